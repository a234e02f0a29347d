"""Where a run writes what it measures: JSONL, TensorBoard, W&B, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
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


def line(entry: dict[str, Any], total: int, left: float) -> str:
    """One line for a person."""
    tasks = " ".join(f"{name} {value:.3f}" for name, value in entry["tasks"].items())
    parts = " ".join(f"{name} {share:.0%}" for name, share in entry["parts"].items())
    mfu = "" if entry["mfu"] is None else f" ({entry['mfu']:.1%} of peak)"
    scale = "" if entry["loss_scale"] == 1 else f"  scale {entry['loss_scale']:g}"
    refused = f"  refused steps {entry['refused']}" if entry["refused"] else ""
    return (
        f"{entry['stage']} step {entry['step']}  {entry['global_step']}/{total}  "
        f"loss {entry['loss']:.4f} ({tasks})  lr {entry['lr']:.2e}  grad {entry['grad_norm']:.3g}"
        f"{scale}  {entry['samples_per_second']:.1f} samples/s  "
        f"{entry['tokens_per_second']:.0f} tokens/s  {entry['tflops']:.3g} TFLOP/s{mfu}  "
        f"wait {entry['data_wait']:.0%} {parts}  {entry['memory_gib']:.2f} GiB  "
        f"left {clock(left)}{refused}{_bad(entry['bad_samples'])}"
    )


class RunLog:
    """Metrics of rank 0: metrics.jsonl, TensorBoard events, W&B, and progress for a person.

    On a terminal the current step stays on one line; elsewhere every log_every-th step is a line.
    """

    def __init__(
        self, folder: Path, total_steps: int, tensorboard: bool, wandb: str | None = None
    ) -> None:
        self.folder, self.total = folder, total_steps
        _drop_half_a_line(folder / "metrics.jsonl")
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.events, self.wandb = None, None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"))
        if wandb is not None:
            self.wandb = _start_wandb(folder, wandb)
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

    def advance(self, stage: str, step: int, done: int, loss: float) -> None:
        """Move the bar of a terminal on."""
        if self.progress is not None:
            text = f"{stage} {step} loss {loss:.3f}"
            self.progress.update(self.bar, completed=done, description=text)

    def write(self, entry: dict[str, Any]) -> None:
        """What a log interval has measured. NaN is written as null: JSON has no other word."""
        done = entry["global_step"]
        self.file.write(json.dumps(_without_nan(entry)) + "\n")
        self.file.flush()
        numbers = {n: v for n, v in entry.items() if isinstance(v, int | float)}
        scalars = {f"train/{name}": value for name, value in numbers.items()}
        for group in ("tasks", "parts"):
            scalars |= {f"{group}/{name}": value for name, value in entry[group].items()}
        if self.events is not None:
            for name, value in scalars.items():
                self.events.add_scalar(name, value, done)
        if self.wandb is not None:
            self.wandb.log(scalars, step=done)
        if self.progress is None:
            passed = time.monotonic() - self.started
            left = passed / max(done - self.first, 1) * (self.total - done)
            print(line(entry, self.total, left), file=sys.stderr, flush=True)

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.progress is not None:
            self.progress.stop()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return value


def _drop_half_a_line(path: Path) -> None:
    """Cut off what a killed run was writing, so that the next entry starts a line of its own."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _start_wandb(folder: Path, project: str) -> Any:
    """A W&B run that goes on where the folder's earlier one stopped."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb={project!r} wants Weights & Biases: pip install wandb, or wandb=null"
        ) from error
    path = folder / "wandb_id.txt"
    id = path.read_text(encoding="utf-8").strip() if path.is_file() else wandb.util.generate_id()
    path.write_text(id, encoding="utf-8")
    return wandb.init(project=project, id=id, resume="allow", dir=str(folder), name=folder.name)
