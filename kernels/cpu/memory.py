"""Memory of a training process on a CPU that is used again, as PyTorch does on a GPU.

By default glibc hands large memory back to the system at once and the end of its heap as soon as
some of it is free, so that in every step maps and gradients are new memory, and touching its pages
for the first time takes longer than many of the operations that fill it.
"""

from __future__ import annotations

import ctypes
import math
import threading

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Bytes: as much as the argument, an int, can say; an older glibc takes 32 MB and no more.
HIGHEST, HIGHEST_BEFORE = 2**31 - 1, 32 << 20

_buffers = threading.local()


def keep_freed() -> None:
    """Let this process keep what it frees for what it allocates next; not to be undone.

    For processes that repeat a step. Where malloc is not glibc's nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_TRIM_THRESHOLD, HIGHEST)
    if not mallopt(M_MMAP_THRESHOLD, HIGHEST):
        mallopt(M_MMAP_THRESHOLD, HIGHEST_BEFORE)


def scratch(name: str, *shape: int) -> Tensor:
    """Uninitialised float32 on the CPU, until this thread asks for the same name again.

    For what is gone before its maker returns: among maps that stay until the backward pass it would
    leave holes in the heap that nothing fits.
    """
    size, buffer = math.prod(shape), getattr(_buffers, name, None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.float32)
        setattr(_buffers, name, buffer)
    return buffer[:size].view(shape)
