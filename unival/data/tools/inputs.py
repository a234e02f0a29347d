"""What a command on data is given: files, folders, tables and shards, and the records in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unival.data import fields
from unival.data.records import Record, RecordError
from unival.data.shards import TarShards
from unival.data.sources import open_table
from unival.data.tsv import TsvTable

TABLES = (".tsv", ".tar")
MEDIA = {
    suffix: medium
    for medium, suffixes in (
        ("image", fields.IMAGE_SUFFIXES),
        ("video", fields.VIDEO_SUFFIXES),
        ("audio", fields.AUDIO_SUFFIXES),
    )
    for suffix in suffixes
}


@dataclass(frozen=True)
class Rows:
    """How the rows of tables are read: see TsvTable."""

    layout: str = "pretrain"
    medium: str = "image"
    media_root: Path | None = None


@dataclass(frozen=True)
class Item:
    """A file, or a record of a table or shard.

    `row` is the record's place: the number of a table's row, the key of a shard's sample, null for
    a file. `problem` says why a table or shard cannot be read at all.
    """

    path: Path
    row: int | str | None = None
    table: TsvTable | TarShards | None = None
    index: int = 0
    problem: str = ""

    def record(self) -> Record | None:
        """Raises RecordError; None for a file."""
        return None if self.table is None else self.table[self.index]

    @property
    def medium(self) -> str | None:
        """What a file's suffix says it is; None where it says nothing."""
        return MEDIA.get(self.path.suffix.lower())


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Sorted; folders that are links are not entered."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def find_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Files as they are named, folders by what is in them.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: nothing is found.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found += files_below(path, suffixes) if path.is_dir() else [path]
    if not found:
        names = ", ".join(map(str, paths))
        raise ValueError(f"{names}: no files ending in {', '.join(suffixes)}")
    return list(dict.fromkeys(found))


def list_items(paths: Sequence[Path], rows: Rows) -> tuple[Iterator[Item], int]:
    """The items of paths, read as they are needed, and how many they are."""
    sources: list[Item] = []
    total = 0
    for path in find_files(paths, (*MEDIA, *TABLES)):
        source = Item(path)
        if path.suffix.lower() in TABLES:
            try:
                table = open_table(path, rows.layout, rows.medium, rows.media_root)
                source = Item(path, table=table)
            except RecordError as error:
                source = Item(path, problem=str(error))
        total += 1 if source.table is None else len(source.table)
        sources.append(source)
    return _items(sources), total


def _items(sources: list[Item]) -> Iterator[Item]:
    sources.reverse()
    while sources:  # emptied, so that a table that is done with is closed
        source = sources.pop()
        table = source.table
        if table is None:
            yield source
            continue
        for index in range(len(table)):
            row = table.key(index) if isinstance(table, TarShards) else index
            yield Item(source.path, row, table, index)
