"""SNLI-VE: a JSON object a line with a hypothesis on a picture of Flickr30K."""

from __future__ import annotations

from typing import Any

from unival.data.fields import LABELS
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
from unival.data.shards import MAX_JSON_BYTES, parse_object

FILES = {"train": "train", "val": "dev", "test": "test"}
FOLDERS = ("flickr30k_images", "flickr30k-images")
NO_LABEL = "-"


def read(source: Source) -> Prepared:
    """One row a pair of picture and hypothesis. The premise, a caption, is not kept: the task shows
    the picture in its place."""
    folder = next((f"{name}/" for name in FOLDERS if (source.media / name).is_dir()), "")

    def make(line: bytes, origin: Origin) -> Entry:
        if len(line) > MAX_JSON_BYTES:
            raise RecordError(origin, "line", f"more than {MAX_JSON_BYTES} bytes")
        return _entry(parse_object(line, origin), folder, origin)

    splits = {split: Entries(source.media) for split in FILES}
    for split, name in FILES.items():
        path = source.find(f"snli_ve_{name}.jsonl")
        with open(path, "rb") as lines:
            for row, line in enumerate(lines):
                if line.strip():
                    splits[split].add(row_of(make, line, Origin(str(path), row)))
    return Prepared(dict(splits))


def _entry(pair: Any, folder: str, origin: Origin) -> Entry:
    label = text_of(pair, "gold_label", origin)
    if label == NO_LABEL:
        raise RecordError(origin, "gold_label", "'-': those who labelled it did not agree")
    if label not in LABELS:
        raise RecordError(origin, "gold_label", f"{label!r} is none of {', '.join(LABELS)}")
    picture = str(field_of(pair, "Flickr30K_ID", (str, int), origin))
    file = text_of({"Flickr30K_ID": f"{picture}.jpg"}, "Flickr30K_ID", origin)
    values = {
        "id": text_of(pair, "pairID", origin),
        "kind": "visual_entailment",
        "captions": [text_of(pair, "sentence2", origin)],
        "label": label,
        "dataset": "snli_ve",
    }
    return Entry(values, folder + file, origin)


DATASET = DataSet(
    title="SNLI-VE",
    needs=(
        "snli_ve_train.jsonl, snli_ve_dev.jsonl and snli_ve_test.jsonl",
        "*.jpg of Flickr30K, in a folder flickr30k_images or not (the media folder)",
    ),
    read=read,
)
