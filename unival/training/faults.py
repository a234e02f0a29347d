"""What ends a run early: requests to stop, steps that are not finite, ranks that die."""

from __future__ import annotations

import os
import signal
import time
import traceback
from functools import partial
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unival.training.batches import Batch
from unival.training.engine import Engine
from unival.training.zero_state import zero_stage

PREEMPTED = 75  # exit status of a run that was asked to stop and can go on (EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """All ranks have saved after a request to stop; the run goes on when it is started again."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite, and the run's policy is to halt; names the report."""


def on_request() -> Event:
    """An event that SIGTERM and SIGUSR1 set: schedulers send them before they take the machine."""
    asked = Event()

    def handler(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in SIGNALS:
        signal.signal(number, handler)
    return asked


def not_finite(value: Any) -> bool:
    """Whether the tensors in a module's output hold an infinity or NaN."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(value.detach().isfinite().all())
    if isinstance(value, dict):
        return any(not_finite(item) for item in value.values())
    if isinstance(value, tuple | list):
        return any(not_finite(item) for item in value)
    return False


def _largest(value: Any) -> float:
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        return float(value.detach().abs().nan_to_num(nan=0.0, posinf=0.0).max())
    if isinstance(value, dict):
        return max((_largest(item) for item in value.values()), default=0.0)
    if isinstance(value, tuple | list):
        return max((_largest(item) for item in value), default=0.0)
    return 0.0


def diagnose(engine: Engine, batches: list[Batch], update: int) -> list[dict[str, Any]]:
    """Run the passes of a refused step again and find where it stopped being finite.

    The weights and the random numbers are those of the step. Every rank calls it together.

    Returns:
        For each pass of this rank: medium, samples, summed loss, and `first_module`: the first, in
        order of execution, whose output is not finite, with the largest finite magnitudes of its
        input and output. If that module's input was not finite either, what came before it inside
        `inside` made it so. Where all outputs and the loss are finite, `first_gradient` is the
        module, from the loss back, whose output's gradient is the first that is not.
    """
    engine.seed(update)
    engine.set_modes()
    found = []
    for batch in engine.passes(batches, update)[0]:
        watch = _Watch(engine.model)
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled parts would not be watched
                loss = engine.run_pass(batch, update, tracked=False)[0]
        finally:
            watch.remove()
        entry: dict[str, Any] = {
            "medium": batch.medium,
            "loss_sum": float(loss.detach()),
            "first_module": watch.first,
            "samples": batch.samples,
        }
        if watch.first is None and not not_finite(loss):
            entry["first_gradient"] = watch.first_gradient(loss, zero_stage(engine.deepspeed))
        found.append(entry)
    engine.restore_running_statistics()
    return found


class _Watch:
    """Looks at what every module of a forward pass puts out."""

    def __init__(self, model: nn.Module) -> None:
        self.first: dict[str, Any] | None = None
        self.outputs: list[tuple[str, Tensor]] = []
        self._hooks = [
            module.register_forward_hook(partial(self._look, name))
            for name, module in model.named_modules()
            if name
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self.outputs.append((name, output))
        if self.first is None and not_finite(output):
            carried = not_finite(inputs)
            self.first = {
                "module": name,
                "type": type(module).__name__,
                "input_finite": not carried,
                "largest_input": _largest(inputs),
                "largest_output": _largest(output),
            }
            if carried:
                self.first["inside"] = name.rpartition(".")[0]

    def first_gradient(self, loss: Tensor, stage: int) -> str | None:
        """The last module whose output's gradient is not finite; None where all are."""
        if stage == 3:
            return "not looked for under ZeRO stage 3, whose weights are gone by then"
        # Gradients of outputs only: those of the weights would be reduced between the ranks.
        tensors = [tensor for _, tensor in self.outputs]
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        bad = [n for (n, _), g in zip(self.outputs, gradients, strict=True) if not_finite(g)]
        return bad[-1] if bad else None


def write_failure(folder: Path, error: BaseException) -> None:
    """Leave a rank's traceback where the others, and a person, find it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(traceback.format_exception(error))
    (folder / f"rank{os.environ.get('RANK', '0')}.txt").write_text(text, encoding="utf-8")


def failed_first(folder: Path, patience: float = 3.0) -> Path | None:
    """The report of a rank that failed before this one's collective broke; None: it left none."""
    own = f"rank{os.environ.get('RANK', '0')}.txt"
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        others = [path for path in folder.glob("rank*.txt") if path.name != own]
        if others:
            return min(others, key=lambda path: path.stat().st_mtime)
        time.sleep(0.1)
    return None


def broken_collective(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, not that this one did something wrong."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    words = ("connection closed by peer", "connection reset by peer", "gloo", "nccl")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
