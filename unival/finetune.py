"""Fine-tuning on a user's own table of media, texts and answers, by the recipe of its task."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unival.config import load_config, save_config
from unival.data.columns import user_splits
from unival.data.sources import open_table
from unival.evaluate import evaluate_run, join_ranks
from unival.evaluation.report import write_report
from unival.launch import launch
from unival.model.configuration import UnivalConfig
from unival.model.loading import ModelError
from unival.tasks import TASKS
from unival.training.options import ModelOptions, Run, Source
from unival.training.trainer import ENCODERS

CONFIGS = next(
    folder / "configs"
    for folder in (Path(__file__).parent, Path(__file__).parents[1])
    if (folder / "configs").is_dir()
)
PASS_ROWS = {"image": 16, "video": 4, "audio": 8, "text": 8}  # of a rank at once
MEASURES = 10  # during a run


@dataclass(frozen=True)
class UserTask:
    """Which recipe a task is fine-tuned by, and the layout and medium of a user's table."""

    recipe: str
    layout: str
    medium: str


USER_TASKS = {
    "image_caption": UserTask("coco_caption", "caption", "image"),
    "vqa": UserTask("vqav2", "vqa", "image"),
    "grounding": UserTask("refcoco", "refcoco", "image"),
    "visual_entailment": UserTask("snli_ve", "snli_ve", "image"),
    "image_generation": UserTask("coco_image_generation", "image_generation", "image"),
    "video_caption": UserTask("msrvtt_caption", "caption", "video"),
    "video_qa": UserTask("msrvtt_qa", "vqa", "video"),
    "audio_caption": UserTask("audiocaps", "caption", "audio"),
}


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    data        folder with train and, better, val and test, as .csv, .tsv or .jsonl
    checkpoint  folder of a saved model
    answers     a file of candidate answers, one a line: questions are then answered from it
    """

    task: str
    data: Path
    checkpoint: Path
    out: Path
    media_root: Path | None = None
    answers: Path | None = None
    ranks: int = 1


def user_run(request: Request) -> Run:
    """The run: the task's recipe with the user's tables, sized to them.

    Raises:
        ValueError, FileNotFoundError: an unknown task, a table or model that cannot be used.
    """
    if request.task not in USER_TASKS:
        raise ValueError(f"unknown task {request.task!r}; known: {', '.join(USER_TASKS)}")
    task = USER_TASKS[request.task]
    run = load_config(Run, CONFIGS / "finetune" / f"{task.recipe}.yaml")
    root = None if request.media_root is None else str(request.media_root)
    sources = {
        split: Source(str(path), split, task.layout, task.medium, root)
        for split, path in user_splits(request.data).items()
    }
    train = sources["train"]
    count = len(open_table(train.path, train.layout, train.medium, train.media_root))
    if not count:
        raise ValueError(f"{train.path}: no rows")
    stage, shown = run.stages[0], run.stages[0].micro_batches[0]
    rows = max(1, min(shown.mixture[0].rows, count) // request.ranks) * request.ranks
    passes = -(-rows // (request.ranks * PASS_ROWS[shown.medium]))
    rows = rows // (request.ranks * passes) * request.ranks * passes
    epochs = stage.epochs or 10.0
    steps = max(1, round(epochs * count / rows))
    every = max(1, steps // MEASURES)
    mixture = [replace(shown.mixture[0], source="train", rows=rows)]
    listed = request.answers is not None or bool(TASKS[request.task].candidates)
    changed: dict[str, Any] = {
        "init_from": str(request.checkpoint),
        "weights": {},
        "steps": steps,
        "epochs": None,
        "accumulate": passes,
        "micro_batches": [replace(shown, mixture=mixture)],
        "constrain_answers": stage.constrain_answers and listed,
        "evaluate_every": every,
        "best": stage.best if "val" in sources else None,
        "ema_decay": None if stage.ema_decay is None else _decay(stage.ema_decay, steps),
    }
    return replace(
        run,
        output=str(request.out),
        sources=sources,
        answers=None if request.answers is None else str(request.answers),
        stages=[replace(stage, **changed)],
        model=ModelOptions(str(CONFIGS / "model/unival_base.yaml"), _overrides(run, request)),
        checkpoint_every=every,
        precision="bf16" if _has_gpu() else "fp32",
        log_every=max(1, min(run.log_every, steps // 20)),
    )


def _decay(recipe: float, steps: int) -> float:
    """With few steps an average of 0.9999 would be one of the first weights."""
    return min(recipe, 1 - 10 / (steps + 10))


def _overrides(run: Run, request: Request) -> dict[str, Any]:
    """The recipe's, but for the audio encoder where the checkpoint has its own."""
    if not (request.checkpoint / "config.json").is_file():
        raise ModelError(f"{request.checkpoint}: no saved model (config.json) in this folder")
    own = UnivalConfig.from_pretrained(request.checkpoint)
    if own.audio_channels is None:
        return dict(run.model.overrides)
    audio = ENCODERS["audio"]
    return {name: value for name, value in run.model.overrides.items() if name not in audio}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def finetune(request: Request, overrides: Sequence[str] = ()) -> int:
    """Fine-tune, measure on the test table where there is one, and write report.html.

    An interrupted run goes on where it stopped.

    Returns:
        The exit status of the training, 0 when all is done.
    """
    run = user_run(request)
    request.out.mkdir(parents=True, exist_ok=True)
    config = request.out / "finetune.yaml"
    save_config(run, config)
    if "val" not in run.sources:
        print(
            f"{request.data}: no val table: the last model is taken, measured on training rows",
            file=sys.stderr,
        )
    status = launch(request.ranks, ["--config", str(config), *overrides])
    if status:
        return status
    run = load_config(Run, request.out / "config.yaml")
    stage = run.stages[-1]
    model = request.out / "stages" / stage.name / "model"
    if "test" in run.sources:
        out = request.out / "evaluation_test"
        result = evaluate_run(model, run, stage.evaluate, "test", out, join_ranks())
        for name, scores in result.metrics.items():
            told = ", ".join(f"{metric} {value:.4g}" for metric, value in scores.items())
            print(f"test: {name}: {told}")
    print(f"model: {model}")
    print(f"{write_report(request.out)}: open it in a browser")
    return 0
