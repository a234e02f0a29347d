"""Tables whose columns have names, as people write them: CSV, TSV with a header, and JSON lines."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unival.data import fields, tsv
from unival.data.records import Answer, Origin, Record, RecordError
from unival.data.shards import parse_object
from unival.data.tsv import KINDS, LAYOUTS, TsvTable

SUFFIXES = (".csv", ".tsv", ".jsonl")
ID = ("id", "uid", "question_id", "image_id")
MEDIA = ("media", "image", "video", "audio", "file", "path", "file_name", "filename")
MEDIUM_NAMES = MEDIA[:4]  # two of these in one table leave open which of them is meant
CORNERS = ("x0", "y0", "x1", "y1")
# What each layout needs beside the medium, and the names that such a column may have.
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "caption": {"captions": ("caption", "captions", "text", "answer")},
    "vqa": {"question": ("question", "text"), "answers": ("answer", "answers", "label")},
    "refcoco": {"text": ("text", "phrase", "expression", "caption"), "box": ("box", "bbox")},
    "snli_ve": {"hypothesis": ("hypothesis", "text", "caption"), "label": ("label", "answer")},
    "image_generation": {"codes": ("codes",), "caption": ("caption", "captions", "text")},
}
SPLITS = {
    "train": ("train",),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}
LABEL_OF_WORD = {"yes": "entailment", "no": "contradiction", "maybe": "neutral"}
FULL_AGREEMENT = 3  # so many people with one answer make it certain (VQA's accuracy)
MAX_HEADER_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"

# A field of a CSV: quoted, with quotes inside doubled, or without any quote.
CSV_FIELD = re.compile(rb'(?:"([^"]*+(?:""[^"]*+)*+)"|[^",]*+)(?=,|\Z)')
# What a line has of a quoted field behind the opening quote; group 1 is the closing quote, or empty
# where the line ends before that.
CSV_REST = re.compile(rb'[^"]*+(?:""[^"]*+)*+("?)')


def has_header(path: str | Path, layout: str) -> bool:
    """Whether the first line of a `.tsv` names columns, one of them of a medium (for
    image_generation, of codes).

    All of them are known names or, where there are more or fewer columns than the layout has
    without a header, at least two: a row that TsvTable could read is never taken for names.
    """
    if layout not in COLUMNS:
        return False
    with open(path, "rb") as file:
        line = file.readline(MAX_HEADER_BYTES).removeprefix(BOM)
    names = [_clean(name) for name in line.decode("utf-8", "replace").split("\t")]
    required = COLUMNS[layout]["codes"] if layout == "image_generation" else MEDIA
    if not _first(required, names):
        return False
    known = {*required, *ID, *CORNERS}.union(*COLUMNS[layout].values()) & set(names)
    return len(known) == len(names) or (len(names) != len(LAYOUTS[layout]) and len(known) > 1)


def user_splits(folder: str | Path) -> dict[str, Path]:
    """The tables of a folder by what they are for: train and, where they are there, val and test.

    `val` may also be called valid, validation or dev; each ends in `.csv`, `.tsv` or `.jsonl`. A
    table by itself is for training: the only one of a folder that has none of these names, or a
    file in place of the folder.

    Raises:
        FileNotFoundError: there is no such folder, or no table to train on in it.
        ValueError: two tables for one split, or a file that is no table.
    """
    folder = Path(folder)
    if folder.is_file():
        if folder.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{folder}: a table ends in {', '.join(SUFFIXES)}")
        return {"train": folder}
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder")
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    splits = {}
    for split, names in SPLITS.items():
        found = [path for path in tables if path.stem.lower() in names]
        if len(found) > 1:
            several = " and ".join(path.name for path in found)
            raise ValueError(f"{folder}: {several} are all for {split!r}; keep one of them")
        if found:
            splits[split] = found[0]
    if not splits and len(tables) == 1:
        splits["train"] = tables[0]
    if "train" not in splits:
        wanted = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        there = ", ".join(path.name for path in tables[:20]) or "none"
        raise FileNotFoundError(f"{folder}: none of {wanted} to train on; tables there: {there}")
    return splits


class ColumnTable(TsvTable):
    """A table of records, read a row at a time, whose columns are found by their names.

    Names do not depend on case or order, and columns that no layout knows are passed by. The first
    of the names in MEDIA, ID and COLUMNS that a table has is taken; a row without an id has its
    number as one. Formats:

    .csv    a header, then rows as in RFC 4180: a field in quotes may hold commas and line breaks
    .tsv    a header, then rows whose fields are taken as they stand: no quotes are undone
    .jsonl  an object a line; the first one says which columns there are

    Captions and answers are lists in JSON and joined by `&&` elsewhere. An answer is a text,
    `confidence|!+text`, or in JSON also [confidence, text] or {"text": ..., "confidence": ...};
    all answers of a row have a confidence, or none. Without one it is 1; where answers repeat, as
    when ten people were asked, min(1, count / 3). A box is (x0, y0, x1, y1), in one column or four.
    Labels are those of visual entailment, or yes, no and maybe.

    Args:
        path: the table, in UTF-8. Blank lines are passed over.
        layout: a key of COLUMNS.
        medium: image, video or audio: what the rows of a caption or vqa layout show.
        media_root: as in TsvTable.

    Raises:
        ValueError: a column is missing, is there twice or is of another medium; the layout has no
            such medium; a quote is never closed.
        FileNotFoundError: there is no such file.

    `table[i]` raises RecordError (file, row, column) where a row cannot be used. Rows are counted
    from 0 behind the header. Only the rows' places are held in memory, 8 bytes each.
    """

    def __init__(
        self,
        path: str | Path,
        layout: str,
        medium: str = "image",
        media_root: str | Path | None = None,
    ) -> None:
        self._format = Path(path).suffix.lower()
        if self._format not in SUFFIXES:
            raise ValueError(f"{path}: a table with named columns ends in {', '.join(SUFFIXES)}")
        if layout not in COLUMNS:
            raise ValueError(
                f"{path}: layout {layout!r} has no named columns; those that have: "
                f"{', '.join(COLUMNS)}; pretrain tables are .tsv files without a header"
            )
        super().__init__(path, layout, medium, media_root)
        self._starts = record_starts(self.path, self._starts, self._format == ".csv")
        self._names: list[str] = []
        self._column_of: dict[str, str] = {}
        if self._format != ".jsonl":
            self._names = self._header()
            self._starts = self._starts[1:]
        elif len(self) > 0:
            self._names = list(self._values(0, Origin(str(self.path), 0)))
        else:
            return  # no object says what the columns are, and none is read
        self._column_of = choose_columns(self._names, self.path, layout, medium)

    def __getitem__(self, index: int) -> Record:
        number = range(len(self))[index]
        origin = Origin(str(self.path), number)
        row = _Row(self._values(number, origin), self._column_of, origin)
        return Record(
            id=row.id(),
            kind=KINDS.get((self.layout, self.medium), self.layout),
            media=b"" if self.layout == "image_generation" else self._medium(row),
            origin=origin,
            **_needed(row, self.layout),
        )

    def _header(self) -> list[str]:
        origin = Origin(str(self.path), "header")
        if len(self._starts) == 1:
            raise RecordError(origin, "row", "the file is empty; its first line names the columns")
        size = int(self._starts[1] - self._starts[0])
        if size > MAX_HEADER_BYTES:
            raise RecordError(origin, "row", f"{size} bytes; {MAX_HEADER_BYTES} at most")
        names = []
        for name in self._split(self._bytes(0, origin), origin):
            try:
                names.append(_clean(name.decode("utf-8")))
            except UnicodeDecodeError as error:
                raise RecordError(origin, "row", f"not UTF-8: {error}") from error
        _check_distinct(names, origin)
        return names

    def _bytes(self, row: int, origin: Origin) -> bytes:
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        if end - start > tsv.MAX_ROW_BYTES:
            problem = f"{end - start} bytes; {tsv.MAX_ROW_BYTES} at most"
            raise RecordError(origin, "row", problem)
        return self._reader.read(start, end - start, origin).rstrip(b"\r\n")

    def _split(self, row: bytes, origin: Origin) -> list[bytes]:
        return row.split(b"\t") if self._format == ".tsv" else split_csv(row, origin, self._names)

    def _values(self, number: int, origin: Origin) -> dict[str, Any]:
        """Column -> bytes of a CSV or TSV, values of JSON."""
        row = self._bytes(number, origin)
        if self._format == ".jsonl":
            values = parse_object(row, origin)
            names = [_clean(name) for name in values]
            _check_distinct(names, origin)
            return dict(zip(names, values.values(), strict=True))
        cells = self._split(row, origin)
        if len(cells) != len(self._names):
            problem = f"{len(cells)} columns; the header has {len(self._names)}: "
            raise RecordError(origin, "row", problem + _listed(self._names))
        return dict(zip(self._names, cells, strict=True))

    def _medium(self, row: _Row) -> bytes | Path:
        text = row.text("media")
        kind = KINDS[self.layout, self.medium]
        try:
            return self._media({"media": text.encode("utf-8")}, kind, row.origin)
        except RecordError as error:
            raise row.refusal("media", error.problem) from error


def record_starts(path: Path, starts: np.ndarray, quoted: bool) -> np.ndarray:
    """int64 [records + 1]: where each record starts, a header included, then where the last ends.

    `starts` says so of the lines: see `line_starts`. A record reaches up to the next one, so that
    the blank lines behind it are in it. With `quoted` a line break inside of a quoted field ends no
    record.

    Raises:
        RecordError: a quote is never closed, so that every row from there on would be one.
    """
    starts = starts.copy()
    is_start = np.ones(len(starts), dtype=bool)
    is_open = False
    with open(path, "rb") as file:
        if file.read(len(BOM)) == BOM:
            starts[0] = len(BOM)
        # Where nothing is quoted, the short lines are read to see which are blank, and no others.
        lines = range(len(starts) - 1) if quoted else np.flatnonzero(np.diff(starts) <= 2)
        for line in lines:
            start, end = int(starts[line]), int(starts[line + 1])
            file.seek(start)
            text = file.read(min(end - start, tsv.MAX_ROW_BYTES))
            is_start[line] = not is_open and bool(text.strip(b"\r\n"))
            # A longer line is refused when its row is asked for; the next one starts anew.
            is_whole = len(text) == end - start
            is_open = quoted and is_whole and _ends_in_quotes(text, is_open)
    if is_open:
        row = int(is_start.sum()) - 3  # less the end, the header, and one to count from 0
        origin = Origin(str(path), "header" if row < 0 else row)
        raise RecordError(origin, "row", "a quote opened here is never closed")
    return starts[is_start]


def _ends_in_quotes(line: bytes, is_open: bool) -> bool:
    """Whether a line of a CSV ends inside a quoted field; `is_open`: it starts in one."""
    position = 0
    while is_open or (position := line.find(b'"', position) + 1) > 0:
        if is_open or position == 1 or line[position - 2 : position - 1] == b",":
            rest = CSV_REST.match(line, position)
            if rest is None or not rest[1]:
                return True
            position = rest.end()
            is_open = False
    return False


def split_csv(row: bytes, origin: Origin, names: Sequence[str] = ()) -> list[bytes]:
    """The fields of one record of a CSV (RFC 4180), without their quotes.

    Raises:
        RecordError: a quote stands where none may; `names` are the columns for the message.
    """
    # Not by the csv module: it refuses fields above a limit that is one for the whole process.
    if b'"' not in row:
        return row.split(b",")
    values: list[bytes] = []
    position = 0
    while True:
        field = CSV_FIELD.match(row, position)
        if field is None:
            name = names[len(values)] if len(values) < len(names) else "row"
            problem = 'a quote out of place; a field with quotes is written "so: ""quoted"""'
            raise RecordError(origin, name, problem)
        values.append(field[0] if field[1] is None else field[1].replace(b'""', b'"'))
        if field.end() == len(row):
            return values
        position = field.end() + 1


def choose_columns(names: Sequence[str], path: Path, layout: str, medium: str) -> dict[str, str]:
    """What a layout needs -> the column that has it; `id` where there is one.

    Raises:
        ValueError: a column is missing, or the one of the medium is not clear.
    """
    id_name = _first(ID, names)
    chosen = {"id": id_name} if id_name else {}
    wanted = dict(COLUMNS[layout])
    if layout != "image_generation":
        _check_medium(names, path, medium)
        wanted = {"media": MEDIA, **wanted}
    for field, known in wanted.items():
        found = _first(known, names)
        if found:
            chosen[field] = found
        elif field == "box" and set(CORNERS) <= set(names):
            chosen |= {corner: corner for corner in CORNERS}
        else:
            raise _missing(field, names, chosen, known, path)
    return chosen


def _check_medium(names: Sequence[str], path: Path, medium: str) -> None:
    found = [name for name in MEDIUM_NAMES if name in names]
    if len(found) > 1:
        raise ValueError(f"{path}: columns {' and '.join(found)}: keep the one of the medium alone")
    if found and found[0] not in ("media", medium):
        raise ValueError(
            f"{path}: column {found[0]!r}, but its rows are to show medium {medium!r}; "
            f"choose medium {found[0]!r}, or name the column {medium!r}"
        )


def _missing(
    field: str,
    names: Sequence[str],
    chosen: Mapping[str, str],
    known: Sequence[str],
    path: Path,
) -> ValueError:
    hint = ""
    for name in names:
        near = difflib.get_close_matches(name, known, n=1)
        if near and name not in chosen.values():
            hint = f"; did you mean {near[0]!r} by {name!r}?"
            break
    wanted = " or ".join(known)
    if field == "box":
        wanted += f", or {', '.join(CORNERS)}"
    return ValueError(
        f"{path}: no column for the {field}: {wanted}; there are: {_listed(names)}{hint}"
    )


def _first(known: Sequence[str], names: Sequence[str]) -> str | None:
    """The first known name that a table has."""
    return next((name for name in known if name in names), None)


def _clean(name: str) -> str:
    return name.strip().lower()


def _check_distinct(names: Sequence[str], origin: Origin) -> None:
    for name, count in Counter(names).items():
        if name and count > 1:
            raise RecordError(origin, name[:40], f"{count} columns of this name")


def _listed(names: Sequence[str]) -> str:
    """For a message: a file that is no table may have any number of columns of any length."""
    shown = ", ".join(name[:40] for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


@dataclass(frozen=True)
class _Row:
    """A row's values by column, and which column has what a layout needs."""

    values: Mapping[str, Any]
    columns: Mapping[str, str]
    origin: Origin

    def refusal(self, field: str, problem: str) -> RecordError:
        return RecordError(self.origin, self.columns[field], problem)

    def value(self, field: str) -> Any:
        """Bytes are decoded; RecordError where the row lacks it."""
        value = self.values.get(self.columns[field])
        if value is None:
            raise self.refusal(field, "missing")
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self.refusal(field, f"not UTF-8: {error}") from error
        return value

    def as_text(self, value: Any, field: str) -> str:
        """A text that is not empty, without the blanks around it; whole numbers of JSON count."""
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.refusal(field, f"{type(value).__name__}; a text is needed")
        text = str(value).strip()
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # half of a pair of \u escapes
            raise self.refusal(field, f"not UTF-8: {error}") from error
        return fields.check_text(text, self.origin, self.columns[field])

    def text(self, field: str) -> str:
        return self.as_text(self.value(field), field)

    def parts(self, field: str) -> Sequence[Any]:
        """A list of JSON, or the parts of a text joined by `&&`."""
        value = self.value(field)
        parts = value if isinstance(value, list) else self.text(field).split(fields.SEPARATOR)
        if not parts:
            raise self.refusal(field, "an empty list")
        return parts

    def id(self) -> str:
        given = "id" in self.columns and self.values.get(self.columns["id"]) not in (None, b"", "")
        return self.text("id") if given else str(self.origin.row)

    def answers(self) -> tuple[Answer, ...]:
        pairs = [self._answer(part) for part in self.parts("answers")]
        texts = [text for confidence, text in pairs if confidence is None]
        column = self.columns["answers"]
        if not texts:
            return tuple(fields.make_answer(*pair, self.origin, column) for pair in pairs)
        if len(texts) < len(pairs):
            problem = f"a confidence for some answers and none for {texts[0][:40]!r}"
            raise self.refusal("answers", problem)
        counts = Counter(texts)
        if len(counts) == len(texts):
            return tuple(Answer(text) for text in texts)
        return tuple(Answer(text, min(1.0, n / FULL_AGREEMENT)) for text, n in counts.items())

    def _answer(self, part: Any) -> tuple[object, str]:
        """(confidence or None, text)."""
        confidence, text = None, part
        if isinstance(part, str) and fields.CONFIDENCE_MARK in part:
            confidence, _, text = part.partition(fields.CONFIDENCE_MARK)
        elif isinstance(part, dict):
            confidence, text = part.get("confidence"), part.get("text")
        elif isinstance(part, list) and len(part) == 2:
            confidence, text = part
        if text is None or isinstance(text, list | dict):
            problem = 'an answer is a text, [confidence, text] or {"text": ..., "confidence": ...}'
            raise self.refusal("answers", problem)
        return confidence, self.as_text(text, "answers")

    def box(self) -> fields.Box:
        if "box" not in self.columns:
            numbers = (fields.number(self.value(name), self.origin, name) for name in CORNERS)
            return fields.make_box(numbers, self.origin, ", ".join(CORNERS))
        value = self.value("box")
        corners: list[Any] = value if isinstance(value, list) else self.text("box").split(",")
        return fields.make_box(corners, self.origin, self.columns["box"])

    def label(self) -> str:
        word = self.text("label").lower()
        label = LABEL_OF_WORD.get(word, word)
        if label not in fields.LABELS:
            known = ", ".join((*fields.LABELS, *LABEL_OF_WORD))
            raise self.refusal("label", f"{word[:40]!r} is none of {known}")
        return label

    def codes(self) -> tuple[int, ...]:
        value = self.value("codes")
        codes: list[Any] = value if isinstance(value, list) else self.text("codes").split()
        return fields.parse_codes(codes, self.origin, self.columns["codes"])


def _needed(row: _Row, layout: str) -> dict[str, Any]:
    """What the records of a layout hold beside id and medium."""
    if layout == "caption":
        captions = (row.as_text(part, "captions") for part in row.parts("captions"))
        return {"captions": tuple(captions)}
    if layout == "vqa":
        return {"question": row.text("question"), "answers": row.answers()}
    if layout == "refcoco":
        return {"captions": (row.text("text"),), "box": row.box()}
    if layout == "snli_ve":
        return {"captions": (row.text("hypothesis"),), "label": row.label()}
    return {"captions": (row.text("caption"),), "codes": row.codes()}
