"""Gradients in Triton, a chunk of the vocabulary at a time.

The logits of a chunk are made again and their gradient is written in hidden's dtype; two products
use it before it leaves the L2 cache. So the embedding is read from memory about once and its
gradient written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unival.kernels.linear_cross_entropy.per_token import Columns, Inputs, Options
from unival.kernels.linear_cross_entropy.tiles import (
    COUNTS,
    allowed_tile,
    bonus_and_slope,
    column_ids,
    logits_tile,
    plan,
)
from unival.kernels.triton_tools.arithmetic import dot
from unival.kernels.triton_tools.launch import Config, launch

# Of the logits' gradient and the embedding's rows and gradient: with the states of 4,096 tokens and
# their gradient in float32 they stay in an A100's 40 MB second-level cache.
CHUNK_BYTES = 12 << 20


@triton.jit(do_not_specialize=COUNTS)
def slopes_kernel(
    hidden,
    embedding,
    target,
    allowed,
    token_rows,  # float32 [7, n]
    upstream,
    slopes,  # [n, width]
    n,
    start,
    count,
    gap,
    hidden_stride,
    embedding_stride,
    allowed_stride,
    slopes_stride,
    bonus_share,
    tangent_start,
    tangent_value,
    tangent_slope,
    dim,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    BONUS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the logits in columns start.. of one chunk; 0 beyond the last column."""
    block_rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(block_rows, n - 1)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = start + local
    ids = column_ids(columns, count, gap)
    logits = logits_tile(
        hidden, embedding, rows, ids, hidden_stride, embedding_stride,
        dim, WHOLE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    peak = tl.load(token_rows + rows)
    log_sum = tl.load(token_rows + n + rows)
    scale = tl.load(token_rows + 3 * n + rows) * tl.load(upstream)
    at_target = tl.load(token_rows + 4 * n + rows)
    spread = tl.load(token_rows + 5 * n + rows)
    total = tl.load(token_rows + 6 * n + rows)
    valid = allowed_tile(allowed, rows, ids, columns < count, allowed_stride, MASKED)
    logp = tl.where(valid, (logits - peak[:, None]) - log_sum[:, None], float("-inf"))
    probability = tl.exp(logp)
    hit = ids[None, :] == tl.load(target + rows)[:, None]
    slope = tl.where(hit, at_target[:, None], 0.0) - spread[:, None]
    if BONUS:
        weight = tl.load(token_rows + 2 * n + rows)
        weighted = tl.where(valid, tl.exp(weight[:, None] * logp), 0.0)
        _, extra = bonus_and_slope(weighted, tangent_start, tangent_value, tangent_slope)
        slope += bonus_share * extra
    slope = tl.where(valid, scale[:, None] * (slope - probability * total[:, None]), 0.0)
    out = slopes + block_rows[:, None] * slopes_stride + local[None, :]
    tl.store(out, slope.to(slopes.dtype.element_ty), mask=block_rows[:, None] < n)


@triton.jit(do_not_specialize=COUNTS)
def hidden_gradient_kernel(
    slopes,
    embedding,
    out,  # float32 [n, D]
    n,
    width,  # of this chunk, padded to whole tiles
    start,
    count,
    gap,
    slopes_stride,
    embedding_stride,
    dim,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out += slopes @ embedding[ids of the chunk]."""
    block_rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(block_rows, n - 1)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inner = tl.arange(0, BLOCK_K)
    tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for step in range(0, width, BLOCK_K):
        s = tl.load(slopes + rows[:, None] * slopes_stride + (step + inner)[None, :])
        ids = column_ids(start + step + inner, count, gap)
        source = embedding + ids.to(tl.int64)[:, None] * embedding_stride + dims[None, :]
        e = tl.load(source) if WHOLE else tl.load(source, mask=dims[None, :] < dim, other=0.0)
        tile += dot(s, e)
    place = out + block_rows[:, None] * dim + dims[None, :]
    mine = (block_rows[:, None] < n) & (dims[None, :] < dim)
    tl.store(place, tl.load(place, mask=mine, other=0.0) + tile, mask=mine)


def chunk_columns(n: int, dim: int, itemsize: int, count: int, block: int) -> int:
    """Columns of a chunk: whole tiles, as many as CHUNK_BYTES hold and the vocabulary has."""
    fitting = CHUNK_BYTES // ((n + 2 * dim) * itemsize) // block
    return block * max(1, min(fitting, triton.cdiv(count, block)))


def backward(
    upstream: Tensor,
    inputs: Inputs,
    rows: Tensor,
    options: Options,
    need_hidden: bool,
    need_embedding: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and embedding, None where not needed. upstream: float32, 0-d."""
    hidden, embedding = inputs.hidden, inputs.embedding
    n, dim = hidden.shape
    columns = options.columns
    kernels = plan(hidden.dtype, n, inputs.allowed is not None, options.bonus_share > 0.0)
    block = kernels.slopes.blocks["BLOCK_V"]
    width = chunk_columns(n, dim, hidden.element_size(), columns.count, block)
    slopes = torch.empty((n, width), dtype=hidden.dtype, device=hidden.device)
    d_hidden = hidden.new_zeros((n, dim), dtype=torch.float32) if need_hidden else None
    d_embedding = None
    if need_embedding:
        # With a constraint range most ids are in no chunk.
        make = torch.empty if columns.count == options.classes else torch.zeros
        d_embedding = make(embedding.shape, dtype=embedding.dtype, device=embedding.device)
    for start in range(0, columns.count, width):
        stop = min(start + width, columns.count)
        chunk = Chunk(slopes, start, stop, triton.cdiv(stop - start, block))
        _write_slopes(chunk, upstream, inputs, rows, options, kernels.slopes)
        if d_hidden is not None:
            padded = chunk.tiles * block
            _add_hidden_gradient(d_hidden, chunk, padded, embedding, columns, kernels.product)
        if d_embedding is not None:
            for first, last, row in columns.pieces(start, stop):
                part = slopes[:, first - start : last - start]
                torch.mm(part.T, hidden, out=d_embedding[row : row + last - first])
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_embedding


class Chunk(NamedTuple):
    """Columns start..stop-1, the gradient of their logits [n, width], and tiles they fill."""

    slopes: Tensor
    start: int
    stop: int
    tiles: int


def _write_slopes(
    chunk: Chunk, upstream: Tensor, inputs: Inputs, rows: Tensor, options: Options, config: Config
) -> None:
    hidden, embedding, target, _, allowed = inputs
    n, dim = hidden.shape
    grid = (triton.cdiv(n, config.blocks["BLOCK_N"]), chunk.tiles)
    tensors = (hidden, embedding, target, allowed, rows, upstream, chunk.slopes)
    where = (n, chunk.start, *options.columns, *inputs.strides, chunk.slopes.stride(0))
    bonus = (options.bonus_share, *options.tangent)
    whole = dim % config.blocks["BLOCK_D"] == 0
    flags = {"WHOLE": whole, "MASKED": allowed is not None, "BONUS": options.bonus_share > 0.0}
    launch(slopes_kernel, grid, config, (*tensors, *where, *bonus, dim), **flags)


def _add_hidden_gradient(
    d_hidden: Tensor,
    chunk: Chunk,
    padded: int,
    embedding: Tensor,
    columns: Columns,
    config: Config,
) -> None:
    n, dim = d_hidden.shape
    grid = (triton.cdiv(n, config.blocks["BLOCK_N"]), triton.cdiv(dim, config.blocks["BLOCK_D"]))
    where = (n, padded, chunk.start, *columns, chunk.slopes.stride(0), embedding.stride(0))
    tensors = (chunk.slopes, embedding, d_hidden)
    whole = dim % config.blocks["BLOCK_D"] == 0
    launch(hidden_gradient_kernel, grid, config, (*tensors, *where, dim), WHOLE=whole)
