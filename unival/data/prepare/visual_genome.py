"""Visual Genome: regions to find, questions, and captions from the phrases of large regions."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from unival.data.fields import number
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

SMALL = 16_384  # square pixels: a smaller region is one to find, another one a caption
SHARE = 0.01  # of the pictures that are held out of training: about 1,080
FOLDERS = ("VG_100K", "VG_100K_2")
NAMES = {"regions": "region_id", "qas": "qa_id"}  # lists of a picture's items -> their ids

Make = Callable[[Any, Origin], Entry]


@dataclass
class Pictures:
    """What image_data.json says.

    files    number of a picture -> its file
    val      those held out of training
    of_coco  how many of them are pictures of COCO
    """

    files: dict[int, str]
    val: set[int]
    of_coco: int

    def file(self, item: Any, origin: Origin) -> str:
        """Of the picture that an item is about."""
        id = field_of(item, "image_id", int, origin)
        if id not in self.files:
            raise RecordError(origin, "image_id", f"image_data.json has no picture {id} of use")
        return self.files[id]

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            f"val is held out of training: {len(self.val)} of {len(self.files)} pictures",
            f"{self.of_coco} pictures are also in COCO, some of them in parts that others test on; "
            "as in the original none is left out",
        )


@dataclass(repr=False)
class Parts:
    """Items that a file lists by picture, made entries when they are read: as entries millions of
    them would not fit into memory.

    path     of the file
    content  its pictures, each with a list `name` of items
    make     reads an item
    media    the folder of pictures
    places   the picture and the place in its list of each item, one after the other
    errors   items that cannot be used, which are the last rows
    """

    path: Path
    content: list
    name: str
    make: Make
    media: Path
    places: array = field(default_factory=lambda: array("i"))
    errors: list[RecordError] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places) // 2 + len(self.errors)

    def __getitem__(self, index: int) -> Record:
        if index >= len(self.places) // 2:
            raise self.errors[index - len(self.places) // 2]
        picture, place = self.places[2 * index : 2 * index + 2]
        item = self.content[picture][self.name][place]
        return Entries(self.media, [row_of(self.make, item, self.origin(picture, place))])[0]

    def origin(self, picture: int, place: int) -> Origin:
        return Origin(str(self.path), f"[{picture}].{self.name}[{place}]")


def read_regions(source: Source) -> Prepared:
    """One row a region of fewer than 16,384 square pixels."""
    pictures = _pictures(source)

    def make(region: Any, origin: Origin) -> Entry:
        x, y, width, height = (
            number(field_of(region, name, (int, float), origin), origin, name)
            for name in ("x", "y", "width", "height")
        )
        values = {
            "id": str(field_of(region, "region_id", int, origin)),
            "kind": "visual_grounding",
            "captions": [text_of(region, "phrase", origin)],
            "box": [x, y, x + width, y + height],
            "dataset": "vg_regions",
        }
        return Entry(values, pictures.file(region, origin), origin)

    train, val = _parts(source, "region_descriptions.json", "regions", make)
    _fill(train, val, pictures, lambda region: _area(region) < SMALL)
    return Prepared({"train": train, "val": val}, (), pictures.notes)


def read_questions(source: Source) -> Prepared:
    """One row a question, with its one answer."""
    pictures = _pictures(source)

    def make(question: Any, origin: Origin) -> Entry:
        values = {
            "id": str(field_of(question, "qa_id", int, origin)),
            "kind": "qa",
            "question": text_of(question, "question", origin),
            "answers": [[1.0, text_of(question, "answer", origin).lower()]],
            "dataset": "vg_qa",
        }
        return Entry(values, pictures.file(question, origin), origin)

    train, val = _parts(source, "question_answers.json", "qas", make)
    _fill(train, val, pictures, lambda _: True)
    return Prepared({"train": train, "val": val}, (), pictures.notes)


def read_captions(source: Source) -> Prepared:
    """In training one row a region of at least 16,384 square pixels, whose phrase is a caption of
    the picture; in validation one row a picture, with all its phrases."""
    pictures = _pictures(source)

    def make(region: Any, origin: Origin) -> Entry:
        values = {
            "id": str(field_of(region, "region_id", int, origin)),
            "kind": "caption",
            "captions": [text_of(region, "phrase", origin)],
            "dataset": "vg_caption",
        }
        return Entry(values, pictures.file(region, origin), origin)

    train, parts = _parts(source, "region_descriptions.json", "regions", make)
    _fill(train, parts, pictures, lambda region: _area(region) >= SMALL)
    val = Entries(source.media, list(parts.errors))
    captions: dict[str, list[str]] = defaultdict(list)
    for index in range(len(parts.places) // 2):
        picture, place = parts.places[2 * index : 2 * index + 2]
        item, origin = parts.content[picture]["regions"][place], parts.origin(picture, place)
        row = row_of(make, item, origin)
        if isinstance(row, RecordError):
            val.add(row)
            continue
        id = str(item["image_id"])
        captions[id].extend(row.values["captions"])
        if len(captions[id]) == 1:
            values = row.values | {"id": id, "captions": captions[id]}
            val.add(Entry(values, row.media, origin))
    note = (
        f"captions are the phrases of regions of at least {SMALL} square pixels; the original took "
        "those of ALBEF's list, and how that was chosen is not public"
    )
    return Prepared({"train": train, "val": val}, (), (*pictures.notes, note))


def _pictures(source: Source) -> Pictures:
    path, content = source.json("image_data.json")
    if not isinstance(content, list):
        raise ValueError(f"{path}: no list of pictures")
    in_folders = any((source.media / folder).is_dir() for folder in FOLDERS)
    files: dict[int, str] = {}
    of_coco = 0
    for row, picture in enumerate(content):
        try:
            id, folder, name = _file(picture, Origin(str(path), row))
        except RecordError:
            continue  # what is about this picture is refused, and says so
        files[id] = f"{folder}/{name}" if in_folders else name
        of_coco += picture.get("coco_id") is not None
    val = {int(id) for id in held_out([str(id) for id in files], SHARE)}
    return Pictures(files, val, of_coco)


def _file(picture: Any, origin: Origin) -> tuple[int, str, str]:
    """A picture's number, the folder that it comes in and its name."""
    path = PurePosixPath(urlsplit(text_of(picture, "url", origin)).path)
    if path.parent.name not in FOLDERS:
        raise RecordError(origin, "url", f"its folder is none of {', '.join(FOLDERS)}")
    return field_of(picture, "image_id", int, origin), path.parent.name, path.name


def _parts(source: Source, file: str, name: str, make: Make) -> tuple[Parts, Parts]:
    """Of training and validation, both empty."""
    path, content = source.json(file)
    if not isinstance(content, list):
        raise ValueError(f"{path}: no list of pictures")
    train, val = (Parts(path, content, name, make, source.media) for _ in range(2))
    return train, val


def _fill(train: Parts, val: Parts, pictures: Pictures, wanted: Callable[[Any], bool]) -> None:
    """Share the items that are wanted out by their picture."""
    seen: set[int] = set()
    for picture, items in _lists(train):
        about = train.content[picture].get("id")
        part = val if isinstance(about, int) and about in pictures.val else train
        for place, item in enumerate(items):
            if not wanted(item):
                continue
            id = item.get(NAMES[train.name]) if isinstance(item, dict) else None
            if isinstance(id, int) and id in seen:
                problem = f"{id} is the id of an earlier row"
                part.errors.append(RecordError(part.origin(picture, place), "id", problem))
                continue
            if isinstance(id, int):
                seen.add(id)
            part.places.extend((picture, place))


def _lists(train: Parts) -> Iterator[tuple[int, list]]:
    for row, picture in enumerate(train.content):
        try:
            yield row, field_of(picture, train.name, list, Origin(str(train.path), row))
        except RecordError as error:
            train.errors.append(error)


def _area(region: Any) -> float:
    """In square pixels; 0 of one that has none, which is refused when it is read."""
    try:
        area = float(region["width"]) * float(region["height"])
    except (TypeError, ValueError, KeyError, OverflowError):
        return 0.0
    return area if math.isfinite(area) else 0.0


def _dataset(title: str, file: str, read: Callable[[Source], Prepared]) -> DataSet:
    needs = (
        f"{file} and image_data.json of Visual Genome 1.2 or 1.4",
        "the pictures, in folders VG_100K and VG_100K_2 or all in one (the media folder)",
    )
    return DataSet(title, needs, read)


REGIONS = _dataset("Visual Genome regions", "region_descriptions.json", read_regions)
QUESTIONS = _dataset("Visual Genome questions", "question_answers.json", read_questions)
CAPTIONS = _dataset("Visual Genome captions", "region_descriptions.json", read_captions)
