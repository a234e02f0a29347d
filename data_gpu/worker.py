"""The process behind `isolation.DecodeWorkers`: reads requests, decodes, writes arrays.

A message is two lengths (8 bytes each, little-endian), a JSON object and bytes.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from unival.data_gpu.errors import DecodeError, Media, MediaInfo
from unival.data_gpu.limits import Limits

LENGTHS = struct.Struct("<QQ")


def write_message(descriptor: int, header: dict, payload: bytes | memoryview = b"") -> None:
    """Write one message to a pipe."""
    text = json.dumps(header).encode()
    for part in (LENGTHS.pack(len(text), len(payload)), text, payload):
        left = memoryview(part)
        while left:
            left = left[os.write(descriptor, left) :]


def read_message(read: Callable[[memoryview], int]) -> tuple[dict, bytearray]:
    """The next message; `read` fills a part of a buffer and says how much.

    Raises:
        EOFError: the other end is gone.
    """
    lengths = LENGTHS.unpack(_exactly(read, LENGTHS.size))
    text, payload = (_exactly(read, length) for length in lengths)
    return json.loads(text), payload


def _exactly(read: Callable[[memoryview], int], length: int) -> bytearray:
    buffer = bytearray(length)
    left = memoryview(buffer)
    while left:
        count = read(left)
        if not count:
            raise EOFError
        left = left[count:]
    return buffer


def decode(request: dict, payload: bytes, limits: Limits) -> np.ndarray | MediaInfo:
    """What the request asks for; raises DecodeError."""
    from unival.data_gpu import audio, image, inspect, video

    media: Media = Path(request["path"]) if "path" in request else payload
    arguments, options = request["arguments"], dict(request["options"])
    if "seed" in options:
        seed = options.pop("seed")
        options["rng"] = None if seed is None else random.Random(seed)
    if request["call"] == "clip":
        return video.decode_clip(media, *arguments, **options, limits=limits)
    if request["call"] == "waveform":
        return audio.decode_waveform(media, *arguments, **options, limits=limits)
    if request["call"] == "picture":
        return np.asarray(image.decode_image(media, limits))
    verify = {
        "image": inspect.verify_image,
        "video": video.verify_video,
        "audio": audio.verify_audio,
    }
    return verify[arguments[0]](media, limits)


def answer(request: dict, payload: bytes, limits: Limits) -> tuple[dict, bytes | memoryview]:
    """The reply to a request: an array, a MediaInfo, or why there is none."""
    try:
        result = decode(request, payload, limits)
    except DecodeError as error:
        return {"problem": error.problem}, b""
    except MemoryError:
        return {"problem": f"needs more than {limits.decode_bytes} bytes of memory"}, b""
    except Exception as error:
        problem = f"cannot be decoded: {type(error).__name__}: {error}"
        return {"problem": problem, "bug": traceback.format_exc()}, b""
    if isinstance(result, MediaInfo):
        return {"info": asdict(result)}, b""
    array = np.ascontiguousarray(result)
    return {"dtype": array.dtype.str, "shape": array.shape}, array.reshape(-1).view(np.uint8).data


def cap_memory(extra: int) -> None:
    """Allow this process `extra` bytes beyond what it takes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    cap = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (cap, resource.RLIM_INFINITY))


def prepare(backend: str, limits: Limits) -> dict:
    """Import what films need with a backend, uncapped; the reply says where it cannot run."""
    from unival.data_gpu.video_backends import BackendError, require_backend

    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        import torch

        torch.set_num_threads(1)
        require_backend(backend)
    except BackendError as error:
        return {"backend": str(error)}
    if backend != "nvdec":  # CUDA reserves addresses without end
        cap_memory(limits.decode_bytes)
    return {}


def main() -> None:
    """Serve requests from standard input until it ends."""
    limits = Limits(**json.loads(sys.argv[1]))
    # Ctrl-C, and requests to stop that go to all processes, are the owner's; this ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what a library prints must not end up between the replies
    from unival.data_gpu import audio, image, inspect, video  # noqa: F401  # before memory is capped

    cap_memory(limits.decode_bytes)
    write_message(replies, {"ready": True})
    while True:
        try:
            request, payload = read_message(lambda buffer: os.readv(requests, [buffer]))
        except EOFError:
            return
        if request["call"] == "prepare":
            write_message(replies, prepare(request["backend"], limits))
        else:
            write_message(replies, *answer(request, bytes(payload), limits))


if __name__ == "__main__":
    main()
