"""What the kernels share: block sizes, the numbering of the vocabulary, a tile of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from unival.kernels.linear_cross_entropy.per_token import FLOOR, SPECIAL
from unival.kernels.triton_tools.arithmetic import dot
from unival.kernels.triton_tools.launch import Config

FIRST_SHIFTED = tl.constexpr(SPECIAL)
SMALLEST_REST = tl.constexpr(FLOOR)


# Integers that change from batch to batch and chunk to chunk: not worth code of their own.
COUNTS = ("n", "start", "count", "gap", "tiles", "width")


class Plan(NamedTuple):
    """Configurations of the walks, of the logits' gradient, and of hidden's gradient."""

    walk: Config
    slopes: Config
    product: Config


def plan(dtype: torch.dtype, n: int, masked: bool, bonus: bool) -> Plan:
    """Chosen by dtype, number of tokens and what a tile has to hold besides its logits.

    Checked ahead of time for spills: masks and the bonus of every class take registers, hence their
    narrower tiles.
    """
    if dtype == torch.float32:  # multiplied without tensor cores
        width, depth = (32, 32) if masked else (64, 16)
        blocks = {"BLOCK_N": 64, "BLOCK_V": width, "BLOCK_D": depth}
        walk = Config(blocks, num_warps=8, num_stages=3)
        product = {"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_K": 32}
        return Plan(walk, walk, Config(product, num_warps=8, num_stages=3))
    rows, warps = (128, 8) if n > 64 else (64, 4)

    def tile(narrow: bool) -> Config:
        blocks = {"BLOCK_N": rows, "BLOCK_V": 64 if narrow else 128, "BLOCK_D": 64}
        return Config(blocks, num_warps=warps, num_stages=3)

    product = {"BLOCK_N": rows, "BLOCK_D": 64, "BLOCK_K": 64}
    product_config = Config(product, num_warps=4, num_stages=4)
    return Plan(tile(masked), tile(masked or bonus), product_config)


@triton.jit
def column_ids(columns, count, gap):
    """int32 ids of columns; from count on the last id, for the caller to mask."""
    inside = tl.minimum(columns, count - 1)
    return inside + tl.where(inside >= FIRST_SHIFTED, gap, 0)


@triton.jit
def logits_tile(
    hidden,
    embedding,
    rows,
    ids,
    hidden_stride,
    embedding_stride,
    dim,  # not a constant: LLVM would unroll the loop, and its addresses would spill
    WHOLE: tl.constexpr,  # dim is a multiple of BLOCK_D
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_V]: hidden[rows] @ embedding[ids]^T; rows and ids must exist."""
    inner = tl.arange(0, BLOCK_D)
    left = hidden + rows[:, None] * hidden_stride + inner[None, :]
    right = embedding + ids.to(tl.int64)[:, None] * embedding_stride + inner[None, :]
    tile = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for start in range(0, dim, BLOCK_D):
        if WHOLE:
            h = tl.load(left + start)
            e = tl.load(right + start)
        else:
            h = tl.load(left + start, mask=inner[None, :] < dim - start, other=0.0)
            e = tl.load(right + start, mask=inner[None, :] < dim - start, other=0.0)
        tile += dot(h, tl.trans(e))
    return tile


@triton.jit
def allowed_tile(allowed, rows, ids, inside, allowed_stride, MASKED: tl.constexpr):
    """bool, broadcasts to the tile: ids that have probability."""
    if MASKED:
        # One 64-bit address for the block, 32-bit offsets: a tile of addresses would spill.
        base = tl.min(rows)
        offsets = (rows - base).to(tl.int32) * allowed_stride
        loaded = tl.load(allowed + base * allowed_stride + (offsets[:, None] + ids[None, :]))
        return (loaded != 0) & inside[None, :]
    else:
        return inside[None, :]


@triton.jit
def bonus_and_slope(probability, start, value, slope):
    """ln(1 - p), continued by its tangent, and its derivative by ln p."""
    rest = 1.0 - probability
    above = probability > start
    bonus = tl.where(
        above,
        value + slope * (probability - start),
        tl.log(tl.maximum(rest, SMALLEST_REST)),
    )
    curved = tl.where(rest >= SMALLEST_REST, -1.0 / tl.maximum(rest, SMALLEST_REST), 0.0)
    return bonus, tl.where(above, slope, curved) * probability
