"""What is asked in an evaluation: the records of a task, grouped, with their right answers."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from unival.data.records import Answer, Record, RecordError
from unival.tasks.base import Task, TaskContext
from unival.tasks.matching import YES_NO
from unival.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

DRAWS = 100  # tries to draw a right and a wrong statement about a record


class Table(Protocol):
    """A TsvTable, TarShards or list of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass
class Item:
    """One question to the model. `truth` holds the right answers; `source` its ids if known."""

    record: Record
    truth: list[Answer]
    source: list[int] | None = None


@dataclass
class Catalogue:
    """Where the records of each kind are, and the texts that negatives are drawn from."""

    tables: Mapping[str, Table]
    rows: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, None] = field(default_factory=dict)
    answers: dict[str, None] = field(default_factory=dict)
    unreadable: int = 0

    @classmethod
    def scan(cls, tables: Mapping[str, Table]) -> Catalogue:
        """Read every record once; one that cannot be read is logged and counted."""
        found = cls(tables)
        for name, table in tables.items():
            for index in range(len(table)):
                try:
                    record = table[index]
                except RecordError as error:
                    logger.warning("not evaluated: %s", error)
                    found.unreadable += 1
                    continue
                found.rows[record.kind].append((name, index))
                if record.box is None:
                    found.captions |= dict.fromkeys(record.captions)
                found.answers |= dict.fromkeys(answer.text for answer in record.answers)
        return found

    def records(self, kinds: Iterable[str]) -> Iterable[Record]:
        for kind in kinds:
            for name, index in self.rows[kind]:
                yield self.tables[name][index]

    def context(self) -> TaskContext:
        return TaskContext(
            negative_captions=list(self.captions), answers_by_type={"other": list(self.answers)}
        )


def task_items(
    task: Task, catalogue: Catalogue, vocabulary: Vocabulary, seed: int, limit: int | None
) -> tuple[list[Item], int]:
    """The items of one task, those of one medium after each other, and how many were skipped.

    Raises ValueError when the tables hold no record of the task's kinds.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for number, record in enumerate(catalogue.records(task.kinds)):
        part = record.box if task.metric == "caption" else number
        groups[record.medium, record.media_key, part].append(record)
    if not groups:
        kinds, names = " or ".join(task.kinds), ", ".join(catalogue.tables)
        raise ValueError(f"task {task.name!r}: no record of kind {kinds} in {names or 'no table'}")
    order = {key[:2]: place for place, key in reversed([*enumerate(groups)])}
    chosen = sorted(groups, key=lambda key: (key[0], order[key[:2]]))[:limit]
    if task.candidates == YES_NO:
        records = [groups[key][0] for key in chosen]
        return matching_items(task, records, catalogue, vocabulary, seed)
    items = []
    for key in chosen:
        try:
            items.append(_item(task, groups[key]))
        except RecordError as error:
            logger.warning("not evaluated: %s", error)
    return items, len(chosen) - len(items)


def _item(task: Task, records: list[Record]) -> Item:
    first = records[0]
    if task.metric == "accuracy" and first.answers:
        return Item(first, list(first.answers))
    texts = dict.fromkeys(text for record in records for text in task.references(record))
    return Item(first, [Answer(text) for text in texts])


def matching_items(
    task: Task, records: list[Record], catalogue: Catalogue, vocabulary: Vocabulary, seed: int
) -> tuple[list[Item], int]:
    """A right and a wrong statement about each record, and how many could not be made.

    A wrong one is true of no record with the same medium.
    """
    rng, context = random.Random(seed), catalogue.context()
    readable = [record for record in records if _true_sources(task, record, vocabulary)]
    media = {record.media_key for record in readable}
    true_sources: dict[str, set] = defaultdict(set)
    for record in catalogue.records(task.kinds):
        if record.media_key in media:
            true_sources[record.media_key] |= _true_sources(task, record, vocabulary)
    items: list[Item] = []
    for record in readable:
        wanted = {"yes", "no"}
        for _ in range(DRAWS):
            example = task.example(record, vocabulary, rng, context)
            word = task.answer(example.target, vocabulary)
            is_true = tuple(example.source) in true_sources[record.media_key]
            if word in wanted and (word == "yes" or not is_true):
                wanted.remove(word)
                items.append(Item(record, [Answer(word)], example.source))
            if not wanted:
                break
        if wanted:
            words = " and ".join(sorted(wanted))
            logger.warning("%s: task %s: no %r item found", record.origin, task.name, words)
    return items, 2 * len(records) - len(items)


def _true_sources(task: Task, record: Record, vocabulary: Vocabulary) -> set[tuple[int, ...]]:
    """The right statements about a record in ids; empty, with a warning, if a field is missing."""
    parts = [replace(record, captions=(caption,)) for caption in record.captions] or [record]
    try:
        return {tuple(task.prompt(part, vocabulary)) for part in parts}
    except RecordError as error:
        logger.warning("not evaluated: %s", error)
        return set()
