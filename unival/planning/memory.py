"""Bytes that a rank holds: the model's state under ZeRO by formula, and what a pass adds by count.

The formula is that of Rajbhandari et al. (2020); benchmarks/zero_memory.py checks it against live
tensors of real ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unival.training.deepspeed_config import BUCKET

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
RESERVED = 2 * 2**30  # CUDA's context, NCCL's buffers, and what the allocator cannot use


@dataclass(frozen=True)
class State:
    """Bytes of a rank's parameters, gradients and optimizer state."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def zero_state(trained: int, precision: str, zero_stage: int, ranks: int, frozen: int = 0) -> State:
    """A rank's share of the state of a model, padding and small parameters left out.

    Gradients are summed in float32. From stage 1 the optimizer holds a float32 master beside Adam's
    moments, also in fp32. Frozen parameters have neither.

    Raises:
        ValueError: an unknown stage or precision, or no rank.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage={zero_stage}; known: 0, 1, 2, 3")
    if precision not in WEIGHT_BYTES:
        raise ValueError(f"precision {precision!r}; known: {', '.join(WEIGHT_BYTES)}")
    if ranks < 1:
        raise ValueError(f"ranks={ranks}; wanted at least 1")
    masters = 0 if zero_stage == 0 else 4
    return State(
        WEIGHT_BYTES[precision] * (trained + frozen) / (ranks if zero_stage >= 3 else 1),
        4 * trained / (ranks if zero_stage >= 2 else 1),
        (8 + masters) * trained / (ranks if zero_stage >= 1 else 1),
    )


def buffer_bytes(trained: int, precision: str, zero_stage: int, ranks: int) -> float:
    """DeepSpeed's buffers: one for gradients to be reduced and one for weights to be gathered."""
    if zero_stage == 0 or ranks == 1:
        return 0.0
    return 2.0 * min(BUCKET, trained) * WEIGHT_BYTES[precision]


def largest(fits: Callable[[int], bool], start: int = 1, most: int = 4096) -> int:
    """The largest number up to `most` that fits, by doubling and bisection; 0 if none does.

    Whoever asks makes sure that what fits at a number fits below it.
    """
    if not fits(1):
        return 0
    low, high = 1, max(start, 2)
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
