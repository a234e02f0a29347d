"""What is in the file of a film: its streams, and its packets without decoding them.

Frames are counted in the order they are shown, whatever their times. `scan_film` reads the whole
file for that, so short files are quick.
"""

from __future__ import annotations

import io
import math
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from unival.data_gpu.errors import DecodeError, Media, MediaInfo, require_content
from unival.data_gpu.limits import Limits
from unival.data_gpu.structure import Damage, check_matroska

# A playlist may name other files and addresses, and FFmpeg would open them: only true containers.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,flv,mpeg,mpegts,mp3,aac,flac,wav"
AV_ERRORS = (av.error.FFmpegError, OSError, ValueError)
FAMILIES = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "matroska"}
PADDING = 1 << 20  # pixels: decoders count the borders they add; the exact check is ours
# Strictest where it was seen not to refuse valid films; the other decoders mark damaged frames.
STRICT = {"mjpeg": {"err_detect": "explode"}}


class Run(NamedTuple):
    """Frames to decode from packet `start` on; the first that comes is number `first`."""

    start: int
    first: int
    wanted: set[int]


@dataclass(frozen=True)
class Film:
    """What the packets of a film tell without being decoded.

    info    as MediaInfo; `frames` is counted, `width` and `height` are those stored
    ticks   times of the frames in the order they are shown, in the stream's units
    starts  (time, packet) where decoding may begin, by time; packets are counted as in the file
    timed   frames are told by their times; otherwise they can only be counted
    plain   no frame is hidden: every decoder counts alike
    unreferenced  times of frames that no other frame is predicted from, as far as known
    """

    info: MediaInfo
    ticks: list[int]
    starts: list[tuple[int, int]]
    timed: bool
    plain: bool
    unreferenced: frozenset[int] = frozenset()

    def runs(self, wanted: Sequence[int]) -> list[Run]:
        """What to decode so that the wanted frames come, in the file's order."""
        runs: dict[int, Run] = {}
        for number in wanted:
            nearest = bisect_right(self.starts, (self.ticks[number], math.inf)) - 1
            tick, packet = self.starts[nearest]
            run = runs.setdefault(packet, Run(packet, bisect_left(self.ticks, tick), set()))
            run.wanted.add(number)
        return sorted(runs.values())


@contextmanager
def open_container(media: Media, limits: Limits) -> Iterator[av.container.InputContainer]:
    """A container of a known format; every error of FFmpeg becomes a DecodeError."""
    require_content(media, limits)
    # max_pixels: already opening a film decodes its first frames.
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "file",
        "max_pixels": str(limits.frame_pixels + PADDING),
    }
    try:
        source = str(media.absolute()) if isinstance(media, Path) else io.BytesIO(media)
        with av.open(source, mode="r", options=options, metadata_errors="replace") as container:
            yield container
    except DecodeError:
        raise
    except AV_ERRORS as error:
        raise DecodeError(media, f"cannot be decoded: {error}") from error


def video_stream(
    container: av.container.InputContainer, media: Media, limits: Limits
) -> tuple[av.video.stream.VideoStream, MediaInfo]:
    """The first video stream, its decoder set up, and what the headers say of it.

    Raises:
        DecodeError: no film, or a header beyond the limits.
    """
    if not container.streams.video:
        raise DecodeError(media, "no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise DecodeError(media, "no decoder for its video stream")
    family = FAMILIES.get(container.format.name, container.format.name.split(",")[0])
    codec = context.codec.canonical_name
    unit = stream.time_base or Fraction(0)
    seconds = float((stream.duration or 0) * unit)
    info = MediaInfo(
        "video",
        f"{family}/{codec}",
        width=context.width,
        height=context.height,
        frames=max(stream.frames, 0),
        seconds=seconds or (container.duration or 0) / av.time_base,
        rate=float(stream.average_rate or 0),
    )
    if info.width * info.height > limits.frame_pixels:
        problem = f"{info.width} x {info.height} pixels; {limits.frame_pixels} at most"
        raise DecodeError(media, problem)
    if info.frames > limits.frames:
        raise DecodeError(media, f"{info.frames} frames; {limits.frames} at most")
    _require_length(media, info.seconds, limits)
    # The size may also change later in the stream: FFmpeg itself then refuses.
    context.options = {"max_pixels": str(limits.frame_pixels + PADDING)} | STRICT.get(codec, {})
    context.thread_count = 1  # the loader's processes are the parallelism
    return stream, info


def _require_length(media: Media, seconds: float, limits: Limits) -> None:
    if seconds > limits.seconds:
        raise DecodeError(media, f"{seconds:.0f} seconds; {limits.seconds:.0f} at most")


def scan_film(media: Media, limits: Limits) -> Film:
    """Read all packets and decode none.

    Raises:
        DecodeError: no film, beyond the limits, damaged packets, or less than the header promises.
            MP4 and AVI promise frames, Matroska bytes, a transport stream and FLV nothing: cut
            between two packets they are shorter films. So is a fragmented MP4 between fragments.
    """
    times: list[int | None] = []
    keys: list[bool] = []
    hidden: list[bool] = []  # by an edit list: decoded, not shown
    unreferenced: set[int] = set()
    present = 0
    with open_container(media, limits) as container:
        stream, info = video_stream(container, media, limits)
        family, codec = info.format.split("/")
        header = stream.codec_context.extradata if codec == "h264" else None
        for packet in container.demux(stream):
            present += packet.dts is not None or packet.size > 0
            if packet.size == 0:  # a dropped frame, or the end
                continue
            if packet.is_corrupt:
                raise DecodeError(media, f"damaged or truncated at packet {len(times)}")
            times.append(packet.pts)
            keys.append(packet.is_keyframe)
            hidden.append(packet.is_discard)
            if header and packet.pts is not None and is_unreferenced(memoryview(packet), header):
                unreferenced.add(packet.pts)
            if len(times) > limits.frames:
                raise DecodeError(media, f"more than {limits.frames} frames")
        promised = info.frames
        if family == "mp4":  # an edit list hides frames, a dropped frame is one of no bytes
            promised = sum(entry.size > 0 for entry in stream.index_entries)
        if present < promised:
            raise DecodeError(media, f"truncated: {present} of {promised} frames")
        if family == "matroska":
            _require_elements(media)
        reordered = stream.codec_context.reorder_depth > 0
        film = _film(info, times, keys, hidden, stream.time_base or Fraction(0), reordered)
    if film.timed:
        film = replace(film, unreferenced=frozenset(unreferenced))
    if film.info.frames == 0:
        raise DecodeError(media, "no frames")
    _require_length(media, film.info.seconds, limits)
    return film


def is_unreferenced(packet: memoryview, header: bytes) -> bool:
    """Whether no other picture of an H.264 stream is predicted from the packet's.

    Its first slice says so (nal_ref_idc, 7.4.1 of the standard). Only units with a length before
    them are read, as in MP4 and Matroska, whose header begins with 1; otherwise no is the answer.
    """
    if len(header) < 5 or header[0] != 1:
        return False
    size, at = (header[4] & 3) + 1, 0
    while at + size < len(packet):
        length = int.from_bytes(packet[at : at + size], "big")
        unit = packet[at + size]
        if 1 <= unit & 31 <= 5:  # a slice
            return unit >> 5 & 3 == 0
        at += size + length
    return False


def _require_elements(media: Media) -> None:
    """Matroska's header does not count frames, but each of its elements says its bytes."""
    try:
        if isinstance(media, Path):
            with media.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                check_matroska(data)
        else:
            check_matroska(media)
    except Damage as error:
        raise DecodeError(media, str(error)) from error


def _film(
    info: MediaInfo,
    times: list[int | None],
    keys: list[bool],
    hidden: list[bool],
    unit: Fraction,
    reordered: bool,
) -> Film:
    family = info.format.split("/")[0]
    shown = [time for time, hide in zip(times, hidden, strict=True) if not hide]
    known = [time for time in times if time is not None]
    # AVI has no times; FFmpeg's guess is right only where frames are stored in the shown order.
    if (
        not (keys and keys[0])
        or len(known) < len(times)
        or len(set(shown)) < len(shown)
        or (family == "avi" and reordered)
    ):
        return Film(replace(info, frames=len(shown)), [], [], timed=False, plain=False)
    # Frames that are shown before the first keyframe need others that are not in the file.
    ticks = sorted(
        time for time, hide in zip(known, hidden, strict=True) if not hide and time >= known[0]
    )
    starts = sorted(
        (known[packet], packet)
        for packet in range(len(known))
        if packet == 0 or (keys[packet] and not hidden[packet])
    )
    seconds = info.seconds
    if ticks and unit and info.rate:
        seconds = float((ticks[-1] - ticks[0]) * unit) + 1 / info.rate
    plain = len(ticks) == len(times) and family in ("mp4", "matroska", "avi")
    return Film(replace(info, frames=len(ticks), seconds=seconds), ticks, starts, True, plain)
