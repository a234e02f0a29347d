"""Large CPU buffers that are used again, as PyTorch does on a GPU.

malloc hands large memory back to the system at once, so an embedding's gradient is new memory in
every step, and touching its pages for the first time takes longer than the product that fills it.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

SMALLEST = 4 << 20  # bytes; malloc keeps smaller memory itself
IDLE = 3  # blocks that wait to be used again; the oldest goes back to the system

_idle: deque[mmap.mmap] = deque(maxlen=IDLE)


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; a large block on the CPU is used again once its tensor is gone."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = _take(size)
    # The storage holds the view, not the block: when the view dies, no tensor uses the memory.
    view = memoryview(block)
    weakref.finalize(view, _idle.append, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)


def _take(size: int) -> mmap.mmap:
    """An idle block of at most twice the size, or a new one."""
    for block in sorted(_idle, key=len):
        if size <= len(block) <= 2 * size:
            try:
                _idle.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
