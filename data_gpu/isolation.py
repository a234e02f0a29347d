"""Decoding in processes of their own, each with a deadline and a cap on memory.

FFmpeg on a hostile film may take minutes, gigabytes or the whole process with it. Here that costs
one sample: the process is ended, another one starts, and the caller gets a DecodeError.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from unival.data_gpu.errors import DecodeError, Media, MediaInfo
from unival.data_gpu.limits import Limits
from unival.data_gpu.video_backends import BackendError
from unival.data_gpu.worker import read_message, write_message

log = logging.getLogger(__name__)
START_SECONDS = 120.0  # until a process has imported its libraries, on a machine under load


class DecodeWorkers:
    """`count` decoding processes; each method gives a future.

    A future raises DecodeError for a medium that cannot be decoded, takes longer than
    `limits.decode_seconds`, needs more than `limits.decode_bytes`, or ends its process; and
    BackendError where a backend cannot run here.

    Processes start when they are first needed. They end at `close` or when this process ends,
    however it ends.
    """

    def __init__(self, count: int, limits: Limits) -> None:
        if count < 1:
            raise ValueError(f"{count} workers; at least one is needed")
        self.limits = limits
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes = [_Process(limits) for _ in range(count)]
        for process in self._processes:
            self._idle.put(process)

    def __enter__(self) -> DecodeWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what was submitted and has not begun is cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.end()

    def clip(
        self,
        media: Media,
        num_frames: int,
        size: int,
        *,
        indices: str,
        mode: str,
        seed: str | None,
        backend: str,
    ) -> Future[np.ndarray]:
        """`video.decode_clip` with random.Random(seed); uint8 [3, F, size, size]."""
        options = {"indices": indices, "mode": mode, "backend": backend}
        return self._submit(
            media, "clip", [num_frames, size], options | {"seed": seed}, _array_of_result
        )

    def waveform(
        self, media: Media, num_samples: int, sample_rate: int | None, *, seed: str | None
    ) -> Future[np.ndarray]:
        """`audio.decode_waveform` with random.Random(seed); float32 [num_samples]."""
        return self._submit(
            media, "waveform", [num_samples, sample_rate], {"seed": seed}, _array_of_result
        )

    def picture(self, media: Media) -> Future[np.ndarray]:
        """`image.decode_image`; uint8 [H, W, 3]."""
        return self._submit(media, "picture", [], {}, _array_of_result)

    def verify(self, media: Media, medium: str) -> Future[MediaInfo]:
        """Decode all of an image, video or audio, strictly."""
        return self._submit(media, "verify", [medium], {}, _info_of_result)

    def _submit(self, media: Media, call: str, arguments: list, options: dict, result: Any) -> Any:
        request = {"call": call, "arguments": arguments, "options": options}
        payload = b""
        if isinstance(media, Path):
            request["path"] = str(media)
        else:
            payload = media
        return self._threads.submit(self._run, media, request, payload, result)

    def _run(self, media: Media, request: dict, payload: bytes, result: Any) -> Any:
        process = self._idle.get()
        try:
            answer, data = process.call(request, payload, self.limits.decode_seconds)
        except _Gone as error:
            raise DecodeError(media, str(error)) from None
        finally:
            self._idle.put(process)
        if "backend" in answer:
            raise BackendError(answer["backend"])
        if "bug" in answer:
            log.warning("decoding raised something unexpected:\n%s", answer["bug"])
        if "problem" in answer:
            raise DecodeError(media, answer["problem"])
        return result(answer, data)


def _array_of_result(answer: dict, data: bytearray) -> np.ndarray:
    return np.frombuffer(data, dtype=answer["dtype"]).reshape(answer["shape"])


def _info_of_result(answer: dict, data: bytearray) -> MediaInfo:
    return MediaInfo(**answer["info"])


class _Gone(Exception):
    """The process died or had to be ended; says why."""


class _Process:
    """One worker process, started when it is called and again after it has gone."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.prepared: set[str] = set()  # backends of films that it has imported
        self.process: subprocess.Popen | None = None

    def call(self, request: dict, payload: bytes, seconds: float) -> tuple[dict, bytearray]:
        if self.process is None:
            self.process = self._start()
        backend = request["options"].get("backend")
        if backend is not None and backend not in self.prepared:
            # Its libraries take seconds to import, which are not those of a film.
            prepare = {"call": "prepare", "backend": backend}
            answer, _ = self._exchange(prepare, b"", START_SECONDS)
            if answer:
                return answer, bytearray()
            self.prepared.add(backend)
        return self._exchange(request, payload, seconds)

    def _exchange(self, request: dict, payload: bytes, seconds: float) -> tuple[dict, bytearray]:
        assert self.process is not None
        try:
            assert self.process.stdin is not None and self.process.stdout is not None
            write_message(self.process.stdin.fileno(), request, payload)
            return read_message(_until(self.process.stdout.fileno(), seconds))
        except TimeoutError:
            self.end()
            raise _Gone(f"not decoded within {seconds:g} seconds") from None
        except (EOFError, BrokenPipeError):
            status = self.process.wait()
            self.end()
            cause = f"by signal {-status}" if status < 0 else f"with status {status}"
            raise _Gone(f"its decoder ended {cause}") from None

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "unival.data_gpu.worker", json.dumps(asdict(self.limits))]
        environment = dict(os.environ)
        # Each process is one of several: its libraries must not start threads of their own.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        assert process.stdout is not None
        try:
            read_message(_until(process.stdout.fileno(), START_SECONDS))
        except (EOFError, TimeoutError) as error:
            process.kill()
            raise RuntimeError(
                f"a decoding process did not start (status {process.wait()}): {' '.join(command)}"
            ) from error
        return process

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()
            self.process = None
            self.prepared.clear()


def _until(descriptor: int, seconds: float) -> Any:
    """A reader of `descriptor` that raises TimeoutError `seconds` from now."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)

    def read(buffer: memoryview) -> int:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        return os.readv(descriptor, [buffer])

    return read
