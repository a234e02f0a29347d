"""Encoding films and pictures anew, small and quick to enter in the middle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from unival.data.records import Record, RecordError
from unival.data.tools.encode import Target, encode
from unival.data.tools.inputs import MEDIA, Rows, files_below
from unival.data.tools.running import (
    Processes,
    Results,
    claim,
    cores,
    in_order,
    progress,
    stamp,
)
from unival.data.tools.shard import report_made, write_shards
from unival.data.tsv import TsvTable
from unival.data_gpu.limits import Limits

ENCODE_SECONDS = 3600.0  # for one film; a decoder that hangs is ended after it
ENCODED = tuple(suffix for suffix, medium in MEDIA.items() if medium != "audio")


class Job(NamedTuple):
    """A medium and the file that it becomes."""

    source: Path
    out: Path


class Reencoded:
    """A table whose records name what their films became; RecordError where that is missing."""

    def __init__(self, table: TsvTable, outputs: dict[Path, Path]) -> None:
        self.table = table
        self.outputs = outputs

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        record = _film_of(self.table, index)
        assert isinstance(record.media, Path)
        out = self.outputs[record.media]
        if not out.exists():
            raise RecordError(record.origin, "media", f"{record.media} could not be encoded anew")
        return replace(record, media=out)


def _film_of(table: TsvTable, index: int) -> Record:
    """A row that shows a film; boxes of a picture would not fit another size."""
    record = table[index]
    if record.medium != "video":
        raise RecordError(record.origin, "kind", f"{record.kind}; only rows of films are encoded")
    return record


def reencode(inputs: Sequence[Path], out: Path, target: Target, rows: Rows) -> int:
    """Write films and pictures anew below `out`, with the paths that they have below the inputs.

    A table's films go to `out`/media and its rows, with these films, into shards in `out`; the
    films may be removed then. What an earlier run finished is not done again.

    Returns:
        How many inputs and rows are bad; they are printed and have no output.
    """
    tables = [path for path in inputs if path.suffix.lower() == ".tsv"]
    if tables and len(inputs) > 1:
        raise ValueError("a table is re-encoded by itself: name one .tsv, or files and folders")
    out.mkdir(parents=True, exist_ok=True)
    claim(out / "reencode.json", asdict(target))
    if not tables:
        return _encode_all(_jobs(inputs, out, target), out, target)
    table = TsvTable(tables[0], rows.layout, rows.medium, rows.media_root)
    root = (rows.media_root or tables[0].parent).resolve()
    outputs: dict[Path, Path] = {}
    for index in range(len(table)):
        try:
            source = _film_of(table, index).media
        except RecordError:
            continue  # said when the shards are written
        assert isinstance(source, Path)
        place = (out / "media" / source.relative_to(root)).with_suffix(target.suffix("video"))
        outputs[source] = place
    jobs = [Job(source, place) for source, place in outputs.items()]
    bad = _encode_all(_distinct(jobs), out, target)
    made_from = [[str(path), stamp(path)] for path in (tables[0], *outputs.values())]
    settings = {
        "rows": {name: str(value) for name, value in vars(rows).items()},
        "inputs": hashlib.sha256(json.dumps(made_from).encode()).hexdigest(),
    }
    name = tables[0].resolve().stem.replace(".", "_")
    made = write_shards([Reencoded(table, outputs)], out, name, settings)
    return bad + report_made(made, out, name)


def _jobs(inputs: Sequence[Path], out: Path, target: Target) -> list[Job]:
    jobs = []
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--out {out} lies in {path}, which is to be encoded")
        folder = path if path.is_dir() else path.parent
        for source in files_below(path, ENCODED) if path.is_dir() else [path]:
            medium = MEDIA.get(source.suffix.lower())
            if medium not in ("image", "video"):
                raise ValueError(f"{source}: a film or a picture is needed: {', '.join(ENCODED)}")
            place = (out / source.relative_to(folder)).with_suffix(target.suffix(medium))
            jobs.append(Job(source, place))
    if not jobs:
        raise ValueError(f"{', '.join(map(str, inputs))}: no files ending in {', '.join(ENCODED)}")
    return _distinct(jobs)


def _distinct(jobs: list[Job]) -> list[Job]:
    sources: dict[Path, Path] = {}
    for source, place in jobs:
        if sources.setdefault(place, source) != source:
            raise ValueError(f"{source} and {sources[place]} would both become {place}")
    return jobs


def _encode_all(jobs: list[Job], out: Path, target: Target) -> int:
    count = cores()
    bad = 0
    with (
        Results(out / "reencode.jsonl") as results,
        Processes(count, ENCODE_SECONDS, Limits().decode_bytes) as processes,
    ):

        def start(job: Job) -> Future[str | None]:
            known = results.known.get((str(job.source), None), "")
            if known or (known is None and job.out.exists()):
                future: Future[str | None] = Future()
                future.set_result(known)
                return future
            medium = MEDIA[job.source.suffix.lower()]
            return processes.submit(encode, job.source, job.out, medium, target)

        started = ((job, start(job)) for job in jobs)
        for job, future in progress(in_order(started, 2 * count), len(jobs), "reencode"):
            reason = _reason(future)
            if reason is not None:
                bad += 1
                print(f"{job.source}: {reason}")
            if (str(job.source), None) not in results.known:
                results.add(job.source, None, MEDIA[job.source.suffix.lower()], reason)
    print(f"reencode: {len(jobs) - bad} good, {bad} bad")
    return bad


def _reason(future: Future[str | None]) -> str | None:
    error = future.exception()
    if isinstance(error, ValueError):
        return str(error)
    return future.result()
