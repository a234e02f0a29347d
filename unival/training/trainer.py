"""The run: stages in order, each trained, checkpointed, logged and handed to the next."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist

from unival.config import load_config, save_config
from unival.convert.parts import initialise
from unival.data.records import RecordError
from unival.data.sampler import LoaderState
from unival.data.shards import TarShards, expand
from unival.data.tsv import TsvTable
from unival.evaluation.runner import Evaluation, evaluate
from unival.files import write_json
from unival.model.configuration import UnivalConfig
from unival.model.loading import load_model, with_config
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.tasks.base import Task
from unival.training import throughput
from unival.training.adapters import add_adapter
from unival.training.batches import (
    Batch,
    BatchMaker,
    answer_trie,
    read_answers,
    stage_media,
)
from unival.training.checkpoint import (
    ResumeError,
    SaveError,
    Saver,
    StageFolder,
    restore,
)
from unival.training.checks import check_data, check_run, with_steps
from unival.training.engine import Engine, StepResult, World, init_distributed
from unival.training.faults import NonFiniteError, Preempted, diagnose, on_request
from unival.training.logs import RunLog, memory_gib
from unival.training.options import Run, Stage, decoding_of, measured_sources
from unival.training.scst import (
    Scst,
    SelfCritical,
    document_frequencies,
    scst_task,
    step_generator,
)
from unival.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Fields of a model's config for each media encoder; the first is None where it has none.
ENCODERS = {
    "image": ("image_layers", "image_channels"),
    "video": ("video_layers", "video_channels", "video_cardinality"),
    "audio": ("audio_channels", "mel_bins", "hop_size", "audio_sample_rate", "audio_dropout"),
}
# What a run that goes on must have in common with the one that began.
SAME = ("stages", "sources", "model", "media", "seed", "precision", "batchnorm", "optimizer")

Tables = Mapping[str, TsvTable | TarShards]


def make_model(run: Run, stage: Stage, previous: Path | None) -> UnivalForConditionalGeneration:
    """The stage's `init_from`, else the model of the stage before, else fresh weights from the
    run's seed; then the stage's weight files.

    A loaded model keeps its own config, but for the run's `model.overrides`. Media encoders that it
    lacks and `model.config` has are added, with fresh weights.
    """
    source = stage.init_from or previous
    torch.manual_seed(run.seed)
    if source is None:
        config = UnivalConfig.from_yaml(run.model.config, **run.model.overrides)
        model = UnivalForConditionalGeneration(config)
    else:
        model = load_model(source)
        before, whole = model.config.to_dict(), UnivalConfig.from_yaml(run.model.config).to_dict()
        added: dict[str, Any] = {}
        for fields in ENCODERS.values():
            if before[fields[0]] is None:
                added |= {name: whole[name] for name in fields}
        after = before | added | run.model.overrides
        if after != before:
            model = with_config(model, UnivalConfig.from_dict(after))
    for part, path in stage.weights.items():
        filled = initialise(model, part, path)
        log.info("%s: %d tensors of %s", stage.name, len(filled), path)
    return model


def make_vocabulary(run: Run) -> Vocabulary:
    """That of the model which the run starts from; where that is none, the config's."""
    start = run.stages[0].init_from
    if start is not None and (Path(start) / "tokenizer.json").is_file():
        return Vocabulary.from_pretrained(start)
    return Vocabulary(run.text_order, run.dict_path)


def check_media(run: Run, stage: Stage, model: UnivalForConditionalGeneration) -> None:
    """Refuse spectrograms that are not those of the model."""
    media = stage_media(run, stage)
    asked = (media.audio_hop_size, media.audio_sample_rate)
    own = (model.config.hop_size, model.config.audio_sample_rate)
    if asked[0] is not None and asked != own:
        raise ValueError(
            f"media.audio_hop_size and audio_sample_rate are {asked}, the model's are {own}; "
            "audio_hop_size=null leaves the spectrogram to the model"
        )


def describe_data(run: Run, tables: Tables) -> dict[str, dict[str, int]]:
    """Records and bytes of every source: what tells one version of a list from another."""
    return {
        name: {
            "records": len(tables[name]),
            "bytes": sum(path.stat().st_size for path in expand(run.sources[name].path)),
        }
        for name in tables
    }


def begin(run: Run, folder: Path, world: World, tables: Tables) -> None:
    """Make the run's folder, or go on in it.

    Raises:
        ResumeError: its run had other stages, data or model.
    """
    path, data = folder / "config.yaml", describe_data(run, tables)
    if path.is_file():
        before = load_config(Run, path)
        for name in SAME:
            if _without_passes(getattr(before, name)) != _without_passes(getattr(run, name)):
                raise ResumeError(
                    f"{folder}: was begun with another {name!r}; choose another `output`"
                )
    if (folder / "data.json").is_file():
        known = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        for name, told in data.items():
            if known.get(name) != told:
                raise ResumeError(
                    f"{folder}: was begun with another list in source {name!r} "
                    f"({run.sources[name].path}): {known.get(name)}, now {told}"
                )
    world.barrier()  # all have read before one writes
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "failures", ignore_errors=True)
        save_config(run, path)
        write_json(folder / "data.json", data)
        (folder / "command.txt").write_text(shlex.join(sys.orig_argv) + "\n", encoding="utf-8")
    world.barrier()


def _without_passes(value: Any) -> Any:
    """A run's stages without `accumulate`, which may change with the number of ranks."""
    if not isinstance(value, list):
        return value
    return [replace(stage, accumulate=1) for stage in value]


def _say_when_done(task: str, done: int, total: int) -> None:
    if done == total:
        log.info("measured %s on %d items", task, total)


def measure(
    run: Run,
    stages: list[Stage],
    model: UnivalForConditionalGeneration,
    vocabulary: Vocabulary,
    folder: Path,
    tables: Tables,
    world: World,
) -> None:
    """Evaluate the stages' tasks on all ranks and add the result to what `folder` holds already."""
    measured, answers = {name: tables[name] for name in measured_sources(run)}, read_answers(run)
    if torch.cuda.is_available():
        model.to("cuda")
    found = Evaluation.load(folder) if (folder / "evaluation.json").is_file() else None
    for stage in stages:
        result = evaluate(
            model,
            vocabulary,
            measured,
            stage.evaluate,
            stage_media(run, stage),
            decoding={task: decoding_of(stage, task) for task in stage.evaluate},
            loading=run.loading,
            answers=answers,
            fine_tuned=stage.evaluate if stage.fine_tuning else [],
            batch_size=run.evaluate_batch,
            folder=folder,
            progress=_say_when_done if world.rank == 0 else None,
            group=world.control,
        )
        if found is not None:
            result.metrics = found.metrics | result.metrics
            kept = [p for p in found.predictions if p.task not in stage.evaluate]
            result.predictions = kept + result.predictions
        found = result
    if found is not None and world.rank == 0:
        found.save(folder)
    world.barrier()


def train(run: Run) -> Path:
    """Train all stages of a run, going on where an earlier process stopped.

    Returns:
        The folder of the final model.

    Raises:
        ValueError, ResumeError: the config, or the run folder, cannot be used.
        Preempted: SIGTERM or SIGUSR1 came; everything is saved.
        NonFiniteError: a loss or gradient was not finite, under the policy to halt.
        SaveError: a checkpoint could not be written.
    """
    asked = on_request()
    world = init_distributed()
    check_run(run, world.size)
    tables = check_data(run)
    run = with_steps(run, tables)
    folder = Path(run.output)
    begin(run, folder, world, tables)
    vocabulary = make_vocabulary(run)
    run_log = None
    if world.rank == 0:
        total = sum(stage.steps for stage in run.stages)
        run_log = RunLog(folder, total, run.tensorboard, run.wandb)
        log.info("TFLOP/s and MFU: %s", throughput.FORMULA)
    previous, done = None, 0
    for stage in run.stages:
        place = StageFolder(folder, stage.name)
        if not place.finished:
            model = make_model(run, stage, previous)
            check_media(run, stage, model)
            begun = place.begun
            world.barrier()  # all have looked before one clears
            if world.rank == 0:
                place.clear_unfinished()
            world.barrier()
            if not done and not begun and run.evaluate_before:
                before = [s for s in run.stages if s.evaluate]
                out = folder / "evaluation_before"
                measure(run, before, model, vocabulary, out, tables, world)
            if stage.adapter is not None:
                torch.manual_seed(run.seed)  # measuring may have used random numbers
                add_adapter(model, stage.adapter, vocabulary)
            shared = Shared(run, vocabulary, world, tables, asked, run_log)
            StageRun(shared, stage, model, place, done).train()
            chosen = place.latest()
            assert chosen is not None
            if stage.best is not None:
                out = chosen / "evaluation"
                measure(run, [stage], _to_measure(chosen), vocabulary, out, tables, world)
                chosen = place.best(stage.best)
                if chosen is None:
                    raise ValueError(f"stage {stage.name!r}: no measure has {stage.best!r}")
                log.info("stage %s: the best by %s is %s", stage.name, stage.best, chosen.name)
            if stage.evaluate:
                out = folder / "evaluation_after"
                measure(run, [stage], _to_measure(chosen), vocabulary, out, tables, world)
            if world.rank == 0:
                place.finish(chosen)
            world.barrier()
        previous, done = place.model, done + stage.steps
    if run_log is not None:
        run_log.close()
    world.barrier()
    assert previous is not None
    return previous


def _to_measure(checkpoint: Path) -> UnivalForConditionalGeneration:
    """The exported model of a checkpoint: the average of the weights where there is one."""
    averaged = checkpoint / "model_ema"
    return load_model(averaged if averaged.is_dir() else checkpoint / "model")


@dataclass(frozen=True)
class Shared:
    """What all stages of a run have in common. `log` is rank 0's."""

    run: Run
    vocabulary: Vocabulary
    world: World
    tables: Tables
    asked: Event
    log: RunLog | None


def _captions(task: Task, tables: Sequence[TsvTable | TarShards]) -> Iterator[list[str]]:
    """The captions of each medium of some tables; what cannot be read is met in training."""
    for table in tables:
        for index in range(len(table)):
            with suppress(RecordError):
                worded = [text for text in task.references(table[index]) if text.split()]
                if worded:
                    yield worded


class StageRun:
    """One stage from its last checkpoint to its end."""

    def __init__(
        self,
        shared: Shared,
        stage: Stage,
        model: UnivalForConditionalGeneration,
        place: StageFolder,
        steps_before: int,
    ) -> None:
        self.run, self.vocabulary, self.world = shared.run, shared.vocabulary, shared.world
        self.tables, self.asked, self.log = shared.tables, shared.asked, shared.log
        self.stage, self.place = stage, place
        self.steps_before = steps_before
        self.folder = place.path.parents[1]
        self.trie = answer_trie(self.run, stage, self.vocabulary)
        self.engine = Engine(model, self.run, stage, self.world, self.trie)
        self.critic = None if stage.scst is None else self._critic(stage.scst)
        self.saver = Saver(self.engine, place, self.vocabulary, self.run.keep, self.run.keep_best)
        self.refused_in_row = self.refused = self.rollbacks = 0
        self._saved = -1  # the step of the last checkpoint
        self.interval = Interval()

    def train(self) -> None:
        """Train until the last step, a request to stop, or a fault that ends the run."""
        rank, size = self.world.rank, self.world.size
        quarantine = self.folder / "quarantine" / f"{self.stage.name}-rank{rank}.jsonl"
        try:
            with BatchMaker(
                self.run,
                self.stage,
                self.vocabulary,
                rank,
                size,
                quarantine,
                self.tables,
                self.trie,
            ) as maker:
                found = restore(self.engine, self.place, self.saver)
                done = 0
                if found is not None:
                    done, maker.state = found
                    self._saved = done
                if self.log is not None:
                    self.log.begin_stage(self.steps_before + done)
                while done < self.stage.steps:
                    done, maker.state = self._steps(maker, done)
                if self._saved != done:
                    self.saver.save(done, maker.state)
            self.saver.wait()
            self.world.barrier()  # the checkpoint is whole when rank 0 has passed
        except BaseException:
            self.saver.abandon()
            raise

    def _steps(self, maker: BatchMaker, done: int) -> tuple[int, LoaderState]:
        """Train until the stage's end or a rollback; returns where the stage is then."""
        state = maker.state
        began = time.monotonic()
        for update, (batches, state) in enumerate(
            maker.steps(done, self.stage.steps), start=done + 1
        ):
            waited = time.monotonic() - began
            batches = self._rewritten(batches, update)
            self.engine.request(stop=self.asked.is_set(), failed=self.saver.failed)
            result = self.engine.step(batches, update)
            if result.failed:
                self.saver.wait()
                raise SaveError("another rank could not write its checkpoint; its message says why")
            if not result.finite and not result.scaling and self._refused(batches, update):
                return self._roll_back(), state
            if result.finite:
                self.refused_in_row = 0
            self.interval.add(result, waited, time.monotonic() - began, batches)
            if update % self.run.log_every == 0 or update == self.stage.steps:
                self._write(maker, update, state)
            elif self.log is not None:
                done_all = self.steps_before + update
                self.log.advance(self.stage.name, update, done_all, result.loss)
            self._save_if_due(update, state, result.stop)
            began = time.monotonic()
        return self.stage.steps, state

    def _critic(self, options: Scst) -> SelfCritical:
        stage, name = self.stage, scst_task(self.stage)
        frequencies = None
        if options.reward == "cider_d":
            used = {mix.source for micro in stage.micro_batches for mix in micro.mixture}
            captions = _captions(TASKS[name], [self.tables[source] for source in sorted(used)])
            frequencies = document_frequencies(options, captions)
        return SelfCritical(
            options,
            TASKS[name],
            self.vocabulary,
            decoding_of(stage, name),
            stage_media(self.run, stage),
            self.run.text_lengths,
            frequencies,
        )

    def _rewritten(self, batches: list[Batch], update: int) -> list[Batch]:
        """In self-critical training the model's own outputs, weighted by their rewards."""
        if self.critic is None:
            return batches
        engine, rank = self.engine, self.world.rank
        generator = step_generator(self.run.seed, self.stage.name, update, rank, engine.device)
        found = []
        with engine.clock.part("outputs"):
            for batch in batches:
                rewritten, measured = self.critic.rewrite(
                    engine.model, batch, batch.references, generator
                )
                found.append(rewritten)
                self.interval.rewarded(measured)
        return found

    def _save_if_due(self, update: int, state: LoaderState, stop: bool) -> None:
        if stop or (update % self.run.checkpoint_every == 0 and update < self.stage.steps):
            with self.engine.clock.part("save"):
                self.saver.save(update, state)
            self._saved = update
        if stop:
            self.saver.wait()
            self.world.barrier()
            raise Preempted(f"stage {self.stage.name} after step {update}")
        every = self.stage.evaluate_every
        if every is not None and update % every == 0 and update < self.stage.steps:
            self._evaluate(update)

    def _evaluate(self, update: int) -> None:
        """Measure the checkpoint of this step, and keep it if it is the best."""
        self.saver.wait()
        self.world.barrier()  # the checkpoint is whole
        path = self.place.at(update)
        out = path / "evaluation"
        model = _to_measure(path)
        measure(self.run, [self.stage], model, self.vocabulary, out, self.tables, self.world)
        if self.world.rank == 0:
            self.place.prune(self.run.keep, self.run.keep_best, self.stage.best)
        self.world.barrier()

    def _refused(self, batches: list[Batch], update: int) -> bool:
        """Report a step that was not finite; whether to roll back. Raises where the run halts."""
        self.refused += 1
        self.refused_in_row += 1
        found = diagnose(self.engine, batches, update)
        path = self.folder / "nonfinite"
        path /= f"{self.stage.name}-step{update:06d}-rank{self.world.rank}.json"
        bad = [e for e in found if e["first_module"] or e.get("first_gradient")]
        policy = self.run.nonfinite
        if bad or self.world.rank == 0:
            path.parent.mkdir(exist_ok=True)
            told = {"stage": self.stage.name, "step": update, "rank": self.world.rank}
            write_json(path, told | {"policy": policy, "passes": found})
        for entry in bad:
            module = entry["first_module"] or {"module": entry["first_gradient"]}
            log.warning(
                "step %d is not finite: %s of medium %s; %s: %s",
                update,
                module["module"],
                entry["medium"],
                policy,
                path,
            )
        self.saver.wait()  # no checkpoint in flight is lost,
        self.world.barrier()  # and every rank's report is there before one ends the run
        limit = self.run.nonfinite_limit
        many = self.refused_in_row > limit if policy == "skip" else self.rollbacks >= limit
        if policy == "halt" or many:
            after = "" if policy == "halt" else f" (nonfinite_limit={limit})"
            raise NonFiniteError(
                f"stage {self.stage.name}: the loss or a gradient of step {update} is not finite"
                f"{after}; {path.parent} says where; no weights were changed by it"
            )
        return policy == "rollback"

    def _roll_back(self) -> int:
        """Go back to the last checkpoint's weights; the samples go on."""
        self.saver.wait()
        self.world.barrier()
        self.rollbacks += 1
        found = restore(self.engine, self.place, self.saver)
        if found is None:
            raise NonFiniteError(
                f"stage {self.stage.name}: there is no checkpoint yet to roll back to"
            )
        return found[0]

    def _write(self, maker: BatchMaker, update: int, state: LoaderState) -> None:
        """Write down what the steps since the last time have measured; all ranks call it."""
        bad = self._bad_samples(maker)
        measured = self.interval.read(self.engine)
        if self.log is None:
            return
        epochs = {name: maker.streams[name].epoch(count) for name, count in state.samples.items()}
        self.log.write(
            {
                "stage": self.stage.name,
                "step": update,
                "global_step": self.steps_before + update,
                "lr": self.engine.lr,
                "loss_scale": self.engine.loss_scale,
                "memory_gib": memory_gib(),
                "bad_samples": bad,
                "refused": self.refused,
                "rollbacks": self.rollbacks,
                "epochs": epochs,
                **measured,
            }
        )

    def _bad_samples(self, maker: BatchMaker) -> dict[str, int]:
        """Bad samples of each source so far in the stage, on all ranks."""
        names = sorted(maker.streams)
        counts = torch.tensor([maker.quarantine.bad[name] for name in names])
        dist.all_reduce(counts, group=self.world.control)
        return dict(zip(names, counts.tolist(), strict=True))


class Interval:
    """Sums over the steps between two entries of the log."""

    def __init__(self) -> None:
        self.samples_seen = 0
        self._clear()

    def _clear(self) -> None:
        self.steps = self.updates = 0
        self.loss = self.waited = self.seconds = self.flops = 0.0
        self.samples = self.tokens = 0
        self.tasks: dict[str, list[float]] = defaultdict(list)
        self.rewards: dict[str, list[float]] = defaultdict(list)
        self.grad_norm = float("nan")

    def rewarded(self, measured: Mapping[str, float]) -> None:
        """Take in what one pass of self-critical training measured on this rank."""
        for name, value in measured.items():
            self.rewards[name].append(value)

    def add(self, result: StepResult, waited: float, seconds: float, batches: list[Batch]) -> None:
        """Take in a step; a refused one has no loss to average."""
        self.steps += 1
        self.waited += waited
        self.seconds += seconds
        self.samples += result.samples
        self.samples_seen += result.samples
        self.tokens += result.tokens
        self.batches = batches
        if result.finite:
            self.updates += 1
            self.loss += result.loss
            self.grad_norm = result.grad_norm
            for name, value in result.task_nll.items():
                self.tasks[name].append(value)

    def read(self, engine: Engine) -> dict[str, Any]:
        """Means and rates since the last reading. Operations are counted on the last step's
        shapes; TFLOP/s and MFU are of one rank's device."""
        flops = throughput.step_flops(engine.model.config, self.batches)
        rate = flops * self.steps / self.seconds
        peak = throughput.peak_flops(engine.device, engine.precision)
        parts = engine.clock.read()
        found = {
            "loss": self.loss / self.updates if self.updates else float("nan"),
            "tasks": {name: sum(v) / len(v) for name, v in self.tasks.items()},
            "rewards": {name: sum(v) / len(v) for name, v in self.rewards.items()},
            "grad_norm": self.grad_norm,
            "samples_per_second": self.samples / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "tflops": rate / 1e12,
            "mfu": None if peak is None else rate / peak,
            "step_seconds": self.seconds / self.steps,
            "data_wait": self.waited / self.seconds,
            "parts": {name: seconds / self.seconds for name, seconds in parts.items()},
            "samples_seen": self.samples_seen,
        }
        self._clear()
        return found
