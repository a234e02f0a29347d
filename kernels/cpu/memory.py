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
MOST_IDLE = 1 << 28  # bytes that wait to be used again; beyond, the oldest goes back to the system

_idle: deque[mmap.mmap] = deque()


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; a large block on the CPU is used again once its tensor is gone."""
    size = math.prod(shape) * dtype.itemsize
    plain = device.type != "cpu" or torch.compiler.is_compiling()
    if plain or size < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = _take(size)
    # The storage holds the view, not the block: when the view dies, no tensor uses the memory.
    view = memoryview(block)
    weakref.finalize(view, _keep, block).atexit = False
    # Not a view of a flat tensor: autograd adds in place to what alone holds its storage.
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape).data


def _take(size: int) -> mmap.mmap:
    """The smallest idle block of at most a quarter more than the size, or a new one."""
    for block in sorted(_idle, key=len):
        if size <= len(block) <= size + size // 4:
            try:
                _idle.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _keep(block: mmap.mmap) -> None:
    """Let a block wait to be used again."""
    _idle.append(block)
    while sum(map(len, _idle)) > MOST_IDLE:
        try:
            _idle.popleft()
        except IndexError:  # another thread was faster
            break
