"""Tar shards in the WebDataset layout: the members of a sample share a name up to the first dot."""

from __future__ import annotations

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from unival.data import fields
from unival.data.files import RangeReader
from unival.data.records import MEDIUM_OF_KIND, Origin, Record, RecordError

MAX_JSON_BYTES = 1 << 20
MAX_MEDIA_BYTES = 1 << 30
MAX_SHARDS = 1_000_000
MEDIA_SUFFIXES = {
    "image": fields.IMAGE_SUFFIXES,
    "video": fields.VIDEO_SUFFIXES,
    "audio": (*fields.AUDIO_SUFFIXES, ".mp4", ".webm"),  # a film's sound
}
SUFFIXES = tuple(dict.fromkeys(itertools.chain(*MEDIA_SUFFIXES.values())))
NONE = -1
SAMPLE = np.dtype(
    [
        ("shard", np.int32),
        ("json_start", np.int64),
        ("json_size", np.int64),
        ("media_start", np.int64),
        ("media_size", np.int64),
        ("suffix", np.int16),
    ]
)


def expand(pattern: str | Path) -> list[Path]:
    """The files of a pattern: numbers as `{000000..000012}`, and `*`, `?`, `[...]`; sorted.

    Raises:
        FileNotFoundError: nothing matches, or a file of the range is missing.
    """
    text = str(pattern)
    ranges = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if ranges:
        first, last = ranges.groups()
        if not 0 <= int(last) - int(first) < MAX_SHARDS:
            raise ValueError(f"{text}: range {ranges.group()} is empty or above {MAX_SHARDS}")
        names = [
            text[: ranges.start()] + str(i).zfill(len(first)) + text[ranges.end() :]
            for i in range(int(first), int(last) + 1)
        ]
        return [path for name in names for path in expand(name)]
    if Path(text).is_file():
        return [Path(text)]
    found = [Path(name) for name in sorted(glob.glob(text))]
    if not found:
        raise FileNotFoundError(f"no shard matches {text}")
    return found


def members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix, offset of the data, size) of every file in a tar, in order.

    Raises:
        RecordError: the tar is damaged, or holds a link, a device or anything else but files and
            folders.
    """
    total = path.stat().st_size
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                origin = Origin(str(path), member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise RecordError(origin, "member", "a link, a device or a sparse file")
                if member.size < 0 or member.offset_data + member.size > total:
                    raise RecordError(origin, "member", "cut off: its data ends after the file")
                name = PurePosixPath(member.name)
                stem, dot, suffix = name.name.partition(".")
                yield str(name.parent / stem), (dot + suffix).lower(), *_span(member)
    except tarfile.TarError as error:
        raise RecordError(Origin(str(path), "headers"), "tar", str(error)) from error


def _span(member: tarfile.TarInfo) -> tuple[int, int]:
    return member.offset_data, member.size


class TarShards:
    """Records of uncompressed tars, found by their headers, read at random by seeking.

    A sample is a run of members with one key: `<key>.json` with the fields `kind`, `captions`,
    `question`, `answers` ([[confidence, text], ...]), `box`, `objects`, `dataset`, `label`, `codes`
    and `id` (the key by default), and one media member. Members with other suffixes are passed by.
    The index holds 34 bytes a sample and the keys. Nothing is unpacked to disk, so the names in a
    tar are never paths.

    Args:
        paths: one tar or pattern (see `expand`), or several of them.

    `shards[i]` raises RecordError (file, key, field) where a sample cannot be used.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        patterns = [paths] if isinstance(paths, str | Path) else paths
        self.paths = [path for pattern in patterns for path in expand(pattern)]
        self._readers = [RangeReader(path) for path in self.paths]
        samples, keys = [], []
        for shard in range(len(self.paths)):
            for key, sample in self._scan(shard):
                samples.append(sample)
                keys.append(key.encode("utf-8", "surrogateescape"))
        self._samples = np.array(samples, dtype=SAMPLE)
        # One blob, because a million Python strings would be copied into every forked worker.
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)

    def _scan(self, shard: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        grouped = itertools.groupby(members(self.paths[shard]), key=lambda member: member[0])
        for key, group in grouped:
            text, media, kind = (NONE, 0), (NONE, 0), NONE
            for _, suffix, start, size in group:
                if suffix == ".json":
                    self._once(text, shard, key, "json")
                    text = (start, size)
                elif suffix in SUFFIXES:
                    self._once(media, shard, key, "media")
                    media, kind = (start, size), SUFFIXES.index(suffix)
            if text != (NONE, 0) or media != (NONE, 0):
                yield key, (shard, *text, *media, kind)

    def _once(self, span: tuple[int, int], shard: int, key: str, field: str) -> None:
        if span != (NONE, 0):
            origin = Origin(str(self.paths[shard]), key)
            raise RecordError(origin, field, "two members in one sample")

    def __len__(self) -> int:
        return len(self._samples)

    def _key(self, row: int) -> str:
        start = int(self._key_ends[row - 1]) if row else 0
        return self._keys[start : int(self._key_ends[row])].decode("utf-8", "replace")

    def __getitem__(self, index: int) -> Record:
        row = range(len(self))[index]
        sample = self._samples[row]
        origin = Origin(str(self.paths[sample["shard"]]), self._key(row))
        values = self._fields(sample, origin)
        kind = fields.check_kind(_text(values, "kind", origin), origin)
        record = Record(
            id=_text(values, "id", origin) or str(origin.row),
            kind=kind,
            media=self._media(sample, kind, origin),
            origin=origin,
            captions=_texts(values, "captions", origin),
            question=_text(values, "question", origin),
            answers=_answers(values, origin),
            box=_box(values, origin),
            objects=_texts(values, "objects", origin),
            dataset=_text(values, "dataset", origin),
            label=_text(values, "label", origin),
            codes=_codes(values, origin),
        )
        if record.label:
            fields.check_label(record.label, origin)
        return fields.check_complete(record)

    def _fields(self, sample: np.void, origin: Origin) -> dict:
        if sample["json_start"] == NONE:
            raise RecordError(origin, "json", "the sample has no .json member")
        size = int(sample["json_size"])
        if size > MAX_JSON_BYTES:
            raise RecordError(origin, "json", f"{size} bytes; {MAX_JSON_BYTES} at most")
        raw = self._readers[sample["shard"]].read(int(sample["json_start"]), size, origin)
        try:
            values = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise RecordError(origin, "json", str(error)) from error
        if not isinstance(values, dict):
            raise RecordError(origin, "json", "not an object of fields")
        return values

    def _media(self, sample: np.void, kind: str, origin: Origin) -> bytes:
        medium = MEDIUM_OF_KIND[kind]
        if medium == "text":
            return b""
        suffixes = MEDIA_SUFFIXES[medium]
        if sample["suffix"] == NONE or SUFFIXES[sample["suffix"]] not in suffixes:
            raise RecordError(origin, "media", f"no member ending in {', '.join(suffixes)}")
        size = int(sample["media_size"])
        if not 0 < size <= MAX_MEDIA_BYTES:
            raise RecordError(origin, "media", f"{size} bytes; 1 to {MAX_MEDIA_BYTES} allowed")
        return self._readers[sample["shard"]].read(int(sample["media_start"]), size, origin)


def _text(values: dict, field: str, origin: Origin) -> str:
    value = values.get(field, "")
    if not isinstance(value, str):
        raise RecordError(origin, field, f"{type(value).__name__}; a string is needed")
    return value


def _list(values: dict, field: str, origin: Origin) -> list:
    value = values.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordError(origin, field, f"{type(value).__name__}; a list is needed")
    return value


def _texts(values: dict, field: str, origin: Origin) -> tuple[str, ...]:
    texts = _list(values, field, origin)
    if not all(isinstance(text, str) for text in texts):
        raise RecordError(origin, field, "not a list of strings")
    return fields.check_texts(tuple(texts), origin, field) if texts else ()


def _answers(values: dict, origin: Origin) -> tuple:
    answers = []
    for pair in _list(values, "answers", origin):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], str):
            raise RecordError(origin, "answers", "not a list of [confidence, answer]")
        answers.append(fields.make_answer(pair[0], pair[1], origin, "answers"))
    return tuple(answers)


def _box(values: dict, origin: Origin) -> fields.Box | None:
    box = _list(values, "box", origin)
    return fields.make_box(box, origin) if box else None


def _codes(values: dict, origin: Origin) -> tuple[int, ...]:
    codes = _list(values, "codes", origin)
    return fields.parse_codes(codes, origin, "codes") if codes else ()
