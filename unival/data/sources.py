"""Opening a table of records by its file name."""

from __future__ import annotations

from pathlib import Path

from unival.data.shards import TarShards
from unival.data.tsv import TsvTable


def open_table(
    path: str | Path,
    layout: str = "pretrain",
    medium: str = "image",
    media_root: str | Path | None = None,
) -> TsvTable | TarShards:
    """A TsvTable of a `.tsv`, or the TarShards of a `.tar` or a pattern of tars.

    A tar says its own kinds and holds its media, so that layout, medium and media_root concern
    tables only.

    Raises:
        ValueError: the suffix is neither.
        FileNotFoundError: no such file.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".tsv":
        return TsvTable(path, layout, medium, media_root)
    if suffix == ".tar":
        return TarShards(path)
    raise ValueError(f"{path}: a table ends in .tsv, shards end in .tar")
