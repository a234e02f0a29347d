"""The run: stages in order, each trained, checkpointed, logged and handed to the next."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from unival.config import load_config, save_config
from unival.evaluation.runner import Evaluation, evaluate
from unival.model.configuration import UnivalConfig
from unival.model.loading import load_model
from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.batches import BatchMaker, check_run, open_sources, read_answers
from unival.training.checkpoint import ResumeError, StageFolder
from unival.training.engine import Engine, init_distributed, learning_rate
from unival.training.logs import RunLog, memory_gib
from unival.training.options import Run, Stage
from unival.vocabulary import Vocabulary

log = logging.getLogger(__name__)


def make_model(run: Run, previous: Path | None) -> UnivalForConditionalGeneration:
    """The last finished stage's model, else `init_from`, else fresh weights from the run's seed."""
    source = previous or (Path(run.model.init_from) if run.model.init_from else None)
    if source is None:
        torch.manual_seed(run.seed)
        config = UnivalConfig.from_yaml(run.model.config, **run.model.overrides)
        return UnivalForConditionalGeneration(config)
    return load_model(source)


def check_media(run: Run, model: UnivalForConditionalGeneration) -> None:
    """Refuse spectrograms that are not those of the model."""
    asked = (run.media.audio_hop_size, run.media.audio_sample_rate)
    own = (model.config.hop_size, model.config.audio_sample_rate)
    if asked[0] is not None and asked != own:
        raise ValueError(
            f"media.audio_hop_size and audio_sample_rate are {asked}, the model's are {own}; "
            "audio_hop_size=null leaves the spectrogram to the model"
        )


def check_same_run(run: Run, folder: Path) -> None:
    """Refuse to go on in a folder whose run had other stages, data or model (rank 0)."""
    path = folder / "config.yaml"
    if path.is_file():
        before = load_config(Run, path)
        for name in ("stages", "sources", "model", "media", "seed", "precision"):
            if getattr(before, name) != getattr(run, name):
                raise ResumeError(
                    f"{folder}: was begun with another {name!r}; choose another `output`"
                )
    folder.mkdir(parents=True, exist_ok=True)
    save_config(run, path)
    (folder / "command.txt").write_text(shlex.join(sys.orig_argv) + "\n", encoding="utf-8")


def _say_when_done(task: str, done: int, total: int) -> None:
    if done == total:
        log.info("measured %s on %d items", task, total)


def measure(
    run: Run,
    stages: list[Stage],
    model: UnivalForConditionalGeneration,
    vocabulary: Vocabulary,
    folder: Path,
) -> None:
    """Evaluate the stages' tasks and add the result to what `folder` holds already."""
    tables, answers = open_sources(run), read_answers(run)
    found = Evaluation.load(folder) if (folder / "evaluation.json").is_file() else None
    for stage in stages:
        result = evaluate(
            model,
            vocabulary,
            tables,
            stage.evaluate,
            run.media,
            loading=run.loading,
            answers=answers,
            fine_tuned=stage.evaluate if stage.fine_tuning else [],
            batch_size=run.evaluate_batch,
            folder=folder,
            progress=_say_when_done,
        )
        if found is not None:
            result.metrics = found.metrics | result.metrics
            kept = [p for p in found.predictions if p.task not in stage.evaluate]
            result.predictions = kept + result.predictions
        found = result
    if found is not None:
        found.save(folder)


def train(run: Run) -> Path:
    """Train all stages of a run, going on where an earlier process stopped.

    Returns:
        The folder of the final model.

    Raises:
        ValueError, ResumeError: the config, or the run folder, cannot be used.
    """
    check_run(run)
    rank, _ = init_distributed()
    folder = Path(run.output)
    if rank == 0:
        check_same_run(run, folder)
    dist.barrier()
    vocabulary = Vocabulary(run.text_order, run.dict_path)
    run_log = None
    total = sum(stage.steps for stage in run.stages)
    if rank == 0:
        run_log = RunLog(folder, total, run.log_every, run.tensorboard)
    previous, done = None, 0
    for stage in run.stages:
        place = StageFolder(folder, stage.name)
        if not place.finished:
            model = make_model(run, previous)
            check_media(run, model)
            if torch.cuda.is_available():
                model.to(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
            first = not done and not (place.path / "progress.json").is_file()
            if rank == 0 and first and run.evaluate_before:
                measured = [s for s in run.stages if s.evaluate]
                measure(run, measured, model, vocabulary, folder / "evaluation_before")
            dist.barrier()
            train_stage(run, stage, model, vocabulary, place, done, run_log)
            if rank == 0:
                if stage.evaluate:
                    measure(run, [stage], model, vocabulary, folder / "evaluation_after")
                place.finish(model, vocabulary)
            dist.barrier()
        previous, done = place.model, done + stage.steps
    if rank == 0:
        assert run_log is not None and previous is not None
        run_log.close()
    dist.barrier()
    assert previous is not None
    return previous


def train_stage(
    run: Run,
    stage: Stage,
    model: UnivalForConditionalGeneration,
    vocabulary: Vocabulary,
    place: StageFolder,
    steps_before: int,
    run_log: RunLog | None,
) -> None:
    """Train one stage from its last checkpoint to its end."""
    place.path.mkdir(parents=True, exist_ok=True)
    engine = Engine(model, run, stage)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    quarantine = place.path.parents[1] / "quarantine" / f"{stage.name}-rank{rank}.jsonl"
    with BatchMaker(run, stage, vocabulary, rank, world_size, quarantine) as maker:
        start, maker.state = place.restore(engine.deepspeed, maker.state)
        if run_log is not None:
            run_log.begin_stage(steps_before + start)
        _train_steps(run, stage, engine, maker, place, start, steps_before, run_log)


def _train_steps(
    run: Run,
    stage: Stage,
    engine: Engine,
    maker: BatchMaker,
    place: StageFolder,
    start: int,
    steps_before: int,
    run_log: RunLog | None,
) -> None:
    began = time.monotonic()
    for update, (batches, state) in enumerate(maker.steps(start, stage.steps), start=start + 1):
        waited = time.monotonic() - began
        result = engine.step(batches, update)
        seconds = time.monotonic() - began
        began = time.monotonic()
        write = update % run.log_every == 0 or update == stage.steps
        bad = _bad_samples(maker, engine) if write else {}
        if run_log is not None:
            entry = {
                "stage": stage.name,
                "step": update,
                "global_step": steps_before + update,
                "loss": result.loss,
                "tasks": result.task_nll,
                "lr": learning_rate(stage, update),
                "grad_norm": result.grad_norm,
                "samples_per_second": result.samples / seconds,
                "tokens_per_second": result.tokens / seconds,
                "step_seconds": seconds,
                "data_wait": waited / seconds,
                "memory_gib": memory_gib(),
                "bad_samples": bad,
                "samples_seen": update * result.samples,
                "epochs": {
                    name: maker.streams[name].epoch(count) for name, count in state.samples.items()
                },
            }
            run_log.step(entry, write=write)
        if update % run.checkpoint_every == 0 and update < stage.steps:
            place.save(engine.deepspeed, update, run.keep, state)


def _bad_samples(maker: BatchMaker, engine: Engine) -> dict[str, int]:
    """Bad samples of each source so far in the stage, on all ranks."""
    names = sorted(maker.streams)
    counts = torch.tensor(
        [maker.quarantine.bad[name] for name in names], device=engine.deepspeed.device
    )
    dist.all_reduce(counts)
    return dict(zip(names, counts.tolist(), strict=True))
