"""Triton: attention forward, one program a block of queries of a head; and one query at a time.

Scores live in registers only. What a row's softmax was is kept as its largest score and the sum of
exponentials, not as their logsumexp, whose rounding alone would cost float32 half its exactness.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unival.kernels.attention.inputs import Inputs
from unival.kernels.triton_tools.arithmetic import dot
from unival.kernels.triton_tools.launch import Config, launch
from unival.kernels.triton_tools.philox import uniform

LOG2E = tl.constexpr(1.4426950408889634)
# Integers that change from batch to batch: code that depended on their divisibility would be
# compiled again for every other length of text.
COUNTS = (
    "num_heads", "first_sequence", "queries", "keys", "sequences", "group", "table_size",
    "qc_b", "kc_b", "row_b", "row_h", "rowdot_b", "rowdot_h", "padding_b",
)  # fmt: skip


@triton.jit
def sequence(starts, batch, length, PACKED: tl.constexpr):
    """Row where a sequence starts, its length, and its index in batched tensors."""
    if PACKED:
        first = tl.load(starts + batch)
        return first.to(tl.int64), (tl.load(starts + batch + 1) - first).to(tl.int32), batch * 0
    return batch * 0, length, batch


@triton.jit
def load_rows(pointer, rows, length, stride, WIDTH: tl.constexpr):
    """[block, WIDTH] of a head's rows; zeros beyond the length.

    32-bit offsets from the head's 64-bit pointer (inputs.py checks that they suffice): half the
    registers.
    """
    offsets = rows[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + offsets, mask=rows[:, None] < length, other=0.0)


@triton.jit
def add_relative(scores, table, query_codes, key_codes, table_size):
    """scores + table[query code - key code]: one gather an element, none outside the table."""
    index = query_codes - key_codes
    inside = (index >= 0) & (index < table_size)
    return scores + tl.load(table + index, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def attention_forward_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding, query_starts, key_starts, seed,
    output, unscaled, largest_score, exponential_sum,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pq_s, pk_b, pk_h, pk_s, output_b, output_h, output_s,
    qc_b, kc_b, row_b, row_h, padding_b,
    num_heads, first_sequence, queries, keys, table_size, scale, dropout,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    query_start, length, query_batch = sequence(query_starts, batch, queries, PACKED)
    key_start, total, key_batch = sequence(key_starts, batch, keys, PACKED)
    begin = tl.program_id(0) * BLOCK_M
    if begin >= length:
        return
    rows = begin + tl.arange(0, BLOCK_M)
    q = load_rows(
        query + query_batch * query_b + head * query_h + query_start * query_s,
        rows, length, query_s, WIDTH,
    )  # fmt: skip
    if position_query is not None:
        pq = load_rows(
            position_query + query_batch * pq_b + head * pq_h + query_start * pq_s,
            rows, length, pq_s, WIDTH,
        )  # fmt: skip
        position_key += key_batch * pk_b + head * pk_h + key_start * pk_s
    if table is not None:
        row_codes = tl.load(
            query_codes + query_batch * qc_b + query_start + rows, mask=rows < length, other=0
        )
        key_codes += key_batch * kc_b + key_start
        table += head * table_size
    key += key_batch * key_b + head * key_h + key_start * key_s
    value += key_batch * value_b + head * value_h + key_start * value_s
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    last = total
    if CAUSAL:
        last = tl.minimum(total, begin + BLOCK_M + total - length)
    for start in range(0, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = dot(q, tl.trans(load_rows(key, columns, total, key_s, WIDTH)))
        if position_query is not None:
            scores = dot(pq, tl.trans(load_rows(position_key, columns, total, pk_s, WIDTH)), scores)
        scores = scores * scale
        if table is not None:
            codes = tl.load(key_codes + columns, mask=columns < total, other=0)
            scores = add_relative(scores, table, row_codes[:, None], codes[None, :], table_size)
        seen = columns[None, :] < total
        if padding is not None:
            absent = tl.load(padding + batch * padding_b + columns, mask=columns < total, other=1)
            seen = seen & (absent[None, :] == 0)
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None] + total - length)
        scores = tl.where(seen, scores, -float("inf"))
        largest = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen no key keeps -inf; subtracting it would give NaN.
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        weights = tl.exp2((scores - shift[:, None]) * LOG2E)
        decay = tl.exp2((maximum - shift) * LOG2E)
        summed = summed * decay + tl.sum(weights, 1)
        if seed is not None:
            plane = ((batch + first_sequence) * num_heads + head).to(tl.int32)
            drawn = uniform(tl.load(seed), columns[None, :], rows[:, None], plane)
            weights = tl.where(drawn >= dropout, weights / (1.0 - dropout), 0.0)
        v = load_rows(value, columns, total, value_s, WIDTH)
        attended = dot(weights.to(v.dtype), v, attended * decay[:, None])
        maximum = largest
    # Rows without a key: their weights are 0 in the backward pass whatever stands here.
    unseen = summed == 0.0
    summed = tl.where(unseen, 1.0, summed)
    attended = attended / summed[:, None]
    inside = rows < length
    place = query_batch * row_b + head * row_h + query_start + rows
    tl.store(largest_score + place, tl.where(unseen, 0.0, maximum), inside)
    tl.store(exponential_sum + place, summed, inside)
    offsets = (
        query_batch * output_b + head * output_h + (query_start + rows[:, None]) * output_s
        + tl.arange(0, WIDTH)[None, :]
    )  # fmt: skip
    inside = inside[:, None]
    if head_scale is not None:
        tl.store(unscaled + offsets, attended.to(unscaled.dtype.element_ty), inside)
        attended = attended * tl.load(head_scale + head).to(tl.float32)
    tl.store(output + offsets, attended.to(output.dtype.element_ty), inside)


@triton.jit(do_not_specialize=COUNTS)
def attention_decode_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding,
    output,
    query_b, query_h, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pk_b, pk_h, pk_s, output_b, output_h, qc_b, kc_b, padding_b,
    keys, table_size, scale,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query against cached keys: products by rows, no block of queries to fill."""
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    width = tl.arange(0, WIDTH)
    q = tl.load(query + batch * query_b + head * query_h + width).to(tl.float32)
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    if position_query is not None:
        pq = tl.load(position_query + batch * pq_b + head * pq_h + width).to(tl.float32)
        position_key += batch * pk_b + head * pk_h
    if table is not None:
        row_code = tl.load(query_codes + batch * qc_b)
        key_codes += batch * kc_b
        table += head * table_size
    # Running values of each lane of keys; lanes are joined once at the end.
    maximum = tl.full([BLOCK_N], -float("inf"), tl.float32)
    summed = tl.zeros([BLOCK_N], tl.float32)
    attended = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, columns, keys, key_s, WIDTH).to(tl.float32)
        scores = tl.sum(q[None, :] * k, 1)
        if position_query is not None:
            pk = load_rows(position_key, columns, keys, pk_s, WIDTH).to(tl.float32)
            scores += tl.sum(pq[None, :] * pk, 1)
        scores = scores * scale
        if table is not None:
            codes = tl.load(key_codes + columns, mask=columns < keys, other=0)
            scores = add_relative(scores, table, row_code, codes, table_size)
        seen = columns < keys
        if padding is not None:
            absent = tl.load(padding + batch * padding_b + columns, mask=columns < keys, other=1)
            seen = seen & (absent == 0)
        scores = tl.where(seen, scores, -float("inf"))
        largest = tl.maximum(maximum, scores)
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        weights = tl.exp2((scores - shift) * LOG2E)
        decay = tl.exp2((maximum - shift) * LOG2E)
        summed = summed * decay + weights
        v = load_rows(value, columns, keys, value_s, WIDTH).to(tl.float32)
        attended = attended * decay[:, None] + weights[:, None] * v
        maximum = largest
    overall = tl.max(maximum, 0)
    overall = tl.where(overall == -float("inf"), 0.0, overall)
    lanes = tl.exp2((maximum - overall) * LOG2E)
    total = tl.sum(summed * lanes, 0)
    result = tl.sum(attended * lanes[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    if head_scale is not None:
        result = result * tl.load(head_scale + head).to(tl.float32)
    place = output + batch * output_b + head * output_h + width
    tl.store(place, result.to(output.dtype.element_ty))


# Blocks of every kernel in float32, whose exact products run without tensor cores.
EXACT_CONFIG = Config({"BLOCK_M": 16, "BLOCK_N": 16}, 8, 1)


def forward_config(queries: int, width: int, dtype: torch.dtype, dropout: bool) -> Config:
    """Blocks for a number of queries: few of them do not fill 64 rows."""
    if dtype == torch.float32:
        return EXACT_CONFIG
    block = 16 if queries <= 16 else 32 if queries <= 32 or width > 64 else 64
    if width == 64 and not dropout:
        return Config({"BLOCK_M": block, "BLOCK_N": 64}, 4, 2)
    return Config({"BLOCK_M": block, "BLOCK_N": 32}, 4, 1)


DECODE_CONFIG = Config({"BLOCK_N": 32}, 4, 2)


def attention_forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, S, d], the same without head scaling, and the softmax's statistics.

    The unscaled output is empty where there is no head scale: then the output is it. Statistics:
    float32 [2, B, H, S], the largest score of a row and its sum of exponentials.
    """
    batch, heads, queries, width = x.query.shape
    output = x.new_output()
    unscaled = x.new_output() if x.head_scale is not None else output.new_empty(0)
    statistics = torch.empty(2, batch, heads, queries, dtype=torch.float32, device=output.device)
    config = forward_config(x.max_queries, width, x.query.dtype, x.seed is not None)
    launch(
        attention_forward_kernel,
        (triton.cdiv(x.max_queries, config.blocks["BLOCK_M"]), heads, x.sequences),
        config,
        (
            *x.tensors(), x.head_scale, x.padding, x.query_starts, x.key_starts, x.seed,
            output, unscaled, statistics[0], statistics[1],
            *x.strides(), *output.stride()[:3],
            *x.code_strides(), *statistics.stride()[1:3], x.padding_stride(),
            heads, x.first, queries, x.key.shape[2], x.table_size(), x.scale, x.dropout,
        ),
        WIDTH=width,
        CAUSAL=x.causal,
        PACKED=x.packed,
    )  # fmt: skip
    return output, unscaled, statistics


def attention_decode(x: Inputs) -> Tensor:
    """Output [B, H, 1, d] of one query a sequence. Causal or not is the same: it is the last."""
    batch, heads, _, width = x.query.shape
    output = x.new_output()
    query_b, query_h, _, *key_value, pq_b, pq_h, _, pk_b, pk_h, pk_s = x.strides()
    launch(
        attention_decode_kernel,
        (heads, batch),
        DECODE_CONFIG,
        (
            *x.tensors(), x.head_scale, x.padding, output,
            query_b, query_h, *key_value, pq_b, pq_h, pk_b, pk_h, pk_s, *output.stride()[:2],
            *x.code_strides(), x.padding_stride(),
            x.key.shape[2], x.table_size(), x.scale,
        ),
        WIDTH=width,
    )  # fmt: skip
    return output
