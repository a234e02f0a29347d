"""Decode everything and say what cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from unival.data.records import RecordError
from unival.data.tools.inputs import MEDIA, Item, Rows, list_items
from unival.data.tools.running import Results, cores, in_order, progress
from unival.data_gpu.errors import DecodeError, Media, MediaInfo
from unival.data_gpu.isolation import DecodeWorkers
from unival.data_gpu.limits import Limits

Verify = Callable[[Media, str], Future[MediaInfo]]


class Job(NamedTuple):
    """An item whose check has begun; `media` is the file that a record names."""

    item: Item
    kind: str | None
    media: Path | None


class Checker:
    """Starts the check of items. A file that several records name is decoded once."""

    def __init__(self, verify: Verify, known: dict[tuple[str, str | int | None], str | None]):
        self._verify = verify
        self._known = known
        self.files: dict[Path, Future] = {}

    def start(self, items: Iterator[Item]) -> Iterator[tuple[Job, Future]]:
        """Each item with the future of its check; an earlier run's result comes back as it was."""
        for item in items:
            key = (str(item.path), item.row)
            if key in self._known:
                yield Job(item, None, None), _finished(self._known[key])
                continue
            try:
                yield self._begin(item)
            except RecordError as error:
                problem = f"field {error.field!r}: {error.problem}"
                yield Job(item, None, None), _finished(problem)

    def _begin(self, item: Item) -> tuple[Job, Future]:
        record = item.record()
        if record is None:
            if item.problem or item.medium is None:
                problem = item.problem or f"not a medium: known are {', '.join(MEDIA)}"
                return Job(item, None, None), _finished(problem)
            return Job(item, item.medium, None), self._verify(item.path, item.medium)
        medium = record.medium
        if medium == "text":
            return Job(item, medium, None), _finished(None)
        if isinstance(record.media, bytes):
            return Job(item, medium, None), self._verify(record.media, medium)
        if record.media not in self.files:
            self.files[record.media] = self._verify(record.media, medium)
        return Job(item, medium, record.media), self.files[record.media]


def _finished(reason: str | None) -> Future:
    future: Future = Future()
    if reason is None:
        future.set_result(None)
    else:
        future.set_exception(ValueError(reason))
    return future


GOOD = _finished(None)


def _reason(future: Future) -> str | None:
    """Why a check failed; what is no fault of the medium is raised."""
    error = future.exception()
    if error is None:
        return None
    if not isinstance(error, ValueError):
        raise error
    return error.problem if isinstance(error, DecodeError) else str(error)


def check(
    paths: Sequence[Path], rows: Rows, json_path: Path | None = None, seconds: float = 120.0
) -> int:
    """Decode every file and every record's medium, in as many processes as there are cores.

    Prints what is bad and a summary.

    Args:
        paths: files, folders (with all below them), tables and shards.
        rows: how tables are read.
        json_path: a line of JSON for each file or record (see Results). What it says of unchanged
            files already is taken over.
        seconds: that decoding one medium may take.

    Returns:
        How many are bad.
    """
    items, total = list_items(paths, rows)
    count = cores()
    known = bad = 0
    with (
        Results(json_path) as results,
        DecodeWorkers(count, Limits(decode_seconds=seconds)) as workers,
    ):
        checker = Checker(workers.verify, results.known)
        started = in_order(checker.start(items), 4 * count)
        for job, future in progress(started, total, "check"):
            item, reason = job.item, _reason(future)
            if (str(item.path), item.row) in results.known:
                known += 1
            else:
                results.add(item.path, item.row, job.kind, reason, job.media)
            if job.media is not None and reason is None:
                checker.files[job.media] = GOOD  # smaller than its own
            if reason is not None:
                bad += 1
                print(f"{item.path}{'' if item.row is None else f', row {item.row}'}: {reason}")
    earlier = f", {known} of them known from {json_path}" if known else ""
    print(f"check: {total - bad} good, {bad} bad{earlier}")
    return bad
