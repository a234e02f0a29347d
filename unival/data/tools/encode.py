"""Encoding one film or picture anew, in a process that needs neither torch nor the tables."""

from __future__ import annotations

import errno
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from unival.data_gpu.errors import DecodeError
from unival.data_gpu.image import decode_image
from unival.data_gpu.limits import Limits
from unival.data_gpu.video_scan import open_container, scan_film, video_stream
from unival.files import finished_file

CLOCK = 60_000  # ticks a second of an mp4's times; MPEG-4 allows no more than 65,535
FPS = (0.01, 240.0)
DEFAULT_RATE = Fraction(25)  # where a film does not say its own
EPSILON = 1e-6  # seconds; times in containers are rounded
JPEG_QUALITY = 92
H264 = {"preset": "veryfast", "crf": "20", "bf": "0", "sc_threshold": "0"}
MPEG4 = {"qmin": "2", "qmax": "5", "bf": "0"}


@dataclass(frozen=True)
class Target:
    """What is wanted.

    size    short side in pixels; what is smaller stays as it is
    gop     frames from one key frame to the next
    jpeg    films become JPEG frames in an AVI, each of them a key frame
    fps     frames a second of those; None keeps all frames
    audio   films keep their sound
    """

    size: int
    gop: int = 8
    jpeg: bool = False
    fps: float | None = None
    audio: bool = False

    def __post_init__(self) -> None:
        if self.fps is not None and not FPS[0] <= self.fps <= FPS[1]:
            raise ValueError(f"{self.fps} frames a second; {FPS[0]} to {FPS[1]:g} are possible")

    def suffix(self, medium: str) -> str:
        return ".jpg" if medium == "image" else ".avi" if self.jpeg else ".mp4"


def encode(source: Path, out: Path, medium: str, target: Target) -> str | None:
    """Write `source` as `out`, as a whole or not at all; why it cannot be, else None.

    Raises:
        OSError: the disk is full.
    """
    try:
        with finished_file(out) as part:
            if medium == "image":
                encode_picture(source, part, target)
            else:
                encode_film(source, part, target, Limits())
    except DecodeError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(cause.errno, f"{out}: {cause.strerror}") from error
        return error.problem
    except MemoryError:
        return "needs too much memory"
    return None


def encode_picture(source: Path, out: Path, target: Target) -> None:
    """A JPEG, upright: the orientation tag is applied and left out."""
    picture = ImageOps.exif_transpose(decode_image(source))
    size = _size(picture.width, picture.height, target.size, even=False)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    picture.save(out, "JPEG", quality=JPEG_QUALITY)


def _size(width: int, height: int, short: int, even: bool = True) -> tuple[int, int]:
    """At most `short` pixels on the short side; even, as films with halved colours need."""
    scale = min(1.0, short / min(width, height))
    if even:
        return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode_film(source: Path, out: Path, target: Target, limits: Limits) -> None:
    """H.264 (MPEG-4 where FFmpeg lacks x264) in an mp4, or JPEG frames in an AVI; upright.

    Pixels that are not square stay so, as the decoders of training take them.
    """
    with (
        open_container(source, limits) as film,
        av.open(str(out), "w", format="avi" if target.jpeg else "mp4") as result,
    ):
        frames = _frames(source, film, target.size, limits)
        if target.fps is None:
            rate = video_stream(film, source, limits)[0].average_rate or DEFAULT_RATE
        else:
            rate = Fraction(target.fps).limit_denominator(1001)
            frames = _at_rate(frames, rate)
        first = next(frames, None)
        if first is None:
            raise DecodeError(source, "no frames")
        stream = _add_video(result, target, rate, first[1])
        sound = _sound(source, result, limits) if target.audio else iter(())
        last = -1
        for number, (time, pixels) in enumerate(itertools.chain([first], frames)):
            if pixels.shape != first[1].shape:
                raise DecodeError(source, f"another size at frame {number}")
            if target.jpeg:
                result.mux(_jpeg_packet(pixels, number, rate, stream))
                continue
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, CLOCK)
            frame.pts = last = max(round(time * CLOCK), last + 1)
            result.mux(stream.encode(frame))
        if not target.jpeg:
            result.mux(stream.encode(None))
        for packets in sound:
            result.mux(packets)


def _add_video(
    result: av.container.OutputContainer, target: Target, rate: Fraction, pixels: np.ndarray
) -> av.video.stream.VideoStream:
    gop = {"g": str(target.gop)}
    if target.jpeg:
        codec, options = "mjpeg", {}
    elif "libx264" in av.codecs_available:
        codec, options = "libx264", H264 | gop
    else:
        codec, options = "mpeg4", MPEG4 | gop
    stream = result.add_stream(codec, rate=rate, options=options)
    assert isinstance(stream, av.video.stream.VideoStream)
    stream.height, stream.width = pixels.shape[:2]
    stream.pix_fmt = "yuvj420p" if target.jpeg else "yuv420p"
    stream.codec_context.time_base = 1 / rate if target.jpeg else Fraction(1, CLOCK)
    stream.codec_context.thread_count = 1  # the processes are the parallelism
    return stream


def _jpeg_packet(
    pixels: np.ndarray, number: int, rate: Fraction, stream: av.video.stream.VideoStream
) -> av.Packet:
    """By Pillow: FFmpeg's way from RGB to the colours of JPEG turns grey to green by two levels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    packet = av.Packet(buffer.getvalue())
    packet.stream = stream
    packet.pts = packet.dts = number  # an AVI has a rate and no times: frame follows frame
    packet.time_base = 1 / rate
    packet.is_keyframe = True
    return packet


def _frames(
    source: Path, film: av.container.InputContainer, short: int, limits: Limits
) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds from the first frame, uint8 [H, W, 3]) of all frames, upright and at size."""
    stream, _ = video_stream(film, source, limits)
    scanned = scan_film(source, limits)
    rate = stream.average_rate or DEFAULT_RATE
    count = 0
    begin = None
    for packet in film.demux(stream):
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError(source, f"damaged at frame {count}")
            time = count / float(rate) if frame.time is None else frame.time
            begin = time if begin is None else begin
            count += 1
            yield time - begin, _upright(frame, short)
    if scanned.plain and count < scanned.info.frames:
        raise DecodeError(source, f"damaged: {count} of {scanned.info.frames} frames")


def _upright(frame: av.VideoFrame, short: int) -> np.ndarray:
    width, height = _size(frame.width, frame.height, short)
    rgb = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))


def _at_rate(
    frames: Iterator[tuple[float, np.ndarray]], rate: Fraction
) -> Iterator[tuple[float, np.ndarray]]:
    """What is seen at 0, 1 / rate, 2 / rate ... until the last frame comes."""
    number = 0
    shown = None
    for time, pixels in frames:
        while shown is not None and number / rate + EPSILON < time:
            yield float(number / rate), shown
            number += 1
        shown, end = pixels, time
    while shown is not None and number / rate <= end + EPSILON:
        yield float(number / rate), shown
        number += 1


def _sound(
    source: Path, result: av.container.OutputContainer, limits: Limits
) -> Iterator[list[av.Packet]]:
    """Adds the film's sound as AAC where it has one; its packets, from a reading of its own."""
    with open_container(source, limits) as film:
        context = film.streams.audio[0].codec_context if film.streams.audio else None
        if context is None:
            return iter(())
        layout = "mono" if context.channels == 1 else "stereo"
        stream = result.add_stream("aac", rate=context.sample_rate, layout=layout)
    assert isinstance(stream, av.audio.stream.AudioStream)
    return _sound_packets(source, stream, limits)


def _sound_packets(
    source: Path, stream: av.audio.stream.AudioStream, limits: Limits
) -> Iterator[list[av.Packet]]:
    resampler = av.AudioResampler(stream.format, stream.layout, stream.rate)
    with open_container(source, limits) as film:
        for frame in itertools.chain(film.decode(film.streams.audio[0]), [None]):
            for piece in resampler.resample(frame):
                yield stream.encode(piece)
    yield stream.encode(None)
