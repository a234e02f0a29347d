"""The micro-batches of a step: which records, which examples, and what replaces a bad one."""

from __future__ import annotations

import json
import logging
import random
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from unival.data.batch import MediaOptions, collate, load_media
from unival.data.records import MEDIUM_OF_KIND, Record, RecordError
from unival.data.sampler import RecordStream, positions
from unival.data.shards import TarShards
from unival.data.sources import open_table
from unival.data.tsv import TsvTable
from unival.tasks import TASKS
from unival.tasks.base import Box, Example, TaskContext
from unival.training.options import MicroBatch, Mixture, Run, Stage
from unival.vocabulary import Vocabulary

log = logging.getLogger(__name__)
ATTEMPTS = 16  # substitutes tried for one bad sample


@dataclass(frozen=True)
class Batch:
    """Tensors of a micro-batch, the task of every row, and the weight of its mean loss."""

    tensors: dict[str, Tensor]
    tasks: list[str]
    weight: float
    medium: str


class MediaCache:
    """Decoded media, least recently used first out; only for transforms without chance."""

    def __init__(self, options: MediaOptions, capacity_mb: int) -> None:
        self.options = options
        chance = (
            options.image_transform != "exact"
            or options.video_transform == "random_resized_crop"
            or options.video_indices == "random"
            or options.audio_random
        )
        self.capacity = 0 if chance else capacity_mb * 2**20
        self.size = 0
        self._kept: OrderedDict[tuple[str, object], tuple[Tensor, Box | None]] = OrderedDict()

    def load(self, record: Record, rng: random.Random) -> tuple[Tensor, Box | None]:
        """As load_media, from memory where it has been decoded before."""
        if self.capacity == 0:
            return load_media(record, self.options, rng)
        key = (record.media_key, record.box)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        loaded = load_media(record, self.options, rng)
        self._kept[key] = loaded
        self.size += loaded[0].nbytes
        while self.size > self.capacity:
            _, (dropped, _) = self._kept.popitem(last=False)
            self.size -= dropped.nbytes
        return loaded


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


class BatchMaker:
    """Builds the micro-batches of any step of a stage: a function of (seed, stage, step, rank)."""

    def __init__(
        self, run: Run, stage: Stage, vocabulary: Vocabulary, rank: int, world_size: int
    ) -> None:
        self.run, self.stage, self.vocabulary = run, stage, vocabulary
        self.rank, self.world_size = rank, world_size
        self.context = read_context(run.negatives, stage.fine_tuning)
        self.cache = MediaCache(MediaOptions(**asdict(run.media)), run.media_cache_mb)
        self.bad_samples = 0
        used = {mix.source for micro in stage.micro_batches for mix in micro.mixture}
        for name in sorted(used - run.sources.keys()):
            raise ValueError(f"stage {stage.name!r} uses source {name!r}, which `sources` lacks")
        self.tables = open_sources(replace(run, sources={n: run.sources[n] for n in used}))
        self.streams = {
            name: RecordStream(len(table), run.seed, f"{stage.name}/{name}")
            for name, table in self.tables.items()
        }

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of a step, in the order of the config."""
        return [self._micro_batch(step, micro) for micro in self.stage.micro_batches]

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Steps first..last-1, each prepared while the one before is in use."""
        with ThreadPoolExecutor(max_workers=1) as worker:
            upcoming = worker.submit(self.step, first) if first < last else None
            for step in range(first, last):
                assert upcoming is not None
                batches = upcoming.result()
                if step + 1 < last:
                    upcoming = worker.submit(self.step, step + 1)
                yield batches

    def _micro_batch(self, step: int, micro: MicroBatch) -> Batch:
        examples: list[tuple[Example, int]] = []
        media: list[Tensor] = []
        tasks: list[str] = []
        for mix in micro.mixture:
            if step % mix.every:
                continue
            turn = step // mix.every
            for position in positions(turn, mix.rows, self.rank, self.world_size):
                tensor, made = self._examples(mix, position, micro.medium)
                media.append(tensor)
                examples += [(example, len(media) - 1) for _, example in made]
                tasks += [name for name, _ in made]
        return Batch(collate(examples, media, micro.medium), tasks, micro.weight, micro.medium)

    def _examples(
        self, mix: Mixture, position: int, medium: str
    ) -> tuple[Tensor, list[tuple[str, Example]]]:
        """A row's medium and its examples, or those of a substitute where the row is unusable."""
        stream = self.streams[mix.source]
        for attempt in range(ATTEMPTS):
            index = (
                stream.index(position) if attempt == 0 else stream.substitute(position, attempt - 1)
            )
            try:
                return self._row(mix, index, position, medium)
            except RecordError as error:
                self.bad_samples += 1
                log.warning("skipped: %s (%d so far)", error, self.bad_samples)
                if self.bad_samples > self.run.max_bad_samples:
                    raise RuntimeError(
                        f"more than max_bad_samples={self.run.max_bad_samples} bad samples; "
                        f"the last one: {error}"
                    ) from error
        raise RuntimeError(
            f"source {mix.source!r}: {ATTEMPTS} records in a row are unusable at {position}"
        )

    def _row(
        self, mix: Mixture, index: int, position: int, medium: str
    ) -> tuple[Tensor, list[tuple[str, Example]]]:
        record = self.tables[mix.source][index]
        if record.medium != medium:
            raise RecordError(
                record.origin, "type", f"{record.kind!r} in a micro-batch of medium {medium!r}"
            )
        seed = f"{self.run.seed}/{self.stage.name}/{mix.source}/{position}"
        tensor, box = self.cache.load(record, random.Random(seed))
        made = [
            (
                name,
                task.example(
                    record, self.vocabulary, random.Random(f"{seed}/{name}"), self.context, box
                ),
            )
            for name, task in TASKS.items()
            if record.kind in task.kinds and (not mix.tasks or name in mix.tasks)
        ]
        if not made:
            raise RecordError(
                record.origin, "type", f"no task of {mix.tasks} takes {record.kind!r}"
            )
        return tensor, made


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
