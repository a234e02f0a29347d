"""How a long command runs: progress, many items at once, and going on after an interruption."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from unival.data_gpu.worker import cap_memory
from unival.files import finished_file, write_json

T = TypeVar("T")
R = TypeVar("R")

LINE_SECONDS = 10.0  # between lines of progress where there is no terminal
MAX_LINE = 1 << 20
BEGIN = b'{"path": '  # of a line of results


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items; on standard error a bar with an estimate, or a line every LINE_SECONDS."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, total, console=Console(stderr=True))
        return
    begin = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            left = (now - begin) / done * (total - done)
            print(f"{what}: {done} of {total}, about {left:.0f} s left", file=sys.stderr)


def in_order(
    started: Iterable[tuple[T, Future[R]]], in_flight: int
) -> Iterator[tuple[T, Future[R]]]:
    """The pairs of a lazy iterable, each when its future is finished; at most `in_flight` pairs are
    taken before the oldest is finished, which bounds memory."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for pair in started:
        waiting.append(pair)
        if len(waiting) >= in_flight:
            waiting[0][1].exception()  # waits
            yield waiting.popleft()
    while waiting:
        waiting[0][1].exception()
        yield waiting.popleft()


class Processes:
    """Runs functions in `count` processes; one that ends or takes too long costs one call.

    Args:
        count: of processes. Each starts when it is first needed.
        seconds: that a call may take.
        memory: bytes that a process may use above what it uses at its start.
    """

    def __init__(self, count: int, seconds: float, memory: int) -> None:
        self.seconds = seconds
        self.memory = memory
        self._threads = ThreadPoolExecutor(count)
        self._running: set[int] = set()
        self._idle: queue.SimpleQueue[ProcessPoolExecutor] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(self._new())

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if kind is not None:  # otherwise what runs now would be waited for
            for pid in list(self._running):
                _kill(pid)
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().shutdown()

    def _new(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, context, _prepare, (self.memory,))

    def submit(self, function: Callable[..., R], *arguments: object) -> Future[R]:
        """A future of function(*arguments); it raises ValueError where the process ended."""
        return self._threads.submit(self._run, function, arguments)

    def _run(self, function: Callable[..., R], arguments: tuple) -> R:
        executor = self._idle.get()
        pid = 0
        try:
            pid = executor.submit(os.getpid).result()
            self._running.add(pid)
            return executor.submit(function, *arguments).result(self.seconds)
        except BrokenProcessPool:
            executor = self._new()
            raise ValueError("its process ended, by a crash or for want of memory") from None
        except TimeoutError:
            assert pid  # 0 would be this process and all its children
            _kill(pid)
            executor = self._new()
            raise ValueError(f"not finished within {self.seconds:g} seconds") from None
        finally:
            self._running.discard(pid)
            self._idle.put(executor)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(pid, signal.SIGKILL)


def _prepare(memory: int) -> None:
    """In a new process: Ctrl-C is the parent's to handle, and memory is capped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cap_memory(memory)


def stamp(path: Path) -> list[int] | None:
    """[size, time of change in ns], by which a changed file is known; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def claim(path: Path, settings: dict) -> None:
    """Say in `path` what a folder's files are made from.

    Raises:
        ValueError: it says something else; mixing the two would give neither.
    """
    if not path.exists():
        write_json(path, settings)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
        raise ValueError(
            f"{path.parent}: what lies there was made from other inputs or options (see {path}); "
            "name another --out, or remove it"
        )


class Results:
    """Lines of JSON, one an item that is finished; a later run keeps those that still hold.

    A line has `path` (the file), `row` (a record's place in it, or null), `kind`, `ok`, `reason`
    (null if ok), `size` and `mtime_ns` of the file, `media` (the file that a record names, or null)
    and `media_stamp` (its size and mtime_ns). A line of a file that has changed, and one cut off by
    an interruption, is dropped.

    Args:
        path: the file of lines; None keeps nothing.

    `known` holds the reason of each item that an earlier run finished.
    """

    def __init__(self, path: Path | None) -> None:
        self.known: dict[tuple[str, str | int | None], str | None] = {}
        self._file = None
        # Of a table it is asked for each of its rows.
        self._stamp = functools.lru_cache(64)(lambda name: stamp(Path(name)))
        if path is None:
            return
        with finished_file(path) as part, open(part, "wb") as kept:
            for line in _whole_lines(path):
                entry = _entry(line, path)
                media = entry["media"]
                if self._stamp(entry["path"]) == [entry["size"], entry["mtime_ns"]] and (
                    media is None or self._stamp(media) == entry["media_stamp"]
                ):
                    self.known[sys.intern(entry["path"]), entry["row"]] = entry["reason"]
                    kept.write(line)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(
        self,
        path: Path,
        row: str | int | None,
        kind: str | None,
        reason: str | None,
        media: Path | None = None,
    ) -> None:
        """Write a line at once."""
        if self._file is None:
            return
        size, mtime_ns = self._stamp(str(path)) or (None, None)
        entry = {
            "path": str(path),
            "row": row,
            "kind": kind,
            "ok": reason is None,
            "reason": reason,
            "size": size,
            "mtime_ns": mtime_ns,
            "media": None if media is None else str(media),
            "media_stamp": None if media is None else stamp(media),
        }
        self._file.write(json.dumps(entry).encode() + b"\n")


def _whole_lines(path: Path) -> Iterator[bytes]:
    """All lines but a last one that was begun as one of results and cut off."""
    if path.exists():
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE):
                if line.endswith(b"\n") or line[: len(BEGIN)] != BEGIN[: len(line)]:
                    yield line


def _entry(line: bytes, path: Path) -> dict:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of results: {error}; name another") from error
    names = {"path", "row", "reason", "size", "mtime_ns", "media", "media_stamp"}
    if not isinstance(entry, dict) or not names <= entry.keys():
        raise ValueError(f"{path}: not a file of results; name another")
    return entry
