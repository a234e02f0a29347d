"""Reading parts of files that others wrote: at an offset, and never outside a chosen folder."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from unival.data.records import Origin, RecordError


class RangeReader:
    """Reads bytes at offsets of one file.

    The file is opened at the first read and a read names its offset (`pread`), so that processes
    forked from this one may share the descriptor; a pickled copy opens the file anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_descriptor": None}

    def read(self, offset: int, size: int, origin: Origin) -> bytes:
        """Exactly `size` bytes from `offset`; RecordError where the file has become shorter."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        parts = []
        missing = size
        while missing > 0:
            part = os.pread(self._descriptor, missing, offset + size - missing)
            if not part:
                problem = f"{missing} of {size} bytes are missing; the file changed after indexing"
                raise RecordError(origin, "row", problem)
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def resolve_media(text: str, folder: Path, chosen: bool, origin: Origin, field: str) -> Path:
    """The path of a media file named by a row, certain to lie in `folder`.

    Links are followed before the check, so a link that points out of the folder is refused too.

    Args:
        text: what the row says.
        folder: the folder that the path starts from and must not leave; already resolved.
        chosen: the user named this folder. Only then may the row say an absolute path or `..`,
            and what it names must still lie in the folder.

    Raises:
        RecordError: the path is refused. Whether the file exists is left to the decoder.
    """
    if "\0" in text:
        raise RecordError(origin, field, "the path holds a NUL character")
    path = Path(text)
    if not chosen and (path.is_absolute() or ".." in path.parts):
        raise RecordError(
            origin, field, f"path {text!r} is absolute or has '..'; name a media_root to allow it"
        )
    try:
        resolved = (folder / path).resolve()
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
        raise RecordError(origin, field, f"path {text!r}: {error}") from error
    if not resolved.is_relative_to(folder):
        raise RecordError(
            origin, field, f"path {text!r} leads to {resolved}, outside media_root {folder}"
        )
    return resolved
