"""Opening a table of records by its file name."""

from __future__ import annotations

from pathlib import Path

from unival.data.columns import SUFFIXES, ColumnTable, has_header
from unival.data.shards import TarShards
from unival.data.tsv import TsvTable


def open_table(
    path: str | Path,
    layout: str = "pretrain",
    medium: str = "image",
    media_root: str | Path | None = None,
) -> TsvTable | TarShards:
    """The table in a file: a ColumnTable of a `.csv`, a `.jsonl` or a `.tsv` with a header, a
    TsvTable of a `.tsv` without one, the TarShards of a `.tar` or a pattern of tars.

    A tar says its own kinds and holds its media, so that layout, medium and media_root concern
    tables only.

    Raises:
        ValueError: the suffix is none of these, or the columns are not those of the layout.
        FileNotFoundError: no such file.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".jsonl") or (suffix == ".tsv" and has_header(path, layout)):
        return ColumnTable(path, layout, medium, media_root)
    if suffix == ".tsv":
        return TsvTable(path, layout, medium, media_root)
    if suffix == ".tar":
        return TarShards(path)
    raise ValueError(f"{path}: a table ends in {', '.join(SUFFIXES)}, shards end in .tar")
