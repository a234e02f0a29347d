"""Frames of a film by their number: with PyAV, torchcodec or DALI's video decoder.

PyAV is the reference. From each wanted frame it goes back to the keyframe before, and decodes on
from there; where the frames that come are not exactly those that the scan of the film promised
(gradual refresh), it decodes from the start. The other backends serve the films whose frames they
count like PyAV, and PyAV serves the rest.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from unival.data_gpu.errors import DecodeError, Media, MediaInfo
from unival.data_gpu.limits import Limits
from unival.data_gpu.video_scan import Film, Run, open_container, scan_film, video_stream

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode

log = logging.getLogger(__name__)

BACKENDS = ("pyav", "torchcodec", "nvdec")
INDICES = ("random", "uniform")
# Here every packet holds one picture, so that a picture that does not come is a damaged one. Other
# codecs have packets without a picture, other containers have packets with half of one.
ONE_PICTURE_CONTAINERS = ("mp4", "matroska")
ONE_PICTURE_CODECS = ("h264", "hevc", "vp9", "av1", "mjpeg")

Choose = Callable[[int], list[int]]


class BackendError(RuntimeError):
    """A backend that cannot run on this machine; says why."""


class _Lost(Exception):
    """Other frames came than the scan promised; `shown` counts those that came."""

    def __init__(self, shown: int) -> None:
        super().__init__(f"frame {shown} did not come")
        self.shown = shown


def _decode_runs(
    media: Media, film: Film, runs: Sequence[Run], limits: Limits
) -> dict[int, np.ndarray]:
    """The frames that the runs want, uint8 [H, W, 3]; between the runs nothing is decoded.

    Every frame on the way must be the next one that the scan promised, undamaged and of one size;
    left out are those that neither the runs want nor other frames need.

    Raises:
        _Lost: it is not the next one.
        DecodeError: damaged.
    """
    wanted = set().union(*(run.wanted for run in runs))
    # Pictures that no other one is predicted from need not be decoded to get at those wanted.
    skipped = {n for n, tick in enumerate(film.ticks) if tick in film.unreferenced} - wanted
    skipped_ticks = {film.ticks[number] for number in skipped}
    frames: dict[int, np.ndarray] = {}
    waiting = list(runs)
    left: set[int] = set()
    number = first = 0  # the next frame, and the first one that its run gives
    from_start = True
    size = None
    with open_container(media, limits) as container:
        stream, _ = video_stream(container, media, limits)
        context = stream.codec_context
        filled = (packet for packet in container.demux(stream) if packet.size)
        for position, packet in enumerate(itertools.chain(filled, [None])):
            while not left and waiting and waiting[0].start <= position:
                run = waiting.pop(0)
                left = run.wanted - frames.keys()
                if run.start == position:  # else the run before has read past it and goes on
                    context.flush_buffers()
                    number = first = next(n for n in itertools.count(run.first) if n not in skipped)
                    from_start = run.first == 0
            if not left and not waiting:
                return frames
            if packet is not None and packet.pts in skipped_ticks:
                continue
            for frame in context.decode(packet) if left else ():
                if film.timed and not _is_next(film, frame, number, first, from_start):
                    continue
                size = size or (frame.width, frame.height)
                if frame.is_corrupt or size != (frame.width, frame.height):
                    what = "damaged" if frame.is_corrupt else "another size"
                    raise DecodeError(media, f"{what} at frame {number}")
                if number in wanted:
                    frames[number] = _pixels(frame)
                    left.discard(number)
                number += 1
                while number in skipped:
                    number += 1
    if left or waiting:
        raise _Lost(number)
    return frames


def _is_next(film: Film, frame: av.VideoFrame, number: int, first: int, from_start: bool) -> bool:
    """Whether this is frame `number`; not so for those before the first one of the run (`first`),
    which need frames before its keyframe. Raises _Lost for any other frame."""
    if number == first and frame.pts is not None and frame.pts < film.ticks[first]:
        return False
    if number >= len(film.ticks) or frame.pts != film.ticks[number]:
        raise _Lost(number)
    if number == first and not from_start and not frame.key_frame:
        raise _Lost(number)
    return True


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], turned upright by its display matrix (quarter turns). Pixels that are not
    square stay as they are stored."""
    return np.rot90(frame.to_ndarray(format="rgb24"), _quarters(frame))


def _quarters(frame: av.VideoFrame) -> int:
    """Quarter turns counter-clockwise until the frame is upright."""
    return math.floor(frame.rotation / 90 + 0.5) % 4


def _decode_in_order(
    media: Media, film: Film, wanted: set[int], limits: Limits
) -> dict[int, np.ndarray]:
    """The wanted frames, decoding from the start. Raises _Lost where packets without a picture are
    allowed and the film shows fewer frames than it has packets."""
    runs = [Run(0, 0, wanted)]
    if film.timed:
        try:
            return _decode_runs(media, film, runs, limits)
        except _Lost as lost:
            family, codec = film.info.format.split("/")
            if family in ONE_PICTURE_CONTAINERS and codec in ONE_PICTURE_CODECS:
                problem = f"damaged: frame {lost.shown} of {film.info.frames} cannot be decoded"
                raise DecodeError(media, problem) from lost
    return _decode_runs(media, replace(film, timed=False, unreferenced=frozenset()), runs, limits)


def verify_film(media: Media, film: Film, limits: Limits) -> MediaInfo:
    """Decode every frame; `frames` of the result counts those that are shown."""
    count = film.info.frames
    film = replace(film, unreferenced=frozenset())  # every frame is decoded
    try:
        _decode_in_order(media, film, {count - 1}, limits)
    except _Lost as lost:
        count = _require_frames(media, lost.shown)
    return replace(film.info, frames=count)


def _require_frames(media: Media, count: int) -> int:
    if count == 0:
        raise DecodeError(media, "no frame can be decoded")
    return count


def _read_pyav(
    media: Media, film: Film, wanted: list[int], choose: Choose, limits: Limits
) -> list[np.ndarray]:
    runs = film.runs(wanted) if film.timed else []
    if any(run.start > 0 for run in runs):
        try:
            frames = _decode_runs(media, film, runs, limits)
            return [frames[number] for number in wanted]
        except (_Lost, DecodeError) as problem:
            log.debug("decoding from the start instead of its keyframes: %s", problem)
    try:
        frames = _decode_in_order(media, film, set(wanted), limits)
    except _Lost as lost:
        wanted = choose(_require_frames(media, lost.shown))
        frames = _decode_in_order(media, film, set(wanted), limits)
    return [frames[number] for number in wanted]


def read_frames(media: Media, choose: Choose, backend: str, limits: Limits) -> list[np.ndarray]:
    """Frames of a film, upright, uint8 [H, W, 3] in RGB.

    Args:
        media: the encoded film.
        choose: the numbers of the frames wanted, of a film of so many. It is asked a second time
            where a film turns out to show fewer frames than it has packets.
        backend: one of BACKENDS. torchcodec gives PyAV's pixels, except of films that refresh
            gradually; the colours of nvdec differ by a few of 255 levels. Only PyAV notices damaged
            frames. Films that another backend refuses, or might count in another way, are PyAV's.
        limits: what a film may cost.

    Raises:
        DecodeError: missing, truncated, damaged, no film, beyond the limits.
        BackendError: the backend cannot run on this machine.
    """
    require_backend(backend)
    film = scan_film(media, limits)
    wanted = choose(film.info.frames)
    if backend != "pyav" and film.plain:
        read = _read_torchcodec if backend == "torchcodec" else _read_nvdec
        try:
            return read(media, wanted, limits)
        except (RuntimeError, IndexError, ValueError) as error:
            log.info("%s cannot read a film, PyAV does: %s", backend, error)
    return _read_pyav(media, film, wanted, choose, limits)


def require_backend(backend: str) -> None:
    """Import what the backend needs and set it up. Raises BackendError where that fails."""
    if backend not in BACKENDS:
        raise ValueError(f"video backend {backend!r}; known: {', '.join(BACKENDS)}")
    try:
        if backend == "torchcodec":
            import torchcodec.decoders

            # Newer ones look for FFmpeg's libraries only when the first film is decoded.
            if getattr(torchcodec, "ffmpeg_major_version", 0) is None:
                raise RuntimeError("torchcodec finds no FFmpeg on this machine")
        elif backend == "nvdec":
            _built_graph("gpu")
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: no FFmpeg, no GPU
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"video backend {backend} cannot run here: {cause[0]}") from error


def _read_torchcodec(media: Media, wanted: list[int], limits: Limits) -> list[np.ndarray]:
    """Only for a film that `open_container` knows: torchcodec would follow a playlist."""
    from torchcodec.decoders import VideoDecoder

    source = str(media.absolute()) if isinstance(media, Path) else media
    decoder = VideoDecoder(source, dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=1)
    return list(decoder.get_frames_at(wanted).data.numpy())


def nvdec_graph(device: str, device_id: int) -> Pipeline:
    """The graph from one encoded film to uint8 [F, H, W, 3], not yet built.

    Its inputs are `encoded`, uint8 [bytes], and `frames`, int32 [F] in any order.

    Args:
        device: `gpu` decodes on the GPU (`mixed`); `cpu` needs none, and reads VP8, VP9 and MJPEG.
        device_id: the GPU; -1 makes a graph that can be looked at (`serialize`) without one.
    """
    from nvidia.dali import fn, pipeline_def, types

    if device not in ("cpu", "gpu"):
        raise ValueError(f"device {device!r}; known: cpu, gpu")

    @pipeline_def
    def graph() -> DataNode:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        decoder = "mixed" if device == "gpu" else "cpu"
        return fn.decoders.video(encoded, frames=frames, device=decoder)

    return graph(
        batch_size=1,
        num_threads=1,
        device_id=device_id if device == "gpu" and device_id >= 0 else None,
        prefetch_queue_depth=1,
    )


@functools.lru_cache(maxsize=1)
def _built_graph(device: str) -> Pipeline:
    graph = nvdec_graph(device, int(os.environ.get("LOCAL_RANK", "0")))
    graph.build()
    return graph


def _read_nvdec(
    media: Media, wanted: list[int], limits: Limits, device: str = "gpu"
) -> list[np.ndarray]:
    with open_container(media, limits) as container:  # DALI knows no display matrix
        stream, _ = video_stream(container, media, limits)
        turns = next((_quarters(frame) for frame in container.decode(stream)), 0)
    graph = _built_graph(device)
    encoded = media.read_bytes() if isinstance(media, Path) else media
    try:
        graph.feed_input("encoded", [np.frombuffer(encoded, dtype=np.uint8)])
        graph.feed_input("frames", [np.array(wanted, dtype=np.int32)])
        (clips,) = graph.run()
        clip = np.array(clips.as_cpu().at(0))
    except RuntimeError:
        _built_graph.cache_clear()  # after an error it may not be used again
        raise
    return list(np.rot90(clip, turns, axes=(1, 2)))


def frame_indices(num_frames: int, length: int, indices: str, rng: random.Random) -> list[int]:
    """Which of `length` frames to take: one in each of n = min(num_frames, length) intervals.

    Their borders are the whole parts of linspace(0, length, n + 1). The last frame chosen is
    repeated up to num_frames.

    `random` draws among a..b-2 of an interval [a, b): its last frame never comes, as in the
    original. Where an interval has fewer than two frames, n frames of the film are drawn instead.
    `uniform` takes (a + b - 1) // 2.
    """
    count = min(num_frames, length)
    borders = np.linspace(0, length, count + 1).astype(int).tolist()
    intervals = list(itertools.pairwise(borders))
    if indices == "uniform":
        chosen = [(first + end - 1) // 2 for first, end in intervals]
    elif all(end - first >= 2 for first, end in intervals):
        chosen = [rng.randrange(first, end - 1) for first, end in intervals]
    else:
        chosen = sorted(rng.sample(range(length), count))
    return chosen + [chosen[-1]] * (num_frames - count)


def choose_backend(
    clips: Sequence[Media], backends: Sequence[str], decode: Callable[[Media, str], object]
) -> str:
    """The one of `backends` that is quickest on these films, all of them decoding the same.

    Bad films and backends that cannot run here are left out; `pyav` where all films are bad.

    Args:
        clips: the films.
        backends: of BACKENDS.
        decode: decodes a film with a backend; raises as `read_frames` does.
    """
    good, times, notes = [], {}, []
    for media in clips:
        try:
            decode(media, "pyav")
            good.append(media)
        except DecodeError as error:
            notes.append(str(error))
    for backend in backends if good else ():
        try:
            decode(good[0], backend)  # imports and builds what it needs
            began = time.perf_counter()
            for media in good:
                decode(media, backend)
        except (BackendError, DecodeError) as error:
            notes.append(str(error))
        else:
            times[backend] = (time.perf_counter() - began) / len(good)
    chosen = min(times, key=times.__getitem__, default="pyav")
    timings = [f"{backend} {1000 * seconds:.1f} ms a clip" for backend, seconds in times.items()]
    log.info("video backend %s: %s", chosen, "; ".join(timings + notes))
    return chosen
