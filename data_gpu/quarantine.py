"""Samples that cannot be used: written down, counted, and too many of them refused."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

log = logging.getLogger(__name__)
FLOOR = 200  # samples of a source below which its share of bad ones says little


class TooManyBadSamples(RuntimeError):
    """A source's bad share passed the cap."""


class Quarantine:
    """The bad samples of one process.

    Args:
        path: JSON lines are added here, one for each bad sample: id, source, file, row, field,
            reason. Those of a run that goes on stay. None only counts.
        max_share: bad samples of a source among those read from it, from 0 to 1. Until FLOOR have
            been read, the share is counted as if they had.
    """

    def __init__(self, path: Path | None, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_share={max_share}; a share lies between 0 and 1")
        self.path, self.max_share = path, max_share
        self.seen: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self._written: set[tuple[str, str]] = set()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._written = _listed(path)

    def count(self, source: str) -> None:
        """A sample of the source was used."""
        self.seen[source] += 1

    def add(
        self, source: str, *, id: str, file: str, row: int | str, field: str, reason: str
    ) -> None:
        """A sample of the source cannot be used.

        Raises:
            TooManyBadSamples: the source's share is above `max_share`.
        """
        self.seen[source] += 1
        self.bad[source] += 1
        if (file, str(row)) not in self._written:  # it comes again in every epoch
            self._written.add((file, str(row)))
            self._write(
                {
                    "id": id,
                    "source": source,
                    "file": file,
                    "row": row,
                    "field": field,
                    "reason": reason,
                }
            )
        bad, allowed = self.bad[source], self.max_share * max(self.seen[source], FLOOR)
        if bad > allowed:
            where = f"; all are listed in {self.path}" if self.path is not None else ""
            raise TooManyBadSamples(
                f"source {source!r}: {bad} of {self.seen[source]} samples cannot be used, more "
                f"than max_bad_share={self.max_share:g} allows; the last one: {file}, row {row}, "
                f"field {field!r}: {reason}{where}"
            )

    def _write(self, entry: dict) -> None:
        log.warning(
            "quarantined from %(source)s: %(file)s, row %(row)s, field %(field)r: %(reason)s", entry
        )
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _listed(path: Path) -> set[tuple[str, str]]:
    """File and row of what an earlier process wrote. A last line that was cut off when it was
    killed is taken out, so that the next one starts a line of its own."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as lines:
            lines.truncate(len(whole))
    entries = [json.loads(line) for line in whole.splitlines()]
    return {(entry["file"], str(entry["row"])) for entry in entries}
