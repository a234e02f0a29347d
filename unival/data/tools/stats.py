"""What data consist of: counts, lengths and sizes, from headers and texts."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unival.data.records import Record, RecordError
from unival.data.tools.inputs import Item, Rows, list_items
from unival.data.tools.running import cores, in_order, progress
from unival.data_gpu.audio import probe_audio
from unival.data_gpu.errors import DecodeError, Media, MediaInfo
from unival.data_gpu.inspect import inspect_image
from unival.data_gpu.limits import Limits
from unival.data_gpu.video import probe_video
from unival.files import finished_file, write_json

PROBES = {"image": inspect_image, "video": probe_video, "audio": probe_audio}
FIELDS = {  # of a MediaInfo, by medium
    "image": ("width", "height"),
    "video": ("width", "height", "frames", "seconds", "rate"),
    "audio": ("seconds", "channels", "rate"),
}
PERCENTILES = (5, 50, 95)


class Stats:
    """Counts and values seen so far; 8 bytes a value."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.media: Counter[str] = Counter()
        self.bad = 0
        self.values: dict[str, array] = {}

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, array("d")).append(value)

    def add_record(self, record: Record) -> None:
        """The kind of a record and the lengths of its texts in words."""
        self.kinds[record.kind] += 1
        for caption in record.captions:
            self.add("caption words", len(caption.split()))
        if record.question:
            self.add("question words", len(record.question.split()))
        for answer in record.answers:
            self.add("answer words", len(answer.text.split()))

    def add_medium(self, medium: str, size: int, info: MediaInfo) -> None:
        """`size` in bytes; what the header leaves open (zero) is not counted."""
        self.media[medium] += 1
        self.add(f"{medium} bytes", size)
        for field in FIELDS[medium]:
            if getattr(info, field):
                self.add(f"{medium} {field}", getattr(info, field))

    def summary(self) -> dict:
        """What stats.json holds."""
        return {
            "records": dict(sorted(self.kinds.items())),
            "media": dict(sorted(self.media.items())),
            "bad": self.bad,
            "values": {name: _summary(self.values[name]) for name in sorted(self.values)},
        }


def _summary(values: array) -> dict[str, float]:
    numbers = np.frombuffer(values, dtype=np.float64)
    found = {"count": len(numbers), "sum": float(numbers.sum()), "mean": float(numbers.mean())}
    found |= {"min": float(numbers.min()), "max": float(numbers.max())}
    percentiles = np.percentile(numbers, PERCENTILES)
    return found | {f"p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)}


def stats(paths: Sequence[Path], rows: Rows, out: Path) -> int:
    """Write stats.json and stats.png about files, folders, tables and shards; print a table.

    Only headers are read. A file that several records name counts once among the media.

    Returns:
        How many files and records cannot be used; `check` says why.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("stats.png needs matplotlib: pip install 'unival[demo]'") from error
    items, total = list_items(paths, rows)
    found = Stats()
    with ThreadPoolExecutor(cores()) as threads:
        started = _started(items, found, threads)
        for medium, future in progress(in_order(started, 4 * cores()), total, "stats"):
            if future.exception() is None:
                if medium is not None:
                    found.add_medium(medium, *future.result())
            elif isinstance(future.exception(), DecodeError):
                found.bad += 1
            else:
                future.result()
    write_json(out / "stats.json", found.summary())
    _draw(found, out / "stats.png")
    _print(found.summary())
    return found.bad


def _started(
    items: Iterator[Item], found: Stats, threads: ThreadPoolExecutor
) -> Iterator[tuple[str | None, Future]]:
    seen: set[Path] = set()
    nothing: Future = Future()
    nothing.set_result(None)
    for item in items:
        try:
            record = item.record()
        except RecordError:
            found.bad += 1
            yield None, nothing
            continue
        media: Media = item.path if record is None else record.media
        medium = item.medium if record is None else record.medium
        if record is not None:
            found.add_record(record)
        if medium is None or item.problem:
            found.bad += 1
        elif medium != "text" and media not in seen:
            if isinstance(media, Path):
                seen.add(media)
            yield medium, threads.submit(_probe, media, medium)
            continue
        yield None, nothing


def _probe(media: Media, medium: str) -> tuple[int, MediaInfo]:
    info = PROBES[medium](media, Limits())
    return (media.stat().st_size if isinstance(media, Path) else len(media)), info


def _draw(found: Stats, path: Path) -> None:
    from matplotlib.figure import Figure

    names = sorted(found.values)
    columns = 3
    lines = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(12, 2.6 * lines), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(lines, columns, number)
        axes.hist(np.frombuffer(found.values[name], dtype=np.float64), bins=40)
        axes.set_title(name)
    with finished_file(path) as part:
        figure.savefig(part, format="png")


def _print(summary: dict) -> None:
    for kind, count in (*summary["records"].items(), *summary["media"].items()):
        print(f"{kind:<24}{count:>12}")
    print(f"{'bad':<24}{summary['bad']:>12}")
    names = ("count", "mean", "min", "p5", "p50", "p95", "max")
    print(f"\n{'':<24}" + "".join(f"{name:>12}" for name in names))
    for name, values in summary["values"].items():
        print(f"{name:<24}" + "".join(f"{values[column]:>12.6g}" for column in names))
