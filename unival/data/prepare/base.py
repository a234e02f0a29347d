"""From the files that a data set's publisher distributes to shards: what all data sets share."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unival.data import pickles
from unival.data.files import RangeReader, resolve_media
from unival.data.records import Origin, Record, RecordError
from unival.data.shards import MEDIA_SUFFIXES, make_record
from unival.data.tools.running import stamp
from unival.data.tools.shard import Made, Table, write_shards
from unival.files import write_json

SUMMARY = "prepared.json"
NAMED = 5  # bad rows that are printed
MAX_LINE = 1 << 17  # bytes; a longer line of a CSV file is taken for several
BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")


class Source:
    """The folder with a publisher's files, and the folder with the media.

    `opened` collects the files read: shards are made anew only when one of them has changed.

    Args:
        folder: of annotations.
        media: of pictures, films and sounds; `folder` where it is None.
        options: what a data set's command was given beside the folders.
    """

    def __init__(
        self, folder: Path, media: Path | None = None, options: Mapping[str, str] | None = None
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        self.folder = folder
        self.media = (media or folder).resolve()
        self.options = dict(options or {})
        self.opened: list[Path] = []

    def find(self, *names: str) -> Path:
        """The first of some names (globs allowed) that exists in the folder.

        Raises:
            FileNotFoundError: none does; the message lists all.
        """
        found = self.look(*names)
        if found is None:
            raise FileNotFoundError(f"{self.folder}: needs {' or '.join(names)}")
        return found

    def look(self, *names: str) -> Path | None:
        """Like `find`, but None where there is none."""
        for name in names:
            for path in sorted(self.folder.glob(name)):
                if path.is_file():
                    self.opened.append(path)
                    return path
        return None

    def json(self, *names: str) -> tuple[Path, Any]:
        """The content of a JSON file."""
        path = self.find(*names)
        try:
            return path, json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error

    def csv_rows(self, *names: str, columns: Sequence[str]) -> CsvRows:
        """The rows of a CSV file with a header that names at least these columns."""
        return CsvRows(self.find(*names), columns)

    def pickle(self, *names: str) -> tuple[Path, Any]:
        """What a pickle of plain data holds; see `pickles.load_plain`."""
        path = self.find(*names)
        return path, pickles.load_plain(path)

    def lines(self, *names: str) -> list[str]:
        """The lines of a text that are not blank."""
        text = self.find(*names).read_text(encoding="utf-8-sig")
        return [line for line in text.splitlines() if line.strip()]


class CsvRows:
    """The rows of a CSV file with a header, each read when it is asked for; 8 bytes of each are
    held. Fields in quotation marks may hold commas and line breaks; blank lines are no rows.

    `rows[i]` maps columns to texts; RecordError where the row has not as many as the header, or
    is no UTF-8 or no CSV. A quotation mark without its other costs no more than the rows within
    the next 131,072 characters, which become one that cannot be read.

    Args:
        path: of the file.
        columns: that the header must have.

    Raises:
        ValueError: the header lacks a column.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._reader = RangeReader(path)
        self._starts = _row_starts(path)
        self._header: list[str] = []
        if len(self._starts) > 1:
            self._header = self._parse(0, "utf-8-sig", Origin(str(path), "header"))
        missing = [name for name in columns if name not in self._header]
        if missing:
            found = ", ".join(self._header)
            raise ValueError(f"{path}: no column {missing[0]!r}; there are {found or 'none'}")

    def __len__(self) -> int:
        return len(self._starts) - 2

    def __getitem__(self, index: int) -> dict[str, str]:
        row = range(len(self))[index]
        fields = self._parse(row + 1, "utf-8", self.origin(row))
        if len(fields) != len(self._header):
            problem = f"{len(fields)} columns; {len(self._header)} are needed"
            raise RecordError(self.origin(row), "row", problem)
        return dict(zip(self._header, fields, strict=True))

    def origin(self, row: int) -> Origin:
        return Origin(str(self.path), row)

    def _parse(self, line: int, encoding: str, origin: Origin) -> list[str]:
        start, end = self._starts[line], self._starts[line + 1]
        data = self._reader.read(start, end - start, origin)
        try:
            rows = csv.reader(io.StringIO(data.decode(encoding), newline=""))
            return next(filter(None, rows), [])  # blank lines may come first
        except (UnicodeDecodeError, csv.Error) as error:
            raise RecordError(origin, "row", str(error)) from error


def _row_starts(path: Path) -> array:
    """int64 [rows + 1]: where each row of a CSV file starts, then where the last one ends."""
    starts = array("q", [0])
    position = 0

    def lines(file: io.BufferedReader) -> Iterator[str]:
        nonlocal position
        while line := file.readline(MAX_LINE):
            position += len(line)
            yield line.decode("latin-1")  # marks and breaks are the same bytes in UTF-8

    with open(path, "rb") as file:
        rows = csv.reader(lines(file))
        while True:
            try:
                if next(rows):
                    starts.append(position)
            except csv.Error:
                starts.append(position)
            except StopIteration:
                return starts


class MediaFiles:
    """The media in some folders, by their names without suffix.

    Args:
        root: the media folder.
        medium: image, video or audio.
        folders: below `root`, "" for `root` itself; of two media of one name that of the earlier
            folder counts. Those that are not there are passed by.
    """

    def __init__(self, root: Path, medium: str, folders: Sequence[str] = ("",)) -> None:
        self._suffixes = MEDIA_SUFFIXES[medium]
        self._files: dict[str, str] = {}
        for folder in folders:
            below = (root / folder).iterdir() if (root / folder).is_dir() else ()
            names = (path.name for path in below)
            for name in sorted(names, key=lambda name: (self._rank(name), name)):
                if self._rank(name) < len(self._suffixes):
                    self._files.setdefault(Path(name).stem, f"{folder}/{name}".lstrip("/"))

    def _rank(self, name: str) -> int:
        suffix = Path(name).suffix.lower()
        return self._suffixes.index(suffix) if suffix in self._suffixes else len(self._suffixes)

    def __contains__(self, stem: str) -> bool:
        return stem in self._files

    def find(self, *stems: str) -> str:
        """The path from the media folder of the first that is there. Where none is, the path that
        the first would have: the row that names it is refused when it is read."""
        found = (self._files[stem] for stem in stems if stem in self._files)
        return next(found, f"{stems[0]}{self._suffixes[0]}")


@dataclass(frozen=True)
class Entry:
    """A row as its publisher's file says it, checked when it is read from `Entries`.

    values  the fields of a shard's sample (see TarShards): id, kind, captions, question, answers,
            box, label, codes, unanswered
    media   path of the medium from the media folder; "" where the kind has none
    """

    values: dict[str, Any]
    media: str
    origin: Origin


@dataclass
class Entries:
    """A table of entries; a row that cannot be used raises RecordError when it is read."""

    media: Path
    rows: list[Entry | RecordError] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set, init=False, repr=False)

    def add(self, row: Entry | RecordError) -> None:
        """Append a row; an entry whose id an earlier one has becomes an error."""
        if isinstance(row, Entry):
            id = row.values["id"]
            if id in self._ids:
                row = RecordError(row.origin, "id", f"{id!r} is the id of an earlier row")
            self._ids.add(id)
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row = self.rows[index]
        if isinstance(row, RecordError):
            raise row
        record = make_record(row.values, row.origin)
        if not row.media:
            return record
        path = resolve_media(row.media, self.media, False, row.origin, "media")
        return replace(record, media=path)


@dataclass(frozen=True)
class Prepared:
    """What a data set's reader makes.

    splits   train, val, test (and others that a data set has) -> rows
    answers  candidate answers, best first; empty where answers are free
    notes    what was decided on the way, such as a validation part held out of training
    """

    splits: dict[str, Table]
    answers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """A data set that `unival data prepare` knows.

    title    as people call it
    needs    files of the publisher, a line each, for the help
    read     makes the rows
    options  names that `--option NAME=VALUE` may set, with what they mean
    """

    title: str
    needs: tuple[str, ...]
    read: Callable[[Source], Prepared]
    options: Mapping[str, str] = field(default_factory=dict)


def field_of(entry: Any, name: str, kind: type | tuple[type, ...], origin: Origin) -> Any:
    """A field of a JSON object that must be there and of a type; else RecordError."""
    if not isinstance(entry, dict) or name not in entry:
        raise RecordError(origin, name, "missing")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecordError(origin, name, f"{value!r:.40} is a {type(value).__name__}")
    return value


def text_of(entry: Any, name: str, origin: Origin) -> str:
    """A text of a JSON object without white space around it, with a space for each run of line
    breaks and tabs; RecordError where there is none, or it is empty or cannot be written as UTF-8.
    """
    text = BREAKS.sub(" ", field_of(entry, name, str, origin)).strip()
    if not text:
        raise RecordError(origin, name, "empty text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(origin, name, f"half a character: {error.reason}") from error
    return text


def row_of(make: Callable[[Any, Origin], Entry], item: Any, origin: Origin) -> Entry | RecordError:
    """The entry that `make` reads in an item of a file, or what is wrong with the item."""
    try:
        return make(item, origin)
    except RecordError as error:
        return error.with_traceback(None)  # which would keep what `make` has read in memory


def held_out(ids: Sequence[str], share: float = 0.05) -> set[str]:
    """Ids that are kept out of training where a data set has no validation part: those of the
    smallest hashes, so that the choice hangs on nothing but the ids."""
    ordered = sorted(set(ids), key=lambda text: hashlib.sha256(text.encode()).digest())
    return set(ordered[: max(1, round(share * len(ordered)))]) if ordered else set()


def most_frequent(answers: Mapping[str, int] | Counter, count: int) -> tuple[str, ...]:
    """The `count` most frequent answers, those of equal frequency in order of the alphabet."""
    return tuple(sorted(answers, key=lambda text: (-answers[text], text))[:count])


def prepare(name: str, dataset: DataSet, source: Source, out: Path) -> int:
    """Write a data set's splits as shards `NAME_SPLIT-000000.tar`, its answers and a summary.

    Bad rows (a medium that is missing, a field that is wrong) are left out, listed in
    `NAME_SPLIT.bad.jsonl` and counted. Training rows are written in a random order, the same each
    time: readers of one shard then see the whole data set.

    Returns:
        The number of bad rows.

    Raises:
        ValueError: an option that the data set does not know, or a split without one good row.
    """
    for option in source.options:
        if option not in dataset.options:
            known = ", ".join(dataset.options) or "none"
            raise ValueError(f"{name} has no option {option!r}; known: {known}")
    prepared = dataset.read(source)
    inputs = [[str(path), stamp(path)] for path in dict.fromkeys(source.opened)]
    settings = {"dataset": name, "inputs": inputs, "options": source.options}
    settings["media"] = str(source.media)
    summary: dict[str, Any] = {"dataset": dataset.title, "splits": {}, "notes": prepared.notes}
    for split, table in prepared.splits.items():
        rows: Table = Shuffled(table) if split == "train" else table
        made = write_shards([rows], out, f"{name}_{split}", settings | {"split": split})
        summary["splits"][split] = _count(made, out, f"{name}_{split}", len(table))
        if not made.samples:
            reasons = summary["splits"][split]["bad"]
            raise ValueError(f"{name} {split}: none of {len(table)} rows can be used: {reasons}")
    if prepared.answers:
        text = "".join(f"{answer}\n" for answer in prepared.answers)
        (out / f"{name}.answers.txt").write_text(text, encoding="utf-8")
        summary["answers"] = len(prepared.answers)
    write_json(out / f"{name}.{SUMMARY}", summary)
    return _print(name, summary, out)


def describe(datasets: Mapping[str, DataSet]) -> str:
    """The data sets, the files that each wants and its options."""
    lines = []
    for name, dataset in datasets.items():
        lines.append(f"{name}: {dataset.title}")
        lines += [f"    {need}" for need in dataset.needs]
        lines += [f"    --option {option}=: {text}" for option, text in dataset.options.items()]
    return "\n".join(lines)


class Shuffled:
    """A table in a random order that hangs on its length alone."""

    def __init__(self, table: Table, seed: int = 7) -> None:
        self._table = table
        self._order = np.random.default_rng(seed).permutation(len(table))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Record:
        return self._table[int(self._order[index])]


def _count(made: Made, out: Path, name: str, rows: int) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    examples: list[str] = []
    with open(out / f"{name}.bad.jsonl", encoding="utf-8") as lines:
        for line in lines:
            bad = json.loads(line)
            reasons[bad["field"]] += 1
            if len(examples) < NAMED:
                examples.append(f"{bad['file']}, row {bad['row']}: {bad['field']}: {bad['reason']}")
    return {
        "rows": rows,
        "samples": made.samples,
        "shards": made.shards,
        "bad": dict(reasons),
        "examples": examples,
    }


def _print(name: str, summary: dict[str, Any], out: Path) -> int:
    bad = 0
    text = io.StringIO()
    for split, counts in summary["splits"].items():
        left_out = sum(counts["bad"].values())
        bad += left_out
        print(f"{split}: {counts['samples']} of {counts['rows']} rows", file=text)
        if left_out:
            by_field = ", ".join(f"{count} for {part}" for part, count in counts["bad"].items())
            print(f"  {left_out} left out ({by_field}): {name}_{split}.bad.jsonl", file=text)
            for example in counts["examples"]:
                print(f"    {example}", file=text)
    for note in summary["notes"]:
        print(f"note: {note}", file=text)
    print(f"{out / name}_*.tar", file=text)
    print(text.getvalue(), end="")
    return bad
