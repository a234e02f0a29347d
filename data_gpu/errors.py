"""A medium, what is known of it, and the one error of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unival.data_gpu.limits import Limits

Media = bytes | Path


class DecodeError(ValueError):
    """A medium that cannot be decoded; the message says why, and which file if it is one."""

    def __init__(self, media: Media, problem: str) -> None:
        name = str(media) if isinstance(media, Path) else f"{len(media)} bytes"
        super().__init__(f"{name}: {problem}")
        self.problem = problem


@dataclass(frozen=True)
class MediaInfo:
    """What a medium is: `kind` is image, video or audio, `format` names container and codec
    (`JPEG`, `mp4/h264`, `ogg/vorbis`). Zero where it does not apply; `rate` in Hz or frames/s."""

    kind: str
    format: str
    width: int = 0
    height: int = 0
    frames: int = 0
    seconds: float = 0.0
    channels: int = 0
    rate: float = 0.0


def require_content(media: Media, limits: Limits) -> int:
    """The size in bytes. Raises DecodeError for a missing file, no regular file (a pipe would wait
    for ever), no bytes and too many bytes."""
    if isinstance(media, Path):
        if not media.exists():
            raise DecodeError(media, "no such file")
        if not media.is_file():
            raise DecodeError(media, "not a regular file")
    size = media.stat().st_size if isinstance(media, Path) else len(media)
    if size == 0:
        raise DecodeError(media, "empty")
    if size > limits.bytes:
        raise DecodeError(media, f"{size} bytes; {limits.bytes} at most")
    return size
