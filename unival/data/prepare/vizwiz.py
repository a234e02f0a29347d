"""VizWiz-VQA: a JSON list of questions a split, and its pictures."""

from __future__ import annotations

from typing import Any

from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    row_of,
    text_of,
)
from unival.data.prepare.vqav2 import best_answers, human_answers, soft_answers, spread
from unival.data.records import Origin, RecordError


def read(source: Source) -> Prepared:
    """One row a picture, for each has one question; the picture's name is its id."""
    train, val, test = (Entries(source.media) for _ in range(3))
    spread(_rows(source, "train"), train, val)
    for row in _rows(source, "val"):
        test.add(row)
    splits = {"train": train, "val": val, "test": test}
    if source.look("test.json", "Annotations/test.json") is not None:
        splits["challenge"] = Entries(source.media)
        for row in _rows(source, "test"):
            splits["challenge"].add(row)
    answers = best_answers(train, val, test)
    notes = (
        "test is val.json, which papers report on; val is 5% of the pictures of train.json; "
        "challenge is test.json, whose answers are not public",
        f"answers: the {len(answers)} best of a question of train.json or val.json; the original "
        "takes its candidates from both too",
    )
    return Prepared(dict(splits), answers, notes)


def _rows(source: Source, part: str) -> list[Entry | RecordError]:
    path, content = source.json(f"{part}.json", f"Annotations/{part}.json")
    if not isinstance(content, list):
        raise ValueError(f"{path}: no list of questions")
    folder = f"{part}/" if (source.media / part).is_dir() else ""

    def make(item: Any, origin: Origin) -> Entry:
        image = text_of(item, "image", origin)
        question = text_of(item, "question", origin)
        values: dict[str, Any] = {"id": image, "kind": "qa", "question": question}
        values["dataset"] = "vizwiz"
        if part == "test":
            values["unanswered"] = True
        else:
            values["answers"] = soft_answers(human_answers(item, origin))
        return Entry(values, folder + image, origin)

    return [row_of(make, item, Origin(str(path), number)) for number, item in enumerate(content)]


DATASET = DataSet(
    title="VizWiz-VQA",
    needs=(
        "train.json and val.json of Annotations.zip, and test.json, if wanted",
        "VizWiz_*.jpg, in folders train, val and test or all in one (the media folder)",
    ),
    read=read,
)
