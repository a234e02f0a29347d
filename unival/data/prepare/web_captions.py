"""SBU, CC3M and CC12M: pictures of the web that img2dataset has downloaded, with their captions."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from unival.data.files import resolve_media
from unival.data.prepare.base import DataSet, Entries, Entry, Prepared, Source, field_of, text_of
from unival.data.records import Origin, Record, RecordError
from unival.data.shards import MAX_JSON_BYTES, parse_object
from unival.data.tsv import SCAN_BYTES

VAL_SHARE = 0.05
MAX_VAL = 5_000
PICTURES = (".jpg", ".png", ".webp")  # that img2dataset writes
MAX_LINE = 1 << 16


class Sidecars:
    """The pictures below a folder as img2dataset's `files` layout has them: `00012/000120034.jpg`
    and beside it `000120034.json` with `caption` and `status`. The id is `00012/000120034`.

    Args:
        media: the media folder.
        names: bytes [n], of the sidecars from the media folder, without `.json`.
        dataset: that the rows name.
    """

    def __init__(self, media: Path, names: np.ndarray, dataset: str) -> None:
        self._media, self._names, self._dataset = media, names, dataset

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = os.fsdecode(bytes(self._names[index]))
        origin = Origin(f"{self._media / name}.json", 0)
        sidecar = resolve_media(f"{name}.json", self._media, False, origin, "file")
        try:
            with open(sidecar, "rb") as file:
                text = file.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            raise RecordError(origin, "file", str(error.strerror)) from error
        if len(text) > MAX_JSON_BYTES:
            raise RecordError(origin, "file", f"more than {MAX_JSON_BYTES} bytes")
        fields = parse_object(text, origin)
        if fields.get("status") != "success":
            raise RecordError(origin, "status", f"{fields.get('status')!r:.40}, not 'success'")
        values = {
            "id": text_of({"file": name}, "file", origin),
            "kind": "caption",
            "captions": [text_of(fields, "caption", origin)],
            "dataset": self._dataset,
        }
        pictures = [name + suffix for suffix in PICTURES]
        found = next((p for p in pictures if (self._media / p).is_file()), pictures[0])
        return Entries(self._media, [Entry(values, found, origin)])[0]


def read(source: Source, dataset: str, tables: tuple[str, ...]) -> Prepared:
    """One row a picture. The pictures of a folder `val` are validation where there is one (beside
    a folder `train`); otherwise 5% of all, 5,000 at most, are held out.

    Args:
        dataset: that the rows name.
        tables: the publisher's files with an address a line, of which one may be there: what of
            it was not downloaded is counted.
    """
    root = "train" if (source.media / "train").is_dir() else ""
    names = sidecars(source, root)
    notes = [_missing(source, tables, len(names))]
    if (source.media / "val").is_dir():
        train, val = names, sidecars(source, "val")
    else:
        train, val = divide(names)
        notes.append(f"val is held out of training: {len(val)} of {len(names)} pictures")
    if not len(train) or not len(val):
        raise ValueError(
            f"{source.media}: {len(train)} pictures to train on and {len(val)} to validate on; "
            "sidecars such as 00000/000000012.json are needed"
        )
    splits = {"train": train, "val": val}
    return Prepared(
        {split: Sidecars(source.media, names, dataset) for split, names in splits.items()},
        (),
        tuple(notes),
    )


def sidecars(source: Source, root: str) -> np.ndarray:
    """bytes [n]: the names of all sidecars in the numbered folders of `root`, in order, without
    `.json`. The folders count as inputs, so that pictures that come later are noticed."""
    names = []
    folders = [f for f in (source.media / root).iterdir() if f.name.isdecimal() and f.is_dir()]
    for folder in sorted(folders):
        source.opened.append(folder)
        place = f"{root}/{folder.name}" if root else folder.name
        found = [e.name for e in os.scandir(folder) if e.name.endswith(".json")]
        # As bytes of one length: 12 million texts would take gigabytes.
        names.append(np.array([os.fsencode(f"{place}/{n[:-5]}") for n in sorted(found)], "S"))
    return np.concatenate(names) if names else np.empty(0, "S1")


def divide(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation: the pictures whose names have the smallest checksums."""
    checksums = np.fromiter((zlib.crc32(name) for name in names), np.uint32, len(names))
    count = min(round(VAL_SHARE * len(names)) or 1, MAX_VAL, len(names))
    is_val = np.zeros(len(names), dtype=bool)
    is_val[np.argsort(checksums, kind="stable")[:count]] = True
    return names[~is_val], names[is_val]


def _missing(source: Source, tables: tuple[str, ...], found: int) -> str:
    path = source.look(*tables)
    if path is None:
        return f"none of {', '.join(tables)} is there: what was not downloaded is not counted"
    rows = _addresses(source, path)
    if found > rows:
        return f"{found} pictures are there, more than the {rows} of {path.name}"
    return f"{rows - found} of the {rows} pictures of {path.name} were not downloaded"


def _addresses(source: Source, path: Path) -> int:
    """How many a file has: the list `image_urls` of a JSON file, else one a line."""
    if path.suffix == ".json":
        _, content = source.json(str(path.relative_to(source.folder)))
        return len(field_of(content, "image_urls", list, Origin(str(path), "file")))
    with open(path, "rb") as file:
        first = file.readline(MAX_LINE)
        if not any(part.strip().startswith(b"http") for part in first.split(b"\t")):
            raise ValueError(f"{path}: its first line has no column with an address")
        count, last = 1, first
        while chunk := file.read(SCAN_BYTES):
            count, last = count + chunk.count(b"\n"), chunk
    return count if last.endswith(b"\n") else count + (last is not first)


def _dataset(title: str, dataset: str, tables: tuple[str, ...]) -> DataSet:
    reader: Callable[[Source], Prepared] = partial(read, dataset=dataset, tables=tables)
    needs = (
        "the media folder as img2dataset's `files` output has it: 00000/000000012.jpg with a .json "
        "beside it; or folders train and val with such folders each",
        f"{' or '.join(tables)}, if what was not downloaded shall be counted",
    )
    return DataSet(title, needs, reader)


SBU = _dataset(
    "SBU captions", "sbu", ("SBU_captioned_photo_dataset_urls.txt", "sbu-captions-all.json")
)
CC3M = _dataset("Conceptual Captions 3M", "cc3m", ("Train_GCC-training.tsv", "Train*.tsv"))
CC12M = _dataset("Conceptual 12M", "cc12m", ("cc12m.tsv",))
