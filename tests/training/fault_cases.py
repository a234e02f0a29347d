"""Runs with something wrong in them, as ranks or as a script of the `deepspeed` launcher:

fault_cases.py KIND STEP RANK --config FILE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unival.train import main
from unival.training.engine import Engine

WHERE = "encoder.layers.0.ffn.fc1"


def note_samples(folder: Path) -> None:
    """Write down what every step of this rank was made of, before it is trained on."""
    step = Engine.step

    def noted(self: Engine, batches: list, update: int) -> Any:
        told = [[s["source"], s["id"]] for batch in batches for s in batch.samples]
        with (folder / f"samples-{self.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps([update, told]) + "\n")
        return step(self, batches, update)

    Engine.step = noted


def break_step(kind: str, at: int, rank: int) -> None:
    """At a step of one rank: `nan` in WHERE's output, `grad` in its gradient, `raise`, `die`."""
    run_pass = Engine.run_pass

    def broken(self: Engine, batch: Any, update: int, tracked: bool = True) -> Any:
        if update != at or self.world.rank != rank:
            return run_pass(self, batch, update, tracked)
        if kind == "raise":
            raise ArithmeticError("the sum of a test")
        if kind == "die":
            os.kill(os.getpid(), 9)
        hook = self.model.get_submodule(WHERE).register_forward_hook(spoil, prepend=True)
        try:
            return run_pass(self, batch, update, tracked)
        finally:
            hook.remove()

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if kind == "nan":
            return output * torch.nan
        output.register_hook(lambda gradient: gradient * torch.inf)
        return output

    Engine.run_pass = broken


def train_with_fault(kind: str, at: int, rank: int, arguments: list[str]) -> int:
    break_step(kind, at, rank)
    return main(arguments)


def train_with_one_fault(at: int, rank: int, arguments: list[str]) -> int:
    """A step that is not finite the first time only."""
    run_pass, met = Engine.run_pass, []

    def broken(self: Engine, batch: Any, update: int, tracked: bool = True) -> Any:
        loss, *rest = run_pass(self, batch, update, tracked)
        if update == at and self.world.rank == rank and not met:
            met.append(update)
            loss = loss * torch.nan
        return loss, *rest

    Engine.run_pass = broken
    return main(arguments)


def train_noted(folder: Path, arguments: list[str]) -> int:
    note_samples(folder)
    return main(arguments)


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    sys.exit(train_with_fault(arguments[0], int(arguments[1]), int(arguments[2]), arguments[3:]))
