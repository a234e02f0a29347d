"""Writing tables, folders and COCO annotations as tar shards with an index."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from unival.data import fields
from unival.data.files import resolve_media
from unival.data.records import Origin, Record, RecordError
from unival.data.shards import (
    MAX_JSON_BYTES,
    MEDIA_SUFFIXES,
    index_path,
    make_record,
    parse_object,
    write_index,
)
from unival.data.tools.inputs import MEDIA, Rows, files_below
from unival.data.tools.running import claim, progress, stamp
from unival.data.tsv import TsvTable
from unival.data_gpu.errors import DecodeError, require_content
from unival.data_gpu.limits import Limits
from unival.files import finished_file, write_json

CAPTION_KINDS = {"image": "caption", "video": "video_caption", "audio": "audio_caption"}
MAX_BYTES = 1 << 30  # of a shard where nothing is said
SIGNATURES = (  # of the pictures that tables hold without a name, and where they start
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x89PNG\r\n\x1a\n", ".png"),
    (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"),
    (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"),
    (8, b"WEBP", ".webp"),
)


class Table(Protocol):
    """Records by number; table[i] raises RecordError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class FolderTable:
    """Media with a text of the same name beside each: `.txt`, a caption a line, or `.json`, the
    fields of a shard's sample (see TarShards; `kind` is captioning by default)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = files_below(folder, tuple(MEDIA))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path = self.files[index]
        name = path.relative_to(self.folder)
        origin = Origin(str(self.folder), str(name))
        media = resolve_media(str(name), self.folder.resolve(), False, origin, "media")
        values: dict[str, Any] = {
            "kind": CAPTION_KINDS[MEDIA[path.suffix.lower()]],
            "id": str(name.with_suffix("")),
        }
        if path.with_suffix(".json").is_file():
            values |= parse_object(_sidecar(path.with_suffix(".json"), origin), origin)
        elif path.with_suffix(".txt").is_file():
            text = _sidecar(path.with_suffix(".txt"), origin)
            try:
                lines = text.decode("utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise RecordError(origin, "captions", f"not UTF-8: {error}") from error
            values["captions"] = [line.strip() for line in lines if line.strip()]
        else:
            problem = f"neither {path.stem}.txt nor {path.stem}.json beside it"
            raise RecordError(origin, "captions", problem)
        return replace(make_record(values, origin), media=media)


def _sidecar(path: Path, origin: Origin) -> bytes:
    with open(path, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise RecordError(origin, path.suffix[1:], f"more than {MAX_JSON_BYTES} bytes")
    return text


class CocoTable:
    """Annotations as in COCO: `images`, `annotations` with `caption` or `bbox`, `categories`.

    An image's captions make one record; each bbox one of visual grounding, with the annotation's
    caption or its category's name. The file is held in memory as a whole.
    """

    def __init__(self, path: Path, media_root: Path | None) -> None:
        self.path = path
        self._chosen = media_root is not None
        self._root = (media_root or path.parent).resolve()
        data = parse_object(path.read_bytes(), Origin(str(path), "file"))
        for name in ("images", "annotations"):
            if not isinstance(data.get(name), list):
                raise ValueError(f"{path}: no list {name!r}, so these are no COCO annotations")
        self._annotations = data["annotations"]
        self._files = _by_id(data["images"], "file_name")
        self._categories = _by_id(data.get("categories", []), "name")
        captions: dict[str, list[int]] = {}
        for number, annotation in enumerate(self._annotations):
            has_box = not isinstance(annotation, dict) or "bbox" in annotation
            group = f"box {number}" if has_box else f"image {annotation.get('image_id')!r}"
            captions.setdefault(group, []).append(number)
        self._groups = list(captions.values())

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Record:
        numbers = self._groups[index]
        origin = Origin(str(self.path), f"annotations[{numbers[0]}]")
        first = self._annotations[numbers[0]]
        if not isinstance(first, dict):
            raise RecordError(origin, "annotations", "not an object")
        image = str(first.get("image_id"))
        if image not in self._files:
            raise RecordError(origin, "image_id", f"no image {image} with a file_name")
        media = resolve_media(self._files[image], self._root, self._chosen, origin, "file_name")
        values: dict[str, Any] = {"id": image, "kind": "caption"}
        texts = [self._annotations[number].get("caption") for number in numbers]
        if "bbox" in first:
            values["id"] = f"{image}-{first.get('id', numbers[0])}"
            values["kind"] = "visual_grounding"
            values["box"] = _corners(first["bbox"], origin)
            texts = [texts[0] or self._categories.get(str(first.get("category_id")))]
        values["captions"] = texts
        return replace(make_record(values, origin), media=media)


def _by_id(entries: object, field: str) -> dict[str, str]:
    entries = entries if isinstance(entries, list) else []
    good = [e for e in entries if isinstance(e, dict) and isinstance(e.get(field), str)]
    return {str(entry.get("id")): entry[field] for entry in good}


def _corners(bbox: object, origin: Origin) -> list[float]:
    """From COCO's x, y, width, height."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise RecordError(origin, "bbox", "not a list of x, y, width, height")
    x, y, width, height = (fields.number(value, origin, "bbox") for value in bbox)
    return [x, y, x + width, y + height]


class Sample(NamedTuple):
    """A row's members: (suffix, data)."""

    row: int
    members: tuple[tuple[str, bytes], ...]

    @property
    def size(self) -> int:
        return sum(len(data) for _, data in self.members)


def make_sample(row: int, record: Record) -> Sample:
    """Raises RecordError where the medium cannot be read or has no known format."""
    values: dict[str, Any] = {"id": record.id, "kind": record.kind}
    optional = "captions question box objects dataset label codes unanswered"
    for name in optional.split():
        if getattr(record, name):
            values[name] = getattr(record, name)
    if record.answers:
        values["answers"] = [[answer.confidence, answer.text] for answer in record.answers]
    text = json.dumps(values, ensure_ascii=False).encode("utf-8")
    if len(text) > MAX_JSON_BYTES:
        raise RecordError(record.origin, "json", f"{len(text)} bytes; {MAX_JSON_BYTES} at most")
    members = [(".json", text)]
    if record.medium != "text":
        members.append(_medium(record))
    return Sample(row, tuple(members))


def _medium(record: Record) -> tuple[str, bytes]:
    media, origin = record.media, record.origin
    if isinstance(media, bytes):
        suffix = next((s for at, mark, s in SIGNATURES if media.startswith(mark, at)), None)
        if suffix is None:
            raise RecordError(origin, "media", "not a picture of a known format")
        return suffix, media
    suffix = media.suffix.lower()
    if suffix not in MEDIA_SUFFIXES[record.medium]:
        known = ", ".join(MEDIA_SUFFIXES[record.medium])
        raise RecordError(origin, "media", f"{media}: ends in none of {known}")
    try:
        require_content(media, Limits())
        return suffix, media.read_bytes()
    except DecodeError as error:
        raise RecordError(origin, "media", str(error)) from error
    except OSError as error:
        raise RecordError(origin, "media", f"{media}: {error.strerror}") from error


@dataclass
class Made:
    """What is finished: shards and their samples, the row that comes next, and bad rows with the
    bytes that their report has."""

    shards: int = 0
    samples: int = 0
    row: int = 0
    bad: int = 0
    bad_bytes: int = 0


def write_shards(
    tables: Sequence[Table],
    out: Path,
    name: str,
    settings: dict,
    samples_per_shard: int | None = None,
    max_bytes: int | None = None,
) -> Made:
    """Write `NAME-000000.tar` and so on, each with its index; the same rows give the same bytes.

    Bad rows are left out and said in `NAME.bad.jsonl`. An interrupted run goes on with the shard
    that comes next: `NAME.shards.json` says what is finished, `NAME.options.json` made from what.

    Args:
        settings: says what the shards are made from; a run goes on only with the same.
        samples_per_shard: samples of a shard.
        max_bytes: of a shard's members; a sample above that has a shard of its own. MAX_BYTES where
            neither is said.

    Raises:
        ValueError: the folder holds shards of that name which are made from something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = out / f"{name}.shards.json"
    other = next(out.glob(f"{name}-[0-9]*.tar"), None)
    if other is not None and not state.exists():
        raise ValueError(f"{other} is there already; name another --out, or remove it")
    if samples_per_shard is None and max_bytes is None:
        max_bytes = MAX_BYTES
    settings = settings | {"samples_per_shard": samples_per_shard, "max_bytes": max_bytes}
    claim(out / f"{name}.options.json", settings)
    made = Made(**json.loads(state.read_text("utf-8"))) if state.exists() else Made()
    write_json(state, vars(made))
    total = sum(len(table) for table in tables)
    with open(out / f"{name}.bad.jsonl", "ab") as bad:
        bad.truncate(made.bad_bytes)
        rows = itertools.islice(_records(tables), made.row, None)
        rest = progress(_samples(rows, made, bad), total - made.row, "shard")
        samples = (sample for sample in rest if sample is not None)
        sample = next(samples, None)
        while sample is not None:
            with finished_file(out / f"{name}-{made.shards:06}.tar") as part:
                count, sample = _write_tar(part, sample, samples, samples_per_shard, max_bytes)
                # The index is there before the tar is, so that a tar that is there is finished.
                with (
                    finished_file(index_path(out / f"{name}-{made.shards:06}.tar")) as index,
                    open(index, "wb") as file,
                ):
                    write_index(part, file)
            made.shards, made.samples = made.shards + 1, made.samples + count
            if sample is not None:
                made.row = sample.row
                os.fsync(bad.fileno())
                write_json(state, vars(made))
        made.row = total
        os.fsync(bad.fileno())
        write_json(state, vars(made))
    return made


def _records(tables: Sequence[Table]) -> Iterator[tuple[int, Table, int]]:
    places = ((table, index) for table in tables for index in range(len(table)))
    for row, (table, index) in enumerate(places):
        yield row, table, index


def _samples(
    rows: Iterator[tuple[int, Table, int]], made: Made, bad: IO[bytes]
) -> Iterator[Sample | None]:
    """The sample of each row; None for a bad one, which is reported."""
    for row, table, index in rows:
        try:
            yield make_sample(row, table[index])
        except RecordError as error:
            report = {"file": error.origin.file, "row": error.origin.row, "field": error.field}
            bad.write(json.dumps(report | {"reason": error.problem}).encode() + b"\n")
            bad.flush()
            made.bad, made.bad_bytes = made.bad + 1, bad.tell()
            yield None


def _write_tar(
    path: Path,
    sample: Sample | None,
    samples: Iterator[Sample],
    samples_per_shard: int | None,
    max_bytes: int | None,
) -> tuple[int, Sample | None]:
    """How many samples were written, and the first that did not fit."""
    count = size = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        while sample is not None and count != samples_per_shard:
            if count and max_bytes is not None and size + sample.size > max_bytes:
                break
            for suffix, data in sample.members:
                member = tarfile.TarInfo(f"{sample.row:09}{suffix}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            count, size = count + 1, size + sample.size
            sample = next(samples, None)
    return count, sample


def shard(
    inputs: Sequence[Path],
    out: Path | None,
    rows: Rows,
    samples_per_shard: int | None = None,
    max_bytes: int | None = None,
) -> int:
    """Write tables (.tsv), folders and COCO annotations (.json) as shards named by the first; of
    tars, write only the index beside each. Returns the number of bad rows."""
    if all(path.suffix.lower() == ".tar" for path in inputs):
        for path in inputs:
            with finished_file(index_path(path)) as part, open(part, "wb") as file:
                print(f"{index_path(path)}: {write_index(path, file)} members")
        return 0
    if out is None:
        raise ValueError("--out is needed, except where all inputs are tars")
    tables = [_open(path, rows) for path in inputs]
    settings = {
        "rows": {name: str(value) for name, value in vars(rows).items()},
        "inputs": [
            [str(path), _digest(path, table)] for path, table in zip(inputs, tables, strict=True)
        ],
    }
    name = inputs[0].resolve().stem.replace(".", "_")
    made = write_shards(tables, out, name, settings, samples_per_shard, max_bytes)
    return report_made(made, out, name)


def report_made(made: Made, out: Path, name: str) -> int:
    """Print what was written; the number of bad rows."""
    print(f"{out / name}-*.tar: {made.samples} samples in {made.shards} shards")
    if made.bad:
        print(f"{out / name}.bad.jsonl: {made.bad} bad rows were left out")
    return made.bad


def _open(path: Path, rows: Rows) -> Table:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    table: Table
    if path.is_dir():
        table = FolderTable(path)
    elif path.suffix.lower() == ".json":
        table = CocoTable(path, rows.media_root)
    elif path.suffix.lower() == ".tsv":
        table = TsvTable(path, rows.layout, rows.medium, rows.media_root)
    else:
        raise ValueError(f"{path}: a folder, .tsv or .json is needed, or .tar for all inputs")
    if not len(table):
        raise ValueError(f"{path}: no rows")
    return table


def _digest(path: Path, table: Table) -> str:
    """By which a changed input is known: a file's stamp, or those of a folder's media and texts."""
    files = [path]
    if isinstance(table, FolderTable):
        files = [p.with_suffix(s) for p in table.files for s in (p.suffix, ".json", ".txt")]
    stamps = json.dumps([[str(file), stamp(file)] for file in files])
    return hashlib.sha256(stamps.encode()).hexdigest()
