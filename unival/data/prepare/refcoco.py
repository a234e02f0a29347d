"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions of objects in pictures of COCO 2014."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unival.data.fields import number
from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    field_of,
    text_of,
)
from unival.data.records import Origin, RecordError

UNC_SPLITS = ("train", "val", "testA", "testB")
UMD_SPLITS = ("train", "val", "test")


def read(source: Source, name: str, refs: str, splits: Sequence[str]) -> Prepared:
    """One row for each expression.

    Args:
        name: of the folder that may hold the files, and the `dataset` of the rows.
        refs: the file of expressions.
        splits: that it has.
    """
    path, references = source.pickle(refs, f"{name}/{refs}")
    if not isinstance(references, list):
        raise ValueError(f"{path}: no list of referred objects")
    instances_path, content = source.json("instances.json", f"{name}/instances.json")
    boxes = _by_id(content, "annotations", instances_path)
    pictures = _by_id(content, "images", instances_path)
    tables = {split: Entries(source.media) for split in splits}
    for row, reference in enumerate(references):
        origin = Origin(str(path), row)
        try:
            split = field_of(reference, "split", str, origin)
            if split not in tables:
                raise RecordError(origin, "split", f"{split!r} is none of {', '.join(splits)}")
        except RecordError as error:
            tables["train"].add(error)
            continue
        for entry in _rows(reference, boxes, pictures, name, origin):
            tables[split].add(entry)
    return Prepared(dict(tables))


def _by_id(content: Any, name: str, path: Path) -> dict[int, dict]:
    items = field_of(content, name, list, Origin(str(path), "file"))
    good = [item for item in items if isinstance(item, dict) and isinstance(item.get("id"), int)]
    return {item["id"]: item for item in good}


def _rows(
    reference: dict,
    boxes: dict[int, dict],
    pictures: dict[int, dict],
    name: str,
    origin: Origin,
) -> list[Entry | RecordError]:
    """The rows of an object; one error where nothing of it can be used."""
    try:
        annotation = _named(reference, "ann_id", boxes, "annotation", origin)
        picture = _named(reference, "image_id", pictures, "image", origin)
        if annotation.get("image_id") != picture["id"]:
            problem = f"annotation {annotation['id']} is of {annotation.get('image_id')!r:.40}"
            raise RecordError(origin, "image_id", problem)
        file = f"train2014/{text_of(picture, 'file_name', origin)}"
        box = corners(field_of(annotation, "bbox", list, origin), origin)
        sentences = field_of(reference, "sentences", list, origin)
    except RecordError as error:
        return [error]
    rows: list[Entry | RecordError] = []
    for sentence in sentences:
        try:
            values = {
                "id": str(field_of(sentence, "sent_id", int, origin)),
                "kind": "visual_grounding",
                "captions": [text_of(sentence, "raw", origin)],
                "box": box,
                "dataset": name,
            }
            rows.append(Entry(values, file, origin))
        except RecordError as error:
            rows.append(error)
    return rows


def _named(reference: dict, name: str, items: dict[int, dict], what: str, origin: Origin) -> dict:
    id = field_of(reference, name, int, origin)
    if id not in items:
        raise RecordError(origin, name, f"instances.json has no {what} {id}")
    return items[id]


def corners(bbox: Sequence[Any], origin: Origin) -> list[float]:
    """x0, y0, x1, y1 of x, y, width, height in pixels, with two decimals."""
    if len(bbox) != 4:
        raise RecordError(origin, "bbox", f"{len(bbox)} numbers; x, y, width, height are needed")
    x, y, width, height = (number(value, origin, "bbox") for value in bbox)
    return [round(value, 2) for value in (x, y, x + width, y + height)]


def _dataset(title: str, name: str, refs: str, splits: Sequence[str]) -> DataSet:
    reader: Callable[[Source], Prepared] = partial(read, name=name, refs=refs, splits=splits)
    needs = (
        f"{refs} and instances.json, or both in a folder {name}",
        "train2014/*.jpg of COCO 2014 (the media folder)",
    )
    return DataSet(title, needs, reader)


REFCOCO = _dataset("RefCOCO (UNC split)", "refcoco", "refs(unc).p", UNC_SPLITS)
REFCOCO_PLUS = _dataset("RefCOCO+ (UNC split)", "refcoco+", "refs(unc).p", UNC_SPLITS)
REFCOCOG = _dataset("RefCOCOg (UMD split)", "refcocog", "refs(umd).p", UMD_SPLITS)
