"""The one place where kernels start, and where a launch can be written down instead.

Kernels are not tuned while they run: a configuration is chosen by rule from the shapes. Tuning
would run again for every new length of text, and its choice changes the order of sums, so the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Whether kernels run in Python on the CPU: TRITON_INTERPRET=1 when Triton was imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Config(NamedTuple):
    """How a kernel is compiled: block sizes (constexpr arguments), warps, pipeline stages."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


class Launch(NamedTuple):
    """A launch that was asked for: every argument by name, constants included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config


_recorder: ContextVar[list[Launch] | None] = ContextVar("launch_recorder", default=None)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches inside are listed, not run. With fake CUDA tensors no GPU is needed."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any, grid: Sequence[int], config: Config, arguments: Sequence[Any], **constants: Any
) -> None:
    """Start a kernel on the device of its first tensor; a grid with a zero starts nothing.

    arguments: by position; constants: constexpr arguments other than the config's blocks.
    """
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        names = dict(zip(kernel.arg_names, arguments, strict=False))
        recorder.append(Launch(kernel, tuple(grid), names | constants | config.blocks, config))
        return
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if first.is_cuda:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(first.device):
            kernel[tuple(grid)](*arguments, **constants, **config.blocks, **options)
    else:
        kernel[tuple(grid)](*arguments, **constants, **config.blocks, **options)


def level_two_cache(device: torch.device) -> int:
    """Bytes of the GPU's second-level cache; an A100's 40 MiB where there is no GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 40 << 20


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors, for kernels that run a few programs on each.

    Without a GPU: 132, an H100's, for recorded launches; 2 when interpreting, where a program costs
    a millisecond.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if _recorder.get() is not None else 2
