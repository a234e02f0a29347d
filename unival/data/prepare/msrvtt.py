"""MSR-VTT: captions, and the questions of MSRVTT-QA, a file format that MSVD-QA has too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    MediaFiles,
    Prepared,
    Source,
    field_of,
    most_frequent,
    row_of,
    text_of,
)
from unival.data.prepare.vqav2 import outside_note
from unival.data.records import Origin, RecordError

SPLITS = {"train": "train", "validate": "val", "test": "test"}
TRAIN_VAL = "train_val_videodatainfo.json"
TEST = "test_videodatainfo.json"
ALL = "MSRVTT_data.json"  # both in one
FOLDERS = (
    "",
    "all",
    "videos",
    "videos/all",
    "TrainValVideo",
    "TestVideo",
    "train-video",
    "test-video",
)
NUM_ANSWERS = 4_000


def read_captions(source: Source) -> Prepared:
    """Training has a row for each caption, validation and test one for each film."""
    splits = {split: Entries(source.media) for split in SPLITS.values()}
    files = MediaFiles(source.media, "video", FOLDERS)
    reader = _Captions(splits, files)
    for path, content, split in _contents(source):
        reader.read(path, content, split)
    notes = (
        "val is the part `validate`; the original trained on train and validate, by the name of "
        "its table, and chose its checkpoint on test",
    )
    return Prepared(dict(splits), (), notes)


def _contents(source: Source) -> Iterator[tuple[Path, Any, str]]:
    """(path, content, split of what says none itself) of the publisher's files."""
    first = source.find(TRAIN_VAL, f"*/{TRAIN_VAL}", ALL, f"*/{ALL}")
    yield *source.json(str(first.relative_to(source.folder))), "train"
    if first.name != ALL:
        yield *source.json(TEST, f"*/{TEST}"), "test"


class _Captions:
    """Fills splits with the sentences about films; errors that tell no split go to the file's."""

    def __init__(self, splits: dict[str, Entries], files: MediaFiles) -> None:
        self._splits, self._files = splits, files
        self._film_splits: dict[str, str] = {}
        self._captions: dict[str, list[str]] = {}  # of the films of val and test
        self._sentences: set[int] = set()

    def read(self, path: Path, content: Any, split: str) -> None:
        videos = field_of(content, "videos", list, Origin(str(path), "file"))
        sentences = field_of(content, "sentences", list, Origin(str(path), "file"))
        for name, items, add in (
            ("videos", videos, self._film),
            ("sentences", sentences, self._sentence),
        ):
            for row, item in enumerate(items):
                try:
                    add(item, Origin(str(path), f"{name}[{row}]"))
                except RecordError as error:
                    self._splits[split].add(error)

    def _film(self, video: Any, origin: Origin) -> None:
        id = text_of(video, "video_id", origin)
        if id in self._film_splits:
            raise RecordError(origin, "video_id", f"{id!r} is the id of an earlier film")
        said = field_of(video, "split", str, origin)
        if said not in SPLITS:
            raise RecordError(origin, "split", f"{said!r} is none of {', '.join(SPLITS)}")
        split = self._film_splits[id] = SPLITS[said]
        if split != "train":
            self._captions[id] = []
            self._add(split, id, id, self._captions[id], origin)

    def _sentence(self, sentence: Any, origin: Origin) -> None:
        number = field_of(sentence, "sen_id", int, origin)
        id = text_of(sentence, "video_id", origin)
        if id not in self._film_splits:
            raise RecordError(origin, "video_id", f"{id!r} is in no entry of `videos`")
        if number in self._sentences:
            raise RecordError(origin, "sen_id", f"{number} is the id of an earlier sentence")
        self._sentences.add(number)
        caption = text_of(sentence, "caption", origin)
        if id in self._captions:
            self._captions[id].append(caption)
        else:
            self._add("train", str(number), id, [caption], origin)

    def _add(self, split: str, id: str, film: str, captions: list[str], origin: Origin) -> None:
        values = {"id": id, "kind": "video_caption", "captions": captions, "dataset": "msrvtt"}
        self._splits[split].add(Entry(values, self._files.find(film), origin))


def read_questions(source: Source) -> Prepared:
    """One row a question, with its one answer."""
    files = MediaFiles(source.media, "video", FOLDERS)
    return video_questions(source, "msrvtt_qa", NUM_ANSWERS, lambda n: files.find(f"video{n}"))


def video_questions(
    source: Source, dataset: str, num_answers: int, film: Callable[[int], str]
) -> Prepared:
    """What `train_qa.json`, `val_qa.json` and `test_qa.json` hold: lists of objects with id,
    question, answer and video_id.

    Args:
        dataset: that the rows name.
        num_answers: candidates where the option `answers` says nothing.
        film: the path of a film from the media folder.
    """
    count = _positive(source.options.get("answers", str(num_answers)))

    def make(item: Any, origin: Origin) -> Entry:
        values = {
            "id": str(field_of(item, "id", int, origin)),
            "kind": "video_qa",
            "question": text_of(item, "question", origin),
            "answers": [[1.0, text_of(item, "answer", origin)]],
            "dataset": dataset,
        }
        return Entry(values, film(field_of(item, "video_id", int, origin)), origin)

    splits = {part: Entries(source.media) for part in ("train", "val", "test")}
    for part, entries in splits.items():
        path, content = source.json(f"{part}_qa.json", f"*/{part}_qa.json")
        if not isinstance(content, list):
            raise ValueError(f"{path}: no list of questions")
        for row, item in enumerate(content):
            entries.add(row_of(make, item, Origin(str(path), row)))
    counts = _answer_counts(splits["train"])
    answers = most_frequent(counts, count)
    known = set(answers)
    outside = {
        part: sum(n for text, n in _answer_counts(splits[part]).items() if text not in known)
        for part in ("val", "test")
    }
    notes = (
        f"answers: the {len(answers)} most frequent of {len(counts)} in training; the original's "
        "list is of training and validation, by its name",
        outside_note(splits["train"], answers),
        f"{outside['val']} val and {outside['test']} test rows have no answer among the "
        "candidates; they stay and count as wrong. The original seems to have left out such rows, "
        "of test too",
    )
    return Prepared(dict(splits), answers, notes)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"answers={text}: how many candidate answers, at least 1")
    return int(text)


def _answer_counts(entries: Entries) -> Counter[str]:
    rows = (row for row in entries.rows if isinstance(row, Entry))
    return Counter(row.values["answers"][0][1] for row in rows)


ANSWERS_OPTION = "how many of the most frequent training answers are candidates"
FILMS = (
    "the films as video0.mp4, all in one folder or in TrainValVideo and TestVideo (the media "
    "folder)"
)
CAPTIONS = DataSet(
    title="MSR-VTT captions",
    needs=(f"{TRAIN_VAL} and {TEST}, or {ALL}", FILMS),
    read=read_captions,
)
QUESTIONS = DataSet(
    title="MSRVTT-QA",
    needs=("train_qa.json, val_qa.json and test_qa.json", FILMS),
    read=read_questions,
    options={"answers": f"{ANSWERS_OPTION} ({NUM_ANSWERS})"},
)
