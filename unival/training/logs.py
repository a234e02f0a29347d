"""Where a run writes what it measures: JSONL, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch


def memory_gib() -> float:
    """Peak memory of the device in GiB; on a CPU the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bad(counts: dict[str, int]) -> str:
    """Bad samples of the sources that have some: `  bad: web 3, own 1`."""
    some = [f"{name} {count}" for name, count in counts.items() if count]
    return f"  bad: {', '.join(some)}" if some else ""


class RunLog:
    """Metrics of rank 0: metrics.jsonl, TensorBoard events, and progress for a person.

    On a terminal the current step stays on one line; elsewhere every log_every-th step is a line.
    """

    def __init__(self, folder: Path, total_steps: int, log_every: int, tensorboard: bool) -> None:
        self.folder, self.total, self.log_every = folder, total_steps, log_every
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"))
        self.started, self.first = time.monotonic(), 0
        self.progress = None
        if sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
            )
            self.progress.start()
            self.bar = self.progress.add_task("training", total=total_steps)

    def begin_stage(self, done: int) -> None:
        """Start the estimate anew at a stage: its steps cost something else than those before."""
        self.started, self.first = time.monotonic(), done

    def step(self, entry: dict[str, Any], write: bool) -> None:
        """One training step; written to the files when `write` says so."""
        done = entry["global_step"]
        if self.progress is not None:
            text = f"{entry['stage']} {entry['step']} loss {entry['loss']:.3f}"
            self.progress.update(self.bar, completed=done, description=text)
        if not write:
            return
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in entry.items():
                if isinstance(value, int | float):
                    self.events.add_scalar(f"train/{name}", value, done)
            for name, value in entry["tasks"].items():
                self.events.add_scalar(f"nll/{name}", value, done)
        if self.progress is None:
            passed = time.monotonic() - self.started
            left = passed / max(done - self.first, 1) * (self.total - done)
            print(
                f"{entry['stage']} step {entry['step']}  {done}/{self.total}  "
                f"loss {entry['loss']:.4f}  lr {entry['lr']:.2e}  "
                f"{entry['samples_per_second']:.1f} samples/s  wait {entry['data_wait']:.0%}  "
                f"left {clock(left)}{_bad(entry['bad_samples'])}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()
        if self.progress is not None:
            self.progress.stop()
