"""Random numbers by counter (Philox-4x32-10, Salmon et al. 2011), in Triton and in PyTorch.

A number depends on a seed and on where it is used, so that a backward pass draws it again instead
of loading a mask. Both versions give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 2^-31, a little less, so that the largest integer stays below 1 (Triton's own constant).
SCALE = tl.constexpr(4.6566127342e-10)
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


@triton.jit
def uniform(seed, column, row, plane):
    """float32 in [0, 1) for every (column, row, plane): int32 blocks that broadcast."""
    zero = (column + row + plane) * 0
    bits, _, _, _ = tl.philox(seed, zero + column, zero + row, zero + plane, zero)
    signed = bits.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, -signed - 1, signed).to(tl.float32) * SCALE


def philox_4x32(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """First word of Philox-4x32-10: int64 in [0, 2^32), shaped as the counters broadcast."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product, in int64 that wraps."""
    product = b * a  # wraps modulo 2^64: the low 64 bits are right
    return (product >> 32) & MASK, product & MASK


def uniform_torch(seed: Tensor, column: Tensor, row: Tensor, plane: Tensor) -> Tensor:
    """What `uniform` gives, as PyTorch: float32 in [0, 1). seed: int64 of one element."""
    value = int(seed)
    zero = torch.zeros((), dtype=torch.int64, device=column.device)
    counter = (column.long(), row.long(), plane.long(), zero)
    bits = philox_4x32((value & MASK, (value >> 32) & MASK), counter)
    signed = bits - ((bits >> 31) << 32)
    return torch.where(signed < 0, -signed - 1, signed).float() * SCALE.value


def draw_seed(device: torch.device) -> Tensor:
    """int64 [1] from PyTorch's generator of the device; no synchronisation."""
    return torch.randint(2**63 - 1, (1,), device=device)
