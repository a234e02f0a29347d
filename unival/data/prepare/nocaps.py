"""nocaps: the captions of its validation part, and pictures of Open Images."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    field_of,
    row_of,
    text_of,
)
from unival.data.records import Origin, RecordError

DOMAINS = {"in-domain": "in_domain", "near-domain": "near_domain", "out-domain": "out_domain"}


def read(source: Source) -> Prepared:
    """One row a picture: all of them in `test`, and again in the split of their domain."""
    path, content = source.json("nocaps_val_4500_captions.json", "nocaps_val*.json")
    images = field_of(content, "images", list, Origin(str(path), "file"))
    annotations = field_of(content, "annotations", list, Origin(str(path), "file"))
    splits = {name: Entries(source.media) for name in ("test", *DOMAINS.values())}
    captions: dict[int, list[str]] = defaultdict(list)
    for row, annotation in enumerate(annotations):
        origin = Origin(str(path), f"annotations[{row}]")
        try:
            image = field_of(annotation, "image_id", int, origin)
            captions[image].append(text_of(annotation, "caption", origin))
        except RecordError as error:
            splits["test"].add(error)
    folder = "val/" if (source.media / "val").is_dir() else ""

    def make(image: Any, origin: Origin) -> Entry:
        id = field_of(image, "id", int, origin)
        domain = field_of(image, "domain", str, origin)
        if domain not in DOMAINS:
            raise RecordError(origin, "domain", f"{domain!r} is none of {', '.join(DOMAINS)}")
        values = {"id": str(id), "kind": "caption", "captions": captions.get(id, [])}
        file = text_of(image, "file_name", origin)
        return Entry(values | {"dataset": "nocaps"}, folder + file, origin)

    for row, image in enumerate(images):
        splits["test"].add(row_of(make, image, Origin(str(path), f"images[{row}]")))
        added = splits["test"].rows[-1]
        if isinstance(added, Entry):  # its id is new
            splits[DOMAINS[image["domain"]]].add(added)
    notes = (
        "test is the public validation part, which papers report on; nocaps has no training part, "
        "so there is none to hold a validation part out of",
    )
    return Prepared({name: table for name, table in splits.items() if len(table)}, (), notes)


DATASET = DataSet(
    title="nocaps",
    needs=(
        "nocaps_val_4500_captions.json",
        "the pictures by their file_name, in a folder val or not (the media folder)",
    ),
    read=read,
)
