"""Measuring a saved model, on one process or several: `deepspeed --module unival.evaluate ...`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unival.config import ConfigError, load_config
from unival.training.options import Run, Stage, decoding_of, measured_sources

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from unival.evaluation.runner import Evaluation


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that measure together; `group` is None for one."""

    rank: int
    device: str
    group: ProcessGroup | None


def join_ranks() -> Ranks:
    """The processes that a launcher started, or this one alone."""
    import torch

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(0, device, None)
    from unival.training.engine import init_distributed

    world = init_distributed()
    return Ranks(world.rank, device, world.control)


def run_of(model: Path, config: Path | None) -> Run:
    """The run config beside a model: it says how the model's media are prepared."""
    if config is None:
        candidates = [folder / "config.yaml" for folder in model.resolve().parents]
        config = next((c for c in candidates if c.is_file()), None)
    if config is None:
        raise ConfigError(f"{model}: no config.yaml above it; name the run with --config")
    return load_config(Run, config, [])


def stage_for(run: Run, task: str) -> Stage:
    """The last stage that measures a task, else the run's last: how it is asked and searched."""
    measuring = [stage for stage in run.stages if task in stage.evaluate]
    return (measuring or run.stages)[-1]


def evaluate_run(
    model_folder: Path,
    run: Run,
    tasks: Sequence[str],
    split: str | None,
    out: Path | None,
    ranks: Ranks,
) -> Evaluation:
    """Measure tasks of a run's model on the run's sources.

    Args:
        tasks: each asked and searched as its stage says.
        split: of the sources; None takes val, or train where a run has no val.
        out: folder for evaluation.json and pictures (rank 0).

    Raises:
        ValueError: the run has no source of that split, or a task is unknown.
    """
    from unival.evaluation.runner import Evaluation, evaluate
    from unival.model.loading import load_model
    from unival.tasks import TASKS
    from unival.training.batches import open_sources, read_answers, stage_media
    from unival.vocabulary import Vocabulary

    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    names = [n for n, source in run.sources.items() if source.split == split]
    if split is not None and not names:
        splits = sorted({source.split for source in run.sources.values()})
        raise ValueError(f"no source of split {split!r}; the run has {', '.join(splits)}")
    model = load_model(model_folder).eval().to(ranks.device)
    vocabulary = Vocabulary.from_pretrained(model_folder)
    chosen = names or measured_sources(run)
    tables = {name: table for name, table in open_sources(run).items() if name in chosen}
    whole = Evaluation()
    for task in tasks:
        stage = stage_for(run, task)
        result = evaluate(
            model,
            vocabulary,
            tables,
            [task],
            stage_media(run, stage),
            loading=run.loading,
            answers=read_answers(run),
            decoding={task: decoding_of(stage, task)},
            fine_tuned=[task] if stage.fine_tuning else [],
            batch_size=run.evaluate_batch,
            folder=out,
            group=ranks.group,
        )
        whole.metrics |= result.metrics
        whole.predictions += result.predictions
    if out is not None and ranks.rank == 0:
        whole.save(out)
    return whole


def all_caption_scores(result: Evaluation) -> dict[str, dict[str, Any]]:
    """By task, the scores of the COCO evaluation of its captions, and what is missing of them."""
    from unival.evaluation.caption import coco_caption_scores
    from unival.tasks import TASKS

    found = {}
    for task in result.metrics:
        said = [p for p in result.predictions if p.task == task]
        if task in TASKS and TASKS[task].metric == "caption" and said:
            texts = {str(number): p.answer for number, p in enumerate(said)}
            truth = {str(number): p.references for number, p in enumerate(said)}
            found[task] = asdict(coco_caption_scores(texts, truth))
    return found


def parser() -> argparse.ArgumentParser:
    """The options of `unival evaluate`."""
    options = argparse.ArgumentParser(prog="unival evaluate", description=__doc__)
    options.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    options.add_argument("--config", type=Path, help="the run's config; else the one above --model")
    options.add_argument("--tasks", nargs="+", required=True)
    options.add_argument("--split", choices=["train", "val", "test"], help="else what was measured")
    options.add_argument("--out", type=Path, help="folder for evaluation.json and pictures")
    options.add_argument(
        "--all-metrics", action="store_true", help="of captions METEOR, SPICE and COCO's tokens too"
    )
    options.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return options


DEFAULT_MODEL = Path("runs/demo/stages/image_video_text/model")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; rank 0 prints the scores. Returns the exit status: 2 where the input is unusable."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        run = run_of(arguments.model, arguments.config)
        ranks = join_ranks()
        result = evaluate_run(
            arguments.model, run, arguments.tasks, arguments.split, arguments.out, ranks
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"unival evaluate: {error}", file=sys.stderr)
        return 2
    if ranks.rank == 0:
        print(json.dumps(result.metrics, indent=2))
        if arguments.all_metrics:
            print(json.dumps(all_caption_scores(result), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
