"""Which implementation of a kernel runs."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from unival.kernels.triton_tools import launch

logger = logging.getLogger(__name__)


def resolve_backend(op: str, backend: str, device: torch.device, known: tuple[str, ...]) -> str:
    """The implementation that `backend` means on a device: one of `known`.

    `auto` is Triton on a GPU and the first of `known` elsewhere, logged once for each op.

    Raises:
        ValueError: unknown name, or Triton for tensors on a CPU without its interpreter.
    """
    if backend == "auto":
        chosen = "triton" if device.type == "cuda" else known[0]
        where = "a GPU" if chosen == "triton" else f"the {device.type}"
        log_once(f"{op}: backend auto runs {chosen} (the tensors are on {where})")
        return chosen
    if backend not in known:
        raise ValueError(f"{op}: backend={backend!r}; known: auto, {', '.join(known)}")
    if backend == "triton" and device.type != "cuda" and not launch.INTERPRETED:
        raise ValueError(
            f"{op}: backend='triton' with tensors on {device.type}: Triton's kernels need an "
            "NVIDIA GPU, or TRITON_INTERPRET=1 in the environment before Python starts"
        )
    return backend


def check_values(fine: Tensor, message: str) -> None:
    """ValueError where `fine` (bool, 0-d) is false; on a GPU an assertion there, without a wait."""
    if fine.device.type != "cpu":
        torch._assert_async(fine, message)
    elif not bool(fine):
        raise ValueError(message)


def log_once(message: str) -> None:
    """Log a choice the first time it is made."""
    if not torch.compiler.is_compiling():  # a compiled graph has no place for it
        _log_once(message)


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
