"""What a run leaves behind so that it can go on: DeepSpeed checkpoints and finished stages."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unival.data.sampler import LoaderState
from unival.model.modeling import UnivalForConditionalGeneration
from unival.vocabulary import Vocabulary

log = logging.getLogger(__name__)


class ResumeError(RuntimeError):
    """A run folder that does not fit the run: another config or another number of ranks."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one, never half of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(temporary, path)


class StageFolder:
    """The folder of one stage: checkpoints while it runs, a model when it has ended."""

    def __init__(self, run_folder: Path, stage: str) -> None:
        self.path = run_folder / "stages" / stage
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    @property
    def finished(self) -> bool:
        return (self.path / "finished.json").is_file()

    def finish(self, model: UnivalForConditionalGeneration, vocabulary: Vocabulary) -> None:
        """Save the model and then say that the stage has ended (rank 0)."""
        model.save_pretrained(self.model)
        vocabulary.tokenizer.save_pretrained(self.model)
        write_json(self.path / "finished.json", {"model": "model"})
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def save(self, engine: Any, step: int, keep: int, data: LoaderState) -> None:
        """Save a checkpoint of every rank after `step` steps, which consumed the samples that
        `data` counts, and drop all but the newest `keep`."""
        state = {"step": step, "world_size": dist.get_world_size(), "data": asdict(data)}
        engine.save_checkpoint(str(self.checkpoints), tag=f"step{step}", client_state=state)
        if dist.get_rank() == 0:
            write_json(self.path / "progress.json", state)
            for tag in self._tags()[:-keep]:
                shutil.rmtree(self.checkpoints / f"step{tag}")
        dist.barrier()

    def restore(self, engine: Any, fresh: LoaderState) -> tuple[int, LoaderState]:
        """Load the newest complete checkpoint.

        Returns:
            The steps it has seen and the samples consumed by then; 0 and `fresh` without one.

        Raises:
            ResumeError: it was written by another number of ranks.
        """
        progress = self.path / "progress.json"
        if not progress.is_file():
            return 0, fresh
        state = json.loads(progress.read_text(encoding="utf-8"))
        if state["world_size"] != dist.get_world_size():
            raise ResumeError(
                f"{self.checkpoints}: written by {state['world_size']} ranks, resumed by "
                f"{dist.get_world_size()}; start the same number of ranks, or remove the folder"
            )
        engine.load_checkpoint(str(self.checkpoints), tag=f"step{state['step']}")
        log.info("resumed %s after step %d", self.path.name, state["step"])
        return int(state["step"]), LoaderState(**state["data"])

    def _tags(self) -> list[int]:
        found = (re.fullmatch(r"step(\d+)", entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)
