"""The micro-batches of a step: which records, which examples, and what replaces a bad one."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import random
import typing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from unival.data.batch import collate
from unival.data.media import MediaLoader, MediaOptions
from unival.data.records import Record, RecordError
from unival.data.sampler import LoaderState, RecordStream
from unival.data.shards import TarShards
from unival.data.sources import open_table
from unival.data.tsv import TsvTable
from unival.data_gpu.inspect import inspect_image
from unival.data_gpu.quarantine import Quarantine
from unival.generation.constraints import Trie
from unival.generation.generate import answer_list
from unival.tasks import TASKS
from unival.tasks.base import Box, Example, TaskContext, require
from unival.training.options import MicroBatch, Mixture, Run, Stage
from unival.training.scst import Reference, scst_task
from unival.vocabulary import BOS, IGNORE, Vocabulary

CODES_TASK = "image_generation"  # its decoder writes image codes
FREE = -2  # where a target is not constrained; no state of a trie
ATTEMPTS = 16  # substitutes tried for one bad sample
Examples = list[tuple[str, Example]]  # of one row, with the names of their tasks


@dataclass(frozen=True)
class Batch:
    """One pass: tensors, the task of every row, the weight of the micro-batch's mean loss.

    group    the micro-batch of the config that the pass is a part of
    samples  what it was made of, for a person: source, id, file and row
    references  what the outputs of every row are rewarded by, in self-critical training
    """

    tensors: dict[str, Tensor]
    tasks: list[str]
    weight: float
    medium: str
    group: int = 0
    samples: list[dict[str, str | int]] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)


def read_context(folder: str | None, fine_tuning: bool) -> TaskContext:
    """Negative captions, objects and typed answers of a `negative_sample` folder."""
    if folder is None:
        return TaskContext(fine_tuning=fine_tuning)
    root = Path(folder)

    def lines(name: str) -> list[str]:
        text = (root / name).read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.strip()]

    types = json.loads((root / "type2ans.json").read_text(encoding="utf-8"))
    return TaskContext(lines("all_captions.txt"), lines("object.txt"), types, fine_tuning)


def stage_media(run: Run, stage: Stage) -> MediaOptions:
    """How the media of a stage are prepared."""
    known = {entry.name for entry in fields(MediaOptions)}
    for name in stage.media:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"stage {stage.name!r}: unknown media.{name}; did you mean {near!r}?")
    if not stage.media:
        return run.media
    try:
        merged = OmegaConf.merge(OmegaConf.structured(run.media), stage.media)
        return typing.cast(MediaOptions, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise ValueError(f"stage {stage.name!r}: media.{error.full_key}: {problem}") from error


def open_sources(run: Run) -> dict[str, TsvTable | TarShards]:
    """The tables of all sources of a run."""
    return {
        name: open_table(source.path, source.layout, source.medium, source.media_root)
        for name, source in run.sources.items()
    }


def read_answers(run: Run) -> list[str]:
    """The run's candidate answers; empty where it names no file."""
    return Path(run.answers).read_text(encoding="utf-8").splitlines() if run.answers else []


def answer_trie(run: Run, stage: Stage, vocabulary: Vocabulary) -> Trie | None:
    """The answers that a stage's loss is over; None where it is over the whole vocabulary."""
    if not stage.constrain_answers:
        return None
    task = TASKS[stage.micro_batches[0].mixture[0].tasks[0]]
    choices = answer_list(task, read_answers(run), vocabulary)
    if choices is None:
        raise ValueError(f"stage {stage.name!r}: constrain_answers wants a file `answers`")
    return choices.trie


def answer_states(trie: Trie, examples: Sequence[tuple[Example, int]], labels: Tensor) -> Tensor:
    """The state of the trie at each target, FREE where there is no loss: int64 like `labels`."""
    states = torch.full_like(labels, FREE)
    for row, (example, _) in zip(states, examples, strict=True):
        silent = next(i for i, token in enumerate(example.target) if token != IGNORE)
        path = trie.path([BOS, *example.decoder_input[silent + 1 :]])
        row[silent : silent + len(path)] = torch.tensor(path)
    return states


@dataclass
class Row:
    """One row of a micro-batch: a position in the stream of a source.

    kind   of the record there, as soon as one could be read; substitutes are of the same
    tried  records looked at: the position's own, then its substitutes
    """

    mix: Mixture
    position: int
    kind: str = ""
    tried: int = 0


@dataclass(frozen=True)
class Usable:
    """What a row became: its medium, its examples, and where they are from."""

    medium: Tensor
    examples: Examples
    sample: dict[str, str | int]
    reference: Reference | None = None


class BatchMaker:
    """Builds the micro-batches of a stage, step after step.

    What a step holds follows from (seed, stage, samples consumed) alone: a run that stopped goes on
    with the same samples, whatever the number of ranks is then.

    Args:
        quarantine: a file that lists the samples that cannot be used; None only counts them.
        tables: of the sources, where they are open already.
        trie: of `answer_trie`.
    """

    def __init__(
        self,
        run: Run,
        stage: Stage,
        vocabulary: Vocabulary,
        rank: int,
        world_size: int,
        quarantine: Path | None = None,
        tables: Mapping[str, TsvTable | TarShards] | None = None,
        trie: Trie | None = None,
    ) -> None:
        self.trie = trie
        self.run, self.stage, self.vocabulary = run, stage, vocabulary
        self.rank, self.world_size = rank, world_size
        self.context = read_context(run.negatives, stage.fine_tuning)
        if stage.constrain_answers and (answers := read_answers(run)):
            self.context = replace(self.context, allowed_answers=frozenset(answers))
        self.quarantine = Quarantine(quarantine, run.loading.max_bad_share)
        used = {mix.source for micro in stage.micro_batches for mix in micro.mixture}
        for name in sorted(used - run.sources.keys()):
            raise ValueError(f"stage {stage.name!r} uses source {name!r}, which `sources` lacks")
        if tables is None:
            tables = open_sources(replace(run, sources={n: run.sources[n] for n in used}))
        self.tables = {name: tables[name] for name in used}
        self.streams = {
            name: RecordStream(len(table), run.seed, f"{stage.name}/{name}")
            for name, table in self.tables.items()
        }
        self.state = LoaderState(run.seed)
        self.lengths = None if run.text_lengths is None else tuple(run.text_lengths)
        media = stage_media(run, stage)
        self.loader = MediaLoader(media, run.loading, int(os.environ.get("LOCAL_RANK", "0")))

    def __enter__(self) -> BatchMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding processes."""
        self.loader.close()

    def step(self, step: int) -> list[Batch]:
        """This rank's passes of the next step, in the order of the config. `step` says which of the
        mixtures take part (`every`)."""
        found = []
        for group, micro in enumerate(self.stage.micro_batches):
            rows = self._rows(step, micro)
            for number in range(self.stage.accumulate):
                piece = number * self.world_size + self.rank
                mine = [row for whole in rows for row in self._piece(whole, piece)]
                found.append(self._micro_batch(mine, micro, group))
        return found

    def _rows(self, step: int, micro: MicroBatch) -> list[list[Row]]:
        """The rows of a step of all ranks: a list for each mixture, one of all where they share."""
        if micro.rows is None:
            return [
                [Row(mix, position) for position in self.state.take(mix.source, mix.rows)]
                for mix in micro.mixture
                if step % mix.every == 0
            ]
        mixes = {mix.source: mix for mix in micro.mixture}
        weights = {
            "balanced": lambda mix: 1.0,
            "proportional": lambda mix: float(len(self.tables[mix.source])),
            "weights": lambda mix: mix.weight,
        }[micro.balance]
        shares = {source: weights(mix) for source, mix in mixes.items()}
        shared = self.state.share(micro.rows, shares)
        return [[Row(mixes[source], position) for source, position in shared]]

    def _piece(self, rows: list[Row], piece: int) -> list[Row]:
        """The rows of one rank in one pass. The ranks hold consecutive runs."""
        count = len(rows) // (self.world_size * self.stage.accumulate)
        return rows[piece * count : (piece + 1) * count]

    def steps(self, first: int, last: int) -> Iterator[tuple[list[Batch], LoaderState]]:
        """Steps first..last-1, `prefetch` of them prepared ahead, each with the state to save after
        it has been trained on."""
        ahead: deque[Future[tuple[list[Batch], LoaderState]]] = deque()
        upcoming = iter(range(first, last))
        with ThreadPoolExecutor(max_workers=1) as worker:  # one: the state moves step by step
            for step in itertools.islice(upcoming, self.run.loading.prefetch):
                ahead.append(worker.submit(self._step_and_state, step))
            try:
                while ahead:
                    prepared = ahead.popleft().result()
                    for step in itertools.islice(upcoming, 1):
                        ahead.append(worker.submit(self._step_and_state, step))
                    yield prepared
            finally:
                worker.shutdown(cancel_futures=True)

    def _step_and_state(self, step: int) -> tuple[list[Batch], LoaderState]:
        return self.step(step), self.state.copy()

    def _micro_batch(self, rows: list[Row], micro: MicroBatch, group: int) -> Batch:
        examples: list[tuple[Example, int]] = []
        tasks: list[str] = []
        filled = self._fill(rows, micro.medium)
        for index, usable in enumerate(filled):
            examples += [(example, index) for _, example in usable.examples]
            tasks += [name for name, _ in usable.examples]
        media = [usable.medium for usable in filled]
        tensors = collate(examples, media, micro.medium, lengths=self.lengths)
        codes = [name == CODES_TASK for name in tasks]
        if any(codes):
            tensors["code_mask"] = torch.tensor(codes)
        if self.trie is not None:
            tensors["answer_states"] = answer_states(self.trie, examples, tensors["labels"])
        samples = [usable.sample for usable in filled]
        references = [usable.reference for usable in filled if usable.reference is not None]
        return Batch(tensors, tasks, micro.weight, micro.medium, group, samples, references)

    def _fill(self, rows: Sequence[Row], medium: str) -> list[Usable]:
        """What each row gives, or a substitute where the row is unusable."""
        filled: dict[int, Usable] = {}
        for _ in range(ATTEMPTS):
            missing = {index: row for index, row in enumerate(rows) if index not in filled}
            if not missing:
                break
            filled |= self._attempt(missing, medium)
        for index, row in enumerate(rows):
            if index not in filled:
                raise RuntimeError(
                    f"source {row.mix.source!r}: {ATTEMPTS} records in a row are unusable at "
                    f"{row.position}"
                )
        return [filled[index] for index in range(len(rows))]

    def _attempt(self, rows: Mapping[int, Row], medium: str) -> dict[int, Usable]:
        """What could be used of the rows' next records; the others are quarantined."""
        read: list[tuple[int, Row, Record]] = []
        for index, row in rows.items():
            try:
                read.append((index, row, self._record(row, medium)))
            except RecordError as error:
                self._refuse(row, str(error.origin.row), error)
        loaded = self.loader.load(
            [record for _, _, record in read], [self._seed(row) for _, row, _ in read]
        )
        usable: dict[int, Usable] = {}
        for (index, row, record), medium_of_row in zip(read, loaded, strict=True):
            try:
                if isinstance(medium_of_row, RecordError):
                    raise medium_of_row
                made = self._examples(row, record, medium_of_row.box)
                reference = self._reference(record)
            except RecordError as error:
                self._refuse(row, record.id, error)
                continue
            origin = record.origin
            sample = {
                "source": row.mix.source,
                "id": record.id,
                "file": str(origin.file),
                "row": origin.row,
            }
            usable[index] = Usable(medium_of_row.tensor, made, sample, reference)
            self.quarantine.count(row.mix.source)
        return usable

    def _refuse(self, row: Row, id: str, error: RecordError) -> None:
        self.quarantine.add(
            row.mix.source,
            id=id,
            file=error.origin.file,
            row=error.origin.row,
            field=error.field,
            reason=error.problem,
        )

    def _record(self, row: Row, medium: str) -> Record:
        """The row's own record; after that has failed, the next substitute of its kind."""
        stream, table = self.streams[row.mix.source], self.tables[row.mix.source]
        while True:
            index = (
                stream.substitute(row.position, row.tried - 1)
                if row.tried
                else stream.index(row.position)
            )
            row.tried += 1
            record = table[index]
            if record.medium != medium:
                raise RecordError(
                    record.origin, "type", f"{record.kind!r} in a micro-batch of medium {medium!r}"
                )
            row.kind = row.kind or record.kind
            if record.kind == row.kind:
                return record

    def _seed(self, row: Row) -> str:
        return f"{self.run.seed}/{self.stage.name}/{row.mix.source}/{row.position}"

    def _reference(self, record: Record) -> Reference | None:
        """What an output is rewarded by; None outside of self-critical training."""
        if self.stage.scst is None:
            return None
        if self.stage.scst.reward == "cider_d":
            texts = TASKS[scst_task(self.stage)].references(record)
            worded = tuple(text for text in texts if text.split())
            if not worded:
                raise RecordError(record.origin, "captions", "hold no word")
            return Reference(worded, None, None)
        box = require(record, "box")
        found = inspect_image(record.media, self.run.loading.limits)
        return Reference((), box, (found.width, found.height))

    def _examples(self, row: Row, record: Record, box: Box | None) -> Examples:
        wanted, seed = row.mix.tasks, self._seed(row)
        made = [
            (
                name,
                task.example(
                    record, self.vocabulary, random.Random(f"{seed}/{name}"), self.context, box
                ),
            )
            for name, task in TASKS.items()
            if record.kind in task.kinds and (not wanted or name in wanted)
        ]
        if not made:
            raise RecordError(record.origin, "type", f"no task of {wanted} takes {record.kind!r}")
        return made
