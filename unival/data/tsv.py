"""Tables with one record a line and columns divided by tabs: the layouts of OFA and UnIVAL."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import numpy as np

from unival.data import fields
from unival.data.files import RangeReader, resolve_media
from unival.data.records import MEDIUM_OF_KIND, Origin, Record, RecordError

LAYOUTS: dict[str, tuple[str, ...]] = {
    "pretrain": ("id", "media", "caption", "question", "refs", "objects", "dataset", "kind"),
    "caption": ("id", "media_id", "captions", "objects", "media"),
    "vqa": ("id", "media_id", "question", "answers", "objects", "media"),
    "refcoco": ("id", "media_id", "text", "box", "media"),
    "snli_ve": ("id", "media_id", "media", "hypothesis", "premise", "label"),
    "image_generation": ("id", "codes", "caption"),
}
PRETRAIN_KINDS = (
    "caption",
    "qa",
    "visual_grounding",
    "video_caption",
    "video_qa",
    "audio_caption",
)
# The kind of a row follows from the layout and, where several media share a layout, the medium.
KINDS = {
    ("caption", "image"): "caption",
    ("caption", "video"): "video_caption",
    ("caption", "audio"): "audio_caption",
    ("vqa", "image"): "qa",
    ("vqa", "video"): "video_qa",
    ("refcoco", "image"): "visual_grounding",
    ("snli_ve", "image"): "visual_entailment",
}
SCAN_BYTES = 1 << 24
MAX_ROW_BYTES = 1 << 28  # a row is held in memory: a base64 picture of 200 MB is no picture
STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
PATH_ENDINGS = tuple(suffix.encode() for suffix in fields.IMAGE_SUFFIXES)


def line_starts(path: Path) -> np.ndarray:
    """int64 [lines + 1]: where each line starts, then where the last one ends.

    Blank lines at the end of the file are no lines. A last line without a newline counts.
    """
    parts = [np.zeros(1, dtype=np.int64)]
    position = 0
    with open(path, "rb") as file:
        while chunk := file.read(SCAN_BYTES):
            newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            parts.append(newlines.astype(np.int64) + position + 1)
            position += len(chunk)
        starts = np.concatenate(parts)
        if starts[-1] != position:
            starts = np.append(starts, np.int64(position))
        while len(starts) > 1 and starts[-1] - starts[-2] <= 2:
            file.seek(starts[-2])
            if file.read(int(starts[-1] - starts[-2])).strip(b"\r\n"):
                break
            starts = starts[:-1]
    return starts


class TsvTable:
    """A table of records, read a line at a time; nothing is decoded and nothing is kept.

    Args:
        path: the table.
        layout: a key of LAYOUTS.
        medium: image, video or audio: what the rows of a caption or vqa layout show. The other
            layouts say it themselves.
        media_root: the folder that media paths start from and must not leave; the table's own
            folder by default, and then no row may say an absolute path or `..`.

    `table[i]` raises RecordError (file, row, field) where a row cannot be used. Fields are taken as
    they stand: no quotes are undone, as in the original reader.
    """

    def __init__(
        self,
        path: str | Path,
        layout: str,
        medium: str = "image",
        media_root: str | Path | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        self_describing = layout in ("pretrain", "image_generation")
        if not self_describing and (layout, medium) not in KINDS:
            raise ValueError(f"layout {layout!r} has no medium {medium!r}")
        self.path = Path(path)
        self.layout = layout
        self.medium = medium
        self._root_chosen = media_root is not None
        self._root = Path(media_root if media_root is not None else self.path.parent).resolve()
        self._starts = line_starts(self.path)
        self._reader = RangeReader(self.path)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        row = range(len(self))[index]
        origin = Origin(str(self.path), row)
        columns = self._columns(row, origin)
        if self.layout == "pretrain":
            return self._pretrain(columns, origin)
        if self.layout == "image_generation":
            record = Record(
                id=self._text(columns, "id", origin, required=True),
                kind="image_generation",
                media=b"",
                origin=origin,
                captions=(self._text(columns, "caption", origin, required=True),),
                codes=fields.parse_codes(
                    self._text(columns, "codes", origin).split(), origin, "codes"
                ),
            )
            return fields.check_complete(record)
        return self._fine_tuning(columns, origin)

    def _columns(self, row: int, origin: Origin) -> dict[str, bytes]:
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        if end - start > MAX_ROW_BYTES:
            raise RecordError(origin, "row", f"{end - start} bytes; {MAX_ROW_BYTES} at most")
        values = self._reader.read(start, end - start, origin).rstrip(b"\r\n").split(b"\t")
        names = LAYOUTS[self.layout]
        if len(values) != len(names):
            raise RecordError(
                origin,
                "row",
                f"{len(values)} columns; layout {self.layout!r} has {len(names)}: "
                + ", ".join(names),
            )
        return dict(zip(names, values, strict=True))

    def _text(
        self, columns: dict[str, bytes], name: str, origin: Origin, required: bool = False
    ) -> str:
        try:
            text = columns[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(origin, name, f"not UTF-8: {error}") from error
        return fields.check_text(text, origin, name) if required else text

    def _pretrain(self, columns: dict[str, bytes], origin: Origin) -> Record:
        """Eight columns; `refs` holds the answers of a question or the box of a phrase."""
        kind = fields.check_kind(self._text(columns, "kind", origin), origin, PRETRAIN_KINDS)
        is_question = kind in ("qa", "video_qa")
        caption = self._text(columns, "caption", origin, required=not is_question)
        refs = self._text(columns, "refs", origin)
        return Record(
            id=self._text(columns, "id", origin, required=True),
            kind=kind,
            media=self._media(columns, kind, origin),
            origin=origin,
            captions=() if is_question else (caption,),
            question=self._text(columns, "question", origin, required=is_question),
            answers=fields.parse_answers(refs, origin, "refs") if is_question else (),
            box=(
                fields.make_box(refs.split(","), origin, "refs")
                if kind == "visual_grounding"
                else None
            ),
            objects=fields.split_texts(self._text(columns, "objects", origin)),
            dataset=self._text(columns, "dataset", origin),
        )

    def _fine_tuning(self, columns: dict[str, bytes], origin: Origin) -> Record:
        kind = KINDS[self.layout, self.medium]
        given: dict = {}
        if self.layout == "caption":
            texts = fields.split_texts(self._text(columns, "captions", origin))
            given["captions"] = fields.check_texts(texts, origin, "captions")
        elif self.layout == "vqa":
            given["question"] = self._text(columns, "question", origin, required=True)
            answers = self._text(columns, "answers", origin)
            given["answers"] = fields.parse_answers(answers, origin, "answers")
        elif self.layout == "refcoco":
            given["captions"] = (self._text(columns, "text", origin, required=True),)
            box = self._text(columns, "box", origin)
            given["box"] = fields.make_box(box.split(","), origin)
        else:
            given["captions"] = (self._text(columns, "hypothesis", origin, required=True),)
            given["label"] = fields.check_label(self._text(columns, "label", origin), origin)
        if "objects" in columns:
            given["objects"] = fields.split_texts(self._text(columns, "objects", origin))
        return Record(
            id=self._text(columns, "id", origin, required=True),
            kind=kind,
            media=self._media(columns, kind, origin),
            origin=origin,
            **given,
        )

    def _media(self, columns: dict[str, bytes], kind: str, origin: Origin) -> bytes | Path:
        """A path for video and audio. For an image: a path where it ends like one (base64 has no
        dot), otherwise base64 in the standard or the url-safe alphabet."""
        raw = columns["media"]
        if not raw:
            raise RecordError(origin, "media", "empty")
        if MEDIUM_OF_KIND[kind] != "image" or raw[-8:].lower().endswith(PATH_ENDINGS):
            text = self._text(columns, "media", origin)
            return resolve_media(text, self._root, self._root_chosen, origin, "media")
        standard = raw.translate(STANDARD_ALPHABET).rstrip(b"=")
        try:
            media = base64.b64decode(standard + b"=" * (-len(standard) % 4), validate=True)
        except binascii.Error as error:
            endings = ", ".join(fields.IMAGE_SUFFIXES)
            problem = f"neither base64 ({error}) nor a path ending in {endings}"
            raise RecordError(origin, "media", problem) from error
        if not media:
            raise RecordError(origin, "media", "empty")
        return media
