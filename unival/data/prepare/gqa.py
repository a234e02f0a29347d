"""GQA 1.2, balanced questions: a JSON object a split with a question for each id."""

from __future__ import annotations

from collections import Counter
from typing import Any

from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    most_frequent,
    row_of,
    text_of,
)
from unival.data.records import Origin

OPTIONAL = ("testdev", "test")


def read(source: Source) -> Prepared:
    """One row a question, with its one answer. The answers of `test` are not public."""
    splits = {"train": _table(source, "train"), "val": _table(source, "val")}
    for split in OPTIONAL:
        if source.look(f"{split}_balanced_questions.json") is not None:
            splits[split] = _table(source, split)
    counts: Counter[str] = Counter()
    for split in ("train", "val"):
        for row in splits[split].rows:
            if isinstance(row, Entry):
                counts.update(text for _, text in row.values["answers"])
    notes = (
        f"answers: all {len(counts)} of training and validation",
        "testdev has public answers and is the part to report on; those of test are not public",
    )
    return Prepared(dict(splits), most_frequent(counts, len(counts)), notes)


def _table(source: Source, split: str) -> Entries:
    path, content = source.json(f"{split}_balanced_questions.json")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no object with a question for each id")
    folder = "images/" if (source.media / "images").is_dir() else ""

    def make(item: tuple[str, Any], origin: Origin) -> Entry:
        id, question = item
        values = {
            "id": text_of({"id": id}, "id", origin),
            "kind": "qa",
            "question": text_of(question, "question", origin),
            "dataset": "gqa",
        }
        answer: dict[str, Any] = {"unanswered": True}
        if split != "test":
            answer = {"answers": [[1.0, text_of(question, "answer", origin).lower()]]}
        return Entry(values | answer, f"{folder}{text_of(question, 'imageId', origin)}.jpg", origin)

    entries = Entries(source.media)
    for row, item in enumerate(content.items()):
        entries.add(row_of(make, item, Origin(str(path), row)))
    return entries


DATASET = DataSet(
    title="GQA (balanced)",
    needs=(
        "train_balanced_questions.json and val_balanced_questions.json",
        "testdev_balanced_questions.json and test_balanced_questions.json, if wanted",
        "the pictures by their id, as 2354786.jpg, in a folder images or not (the media folder)",
    ),
    read=read,
)
