"""COCO captions, Karpathy's split: `dataset_coco.json` and the pictures of COCO 2014."""

from __future__ import annotations

from unival.data.prepare.base import DataSet, Entries, Entry, Prepared, Source, field_of
from unival.data.records import Origin, RecordError

# Karpathy gives the part of val2014 that nobody evaluates on back to training.
SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read(source: Source) -> Prepared:
    """Training has a row for each caption, validation and test one for each picture."""
    path, content = source.json("dataset_coco.json")
    splits = {name: Entries(source.media) for name in ("train", "val", "test")}
    images = field_of(content, "images", list, Origin(str(path), "file"))
    for number, image in enumerate(images):
        origin = Origin(str(path), f"images[{number}]")
        try:
            split, entries = _image(image, origin)
        except RecordError as error:
            splits["train"].rows.append(error)
            continue
        splits[split].rows.extend(entries)
    return Prepared(dict(splits))


def _image(image: object, origin: Origin) -> tuple[str, list[Entry]]:
    said = field_of(image, "split", str, origin)
    if said not in SPLITS:
        raise RecordError(origin, "split", f"{said!r} is none of {', '.join(SPLITS)}")
    split = SPLITS[said]
    folder = field_of(image, "filepath", str, origin)
    file = f"{folder}/{field_of(image, 'filename', str, origin)}"
    number = str(field_of(image, "cocoid", int, origin))
    sentences = field_of(image, "sentences", list, origin)
    captions = [field_of(sentence, "raw", str, origin).strip() for sentence in sentences]
    groups = [[caption] for caption in captions] if split == "train" else [captions]
    entries = []
    for place, group in enumerate(groups):
        id = f"{number}-{place}" if split == "train" else number
        values = {"id": id, "kind": "caption", "captions": group, "dataset": "coco"}
        entries.append(Entry(values, file, origin))
    return split, entries


DATASET = DataSet(
    title="COCO captions (Karpathy's split)",
    needs=(
        "dataset_coco.json of Karpathy's caption_datasets.zip",
        "train2014/*.jpg and val2014/*.jpg of COCO 2014 (the media folder)",
    ),
    read=read,
)
