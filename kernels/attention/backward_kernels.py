"""Triton: attention backward, recomputing the scores from q, k and the logsumexp.

Four kernels over the same scores, each the only writer of what it makes:
    rowdot     the sum of dy * o of a row: c times it is softmax's delta, its sum dc
    keys       dk, dv and dpk: a program owns keys and walks the queries
    queries    dq and dpq: a program owns queries and walks the keys
    relative   the table's gradient: a program owns queries of a head, walks the keys, and sums over
               its sequences before it scatters, so that a table entry is added to rarely
Where all sequences share their position terms, a program walks several sequences and keeps the sum
of their dpq or dpk in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unival.kernels.attention.forward import LOG2E, add_relative, load_rows, sequence
from unival.kernels.triton_tools.arithmetic import dot
from unival.kernels.triton_tools.philox import uniform


@triton.jit
def attention_rowdot_kernel(
    grad, unscaled, rowdot,
    grad_b, grad_h, grad_s, unscaled_b, unscaled_h, unscaled_s, rowdot_b, rowdot_h,
    queries, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dy = load_rows(grad + batch * grad_b + head * grad_h, rows, queries, grad_s, WIDTH)
    o = load_rows(
        unscaled + batch * unscaled_b + head * unscaled_h, rows, queries, unscaled_s, WIDTH
    )
    found = tl.sum(dy.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(rowdot + batch * rowdot_b + head * rowdot_h + rows, found, rows < queries)


@triton.jit
def probabilities(
    scores, table, row_codes, column_codes, table_size, lse, rows, columns, absent,
    length, total, scale, CAUSAL: tl.constexpr,
):  # fmt: skip
    """exp(score - logsumexp) of a block, 0 where the query does not see the key.

    rows and what belongs to queries, columns and what belongs to keys: broadcast to the block, in
    either order. absent: nonzero at padding, or None.
    """
    scores = scores * scale
    if table is not None:
        scores = add_relative(scores, table, row_codes, column_codes, table_size)
    seen = (columns < total) & (rows < length)
    if absent is not None:
        seen = seen & (absent == 0)
    if CAUSAL:
        seen = seen & (columns <= rows + total - length)
    return tl.where(seen, tl.exp2((scores - lse) * LOG2E), 0.0)


@triton.jit
def drop(weights, seed, rows, columns, plane, dropout):
    """weights as dropout left them in the forward pass."""
    if seed is not None:
        drawn = uniform(tl.load(seed), columns, rows, plane)
        weights = tl.where(drawn >= dropout, weights / (1.0 - dropout), 0.0)
    return weights


@triton.jit
def attention_keys_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding, query_starts, key_starts, seed,
    grad, lse, rowdot, grad_key, grad_value, grad_pk,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pq_s, pk_b, pk_h, pk_s, grad_b, grad_h, grad_s,
    gk_b, gk_h, gk_s, gpk_g, gpk_h, gpk_s,
    qc_b, kc_b, lse_b, lse_h, padding_b,
    num_heads, queries, keys, sequences, group, table_size, scale, dropout,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk, dv and dpk of a block of keys, for the sequences of a group in turn."""
    head = tl.program_id(1).to(tl.int64)
    index = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    width = tl.arange(0, WIDTH)
    factor = 1.0
    if head_scale is not None:
        factor = tl.load(head_scale + head).to(tl.float32)
    if table is not None:
        table += head * table_size
    if position_query is not None:
        dpk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for batch32 in range(
        tl.program_id(2) * group, tl.minimum(sequences, (tl.program_id(2) + 1) * group)
    ):
        batch = tl.to_tensor(batch32).to(tl.int64)
        query_start, length, query_batch = sequence(query_starts, batch, queries, PACKED)
        key_start, total, key_batch = sequence(key_starts, batch, keys, PACKED)
        k = load_rows(
            key + key_batch * key_b + head * key_h + key_start * key_s,
            columns, total, key_s, WIDTH,
        )  # fmt: skip
        v = load_rows(
            value + key_batch * value_b + head * value_h + key_start * value_s,
            columns, total, value_s, WIDTH,
        )  # fmt: skip
        if position_query is not None:
            pk = load_rows(
                position_key + key_batch * pk_b + head * pk_h + key_start * pk_s,
                columns, total, pk_s, WIDTH,
            )  # fmt: skip
            pq_rows = position_query + query_batch * pq_b + head * pq_h + query_start * pq_s
        column_codes = None
        if table is not None:
            column_codes = tl.load(
                key_codes + key_batch * kc_b + key_start + columns, columns < total, other=0
            )[:, None]
            codes = query_codes + query_batch * qc_b + query_start
        absent = None
        if padding is not None:
            absent = tl.load(padding + batch * padding_b + columns, columns < total, other=1)[
                :, None
            ]
        q_rows = query + query_batch * query_b + head * query_h + query_start * query_s
        grad_rows = grad + query_batch * grad_b + head * grad_h + query_start * grad_s
        row_values = query_batch * lse_b + head * lse_h + query_start
        plane = (batch * num_heads + head).to(tl.int32)
        dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        first = 0
        if CAUSAL:
            # The first query that sees a key of the block, rounded down to a whole block.
            first = tl.maximum(start - (total - length), 0) // BLOCK_M * BLOCK_M
        for begin in range(first, length, BLOCK_M):
            rows = begin + tl.arange(0, BLOCK_M)
            q = load_rows(q_rows, rows, length, query_s, WIDTH)
            scores = dot(k, tl.trans(q))
            if position_query is not None:
                pq = load_rows(pq_rows, rows, length, pq_s, WIDTH)
                scores = dot(pk, tl.trans(pq), scores)
            row_codes = None
            if table is not None:
                row_codes = tl.load(codes + rows, rows < length, other=0)[None, :]
            p = probabilities(
                scores, table, row_codes, column_codes, table_size,
                tl.load(lse + row_values + rows, rows < length, other=0.0)[None, :],
                rows[None, :], columns[:, None], absent, length, total, scale, CAUSAL,
            )  # fmt: skip
            dy = load_rows(grad_rows, rows, length, grad_s, WIDTH)
            delta = factor * tl.load(rowdot + row_values + rows, rows < length, other=0.0)
            dp = factor * dot(v, tl.trans(dy))
            dropped = drop(p, seed, rows[None, :], columns[:, None], plane, dropout)
            dv = dot(dropped.to(dy.dtype), dy, dv)
            dp = drop(dp, seed, rows[None, :], columns[:, None], plane, dropout)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = dot(ds, q, dk)
            if position_query is not None:
                dpk = dot(ds, pq, dpk)
        inside = columns[:, None] < total
        place = (
            key_batch * gk_b + head * gk_h + (key_start + columns[:, None]) * gk_s + width[None, :]
        )
        tl.store(grad_key + place, (dk * scale).to(grad_key.dtype.element_ty), inside)
        tl.store(grad_value + place, (dv * factor).to(grad_value.dtype.element_ty), inside)
        if PACKED and position_query is not None:
            # Packed sequences lie behind one another in the first group.
            place = head * gpk_h + (key_start + columns[:, None]) * gpk_s + width[None, :]
            tl.store(grad_pk + place, (dpk * scale).to(grad_pk.dtype.element_ty), inside)
            dpk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    if position_query is not None and not PACKED:
        place = index * gpk_g + head * gpk_h + columns[:, None] * gpk_s + width[None, :]
        tl.store(
            grad_pk + place, (dpk * scale).to(grad_pk.dtype.element_ty), columns[:, None] < keys
        )


@triton.jit
def attention_queries_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding, query_starts, key_starts, seed,
    grad, lse, rowdot, grad_query, grad_pq,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pq_s, pk_b, pk_h, pk_s, grad_b, grad_h, grad_s,
    gq_b, gq_h, gq_s, gpq_g, gpq_h, gpq_s,
    qc_b, kc_b, lse_b, lse_h, padding_b,
    num_heads, queries, keys, sequences, group, table_size, scale, dropout,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq and dpq of a block of queries, for the sequences of a group in turn."""
    head = tl.program_id(1).to(tl.int64)
    index = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_M
    rows = begin + tl.arange(0, BLOCK_M)
    width = tl.arange(0, WIDTH)
    factor = 1.0
    if head_scale is not None:
        factor = tl.load(head_scale + head).to(tl.float32)
    if table is not None:
        table += head * table_size
    if position_query is not None:
        dpq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for batch32 in range(
        tl.program_id(2) * group, tl.minimum(sequences, (tl.program_id(2) + 1) * group)
    ):
        batch = tl.to_tensor(batch32).to(tl.int64)
        query_start, length, query_batch = sequence(query_starts, batch, queries, PACKED)
        key_start, total, key_batch = sequence(key_starts, batch, keys, PACKED)
        q = load_rows(
            query + query_batch * query_b + head * query_h + query_start * query_s,
            rows, length, query_s, WIDTH,
        )  # fmt: skip
        dy = load_rows(
            grad + query_batch * grad_b + head * grad_h + query_start * grad_s,
            rows, length, grad_s, WIDTH,
        )  # fmt: skip
        if position_query is not None:
            pq = load_rows(
                position_query + query_batch * pq_b + head * pq_h + query_start * pq_s,
                rows, length, pq_s, WIDTH,
            )  # fmt: skip
            pk_rows = position_key + key_batch * pk_b + head * pk_h + key_start * pk_s
        row_codes = None
        if table is not None:
            row_codes = tl.load(
                query_codes + query_batch * qc_b + query_start + rows, rows < length, other=0
            )[:, None]
            codes = key_codes + key_batch * kc_b + key_start
        row_values = query_batch * lse_b + head * lse_h + query_start + rows
        row_lse = tl.load(lse + row_values, rows < length, other=0.0)
        delta = factor * tl.load(rowdot + row_values, rows < length, other=0.0)
        k_rows = key + key_batch * key_b + head * key_h + key_start * key_s
        v_rows = value + key_batch * value_b + head * value_h + key_start * value_s
        plane = (batch * num_heads + head).to(tl.int32)
        dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        last = total
        if CAUSAL:
            last = tl.minimum(total, begin + BLOCK_M + total - length)
        for start in range(0, last, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            k = load_rows(k_rows, columns, total, key_s, WIDTH)
            scores = dot(q, tl.trans(k))
            if position_query is not None:
                pk = load_rows(pk_rows, columns, total, pk_s, WIDTH)
                scores = dot(pq, tl.trans(pk), scores)
            column_codes = None
            if table is not None:
                column_codes = tl.load(codes + columns, columns < total, other=0)[None, :]
            absent = None
            if padding is not None:
                absent = tl.load(padding + batch * padding_b + columns, columns < total, other=1)
                absent = absent[None, :]
            p = probabilities(
                scores, table, row_codes, column_codes, table_size, row_lse[:, None],
                rows[:, None], columns[None, :], absent, length, total, scale, CAUSAL,
            )  # fmt: skip
            v = load_rows(v_rows, columns, total, value_s, WIDTH)
            dp = factor * dot(dy, tl.trans(v))
            dp = drop(dp, seed, rows[:, None], columns[None, :], plane, dropout)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            dq = dot(ds, k, dq)
            if position_query is not None:
                dpq = dot(ds, pk, dpq)
        inside = rows[:, None] < length
        place = (
            query_batch * gq_b + head * gq_h + (query_start + rows[:, None]) * gq_s + width[None, :]
        )
        tl.store(grad_query + place, (dq * scale).to(grad_query.dtype.element_ty), inside)
        if PACKED and position_query is not None:
            place = head * gpq_h + (query_start + rows[:, None]) * gpq_s + width[None, :]
            tl.store(grad_pq + place, (dpq * scale).to(grad_pq.dtype.element_ty), inside)
            dpq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if position_query is not None and not PACKED:
        place = index * gpq_g + head * gpq_h + rows[:, None] * gpq_s + width[None, :]
        tl.store(
            grad_pq + place, (dpq * scale).to(grad_pq.dtype.element_ty), rows[:, None] < queries
        )


@triton.jit
def scatter(
    ds, index, grad_table, table_size,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def attention_relative_kernel(
    query, key, value, position_query, position_key,
    table, query_codes, key_codes, head_scale, padding, query_starts, key_starts, seed,
    grad, lse, rowdot, grad_table,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    pq_b, pq_h, pq_s, pk_b, pk_h, pk_s, grad_b, grad_h, grad_s,
    qc_b, kc_b, lse_b, lse_h, padding_b,
    num_heads, queries, keys, sequences, group, table_size, scale, dropout,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    SHARED: tl.constexpr, DETERMINISTIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The table's gradient from a block of queries, all keys, and the sequences of a group.

    SHARED: the sequences have the same codes; their score gradients are summed before the scatter.
    """
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_M
    rows = begin + tl.arange(0, BLOCK_M)
    factor = 1.0
    if head_scale is not None:
        factor = tl.load(head_scale + head).to(tl.float32)
    table += head * table_size
    grad_table += head * table_size
    if DETERMINISTIC:
        program = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        grad_table += program * num_heads * table_size
    low = tl.program_id(2) * group
    high = tl.minimum(sequences, low + group)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        summed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        index = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
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
            scores = dot(q, tl.trans(k))
            if position_query is not None:
                pq = load_rows(
                    position_query + query_batch * pq_b + head * pq_h + query_start * pq_s,
                    rows, length, pq_s, WIDTH,
                )  # fmt: skip
                pk = load_rows(
                    position_key + key_batch * pk_b + head * pk_h + key_start * pk_s,
                    columns, total, pk_s, WIDTH,
                )  # fmt: skip
                scores = dot(pq, tl.trans(pk), scores)
            row_codes = tl.load(
                query_codes + query_batch * qc_b + query_start + rows, rows < length, other=0
            )[:, None]
            column_codes = tl.load(
                key_codes + key_batch * kc_b + key_start + columns, columns < total, other=0
            )[None, :]
            absent = None
            if padding is not None:
                absent = tl.load(padding + batch * padding_b + columns, columns < total, other=1)
                absent = absent[None, :]
            row_values = query_batch * lse_b + head * lse_h + query_start + rows
            p = probabilities(
                scores, table, row_codes, column_codes, table_size,
                tl.load(lse + row_values, rows < length, other=0.0)[:, None],
                rows[:, None], columns[None, :], absent, length, total, scale, CAUSAL,
            )  # fmt: skip
            dy = load_rows(
                grad + query_batch * grad_b + head * grad_h + query_start * grad_s,
                rows, length, grad_s, WIDTH,
            )  # fmt: skip
            v = load_rows(
                value + key_batch * value_b + head * value_h + key_start * value_s,
                columns, total, value_s, WIDTH,
            )  # fmt: skip
            delta = factor * tl.load(rowdot + row_values, rows < length, other=0.0)
            dp = factor * dot(dy, tl.trans(v))
            plane = (batch * num_heads + head).to(tl.int32)
            dp = drop(dp, seed, rows[:, None], columns[None, :], plane, dropout)
            ds = p * (dp - delta[:, None])
            index = row_codes - column_codes
            # Outside the sequences ds is 0, but codes read as 0 there could name a real entry.
            index = tl.where((rows[:, None] < length) & (columns[None, :] < total), index, -1)
            if SHARED:
                summed += ds
            else:
                scatter(ds, index, grad_table, table_size, DETERMINISTIC)
        if SHARED:
            scatter(summed, index, grad_table, table_size, DETERMINISTIC)
