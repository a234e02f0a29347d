"""The micro-batches of a step: which records, which examples, and what replaces a bad one."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from unival.data.batch import collate
from unival.data.media import MediaLoader
from unival.data.records import MEDIUM_OF_KIND, Record, RecordError
from unival.data.sampler import LoaderState, RecordStream
from unival.data.shards import TarShards
from unival.data.sources import open_table
from unival.data.tsv import TsvTable
from unival.data_gpu.quarantine import Quarantine
from unival.tasks import TASKS
from unival.tasks.base import Box, Example, TaskContext
from unival.training.options import MicroBatch, Mixture, Run, Stage
from unival.vocabulary import Vocabulary

ATTEMPTS = 16  # substitutes tried for one bad sample
Examples = list[tuple[str, Example]]  # of one row, with the names of their tasks


@dataclass(frozen=True)
class Batch:
    """Tensors of a micro-batch, the task of every row, and the weight of its mean loss."""

    tensors: dict[str, Tensor]
    tasks: list[str]
    weight: float
    medium: str


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


def open_sources(run: Run) -> dict[str, TsvTable | TarShards]:
    """The tables of all sources of a run."""
    return {
        name: open_table(source.path, source.layout, source.medium, source.media_root)
        for name, source in run.sources.items()
    }


def read_answers(run: Run) -> list[str]:
    """The run's candidate answers; empty where it names no file."""
    return Path(run.answers).read_text(encoding="utf-8").splitlines() if run.answers else []


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


class BatchMaker:
    """Builds the micro-batches of a stage, step after step.

    What a step holds follows from (seed, stage, samples consumed) alone: a run that stopped goes on
    with the same samples, whatever the number of ranks is then.

    Args:
        quarantine: a file that lists the samples that cannot be used; None only counts them.
    """

    def __init__(
        self,
        run: Run,
        stage: Stage,
        vocabulary: Vocabulary,
        rank: int,
        world_size: int,
        quarantine: Path | None = None,
    ) -> None:
        self.run, self.stage, self.vocabulary = run, stage, vocabulary
        self.rank, self.world_size = rank, world_size
        self.context = read_context(run.negatives, stage.fine_tuning)
        self.quarantine = Quarantine(quarantine, run.loading.max_bad_share)
        used = {mix.source for micro in stage.micro_batches for mix in micro.mixture}
        for name in sorted(used - run.sources.keys()):
            raise ValueError(f"stage {stage.name!r} uses source {name!r}, which `sources` lacks")
        self.tables = open_sources(replace(run, sources={n: run.sources[n] for n in used}))
        self.streams = {
            name: RecordStream(len(table), run.seed, f"{stage.name}/{name}")
            for name, table in self.tables.items()
        }
        self.state = LoaderState(run.seed)
        self.loader = MediaLoader(run.media, run.loading, int(os.environ.get("LOCAL_RANK", "0")))

    def __enter__(self) -> BatchMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding processes."""
        self.loader.close()

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of the next step, in the order of the config. `step` says which of the
        mixtures take part (`every`)."""
        return [self._micro_batch(step, micro) for micro in self.stage.micro_batches]

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

    def _micro_batch(self, step: int, micro: MicroBatch) -> Batch:
        rows = [
            Row(mix, position)
            for mix in micro.mixture
            if step % mix.every == 0
            for position in self.state.take(mix.source, mix.rows, self.rank, self.world_size)
        ]
        examples: list[tuple[Example, int]] = []
        tasks: list[str] = []
        filled = self._fill(rows, micro.medium)
        for index, (_, made) in enumerate(filled):
            examples += [(example, index) for _, example in made]
            tasks += [name for name, _ in made]
        media = [tensor for tensor, _ in filled]
        return Batch(collate(examples, media, micro.medium), tasks, micro.weight, micro.medium)

    def _fill(self, rows: Sequence[Row], medium: str) -> list[tuple[Tensor, Examples]]:
        """Each row's medium and examples, or those of a substitute where the row is unusable."""
        filled: dict[int, tuple[Tensor, Examples]] = {}
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

    def _attempt(self, rows: Mapping[int, Row], medium: str) -> dict[int, tuple[Tensor, Examples]]:
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
        usable: dict[int, tuple[Tensor, Examples]] = {}
        for (index, row, record), medium_of_row in zip(read, loaded, strict=True):
            try:
                if isinstance(medium_of_row, RecordError):
                    raise medium_of_row
                made = self._examples(row, record, medium_of_row.box)
            except RecordError as error:
                self._refuse(row, record.id, error)
                continue
            usable[index] = (medium_of_row.tensor, made)
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


def check_run(run: Run) -> None:
    """Refuse what no step could be made of: unknown tasks or media, micro-batches without rows.

    Raises:
        ValueError: names the stage and what would be right.
    """
    for stage in run.stages:
        named = set(stage.evaluate)
        if not stage.micro_batches:
            raise ValueError(f"stage {stage.name!r} has no micro_batches")
        for micro in stage.micro_batches:
            named |= {task for mix in micro.mixture for task in mix.tasks}
            if micro.medium not in MEDIUM_OF_KIND.values():
                known = ", ".join(sorted(set(MEDIUM_OF_KIND.values())))
                raise ValueError(f"stage {stage.name!r}: medium {micro.medium!r}; known: {known}")
            if not any(mix.every == 1 and mix.rows > 0 for mix in micro.mixture):
                raise ValueError(
                    f"stage {stage.name!r}: a micro-batch needs a mixture with rows in every step "
                    "(every: 1, rows of at least 1)"
                )
        for name in sorted(named - TASKS.keys()):
            raise ValueError(
                f"stage {stage.name!r}: unknown task {name!r}; known: {', '.join(TASKS)}"
            )
