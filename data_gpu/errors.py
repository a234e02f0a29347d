"""The one error of decoding."""

from __future__ import annotations

from pathlib import Path

Media = bytes | Path


class DecodeError(ValueError):
    """A medium that cannot be decoded; the message says why, and which file if it is one."""

    def __init__(self, media: Media, problem: str) -> None:
        name = str(media) if isinstance(media, Path) else f"{len(media)} bytes"
        super().__init__(f"{name}: {problem}")
        self.problem = problem


def require_content(media: Media) -> None:
    """Raises DecodeError for a missing file, no regular file (a pipe would wait for ever) and no
    bytes."""
    if isinstance(media, Path):
        if not media.exists():
            raise DecodeError(media, "no such file")
        if not media.is_file():
            raise DecodeError(media, "not a regular file")
    if (media.stat().st_size if isinstance(media, Path) else len(media)) == 0:
        raise DecodeError(media, "empty")
