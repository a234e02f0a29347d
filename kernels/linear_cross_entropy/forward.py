"""The walks over the vocabulary in Triton: logits are made tile by tile and never written.

A program has a block of tokens and a share of the vocabulary (a split); what the splits saw is
combined by a few PyTorch operations on [splits, n].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unival.kernels.linear_cross_entropy.per_token import (
    Columns,
    Finished,
    Inputs,
    Options,
    Seen,
    finish,
    settle,
)
from unival.kernels.linear_cross_entropy.tiles import (
    COUNTS,
    allowed_tile,
    bonus_and_slope,
    column_ids,
    logits_tile,
    plan,
)
from unival.kernels.triton_tools.launch import Config, launch, multiprocessors

WAVES = 4  # programs for each multiprocessor; more splits balance better and combine slower


@triton.jit(do_not_specialize=COUNTS)
def first_walk_kernel(
    hidden,
    embedding,
    target,
    allowed,
    seen,  # float32 [5, splits, n], in the order of `Seen`
    n,
    count,
    gap,
    tiles,  # of one split
    hidden_stride,
    embedding_stride,
    allowed_stride,
    dim,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(1)
    block_rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(block_rows, n - 1)
    wanted = tl.load(target + rows)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    target_logit = tl.full([BLOCK_N], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK_N], tl.float32)
    logit_sum = tl.zeros([BLOCK_N], tl.float32)
    allowed_count = tl.zeros([BLOCK_N], tl.float32)
    last = tl.minimum((split + 1) * tiles, tl.cdiv(count, BLOCK_V))
    for tile in range(split * tiles, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        ids = column_ids(columns, count, gap)
        logits = logits_tile(
            hidden, embedding, rows, ids, hidden_stride, embedding_stride,
            dim, WHOLE, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        valid = allowed_tile(allowed, rows, ids, columns < count, allowed_stride, MASKED)
        masked = tl.where(valid, logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(masked, 1))
        # Before the first allowed id the peak is -inf, and -inf - -inf would be NaN.
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        sum_exp = sum_exp * tl.exp(peak - safe) + tl.sum(tl.exp(masked - safe[:, None]), 1)
        peak = new_peak
        logit_sum += tl.sum(tl.where(valid, logits, 0.0), 1)
        hit = tl.where(ids[None, :] == wanted[:, None], masked, float("-inf"))
        target_logit = tl.maximum(target_logit, tl.max(hit, 1))
        if MASKED:
            allowed_count += tl.sum(valid.to(tl.float32), 1)
        else:
            allowed_count += tl.minimum(count - tile * BLOCK_V, BLOCK_V)
    plane = tl.num_programs(1).to(tl.int64) * n
    out = seen + split.to(tl.int64) * n + block_rows
    tl.store(out, peak, mask=block_rows < n)
    tl.store(out + plane, sum_exp, mask=block_rows < n)
    tl.store(out + 2 * plane, logit_sum, mask=block_rows < n)
    tl.store(out + 3 * plane, target_logit, mask=block_rows < n)
    tl.store(out + 4 * plane, allowed_count, mask=block_rows < n)


@triton.jit(do_not_specialize=COUNTS)
def bonus_walk_kernel(
    hidden,
    embedding,
    allowed,
    token_rows,  # float32 [7, n]
    sums,  # float32 [2, splits, n]
    n,
    count,
    gap,
    tiles,
    hidden_stride,
    embedding_stride,
    allowed_stride,
    tangent_start,
    tangent_value,
    tangent_slope,
    dim,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(1)
    block_rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(block_rows, n - 1)
    peak = tl.load(token_rows + rows)
    log_sum = tl.load(token_rows + n + rows)
    weight = tl.load(token_rows + 2 * n + rows)
    bonus_sum = tl.zeros([BLOCK_N], tl.float32)
    slope_sum = tl.zeros([BLOCK_N], tl.float32)
    last = tl.minimum((split + 1) * tiles, tl.cdiv(count, BLOCK_V))
    for tile in range(split * tiles, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        ids = column_ids(columns, count, gap)
        logits = logits_tile(
            hidden, embedding, rows, ids, hidden_stride, embedding_stride,
            dim, WHOLE, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        valid = allowed_tile(allowed, rows, ids, columns < count, allowed_stride, MASKED)
        logp = weight[:, None] * ((logits - peak[:, None]) - log_sum[:, None])
        probability = tl.where(valid, tl.exp(logp), 0.0)
        bonus, slope = bonus_and_slope(probability, tangent_start, tangent_value, tangent_slope)
        bonus_sum += tl.sum(bonus, 1)
        slope_sum += tl.sum(slope, 1)
    out = sums + split.to(tl.int64) * n + block_rows
    tl.store(out, bonus_sum, mask=block_rows < n)
    tl.store(out + tl.num_programs(1).to(tl.int64) * n, slope_sum, mask=block_rows < n)


def _splits(n: int, columns: Columns, config: Config, device: torch.device) -> tuple[int, int]:
    """(splits, tiles of one split) that fill the GPU WAVES times."""
    total = triton.cdiv(columns.count, config.blocks["BLOCK_V"])
    token_blocks = max(triton.cdiv(n, config.blocks["BLOCK_N"]), 1)
    tiles = triton.cdiv(total, max(WAVES * multiprocessors(device) // token_blocks, 1))
    return triton.cdiv(total, tiles), tiles


def forward(inputs: Inputs, options: Options) -> Finished:
    """The loss and what its gradient needs."""
    hidden, embedding, target, weight, allowed = inputs
    n, dim = hidden.shape
    columns = options.columns
    config = plan(hidden.dtype, n, allowed is not None, options.bonus_share > 0.0).walk
    splits, tiles = _splits(n, columns, config, hidden.device)
    grid = (triton.cdiv(n, config.blocks["BLOCK_N"]), splits)
    where = (n, *columns, tiles, *inputs.strides)
    whole = dim % config.blocks["BLOCK_D"] == 0
    constants = {"WHOLE": whole, "MASKED": allowed is not None}
    seen = torch.empty((5, splits, n), dtype=torch.float32, device=hidden.device)
    tensors = (hidden, embedding, target, allowed, seen)
    launch(first_walk_kernel, grid, config, (*tensors, *where, dim), **constants)
    settled = settle(_combine(seen), target, weight, options)
    if not options.bonus_share:
        return finish(settled, options, None)
    sums = torch.empty((2, splits, n), dtype=torch.float32, device=hidden.device)
    tensors = (hidden, embedding, allowed, settled.rows, sums)
    launch(bonus_walk_kernel, grid, config, (*tensors, *where, *options.tangent, dim), **constants)
    bonus, slope = sums.sum(1).unbind()
    return finish(settled, options, (bonus, slope))


def _combine(seen: Tensor) -> Seen:
    """What the splits saw together."""
    peaks, sums, logit_sums, target_logits, counts = seen.unbind()
    peak = peaks.amax(0)
    safe = peak.masked_fill(peak == -torch.inf, 0.0)
    sum_exp = (sums * (peaks - safe).exp()).sum(0)
    return Seen(peak, sum_exp, logit_sums.sum(0), target_logits.amax(0), counts.sum(0))
