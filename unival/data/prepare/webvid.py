"""WebVid: captions of stock footage (2M or 10M), and WebVidVQA3M, questions made from them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from unival.data.prepare.base import (
    CsvRows,
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    field_of,
    text_of,
)
from unival.data.records import Origin, Record, RecordError

COLUMNS = ("videoid", "page_dir", "name")
ID_DIGITS = 18  # of a number that fits into 64 bits
NO_ID = -1


class Videos:
    """The rows of `results_*.csv`: what the videos are called and where they lie. The rows are read
    when they are asked for, for there may be ten million; 17 bytes of each are held."""

    def __init__(self, rows: CsvRows, media: Path) -> None:
        self.rows = rows
        self._media = media
        self._root = _root(media)
        self._order, self._ids = _sorted_ids(rows)
        self._repeated = np.zeros(len(rows), dtype=bool)
        same = (self._ids[1:] == self._ids[:-1]) & (self._ids[1:] != NO_ID)
        self._repeated[self._order[1:][same]] = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row, origin = self.rows[index], self.rows.origin(index)
        id = video_id(row["videoid"], origin)
        if self._repeated[index]:
            raise RecordError(origin, "videoid", f"{id} is the id of an earlier row")
        values = {
            "id": str(id),
            "kind": "video_caption",
            "captions": [text_of(row, "name", origin)],
            "dataset": "webvid",
        }
        return Entries(self._media, [Entry(values, self._file(row, id), origin)])[0]

    def file(self, id: int) -> str | None:
        """The path of a video from the media folder; None where no row has this id."""
        place = int(np.searchsorted(self._ids, id))
        if place == len(self._ids) or self._ids[place] != id:
            return None
        return self._file(self.rows[int(self._order[place])], id)

    def _file(self, row: dict[str, str], id: int) -> str:
        """In the folder that the row names or, without it, in the folder of all videos."""
        place = Path(self._root, row["page_dir"].strip(), f"{id}.mp4")
        try:
            there = (self._media / place).is_file()
        except (OSError, ValueError):  # a name that is too long, or holds a NUL
            there = False
        flat = Path(self._root, f"{id}.mp4")
        return str(flat if not there and (self._media / flat).is_file() else place)


def _root(media: Path) -> str:
    return "videos" if (media / "videos").is_dir() else ""


def _sorted_ids(rows: CsvRows) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] twice: the rows in order of their ids, and these ids; NO_ID where there is none."""
    ids = np.full(len(rows), NO_ID, dtype=np.int64)
    for row in range(len(rows)):
        try:
            ids[row] = video_id(rows[row]["videoid"], rows.origin(row))
        except RecordError:
            continue  # said when the row is read
    order = np.argsort(ids, kind="stable")
    return order, ids[order]


def video_id(text: str, origin: Origin) -> int:
    """The number of a video; RecordError where the text is none."""
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= ID_DIGITS):
        raise RecordError(origin, "videoid", f"{text:.40} is not the number of a video")
    return int(text)


def read_captions(source: Source, size: str) -> Prepared:
    """One row a video, in training and in validation.

    Args:
        size: `2M` or `10M`.
    """
    splits = {part: _videos(source, f"results_{size}_{part}.csv") for part in ("train", "val")}
    return Prepared(dict(splits), (), ("WebVid has no test part",))


def _videos(source: Source, name: str) -> Videos:
    return Videos(source.csv_rows(name, columns=COLUMNS), source.media)


@dataclass
class Questions:
    """The questions about some videos, made records when they are read.

    path    of the file that they come from
    content  what it says of each video: lists `question` and `answer`
    names   of videos
    places  the number of a name and the place in its lists of each question, one after the other
    errors  what cannot be used, which are the last rows
    file    the path of a video from the media folder
    media   the media folder
    """

    path: Path
    content: dict
    names: list[str]
    places: array
    errors: list[RecordError]
    file: Callable[[str, Origin], str]
    media: Path

    def __len__(self) -> int:
        return len(self.places) // 2 + len(self.errors)

    def __getitem__(self, index: int) -> Record:
        if index >= len(self.places) // 2:
            raise self.errors[index - len(self.places) // 2]
        name, place = self.names[self.places[2 * index]], self.places[2 * index + 1]
        origin = Origin(str(self.path), f"{name}[{place}]")
        pair = {part: self.content[name][part][place] for part in ("question", "answer")}
        values = {
            "id": f"{name}-{place}",
            "kind": "video_qa",
            "question": text_of(pair, "question", origin),
            "answers": [[1.0, text_of(pair, "answer", origin)]],
            "dataset": "webvidqa",
        }
        return Entries(self.media, [Entry(values, self.file(name, origin), origin)])[0]


def read_questions(source: Source) -> Prepared:
    """One row a question, with its one answer; all answers count, so there are no candidates.

    The pickle is held in memory, as it cannot be read in parts.
    """
    path, content = source.pickle("webvidvqa.pkl", "webvidqa.pkl")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no dictionary with the questions of each video")
    splits = {part: _questions(source, path, content, part) for part in ("train", "val")}
    return Prepared(dict(splits), (), ("WebVidVQA3M has no test part",))


def _questions(source: Source, path: Path, content: dict, part: str) -> Questions:
    """Of the videos that the CSV file of a part lists."""
    rows = source.csv_rows(f"{part}_webvidvqa.csv", columns=("video_id",))
    names: list[str] = []
    errors: list[RecordError] = []
    places = array("i")
    seen: set[str] = set()
    for row in range(len(rows)):
        origin = rows.origin(row)
        try:
            name = str(video_id(rows[row]["video_id"], origin))
            if name in seen:
                raise RecordError(origin, "video_id", f"{name} is the id of an earlier row")
            seen.add(name)
            count = _count(content, name, path)
        except RecordError as error:
            errors.append(error)
            continue
        for place in range(count):
            places.extend((len(names), place))
        names.append(name)
    file = _files(source, part)
    return Questions(path, content, names, places, errors, file, source.media)


def _count(content: dict, name: str, path: Path) -> int:
    """How many questions a video has."""
    origin = Origin(str(path), name)
    if name not in content:
        raise RecordError(origin, "video_id", "no questions about this video")
    questions = field_of(content[name], "question", list, origin)
    answers = field_of(content[name], "answer", list, origin)
    if len(questions) != len(answers):
        problem = f"{len(questions)} questions and {len(answers)} answers"
        raise RecordError(origin, "answer", problem)
    return len(questions)


def _files(source: Source, part: str) -> Callable[[str, Origin], str]:
    """Where videos lie: as `results_2M_*.csv` says where it is there, else all in one folder."""
    name = f"results_2M_{part}.csv"
    if source.look(name) is None:
        root = _root(source.media)
        return lambda name, origin: str(Path(root, f"{name}.mp4"))
    videos = _videos(source, name)

    def file(name: str, origin: Origin) -> str:
        found = videos.file(int(name))
        if found is None:
            raise RecordError(origin, "video_id", f"{videos.rows.path} has no video {name}")
        return found

    return file


MEDIA = (
    "the videos as PAGE_DIR/VIDEOID.mp4 or VIDEOID.mp4, in a folder videos or not (the media "
    "folder)"
)


def _dataset(size: str) -> DataSet:
    return DataSet(
        title=f"WebVid-{size}",
        needs=(f"results_{size}_train.csv and results_{size}_val.csv", MEDIA),
        read=partial(read_captions, size=size),
    )


WEBVID_2M = _dataset("2M")
WEBVID_10M = _dataset("10M")
WEBVID_QA = DataSet(
    title="WebVidVQA3M",
    needs=(
        "webvidvqa.pkl, train_webvidvqa.csv and val_webvidvqa.csv of Just Ask",
        "results_2M_train.csv and results_2M_val.csv, where the videos lie in folders PAGE_DIR",
        MEDIA,
    ),
    read=read_questions,
)
