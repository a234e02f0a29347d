"""Which record comes next: one seeded order for the whole world, whose state is a count."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass
class LoaderState:
    """How far a run has come in its data: all that is needed to go on with the sample that comes
    next, with any number of ranks.

    `samples` counts, for each source, those that all ranks together have consumed.
    """

    seed: int
    samples: dict[str, int] = field(default_factory=dict)

    def take(self, source: str, rows: int) -> range:
        """Consume the next rows of a source: their positions in its stream."""
        if rows < 0:
            raise ValueError(f"{rows} rows of {source!r}")
        first = self.samples.get(source, 0)
        self.samples[source] = first + rows
        return range(first, first + rows)

    def share(self, rows: int, weights: dict[str, float]) -> list[tuple[str, int]]:
        """Consume rows of several sources, each as often as its weight says: (source, position).

        Every row comes from the source that lags furthest behind its share of all rows so far, so
        that the counts are never more than a row per source away from it.
        """
        whole = sum(weights.values())
        taken = sum(self.samples.get(source, 0) for source in weights)
        found = []
        for number in range(taken + 1, taken + rows + 1):
            lag = {s: w / whole * number - self.samples.get(s, 0) for s, w in weights.items()}
            source = max(lag, key=lambda name: lag[name])
            found.append((source, self.take(source, 1).start))
        return found

    def copy(self) -> LoaderState:
        return LoaderState(self.seed, dict(self.samples))


class RecordStream:
    """An endless order of the records 0..length-1: every epoch is a new permutation of them.

    The permutation of an epoch follows from (seed, name, epoch) alone. It sorts raw Philox words,
    a stream that numpy keeps from version to version (which `Generator.permutation` is not sure
    to), so that a run resumes alike after an upgrade. The current epoch's permutation is kept:
    8 bytes a record.
    """

    def __init__(self, table_len: int, seed: int, name: str) -> None:
        if table_len < 1:
            raise ValueError(f"stream {name!r}: the table has no records")
        self.length = table_len
        self.seed = seed
        self.name = name
        self._current: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def index(self, position: int) -> int:
        """The record at a position of the stream, counted from 0 over all epochs and ranks."""
        if position < 0:
            raise ValueError(f"stream {self.name!r}: position {position} is negative")
        epoch, place = divmod(position, self.length)
        return int(self._permutation(epoch)[place])

    def epoch(self, samples: int) -> float:
        """Epochs in `samples` samples of the stream."""
        return samples / self.length

    def substitute(self, position: int, attempt: int) -> int:
        """Another record for a position whose own cannot be decoded; attempts count from 0.

        The first length - 1 attempts name different records, none of them the position's own.

        Raises:
            ValueError: there is no further record.
        """
        others = self.length - 1
        if not 0 <= attempt < others:
            raise ValueError(f"stream {self.name!r}: no substitute {attempt} of {others}")
        shift = 1 + (self._number("substitute", position) + attempt) % others
        epoch, place = divmod(position, self.length)
        return int(self._permutation(epoch)[(place + shift) % self.length])

    def _permutation(self, epoch: int) -> np.ndarray:
        known, order = self._current  # one attribute, so that threads never see half a change
        if epoch != known:
            words = np.random.Philox(key=self._number("epoch", epoch)).random_raw(self.length)
            order = np.argsort(words, kind="stable")
            self._current = (epoch, order)
        return order

    def _number(self, purpose: str, count: int) -> int:
        """128 bits that depend on every argument, as Python's own hash would not repeatably."""
        text = f"{self.seed}\0{self.name}\0{purpose}\0{count}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
