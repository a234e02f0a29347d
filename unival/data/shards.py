"""Tar shards in the WebDataset layout: the members of a sample share a name up to the first dot."""

from __future__ import annotations

import glob
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from unival.data import fields
from unival.data.files import RangeReader
from unival.data.records import MEDIUM_OF_KIND, Origin, Record, RecordError

MAX_JSON_BYTES = 1 << 20
MAX_MEDIA_BYTES = 1 << 30
MAX_SHARDS = 1_000_000
MAX_NAME_BYTES = 1024
MAX_EXTENSION_BYTES = 1 << 16  # of a header that holds a long name or attributes
MAX_INDEX_LINE = 1 << 14
BLOCK = 512  # tars are made of blocks of this many bytes
MEDIA_SUFFIXES = {
    "image": fields.IMAGE_SUFFIXES,
    "video": fields.VIDEO_SUFFIXES,
    "audio": (*fields.AUDIO_SUFFIXES, ".mp4", ".webm"),  # a film's sound
}
SUFFIXES = tuple(dict.fromkeys(itertools.chain(*MEDIA_SUFFIXES.values())))
NONE = -1
ABSENT = (NONE, 0, NONE)
SAMPLE = np.dtype(
    [
        ("shard", np.int32),
        ("json_start", np.int64),
        ("json_size", np.int64),
        ("json_crc32", np.int64),
        ("media_start", np.int64),
        ("media_size", np.int64),
        ("media_crc32", np.int64),
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


class Member(NamedTuple):
    """One file in a tar. `key` and `suffix` are its name up to and from the first dot, `crc32` is
    NONE where no index knows it."""

    key: str
    suffix: str
    offset: int
    size: int
    crc32: int


def members(path: Path) -> Iterator[Member]:
    """Every file in a tar, in order, by its headers alone; the data are passed over.

    Not by `tarfile`: that reads an extension header of any claimed size into memory, and recurses
    once for each of a chain of them.

    Raises:
        RecordError: the tar is damaged or cut off; a member is a link, a device, sparse or anything
            else but a file or folder, or its name is absolute, has `..`, control characters or more
            than MAX_NAME_BYTES; an extension header is longer than MAX_EXTENSION_BYTES.
    """
    total = path.stat().st_size
    extended: dict[bytes, bytes] = {}  # what headers before a member say of it
    offset = 0
    with open(path, "rb") as file:
        while True:
            file.seek(offset)
            block = file.read(BLOCK)
            origin = Origin(str(path), f"byte {offset}")
            if len(block) < BLOCK:
                raise RecordError(origin, "tar", "cut off: there is no end mark")
            if not any(block):
                return
            kind, name, size = _header(block, origin)
            start = offset + BLOCK
            if kind in b"xgL":
                extension = _extension(file, kind, size, origin)
                extended |= {} if kind == b"g" else extension
                offset = start + _padded(size)
                continue
            name = extended.get(b"path", name)
            origin = Origin(str(path), _safe_name(name, origin))
            size = _decimal(extended[b"size"], origin) if b"size" in extended else size
            sparse = any(key.startswith(b"GNU.sparse") for key in extended)
            extended = {}
            is_folder = kind == b"5" or (kind in b"0\0" and name.endswith(b"/"))
            if sparse or not (is_folder or kind in b"07\0"):
                raise RecordError(origin, "member", "a link, a device or a sparse file")
            if is_folder:
                offset = start
                continue
            if start + size > total:
                raise RecordError(origin, "member", "cut off: its data ends after the file")
            yield Member(*_split_name(str(origin.row)), start, size, NONE)
            offset = start + _padded(size)


def _header(block: bytes, origin: Origin) -> tuple[bytes, bytes, int]:
    """(type, name, size) of a header block."""
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _octal(block[148:156], origin) != checksum:
        raise RecordError(origin, "tar", "no header where one is due: damaged, or not a plain tar")
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":  # GNU tar has other things in its place
        name = prefix + b"/" + name
    return block[156:157], name, _octal(block[124:136], origin)


def _octal(field: bytes, origin: Origin) -> int:
    """A number of a header: octal digits, or bytes marked by the first one."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if digits and not re.fullmatch(b"[0-7]+", digits):
        raise RecordError(origin, "tar", f"{field!r} in a header is no size or checksum")
    return int(digits or b"0", 8)


def _decimal(digits: bytes, origin: Origin) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", digits):
        raise RecordError(origin, "tar", f"size {digits[:40]!r} is not a number")
    return int(digits)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _extension(file: IO[bytes], kind: bytes, size: int, origin: Origin) -> dict[bytes, bytes]:
    """The attributes in an extension header: GNU tar's long name, or records `LENGTH KEY=VALUE`."""
    if size > MAX_EXTENSION_BYTES:
        problem = f"an extension header of {size} bytes; {MAX_EXTENSION_BYTES} at most"
        raise RecordError(origin, "tar", problem)
    data = file.read(size)
    if kind == b"L":
        return {b"path": data.split(b"\0")[0]}
    values, position = {}, 0
    while position < len(data):
        length = re.compile(rb"([0-9]{1,6}) ").match(data, position)
        record = data[length.end() : position + int(length[1])] if length else b""
        key, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n":
            raise RecordError(origin, "tar", "a damaged extension header")
        values[key] = value
        position += int(length[1]) if length else 0
    return values


def _safe_name(raw: bytes, origin: Origin) -> str:
    """A member's name; never used as a path, but a shard that tries is no shard to read."""
    shown = repr(raw[:80].decode("utf-8", "backslashreplace"))
    if len(raw) > MAX_NAME_BYTES:
        problem = f"name {shown}... has {len(raw)} bytes; {MAX_NAME_BYTES} at most"
        raise RecordError(origin, "member", problem)
    name = raw.decode("utf-8", "surrogateescape")
    if name.startswith("/") or ".." in name.split("/") or any(ord(c) < 32 for c in name):
        problem = f"name {shown} is absolute, or has '..' or control characters"
        raise RecordError(origin, "member", problem)
    return name


def _split_name(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.parent / stem), (dot + suffix).lower()


def index_path(tar: Path) -> Path:
    """`train-000000.index.jsonl` of `train-000000.tar`."""
    return tar.with_suffix(".index.jsonl")


def write_index(tar: Path, index: IO[bytes]) -> int:
    """Write where the members of `tar` lie and the CRC-32 of each; returns how many there are.

    The first line holds the tar's size, the number of members and the CRC-32 of the lines that
    follow: one a member, with `key`, `suffix`, `offset`, `size` and `crc32`.
    """
    lines = []
    with open(tar, "rb") as file:
        for member in members(tar):
            crc32, left = 0, member.size
            file.seek(member.offset)
            while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                crc32 = zlib.crc32(chunk, crc32)
                left -= len(chunk)
            lines.append(json.dumps(member._replace(crc32=crc32)._asdict()) + "\n")
    body = "".join(lines).encode()
    head = {"tar_bytes": tar.stat().st_size, "members": len(lines), "crc32": zlib.crc32(body)}
    index.write(json.dumps(head).encode() + b"\n" + body)
    return len(lines)


def indexed_members(tar: Path) -> Iterator[Member]:
    """What `members` gives, read from the tar's index.

    Raises:
        RecordError: the index is damaged or is of another tar.
    """
    path = index_path(tar)
    total = tar.stat().st_size
    crc32 = count = 0
    with open(path, "rb") as lines:
        head = _index_line(lines.readline(MAX_INDEX_LINE), path, 0, ("tar_bytes", "members"))
        if head["tar_bytes"] != total:
            raise _misfit(path, 0, f"of a tar of {head['tar_bytes']} bytes; {tar} has {total}")
        while line := lines.readline(MAX_INDEX_LINE):
            count += 1
            crc32 = zlib.crc32(line, crc32)
            values = _index_line(line, path, count, ("offset", "size"))
            key, suffix = values.get("key"), values.get("suffix")
            if not isinstance(key, str) or not isinstance(suffix, str):
                raise _misfit(path, count, "key or suffix is no text")
            _safe_name((key + suffix).encode("utf-8", "replace"), Origin(str(path), count))
            if values["offset"] + values["size"] > total:
                raise _misfit(path, count, f"member {key!r} ends after the tar")
            yield Member(key, suffix, values["offset"], values["size"], values["crc32"])
    if (count, crc32) != (head["members"], head["crc32"]):
        raise _misfit(path, count, f"damaged: {count} lines of {head['members']}, or crc32")


def _index_line(line: bytes, path: Path, row: int, numbers: tuple[str, ...]) -> dict:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _misfit(path, row, f"no JSON: {error}") from error
    names = (*numbers, "crc32")
    good = isinstance(values, dict) and all(type(values.get(n)) is int for n in names)
    if not good or min(values[n] for n in names) < 0:
        raise _misfit(path, row, f"no object with numbers {', '.join(names)}")
    return values


def _misfit(path: Path, row: int, problem: str) -> RecordError:
    advice = "remove the index, or write it anew with `unival data shard TAR`"
    return RecordError(Origin(str(path), row), "index", f"{problem}; {advice}")


class TarShards:
    """Records of uncompressed tars, found by an index or their headers, read by seeking.

    A sample is a run of members with one key: `<key>.json` with the fields `kind`, `captions`,
    `question`, `answers` ([[confidence, text], ...]), `box`, `objects`, `dataset`, `label`,
    `codes`, `unanswered` (true: the answers are not public) and `id` (the key by default), and one
    media member. Members with other suffixes are passed by.
    54 bytes a sample and the keys are held in memory. Nothing is unpacked to disk, so the names in
    a tar are never paths.

    Where `NAME.index.jsonl` lies beside `NAME.tar` (see `write_index`), the tar is not scanned, and
    every member that is read is checked against its CRC-32.

    Args:
        paths: one tar or pattern (see `expand`), or several of them.

    `shards[i]` raises RecordError (file, key, field) where a sample cannot be used.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        patterns = [paths] if isinstance(paths, str | Path) else paths
        self.paths = [path for pattern in patterns for path in expand(pattern)]
        self._readers = [RangeReader(path) for path in self.paths]
        # Arrays, because a million Python objects would be copied into every forked worker.
        samples, blobs, lengths = [], [], []
        for shard in range(len(self.paths)):
            keys, found = [], []
            for key, sample in self._scan(shard):
                keys.append(key.encode("utf-8", "surrogateescape"))
                found.append(sample)
            samples.append(np.array(found, dtype=SAMPLE))
            blobs.append(b"".join(keys))
            lengths.append(np.array([len(key) for key in keys], dtype=np.int64))
        self._samples = np.concatenate(samples)
        self._keys = b"".join(blobs)
        self._key_ends = np.cumsum(np.concatenate(lengths))

    def _scan(self, shard: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        path = self.paths[shard]
        found = indexed_members(path) if index_path(path).exists() else members(path)
        seen = set()
        for key, group in itertools.groupby(found, key=lambda member: member.key):
            origin = Origin(str(path), key)
            if key in seen:
                raise RecordError(origin, "member", "the key again: its members must be together")
            seen.add(key)
            text, media, kind = ABSENT, ABSENT, NONE
            for member in group:
                span = (member.offset, member.size, member.crc32)
                if member.suffix == ".json":
                    text = _once(text, span, origin, "json")
                elif member.suffix in SUFFIXES:
                    media = _once(media, span, origin, "media")
                    kind = SUFFIXES.index(member.suffix)
            if text != ABSENT or media != ABSENT:
                yield key, (shard, *text, *media, kind)

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, row: int) -> str:
        """What the names of the sample's members begin with."""
        start = int(self._key_ends[row - 1]) if row else 0
        return self._keys[start : int(self._key_ends[row])].decode("utf-8", "replace")

    def __getitem__(self, index: int) -> Record:
        row = range(len(self))[index]
        sample = self._samples[row]
        origin = Origin(str(self.paths[sample["shard"]]), self.key(row))
        record = make_record(self._fields(sample, origin), origin)
        return replace(record, media=self._media(sample, record.kind, origin))

    def _fields(self, sample: np.void, origin: Origin) -> dict:
        if sample["json_start"] == NONE:
            raise RecordError(origin, "json", "the sample has no .json member")
        size = int(sample["json_size"])
        if size > MAX_JSON_BYTES:
            raise RecordError(origin, "json", f"{size} bytes; {MAX_JSON_BYTES} at most")
        return parse_object(self._read(sample, "json", origin), origin)

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
        return self._read(sample, "media", origin)

    def _read(self, sample: np.void, member: str, origin: Origin) -> bytes:
        start, size = int(sample[f"{member}_start"]), int(sample[f"{member}_size"])
        data = self._readers[sample["shard"]].read(start, size, origin)
        expected = int(sample[f"{member}_crc32"])
        if expected != NONE and zlib.crc32(data) != expected:
            problem = f"crc32 {zlib.crc32(data)}; the index says {expected}: the data has changed"
            raise RecordError(origin, member, problem)
        return data


def _once(
    earlier: tuple[int, int, int], span: tuple[int, int, int], origin: Origin, field: str
) -> tuple[int, int, int]:
    if earlier != ABSENT:
        raise RecordError(origin, field, "two members in one sample")
    return span


def parse_object(text: bytes, origin: Origin) -> dict:
    """The object in a JSON text; RecordError where there is none."""
    try:
        values = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(origin, "json", str(error)) from error
    if not isinstance(values, dict):
        raise RecordError(origin, "json", "not an object of fields")
    return values


def make_record(values: dict, origin: Origin) -> Record:
    """A record without its medium from the fields of a sample's `.json` (see TarShards)."""
    record = Record(
        id=_text(values, "id", origin) or str(origin.row),
        kind=fields.check_kind(_text(values, "kind", origin), origin),
        media=b"",
        origin=origin,
        captions=_texts(values, "captions", origin),
        question=_text(values, "question", origin),
        answers=_answers(values, origin),
        box=_box(values, origin),
        objects=_texts(values, "objects", origin),
        dataset=_text(values, "dataset", origin),
        label=_text(values, "label", origin),
        codes=_codes(values, origin),
        unanswered=values.get("unanswered") is True,
    )
    if record.label:
        fields.check_label(record.label, origin)
    return fields.check_complete(record)


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
