"""COCO captions, Karpathy's split: `dataset_coco.json` and the pictures of COCO 2014."""

from __future__ import annotations

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

# Karpathy gives the part of val2014 that nobody evaluates on back to training.
SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read(source: Source) -> Prepared:
    """Training has a row for each caption, validation and test one for each picture.

    With the option `pictures`, the split train_pictures has the training pictures with all their
    captions: what self-critical training rewards by.
    """
    path, content = source.json("dataset_coco.json")
    splits = {name: Entries(source.media) for name in ("train", "val", "test")}
    pictures = Entries(source.media)
    images = field_of(content, "images", list, Origin(str(path), "file"))
    for number, image in enumerate(images):
        origin = Origin(str(path), f"images[{number}]")
        try:
            split, rows = _image(image, origin)
        except RecordError as error:
            split, rows = "train", [error]
        for row in rows:
            splits[split].add(row)
        good = [row for row in rows if isinstance(row, Entry)]
        if split == "train" and good:
            captions = [text for row in good for text in row.values["captions"]]
            values = good[0].values | {"id": str(image["cocoid"]), "captions": captions}
            pictures.add(Entry(values, good[0].media, origin))
    if "pictures" in source.options:
        splits["train_pictures"] = pictures
    return Prepared(dict(splits))


def _image(image: object, origin: Origin) -> tuple[str, list[Entry | RecordError]]:
    """The split of a picture and its rows; a caption that cannot be used is a row of its own."""
    said = field_of(image, "split", str, origin)
    if said not in SPLITS:
        raise RecordError(origin, "split", f"{said!r} is none of {', '.join(SPLITS)}")
    split = SPLITS[said]
    file = f"{text_of(image, 'filepath', origin)}/{text_of(image, 'filename', origin)}"
    number = str(field_of(image, "cocoid", int, origin))
    captions: dict[str, str] = {}
    rows: list[Entry | RecordError] = []
    for place, sentence in enumerate(field_of(image, "sentences", list, origin)):
        try:
            captions[f"{number}-{place}"] = text_of(sentence, "raw", origin)
        except RecordError as error:
            rows.append(error)
    groups = {id: [text] for id, text in captions.items()}
    if split != "train":
        groups = {number: list(captions.values())}
    for id, group in groups.items():
        values = {"id": id, "kind": "caption", "captions": group, "dataset": "coco"}
        rows.append(Entry(values, file, origin))
    return split, rows


DATASET = DataSet(
    title="COCO captions (Karpathy's split)",
    needs=(
        "dataset_coco.json of Karpathy's caption_datasets.zip",
        "train2014/*.jpg and val2014/*.jpg of COCO 2014 (the media folder)",
    ),
    read=read,
    options={"pictures": "any value: write train_pictures too, a row a picture"},
)
