"""Refusing a run that cannot work before anything is trained, with what is wrong and where."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import replace
from math import gcd
from pathlib import Path

from unival.convert.parts import PARTS
from unival.data.records import MEDIUM_OF_KIND
from unival.data.shards import TarShards
from unival.data.tsv import TsvTable
from unival.model.loading import load_model
from unival.tasks import TASKS
from unival.training import scst
from unival.training.batches import open_sources, stage_media
from unival.training.deepspeed_config import deepspeed_config, zero_stage_of
from unival.training.freezing import RULES
from unival.training.options import MicroBatch, Run, Stage, decoding_of
from unival.vocabulary import FIRST_TEXT

CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "batchnorm": ("local", "sync", "frozen", "folded"),
    "compile": ("off", "default", "cuda_graphs"),
    "nonfinite": ("skip", "halt", "rollback"),
}
SPLITS = ("train", "val", "test")
BALANCES = ("balanced", "proportional", "weights")


def check_run(run: Run, world_size: int) -> None:
    """Refuse a run that no step could be made of, on this many ranks.

    Raises:
        ValueError: names the stage and the field, and says what would be right.
    """
    for name, known in CHOICES.items():
        _known(name, getattr(run, name), known)
    if run.deepspeed.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_stage={run.deepspeed.zero_stage}; known: 0, 1, 2, 3")
    if run.text_lengths is not None and (len(run.text_lengths) != 2 or min(run.text_lengths) < 1):
        raise ValueError(f"text_lengths={run.text_lengths}; wanted [source tokens, target tokens]")
    if run.compile == "cuda_graphs" and run.text_lengths is None:
        raise ValueError("compile=cuda_graphs wants text_lengths: graphs are of fixed shapes")
    for name in ("checkpoint_every", "keep", "log_every", "nonfinite_limit", "evaluate_batch"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name}={getattr(run, name)}; wanted at least 1")
    if not run.stages:
        raise ValueError("stages is empty: there is nothing to train")
    for name, source in run.sources.items():
        _known(f"source {name!r}: split", source.split, SPLITS)
    names = [stage.name for stage in run.stages]
    for name in names:
        if names.count(name) > 1 or not name.replace("-", "_").isidentifier():
            raise ValueError(f"stage name {name!r}: wanted one name a stage, of letters and digits")
    for stage in run.stages:
        _check_stage(run, stage, world_size)


def check_data(run: Run) -> dict[str, TsvTable | TarShards]:
    """Open what every stage will need, so that the last one does not fail after days.

    Returns:
        The tables of all sources but those of split test, which no run reads.

    Raises:
        ValueError: a source that is not there or has no rows, or a model or file of weights that is
            not there; names it.
    """
    read = {name: source for name, source in run.sources.items() if source.split != "test"}
    tables = open_sources(replace(run, sources=read))
    for name, table in tables.items():
        if len(table) == 0:
            raise ValueError(f"source {name!r}: {run.sources[name].path} has no rows")
    for stage in run.stages:
        for part, path in stage.weights.items():
            if not Path(path).exists():
                raise ValueError(f"stage {stage.name!r}: weights.{part}: no file {path}")
        if stage.init_from is not None and not _made_by_this_run(run, stage.init_from):
            load_model(stage.init_from)
    return tables


def with_steps(run: Run, tables: Mapping[str, Sized]) -> Run:
    """The run with each stage's `epochs` as `steps`: passes over the sources of its first
    micro-batch, on average where they are several."""
    stages = []
    for stage in run.stages:
        if stage.epochs is not None:
            micro = stage.micro_batches[0]
            records = sum(len(tables[mix.source]) for mix in micro.mixture)
            rows = micro.rows or sum(mix.rows / mix.every for mix in micro.mixture)
            steps = max(1, round(stage.epochs * records / rows))
            stage = replace(stage, steps=steps, epochs=None)
        stages.append(stage)
    return replace(run, stages=stages)


def _made_by_this_run(run: Run, path: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(run.output).resolve())


def _known(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what}={value!r}; known: {', '.join(known)}")


def _check_stage(run: Run, stage: Stage, world_size: int) -> None:
    where = f"stage {stage.name!r}"
    if (stage.steps < 1) == (stage.epochs is None or stage.epochs <= 0) or stage.accumulate < 1:
        raise ValueError(
            f"{where}: wanted steps of at least 1 or epochs above 0, not both, and accumulate of "
            f"at least 1; got steps={stage.steps}, epochs={stage.epochs}, "
            f"accumulate={stage.accumulate}"
        )
    if stage.ema_decay is not None and not 0 < stage.ema_decay < 1:
        raise ValueError(f"{where}: ema_decay={stage.ema_decay}; wanted a number between 0 and 1")
    for part in stage.weights:
        _known(f"{where}: weights of the part", part, PARTS)
    if "text" in stage.weights and run.text_order != "bart":
        raise ValueError(
            f"{where}: weights.text are BART's, whose vocabulary is in BART's order: wanted "
            f"text_order=bart with dict_path, not {run.text_order!r}"
        )
    mixtures = [mix for micro in stage.micro_batches for mix in micro.mixture]
    if stage.adapter is not None and stage.freeze:
        raise ValueError(f"{where}: an adapter is trained alone; wanted no freeze beside it")
    limits = stage.constraint_range
    if limits is not None and (len(limits) != 2 or not FIRST_TEXT <= limits[0] < limits[1]):
        raise ValueError(f"{where}: constraint_range={limits}; wanted [first id, last id + 1]")
    if stage.constrain_answers:
        asked = {task for mix in mixtures for task in mix.tasks or ["any"]}
        constrained = [n for n in asked if n in TASKS and TASKS[n].decoding.constraint == "answers"]
        if len(asked) != 1 or not constrained:
            raise ValueError(
                f"{where}: constrain_answers wants every mixture's `tasks` to name one task that "
                f"answers from a list; they name {', '.join(sorted(asked))}"
            )
    if stage.scst is not None:
        scst.check_stage(run, stage, zero_stage_of(deepspeed_config(run, stage)))
        name = scst.scst_task(stage)
        search = (decoding_of(stage, name), stage_media(run, stage), run.text_lengths)
        scst.check_search(stage.scst, TASKS[name], *search)
    for task in stage.decoding:
        _known(f"{where}: decoding", task, tuple(TASKS))
        decoding_of(stage, task)
    for rule in stage.freeze:
        _known(f"{where}: freeze", rule, tuple(RULES))
    stage_media(run, stage)
    if not stage.micro_batches:
        raise ValueError(f"{where} has no micro_batches")
    for micro in stage.micro_batches:
        _check_micro_batch(run, where, stage, micro, world_size)
    named = set(stage.evaluate) | {task for mix in mixtures for task in mix.tasks}
    for name in sorted(named - TASKS.keys()):
        raise ValueError(f"{where}: unknown task {name!r}; known: {', '.join(TASKS)}")
    if stage.evaluate_every is not None and not stage.evaluate:
        raise ValueError(f"{where}: evaluate_every wants tasks in `evaluate`")
    if stage.evaluate_every is not None and stage.evaluate_every % run.checkpoint_every:
        raise ValueError(
            f"{where}: evaluate_every={stage.evaluate_every} is no multiple of "
            f"checkpoint_every={run.checkpoint_every}: what is measured is a checkpoint"
        )
    if stage.best is not None:
        task, slash, metric = stage.best.partition("/")
        if task not in stage.evaluate or not slash or not metric:
            raise ValueError(f"{where}: best={stage.best!r}; wanted a task of `evaluate`/metric")


def _check_micro_batch(
    run: Run, where: str, stage: Stage, micro: MicroBatch, world_size: int
) -> None:
    if micro.medium not in MEDIUM_OF_KIND.values():
        known = ", ".join(sorted(set(MEDIUM_OF_KIND.values())))
        raise ValueError(f"{where}: medium {micro.medium!r}; known: {known}")
    for mix in micro.mixture:
        if mix.source not in run.sources:
            raise ValueError(f"{where} uses source {mix.source!r}, which `sources` lacks")
        if run.sources[mix.source].split != "train":
            split = run.sources[mix.source].split
            raise ValueError(f"{where} trains on source {mix.source!r}, whose split is {split!r}")
        if mix.rows < 0 or mix.every < 1:
            raise ValueError(
                f"{where}: source {mix.source!r} has rows={mix.rows} and every={mix.every}; wanted "
                "at least 0 and 1"
            )
    if micro.rows is None:
        counts = [mix.rows for mix in micro.mixture]
        if not any(mix.every == 1 and mix.rows > 0 for mix in micro.mixture):
            raise ValueError(
                f"{where}: a micro-batch needs a mixture with rows in every step "
                "(every: 1, rows of at least 1), or rows of its own"
            )
    else:
        if micro.rows < 1 or not micro.mixture:
            raise ValueError(f"{where}: a micro-batch with rows of its own wants one and a mixture")
        counts = [micro.rows]
        _known(f"{where}: balance", micro.balance, BALANCES)
        names = [mix.source for other in stage.micro_batches for mix in other.mixture]
        for mix in micro.mixture:
            if mix.rows or mix.every != 1 or names.count(mix.source) > 1 or mix.weight <= 0:
                raise ValueError(
                    f"{where}: source {mix.source!r} shares the rows of its micro-batch: it has a "
                    "weight above 0, no rows, no every, and is named once in the stage"
                )
    for rows in counts:
        if rows % (world_size * stage.accumulate):
            fits = gcd(*counts) // stage.accumulate
            raise ValueError(
                f"{where}: {rows} rows of medium {micro.medium!r} do not divide into {world_size} "
                f"ranks x {stage.accumulate} passes (accumulate); with these rows the number of "
                f"ranks is a divisor of {fits}"
                if gcd(*counts) % stage.accumulate == 0
                else f"{where}: {rows} rows do not divide into {stage.accumulate} passes"
            )
