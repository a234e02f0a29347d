"""What one row of a table or one group of members of a shard says, before anything is decoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

MEDIUM_OF_KIND = {
    "caption": "image",
    "qa": "image",
    "visual_grounding": "image",
    "visual_entailment": "image",
    "video_caption": "video",
    "video_qa": "video",
    "audio_caption": "audio",
    "image_generation": "text",
}


class RecordError(ValueError):
    """A row that cannot be used; the message names file, row and field."""

    def __init__(self, origin: Origin, field: str, problem: str) -> None:
        super().__init__(f"{origin}: field {field!r}: {problem}")
        self.origin = origin
        self.field = field
        self.problem = problem


@dataclass(frozen=True)
class Origin:
    """Where a record was read: a file and its row (0-based) or the key of a shard's sample."""

    file: str
    row: int | str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class Answer:
    """A reference answer with its confidence (the loss weight of VQA)."""

    text: str
    confidence: float = 1.0


@dataclass(frozen=True)
class Record:
    """One row. `media` holds encoded bytes or the path of a file; empty bytes where there is no
    medium.

    `kind` is one of MEDIUM_OF_KIND (the `type` column of the pretraining tables). `box` is
    (x0, y0, x1, y1) in pixels of the original picture. `captions` holds the caption, the referring
    expression (grounding) or the hypothesis (visual entailment). `unanswered` says that the
    publisher keeps the answers of this question to himself.
    """

    id: str
    kind: str
    media: bytes | Path
    origin: Origin
    captions: tuple[str, ...] = ()
    question: str = ""
    answers: tuple[Answer, ...] = ()
    box: tuple[float, float, float, float] | None = None
    objects: tuple[str, ...] = ()
    dataset: str = ""
    label: str = ""
    codes: tuple[int, ...] = ()
    unanswered: bool = False

    @property
    def medium(self) -> str:
        return MEDIUM_OF_KIND[self.kind]

    @property
    def best_answer(self) -> Answer:
        return max(self.answers, key=lambda answer: answer.confidence)

    @property
    def media_key(self) -> str:
        """The same for records that show the same medium (groups references in evaluation)."""
        if isinstance(self.media, Path):
            return str(self.media)
        return hashlib.sha256(self.media).hexdigest()
