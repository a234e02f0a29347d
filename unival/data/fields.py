"""What the fields of a record must look like, whichever file they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable

from unival.data.records import MEDIUM_OF_KIND, Answer, Origin, Record, RecordError
from unival.vocabulary import NUM_CODES

SEPARATOR = "&&"
CONFIDENCE_MARK = "|!+"
LABELS = ("entailment", "neutral", "contradiction")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
AUDIO_SUFFIXES = (".ogg", ".wav", ".flac", ".mp3", ".m4a", ".opus")

Box = tuple[float, float, float, float]


def split_texts(text: str) -> tuple[str, ...]:
    """The parts of `a&&b`; () of an empty text."""
    return tuple(text.split(SEPARATOR)) if text else ()


def check_kind(kind: str, origin: Origin, allowed: Iterable[str] = MEDIUM_OF_KIND) -> str:
    if kind not in allowed:
        raise RecordError(origin, "kind", f"unknown kind {kind!r}; known: {', '.join(allowed)}")
    return kind


def check_text(text: str, origin: Origin, field: str) -> str:
    if not text.strip():
        raise RecordError(origin, field, "empty text")
    return text


def check_texts(texts: tuple[str, ...], origin: Origin, field: str) -> tuple[str, ...]:
    if not texts:
        raise RecordError(origin, field, "empty text")
    for text in texts:
        check_text(text, origin, field)
    return texts


def check_label(label: str, origin: Origin) -> str:
    if label not in LABELS:
        raise RecordError(origin, "label", f"{label!r} is none of {', '.join(LABELS)}")
    return label


def number(value: object, origin: Origin, field: str) -> float:
    """A finite number from a text or a JSON number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordError(origin, field, f"{value!r} is not a number")
    try:
        result = float(value)
    except (ValueError, OverflowError) as error:
        raise RecordError(origin, field, f"{str(value)[:40]!r} is not a number") from error
    if not math.isfinite(result):
        raise RecordError(origin, field, f"{result} is not finite")
    return result


def make_box(values: Iterable[object], origin: Origin, field: str = "box") -> Box:
    """(x0, y0, x1, y1) in pixels: top left and bottom right, from four texts or numbers."""
    corners = tuple(number(value, origin, field) for value in values)
    if len(corners) != 4:
        raise RecordError(origin, field, f"{len(corners)} numbers; a box has 4: x0,y0,x1,y1")
    x0, y0, x1, y1 = corners
    if min(corners) < 0:
        raise RecordError(origin, field, f"negative coordinate in {corners}")
    if x1 <= x0 or y1 <= y0:
        raise RecordError(origin, field, f"empty box {corners}; x0 < x1 and y0 < y1 are needed")
    return x0, y0, x1, y1


def make_answer(confidence: object, text: str, origin: Origin, field: str) -> Answer:
    value = number(confidence, origin, field)
    if value < 0:
        raise RecordError(origin, field, f"negative confidence {value}")
    return Answer(check_text(text, origin, field), value)


def parse_answers(text: str, origin: Origin, field: str) -> tuple[Answer, ...]:
    """Answers written as `confidence|!+answer`, several joined by `&&`."""
    check_text(text, origin, field)
    answers = []
    for part in text.split(SEPARATOR):
        confidence, mark, answer = part.partition(CONFIDENCE_MARK)
        if not mark:
            raise RecordError(origin, field, f"{part[:40]!r} is not `confidence|!+answer`")
        answers.append(make_answer(confidence, answer, origin, field))
    return tuple(answers)


def parse_codes(values: Iterable[str | int], origin: Origin, field: str) -> tuple[int, ...]:
    """Codes of an image, each 0..8191."""
    codes = []
    for value in values:
        code = number(value, origin, field)
        if not 0 <= code < NUM_CODES or code != int(code):
            raise RecordError(origin, field, f"{value!r} is not a code (0..{NUM_CODES - 1})")
        codes.append(int(code))
    if not codes:
        raise RecordError(origin, field, "no codes")
    return tuple(codes)


def check_complete(record: Record) -> Record:
    """Refuse a record that lacks what its kind needs."""
    needed = {
        "qa": ("question", "answers"),
        "video_qa": ("question", "answers"),
        "visual_grounding": ("captions", "box"),
        "visual_entailment": ("captions", "label"),
        "image_generation": ("captions", "codes"),
    }.get(record.kind, ("captions",))
    for field in needed:
        if field in ("answers", "codes") and record.unanswered:
            continue
        value = getattr(record, field)
        if not value or (isinstance(value, str) and not value.strip()):
            problem = f"missing or empty; a {record.kind} record needs it"
            raise RecordError(record.origin, field, problem)
    return record
