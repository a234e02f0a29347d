"""Triton: attention backward, recomputing the scores from q and k.

Kernels over the same scores, each the only writer of what it makes:
    rowdot     the sum of dy * o of a row: c times it is softmax's delta, its sum dc
    keys       dk and dv: a program owns keys and walks the queries
    queries    dq: a program owns queries and walks the keys
    bias       what the position part and the table get. A program owns queries (dpq, table) or keys
               (dpk) and sums the scores' gradient over several sequences that share them before it
               multiplies or scatters. In a kernel of its own, since one more accumulator in the two
               above would not fit an A100's registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unival.kernels.attention.forward import COUNTS, LOG2E, add_relative, load_rows, sequence
from unival.kernels.triton_tools.arithmetic import dot
from unival.kernels.triton_tools.philox import uniform


@triton.jit(do_not_specialize=COUNTS)
def attention_rowdot_kernel(
    grad, unscaled, rowdot,
    grad_b, grad_h, grad_s, unscaled_b, unscaled_h, unscaled_s, rowdot_b, rowdot_h,
    queries, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    # 64 bits: packed rows are counted over all sequences here.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dy = load_rows(grad + batch * grad_b + head * grad_h, rows, queries, grad_s, WIDTH)
    o = load_rows(
        unscaled + batch * unscaled_b + head * unscaled_h, rows, queries, unscaled_s, WIDTH
    )
    found = tl.sum(dy.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(rowdot + batch * rowdot_b + head * rowdot_h + rows, found, rows < queries)


@triton.jit
def row_statistics(largest_score, exponential_sum, rowdot, place, inside, factor):
    """Largest score, inverse sum of exponentials and softmax's delta of a block of queries."""
    largest = tl.load(largest_score + place, inside, other=0.0)
    inverse = 1.0 / tl.load(exponential_sum + place, inside, other=1.0)
    return largest, inverse, factor * tl.load(rowdot + place, inside, other=0.0)


@triton.jit
def visible(rows, columns, length, total, padding, CAUSAL: tl.constexpr):
    """Which queries see which keys; rows and columns broadcast to the block in either order.

    padding: pointer to the sequence's mask, or None.
    """
    inside = columns < total
    if padding is not None:
        inside = inside & (tl.load(padding + columns, mask=inside, other=1) == 0)
    seen = inside & (rows < length)
    if CAUSAL:
        seen = seen & (columns <= rows + total - length)
    return seen


@triton.jit
def drop(weights, seed, rows, columns, plane, dropout):
    """weights as dropout left them in the forward pass."""
    if seed is not None:
        drawn = uniform(tl.load(seed), columns, rows, plane)
        weights = tl.where(drawn >= dropout, weights / (1.0 - dropout), 0.0)
    return weights


@triton.jit(do_not_specialize=COUNTS)
def attention_keys_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding, query_starts, key_starts, seed,
    grad, largest_score, exponential_sum, rowdot, grad_key, grad_value,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pq_s, pk_b, pk_h, pk_s, grad_b, grad_h, grad_s, gk_b, gk_h, gk_s,
    qc_b, kc_b, row_b, row_h, padding_b,
    num_heads, first_sequence, queries, keys, table_size, scale, dropout,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys. Scores are held transposed: [keys, queries]."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    query_start, length, query_batch = sequence(query_starts, batch, queries, PACKED)
    key_start, total, key_batch = sequence(key_starts, batch, keys, PACKED)
    start = tl.program_id(0) * BLOCK_N
    if start >= total:
        return
    columns = start + tl.arange(0, BLOCK_N)
    key += key_batch * key_b + head * key_h + key_start * key_s
    value += key_batch * value_b + head * value_h + key_start * value_s
    k = load_rows(key, columns, total, key_s, WIDTH)
    v = load_rows(value, columns, total, value_s, WIDTH)
    if position_query is not None:
        position_query += query_batch * pq_b + head * pq_h + query_start * pq_s
        position_key += key_batch * pk_b + head * pk_h + key_start * pk_s
        pk = load_rows(position_key, columns, total, pk_s, WIDTH)
    if table is not None:
        table += head * table_size
        query_codes += query_batch * qc_b + query_start
        key_codes += key_batch * kc_b + key_start
        column_codes = tl.load(key_codes + columns, columns < total, other=0)[:, None]
    if padding is not None:
        padding += batch * padding_b
    factor = 1.0
    if head_scale is not None:
        factor = tl.load(head_scale + head).to(tl.float32)
    query += query_batch * query_b + head * query_h + query_start * query_s
    grad += query_batch * grad_b + head * grad_h + query_start * grad_s
    row_values = query_batch * row_b + head * row_h + query_start
    plane = ((batch + first_sequence) * num_heads + head).to(tl.int32)
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    first = 0
    if CAUSAL:
        # The first query that sees a key of the block, rounded down to a whole block.
        first = tl.maximum(start - (total - length), 0) // BLOCK_M * BLOCK_M
    for begin in range(first, length, BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        q = load_rows(query, rows, length, query_s, WIDTH)
        scores = dot(k, tl.trans(q))
        if position_query is not None:
            pq = load_rows(position_query, rows, length, pq_s, WIDTH)
            scores = dot(pk, tl.trans(pq), scores)
        scores = scores * scale
        if table is not None:
            row_codes = tl.load(query_codes + rows, rows < length, other=0)[None, :]
            scores = add_relative(scores, table, row_codes, column_codes, table_size)
        largest, inverse, delta = row_statistics(
            largest_score, exponential_sum, rowdot, row_values + rows, rows < length, factor
        )
        seen = visible(rows[None, :], columns[:, None], length, total, padding, CAUSAL)
        weights = tl.exp2((scores - largest[None, :]) * LOG2E) * inverse[None, :]
        weights = tl.where(seen, weights, 0.0)
        dy = load_rows(grad, rows, length, grad_s, WIDTH)
        dropped = drop(weights, seed, rows[None, :], columns[:, None], plane, dropout)
        dv = dot(dropped.to(dy.dtype), dy, dv)
        dp = factor * dot(v, tl.trans(dy))
        dp = drop(dp, seed, rows[None, :], columns[:, None], plane, dropout)
        dk = dot((weights * (dp - delta[None, :])).to(q.dtype), q, dk)
    place = (
        key_batch * gk_b + head * gk_h + (key_start + columns[:, None]) * gk_s
        + tl.arange(0, WIDTH)[None, :]
    )  # fmt: skip
    inside = columns[:, None] < total
    tl.store(grad_key + place, (dk * scale).to(grad_key.dtype.element_ty), inside)
    tl.store(grad_value + place, (dv * factor).to(grad_value.dtype.element_ty), inside)


@triton.jit(do_not_specialize=COUNTS)
def attention_queries_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding, query_starts, key_starts, seed,
    grad, largest_score, exponential_sum, rowdot, grad_query,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pq_s, pk_b, pk_h, pk_s, grad_b, grad_h, grad_s, gq_b, gq_h, gq_s,
    qc_b, kc_b, row_b, row_h, padding_b,
    num_heads, first_sequence, queries, keys, table_size, scale, dropout,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    query_start, length, query_batch = sequence(query_starts, batch, queries, PACKED)
    key_start, total, key_batch = sequence(key_starts, batch, keys, PACKED)
    begin = tl.program_id(0) * BLOCK_M
    if begin >= length:
        return
    rows = begin + tl.arange(0, BLOCK_M)
    query += query_batch * query_b + head * query_h + query_start * query_s
    grad += query_batch * grad_b + head * grad_h + query_start * grad_s
    q = load_rows(query, rows, length, query_s, WIDTH)
    dy = load_rows(grad, rows, length, grad_s, WIDTH)
    if position_query is not None:
        position_query += query_batch * pq_b + head * pq_h + query_start * pq_s
        position_key += key_batch * pk_b + head * pk_h + key_start * pk_s
        pq = load_rows(position_query, rows, length, pq_s, WIDTH)
    if table is not None:
        table += head * table_size
        query_codes += query_batch * qc_b + query_start
        key_codes += key_batch * kc_b + key_start
        row_codes = tl.load(query_codes + rows, rows < length, other=0)[:, None]
    if padding is not None:
        padding += batch * padding_b
    factor = 1.0
    if head_scale is not None:
        factor = tl.load(head_scale + head).to(tl.float32)
    row_values = query_batch * row_b + head * row_h + query_start + rows
    largest, inverse, delta = row_statistics(
        largest_score, exponential_sum, rowdot, row_values, rows < length, factor
    )
    key += key_batch * key_b + head * key_h + key_start * key_s
    value += key_batch * value_b + head * value_h + key_start * value_s
    plane = ((batch + first_sequence) * num_heads + head).to(tl.int32)
    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    last = total
    if CAUSAL:
        last = tl.minimum(total, begin + BLOCK_M + total - length)
    for start in range(0, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, columns, total, key_s, WIDTH)
        scores = dot(q, tl.trans(k))
        if position_query is not None:
            pk = load_rows(position_key, columns, total, pk_s, WIDTH)
            scores = dot(pq, tl.trans(pk), scores)
        scores = scores * scale
        if table is not None:
            column_codes = tl.load(key_codes + columns, columns < total, other=0)[None, :]
            scores = add_relative(scores, table, row_codes, column_codes, table_size)
        seen = visible(rows[:, None], columns[None, :], length, total, padding, CAUSAL)
        weights = tl.exp2((scores - largest[:, None]) * LOG2E) * inverse[:, None]
        weights = tl.where(seen, weights, 0.0)
        v = load_rows(value, columns, total, value_s, WIDTH)
        dp = factor * dot(dy, tl.trans(v))
        dp = drop(dp, seed, rows[:, None], columns[None, :], plane, dropout)
        dq = dot((weights * (dp - delta[:, None])).to(k.dtype), k, dq)
    place = (
        query_batch * gq_b + head * gq_h + (query_start + rows[:, None]) * gq_s
        + tl.arange(0, WIDTH)[None, :]
    )  # fmt: skip
    tl.store(
        grad_query + place, (dq * scale).to(grad_query.dtype.element_ty), rows[:, None] < length
    )


@triton.jit
def scatter(ds, index, grad_table, table_size, DETERMINISTIC: tl.constexpr):
    """grad_table[index] += ds for the elements whose index is inside the table.

    Deterministic: the entries of the block's range in turn, each the sum of the whole block in one
    order; grad_table must be this program's own.
    """
    inside = (index >= 0) & (index < table_size)
    if DETERMINISTIC:
        lowest = tl.min(tl.min(tl.where(inside, index, table_size), 1), 0)
        highest = tl.max(tl.max(tl.where(inside, index, -1), 1), 0)
        for entry in range(lowest, highest + 1):
            found = tl.sum(tl.sum(tl.where(index == entry, ds, 0.0), 1), 0)
            tl.store(grad_table + entry, tl.load(grad_table + entry) + found)
    else:
        tl.atomic_add(grad_table + index, ds, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def attention_bias_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding, query_starts, key_starts, seed,
    grad, largest_score, exponential_sum, rowdot, grad_position, grad_table,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pq_s, pk_b, pk_h, pk_s, grad_b, grad_h, grad_s, gp_g, gp_h, gp_s,
    qc_b, kc_b, row_b, row_h, padding_b,
    num_heads, first_sequence, queries, keys, sequences, group, table_size, scale, dropout,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    OF_KEYS: tl.constexpr, DETERMINISTIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dpq and the table's gradient of a block of queries; or (OF_KEYS) dpk of a block of keys.

    Which of them is told by grad_position and grad_table being there.

    Sums over the sequences of a group, which share positions and codes; a group of sequences that
    do not share them has one.
    """
    head = tl.program_id(1).to(tl.int64)
    low = tl.program_id(2) * group
    high = tl.minimum(sequences, low + group)
    batch = low.to(tl.int64)
    query_start, length, query_batch = sequence(query_starts, batch, queries, PACKED)
    key_start, total, key_batch = sequence(key_starts, batch, keys, PACKED)
    owned = tl.program_id(0) * (BLOCK_N if OF_KEYS else BLOCK_M)
    if owned >= (total if OF_KEYS else length):
        return
    if position_query is not None:
        position_query += query_batch * pq_b + head * pq_h + query_start * pq_s
        position_key += key_batch * pk_b + head * pk_h + key_start * pk_s
    if grad_position is not None:
        grad_position += head * gp_h
        if PACKED:
            grad_position += (key_start if OF_KEYS else query_start) * gp_s
        else:
            grad_position += tl.program_id(2).to(tl.int64) * gp_g
    if table is not None:
        table += head * table_size
        query_codes += query_batch * qc_b + query_start
        key_codes += key_batch * kc_b + key_start
    if grad_table is not None:
        grad_table += head * table_size
        if DETERMINISTIC:
            program = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            grad_table += program * num_heads * table_size
    factor = 1.0
    if head_scale is not None:
        factor = tl.load(head_scale + head).to(tl.float32)
    if grad_position is not None:
        found = tl.zeros([BLOCK_N if OF_KEYS else BLOCK_M, WIDTH], tl.float32)
    first = 0
    last = length if OF_KEYS else total
    if CAUSAL:  # blocks of which no query sees a key
        if OF_KEYS:
            first = tl.maximum(owned - (total - length), 0) // BLOCK_M * BLOCK_M
        else:
            last = tl.minimum(total, owned + BLOCK_M + total - length)
    for other in range(first, last, BLOCK_M if OF_KEYS else BLOCK_N):
        rows = (other if OF_KEYS else owned) + tl.arange(0, BLOCK_M)
        columns = (owned if OF_KEYS else other) + tl.arange(0, BLOCK_N)
        bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if position_query is not None:
            pq = load_rows(position_query, rows, length, pq_s, WIDTH)
            pk = load_rows(position_key, columns, total, pk_s, WIDTH)
            bias = dot(pq, tl.trans(pk)) * scale
        if table is not None:
            row_codes = tl.load(query_codes + rows, rows < length, other=0)[:, None]
            column_codes = tl.load(key_codes + columns, columns < total, other=0)[None, :]
            bias = add_relative(bias, table, row_codes, column_codes, table_size)
        summed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for batch32 in range(low, high):
            batch = tl.to_tensor(batch32).to(tl.int64)
            query_start, length, query_batch = sequence(query_starts, batch, queries, PACKED)
            key_start, total, key_batch = sequence(key_starts, batch, keys, PACKED)
            q = load_rows(
                query + query_batch * query_b + head * query_h + query_start * query_s,
                rows, length, query_s, WIDTH,
            )  # fmt: skip
            k = load_rows(
                key + key_batch * key_b + head * key_h + key_start * key_s,
                columns, total, key_s, WIDTH,
            )  # fmt: skip
            scores = dot(q, tl.trans(k)) * scale + bias
            row_values = query_batch * row_b + head * row_h + query_start + rows
            largest, inverse, delta = row_statistics(
                largest_score, exponential_sum, rowdot, row_values, rows < length, factor
            )
            mask = padding
            if padding is not None:
                mask = padding + batch * padding_b
            seen = visible(rows[:, None], columns[None, :], length, total, mask, CAUSAL)
            weights = tl.exp2((scores - largest[:, None]) * LOG2E) * inverse[:, None]
            weights = tl.where(seen, weights, 0.0)
            dy = load_rows(
                grad + query_batch * grad_b + head * grad_h + query_start * grad_s,
                rows, length, grad_s, WIDTH,
            )  # fmt: skip
            v = load_rows(
                value + key_batch * value_b + head * value_h + key_start * value_s,
                columns, total, value_s, WIDTH,
            )  # fmt: skip
            dp = factor * dot(dy, tl.trans(v))
            plane = ((batch + first_sequence) * num_heads + head).to(tl.int32)
            dp = drop(dp, seed, rows[:, None], columns[None, :], plane, dropout)
            summed += weights * (dp - delta[:, None])
        if grad_position is not None:
            if OF_KEYS:
                found = dot(tl.trans(summed.to(pq.dtype)), pq, found)
            else:
                found = dot(summed.to(pk.dtype), pk, found)
        if grad_table is not None:
            # -1 at places outside the sequence, whose codes, read as 0, could name a real entry.
            index = tl.where(
                (rows[:, None] < length) & (columns[None, :] < total), row_codes - column_codes, -1
            )
            scatter(summed, index, grad_table, table_size, DETERMINISTIC)
    if grad_position is not None:
        mine = owned + tl.arange(0, BLOCK_N if OF_KEYS else BLOCK_M)
        place = mine[:, None] * gp_s + tl.arange(0, WIDTH)[None, :]
        tl.store(
            grad_position + place,
            (found * scale).to(grad_position.dtype.element_ty),
            mine[:, None] < (total if OF_KEYS else length),
        )
