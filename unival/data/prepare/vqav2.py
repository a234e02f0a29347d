"""VQAv2: questions and annotations of its 2014 and 2015 files, and the pictures of COCO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    field_of,
    held_out,
    most_frequent,
    row_of,
    text_of,
)
from unival.data.records import Origin, RecordError
from unival.evaluation.vqa import normalize_answer

MIN_COUNT = 9  # questions that a candidate answer is the majority's answer of: 3,129 answers
UNANSWERED = {"test": "test2015", "testdev": "test-dev2015"}


def read(source: Source) -> Prepared:
    """One row a question. The test questions have no public answers."""
    train, val = Entries(source.media), Entries(source.media)
    majority: Counter[str] = Counter()
    for row in coco_questions(source, "v2_", "train2014", "vqav2", majority):
        train.add(row)
    validation = coco_questions(source, "v2_", "val2014", "vqav2", majority)
    spread(validation, train, val)
    splits = {"train": train, "val": val}
    for split, part in UNANSWERED.items():
        path = source.look(f"v2_OpenEnded_mscoco_{part}_questions.json")
        if path is not None:
            splits[split] = _unanswered(source, path)
    normalised: Counter[str] = Counter()
    for text, count in majority.items():
        normalised[normalize_answer(text)] += count
    frequent = {text: n for text, n in normalised.items() if n >= MIN_COUNT and text}
    answers = most_frequent(frequent, len(frequent))
    notes = (
        f"training is train2014 and val2014 but {len(val)} questions on 5% of the pictures of "
        "val2014, which are val",
        f"answers: {len(answers)} that are the most frequent answer of at least {MIN_COUNT} "
        "questions of train2014 and val2014, as the official evaluation normalises them; the empty "
        "answer, which that makes of an article, is none",
        outside_note(train, answers),
        "the questions of Visual Genome that the original adds to training are vg_qa",
    )
    return Prepared(dict(splits), answers, notes)


def _unanswered(source: Source, path: Path) -> Entries:
    _, content = source.json(path.name)
    entries = Entries(source.media)

    def make(question: Any, origin: Origin) -> Entry:
        values, media = _question(question, "test2015", "vqav2", origin)
        return Entry(values | {"unanswered": True}, media, origin)

    for number, question in enumerate(_list(content, "questions", path)):
        entries.add(row_of(make, question, Origin(str(path), f"questions[{number}]")))
    return entries


def coco_questions(
    source: Source,
    prefix: str,
    part: str,
    dataset: str,
    majority: Counter[str] | None = None,
) -> list[Entry | RecordError]:
    """The rows of a pair of files `OpenEnded_mscoco_PART_questions.json` and
    `mscoco_PART_annotations.json`.

    Args:
        prefix: before these names, as `v2_`.
        part: of COCO, as `train2014`.
        majority: counts the `multiple_choice_answer` of every annotation.
    """
    path, questions = source.json(f"{prefix}OpenEnded_mscoco_{part}_questions.json")
    annotations_path, content = source.json(f"{prefix}mscoco_{part}_annotations.json")
    rows: list[Entry | RecordError] = []
    annotations: dict[int, dict] = {}
    for number, annotation in enumerate(_list(content, "annotations", annotations_path)):
        origin = Origin(str(annotations_path), f"annotations[{number}]")
        try:
            id = field_of(annotation, "question_id", int, origin)
            if id in annotations:
                raise RecordError(origin, "question_id", f"{id} is that of an earlier annotation")
            if majority is not None:
                majority[field_of(annotation, "multiple_choice_answer", str, origin)] += 1
            annotations[id] = annotation
        except RecordError as error:
            rows.append(error)

    def make(question: Any, origin: Origin) -> Entry:
        values, media = _question(question, part, dataset, origin)
        annotation = annotations.get(question["question_id"])
        if annotation is None:
            raise RecordError(origin, "question_id", f"{values['id']} has no annotation")
        if annotation.get("image_id") != question["image_id"]:
            problem = f"{question['image_id']}; the annotation says {annotation.get('image_id')!r}"
            raise RecordError(origin, "image_id", problem)
        values["answers"] = soft_answers(human_answers(annotation, origin))
        return Entry(values, media, origin)

    for number, question in enumerate(_list(questions, "questions", path)):
        rows.append(row_of(make, question, Origin(str(path), f"questions[{number}]")))
    return rows


def _list(content: Any, name: str, path: Path) -> list:
    items: list = field_of(content, name, list, Origin(str(path), "file"))
    return items


def _question(question: Any, part: str, dataset: str, origin: Origin) -> tuple[dict, str]:
    id = field_of(question, "question_id", int, origin)
    values = {
        "id": str(id),
        "kind": "qa",
        "question": text_of(question, "question", origin),
        "dataset": dataset,
    }
    return values, coco_picture(part, field_of(question, "image_id", int, origin))


def coco_picture(part: str, image_id: int) -> str:
    """`train2014/COCO_train2014_000000000009.jpg`."""
    return f"{part}/COCO_{part}_{image_id:012}.jpg"


def human_answers(annotation: Any, origin: Origin) -> list[str]:
    """What each person answered, in the official normal form, which predictions are compared in;
    "" where one answered nothing."""
    texts = []
    for answer in field_of(annotation, "answers", list, origin):
        is_blank = not field_of(answer, "answer", str, origin).strip()
        texts.append("" if is_blank else normalize_answer(text_of(answer, "answer", origin)))
    if not any(texts):
        raise RecordError(origin, "answers", "no one answered")
    return texts


def soft_answers(answers: Sequence[str]) -> list[list]:
    """[confidence, answer] of each distinct answer of ten people, best first.

    The confidence is the official accuracy of the answer: min(1, others who say it / 3), where
    each of the ten people is left out once. The mean of that is 0.3, 0.6, 0.9 and 1 for one, two,
    three and more people.
    """
    counts = Counter(filter(None, answers))
    ordered = sorted(counts, key=lambda text: (-counts[text], text))
    return [[min(10, 3 * counts[text]) / 10, text] for text in ordered]


def spread(rows: Iterable[Entry | RecordError], train: Entries, val: Entries) -> None:
    """Add the rows of 5% of the media to `val`, the other rows to `train`."""
    rows = list(rows)
    chosen = held_out([row.media for row in rows if isinstance(row, Entry)])
    for row in rows:
        (val if isinstance(row, Entry) and row.media in chosen else train).add(row)


def best_answers(*tables: Entries) -> tuple[str, ...]:
    """The answers of the highest confidence of each question, those of most questions first."""
    counts: Counter[str] = Counter()
    for table in tables:
        for row in table.rows:
            if isinstance(row, Entry):
                answers = row.values["answers"]
                counts.update(text for confidence, text in answers if confidence == answers[0][0])
    return most_frequent(counts, len(counts))


def outside_note(train: Entries, answers: Sequence[str]) -> str:
    """How many rows of training have no answer among the candidates."""
    known = set(answers)
    outside = sum(
        not any(text in known for _, text in row.values["answers"])
        for row in train.rows
        if isinstance(row, Entry)
    )
    return f"{outside} training rows have no answer among the candidates; they stay"


DATASET = DataSet(
    title="VQAv2",
    needs=(
        "v2_OpenEnded_mscoco_{train2014,val2014}_questions.json",
        "v2_mscoco_{train2014,val2014}_annotations.json",
        "v2_OpenEnded_mscoco_{test2015,test-dev2015}_questions.json, if wanted",
        "train2014/*.jpg, val2014/*.jpg and test2015/*.jpg of COCO (the media folder)",
    ),
    read=read,
)
