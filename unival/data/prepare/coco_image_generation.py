"""Pictures from texts on COCO 2014: captions, and the VQGAN codes of their pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unival.data.files import RangeReader
from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    field_of,
    held_out,
    row_of,
    text_of,
)
from unival.data.records import Origin, Record, RecordError
from unival.data.shards import make_record
from unival.data.tools.shard import Table
from unival.data.tsv import TsvTable, line_starts

NUM_CODES = 1024  # of a picture of 256 x 256 pixels
MAX_LINE = 1 << 14
MAX_ID = 32  # bytes
TEST_SHARE = 30_000 / 40_504  # of the pictures of val2014
PUBLISHED = {
    "train": ("coco_vqgan_train.tsv", "coco_vqgan_train_1.tsv"),
    "val": ("coco_vqgan_dev.tsv",),
    "test": ("coco_vqgan_full_test.tsv",),
}


class Codes:
    """The codes of pictures in a table of two columns: the number of a picture, and its 1,024 codes
    with spaces between. A line is read when its picture is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = line_starts(path)
        self._reader = RangeReader(path)
        self._rows: dict[str, int] = {}
        for row in range(len(self._starts) - 1):
            start, end = self._starts[row : row + 2]
            head = self._reader.read(int(start), int(min(end - start, MAX_ID)), self._origin(row))
            id, tab, _ = head.partition(b"\t")
            if tab and id.isdigit():
                self._rows.setdefault(str(int(id)), row)
        if not self._rows:
            raise ValueError(f"{path}: no line begins with the number of a picture and a tab")

    def __contains__(self, picture: str) -> bool:
        return picture in self._rows

    def read(self, picture: str, origin: Origin) -> list[str]:
        """The codes of a picture as they are written; RecordError unless there are 1,024."""
        if picture not in self._rows:
            raise RecordError(origin, "codes", f"{self.path} has none of picture {picture}")
        row = self._rows[picture]
        start, end = (int(place) for place in self._starts[row : row + 2])
        if end - start > MAX_LINE:
            problem = f"a line of {end - start} bytes; {MAX_LINE} at most"
            raise RecordError(self._origin(row), "codes", problem)
        line = self._reader.read(start, end - start, self._origin(row))
        codes = line.decode("ascii", "replace").rstrip("\r\n").split("\t")[-1].split()
        if len(codes) != NUM_CODES:
            raise RecordError(self._origin(row), "codes", f"{len(codes)} codes, not {NUM_CODES}")
        return codes

    def _origin(self, row: int) -> Origin:
        return Origin(str(self.path), row)


class CodedCaptions:
    """Captions with the codes of their picture, which are read when a row is."""

    def __init__(self, rows: Iterable[Entry | RecordError], codes: Codes) -> None:
        self._entries = Entries(Path())
        for row in rows:
            self._entries.add(row)
        self._codes = codes

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        row = self._entries.rows[index]
        if isinstance(row, RecordError):
            raise row
        codes = self._codes.read(row.values["picture"], row.origin)
        return make_record(row.values | {"codes": codes}, row.origin)


def read(source: Source) -> Prepared:
    """Training has a row for each caption, validation and test one for each picture."""
    if source.look(*PUBLISHED["train"]) is not None:
        tables = {
            split: TsvTable(source.find(*names), "image_generation")
            for split, names in PUBLISHED.items()
        }
        return Prepared(dict(tables), (), ("the rows are those of the published tables",))
    codes = Codes(source.find("codes.tsv"))
    splits: dict[str, Table] = {"train": CodedCaptions(_captions(source, "train2014"), codes)}
    later = _one_a_picture(_captions(source, "val2014"))
    pictures = [row.values["id"] for row in later if isinstance(row, Entry)]
    testing = held_out(pictures, TEST_SHARE)
    notes = [
        f"test is a caption of each of {len(testing)} pictures of val2014, val one of each of the "
        f"{len(pictures) - len(testing)} others; captions are in lower case, as published tables"
    ]
    for split, chosen in (("val", set(pictures) - testing), ("test", testing)):
        if any(picture in codes for picture in chosen):
            rows = [row for row in later if _is_in(row, chosen, split)]
            splits[split] = CodedCaptions(rows, codes)
        else:
            notes.append(f"there is no {split}: codes.tsv has none of its pictures")
    return Prepared(splits, (), tuple(notes))


def _captions(source: Source, part: str) -> list[Entry | RecordError]:
    path, content = source.json(f"captions_{part}.json", f"annotations/captions_{part}.json")
    annotations = field_of(content, "annotations", list, Origin(str(path), "file"))

    def make(annotation: Any, origin: Origin) -> Entry:
        values = {
            "id": str(field_of(annotation, "id", int, origin)),
            "kind": "image_generation",
            "captions": [text_of(annotation, "caption", origin).lower()],
            "dataset": "coco",
            "picture": str(field_of(annotation, "image_id", int, origin)),
        }
        return Entry(values, "", origin)

    return [
        row_of(make, annotation, Origin(str(path), f"annotations[{row}]"))
        for row, annotation in enumerate(annotations)
    ]


def _one_a_picture(rows: Iterable[Entry | RecordError]) -> list[Entry | RecordError]:
    """The first caption of each picture, under the picture's number, and all errors."""
    seen: set[str] = set()
    kept: list[Entry | RecordError] = []
    for row in rows:
        if isinstance(row, Entry):
            picture = row.values["picture"]
            if picture in seen:
                continue
            seen.add(picture)
            row = Entry(row.values | {"id": picture}, row.media, row.origin)
        kept.append(row)
    return kept


def _is_in(row: Entry | RecordError, chosen: set[str], split: str) -> bool:
    return row.values["id"] in chosen if isinstance(row, Entry) else split == "test"


DATASET = DataSet(
    title="text to image on COCO 2014",
    needs=(
        "coco_vqgan_train.tsv, coco_vqgan_dev.tsv and coco_vqgan_full_test.tsv, as OFA published "
        "them; or all of the following",
        "captions_train2014.json and captions_val2014.json",
        "codes.tsv: a line a picture of train2014 and val2014 with its number, a tab and the 1,024 "
        "codes (0..8191) that the VQGAN gives to its 256 x 256 pixels, with spaces between",
    ),
    read=read,
)
