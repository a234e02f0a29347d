"""Cutting clips out of films, each film decoded once for all its clips, in processes that need
neither torch nor the tables."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from unival.data.tools.encode import (
    CLOCK,
    DEFAULT_RATE,
    EPSILON,
    Target,
    _add_video,
    _frames,
)
from unival.data.tools.running import Processes, Results, claim, cores, in_order, progress
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.limits import Limits
from unival.data_gpu.video_scan import open_container, video_stream
from unival.files import finished_file

CUT_SECONDS = 3600.0  # for one film; a decoder that hangs is ended after it

Writer = Generator[None, tuple[float, np.ndarray] | None, None]


@dataclass(frozen=True)
class Cut:
    """What is seen of a film from `start` to `end`, in seconds from its first frame, as `out`: an
    mp4. A film that ends before `end` gives a shorter clip."""

    start: float
    end: float
    out: Path


def cut_films(films: Mapping[Path, Sequence[Cut]], folder: Path, target: Target) -> dict[Path, str]:
    """Write the clips of films, those of several films at once, and why clips cannot be.

    What an earlier run finished is not done again: `cut.jsonl` in the folder says what is, and
    forgets it where the film has changed. `cut.json` says how clips are encoded.

    Args:
        films: the cuts of each.
        folder: that the clips are in.
        target: how they are encoded.

    Returns:
        The reason for each clip, by its path, that cannot be written.

    Raises:
        ValueError: the folder holds clips that are encoded otherwise.
        OSError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / "cut.json", asdict(target))
    reasons: dict[Path, str] = {}
    with (
        Results(folder / "cut.jsonl") as results,
        Processes(cores(), CUT_SECONDS, Limits().decode_bytes) as processes,
    ):
        left: dict[Path, list[Cut]] = {}
        for film, cuts in films.items():
            for cut in cuts:
                reason = results.known.get((str(film), _name(cut, folder)), "")
                if reason:
                    reasons[cut.out] = reason
                elif reason == "" or not cut.out.exists():
                    cut.out.unlink(missing_ok=True)  # of a film that has changed
                    left.setdefault(film, []).append(cut)

        def start(film: Path) -> Future[list[str | None]]:
            return processes.submit(cut_film, film, left[film], target)

        started = ((film, start(film)) for film in left)
        for film, future in progress(in_order(started, 2 * cores()), len(left), "cut"):
            for cut, reason in zip(left[film], _reasons(future, left[film]), strict=True):
                results.add(film, _name(cut, folder), "video", reason)
                if reason is not None:
                    reasons[cut.out] = reason
    return reasons


def _name(cut: Cut, folder: Path) -> str:
    return str(cut.out.relative_to(folder))


def _reasons(future: Future[list[str | None]], cuts: Sequence[Cut]) -> list[str | None]:
    """Where the process ended, the clips that it had finished are good."""
    error = future.exception()
    if isinstance(error, ValueError):
        return [None if cut.out.exists() else str(error) for cut in cuts]
    return future.result()


def cut_film(film: Path, cuts: Sequence[Cut], target: Target) -> list[str | None]:
    """Write each clip as a whole or not at all; why it cannot be, else None.

    Raises:
        OSError: the disk is full.
    """
    written: set[Cut] = set()
    problem = "needs too much memory"
    try:
        for cut in _cut(film, cuts, target):
            written.add(cut)
        return [None if cut in written else "the film ends before the clip begins" for cut in cuts]
    except DecodeError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(cause.errno, f"{film}: {cause.strerror}") from error
        problem = error.problem
    except MemoryError:
        pass
    return [None if cut in written else problem for cut in cuts]


def _cut(film: Path, cuts: Sequence[Cut], target: Target) -> Iterator[Cut]:
    """The cuts as they are written; ends when all are, or with the film."""
    limits = Limits()
    writers: dict[Cut, Writer] = {}
    left = set(cuts)
    try:
        with open_container(film, limits) as container:
            rate = video_stream(container, film, limits)[0].average_rate or DEFAULT_RATE
            frames = _frames(film, container, target.size, limits)
            for begin, end, pixels in _shown(frames, rate):
                for cut in [cut for cut in left if cut.start < end - EPSILON]:
                    if cut not in writers:
                        writers[cut] = _writer(film, cut.out, target, rate)
                        next(writers[cut])
                    writers[cut].send((max(begin - cut.start, 0.0), pixels))
                    if cut.end <= end + EPSILON:
                        yield from _finish([cut], writers)
                        left.remove(cut)
                if not left:
                    return
            yield from _finish(list(writers), writers)
    finally:
        for writer in writers.values():
            writer.close()


def _finish(cuts: Iterable[Cut], writers: dict[Cut, Writer]) -> Iterator[Cut]:
    for cut in cuts:
        with suppress(StopIteration):
            writers[cut].send(None)
        del writers[cut]
        yield cut


def _shown(
    frames: Iterable[tuple[float, np.ndarray]], rate: Fraction
) -> Iterator[tuple[float, float, np.ndarray]]:
    """(begin, end, pixels): each frame is shown until the next one comes."""
    before: tuple[float, np.ndarray] | None = None
    for time, pixels in frames:
        if before is not None:
            yield before[0], time, before[1]
        before = time, pixels
    if before is not None:
        yield before[0], before[0] + float(1 / rate), before[1]


def _writer(film: Path, out: Path, target: Target, rate: Fraction) -> Writer:
    """Encodes the (seconds, pixels) that are sent; None ends the clip, and closing it before
    that leaves no file."""
    last = -1
    with finished_file(out) as part, av.open(str(part), "w", format="mp4") as result:
        item = yield
        assert item is not None  # a clip has a frame
        shape = item[1].shape
        stream = _add_video(result, target, rate, item[1])
        while item is not None:
            time, pixels = item
            if pixels.shape != shape:
                raise DecodeError(film, f"another size at {time:.2f} seconds of a clip")
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, CLOCK)
            frame.pts = last = max(round(time * CLOCK), last + 1)
            result.mux(stream.encode(frame))
            item = yield
        result.mux(stream.encode(None))
