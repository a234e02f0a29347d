"""Large CPU buffers that are used again, as PyTorch does on a GPU.

malloc hands large memory back to the system at once, so that large maps and an embedding's gradient
are new memory in every step, and touching its pages for the first time takes longer than the
operations that fill it.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

SMALLEST = 16 << 20  # bytes; malloc keeps smaller memory itself
SMALLEST_SCRATCH = 1 << 20  # bytes; what malloc keeps goes to maps that stay
MOST_IDLE = 1 << 28  # bytes that wait to be used again; beyond, the oldest goes back to the system

_idle: deque[mmap.mmap] = deque()
_idle_scratch: deque[mmap.mmap] = deque()  # apart: maps that stay would push it out


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; a large block on the CPU is used again once its tensor is gone."""
    return _from(_idle, SMALLEST, shape, dtype, device)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `fresh`, for what is gone when its maker is done."""
    return _from(_idle_scratch, SMALLEST_SCRATCH, shape, dtype, device)


def _from(
    idle: deque[mmap.mmap],
    smallest: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    plain = device.type != "cpu" or torch.compiler.is_compiling()
    if plain or size < smallest or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = _take(idle, size)
    # The storage holds the view, not the block: when the view dies, no tensor uses the memory.
    view = memoryview(block)
    weakref.finalize(view, _keep, idle, block).atexit = False
    # Not a view of a flat tensor: autograd adds in place to what alone holds its storage.
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape).data


def _take(idle: deque[mmap.mmap], size: int) -> mmap.mmap:
    """The smallest idle block of at most a quarter more than the size, or a new one."""
    for block in sorted(idle, key=len):
        if size <= len(block) <= size + size // 4:
            try:
                idle.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _keep(idle: deque[mmap.mmap], block: mmap.mmap) -> None:
    """Let a block wait to be used again."""
    idle.append(block)
    while sum(map(len, idle)) > MOST_IDLE:
        try:
            idle.popleft()
        except IndexError:  # another thread was faster
            break
