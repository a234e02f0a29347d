"""Arguments of an attention, checked: every error names the argument, its shape and what fits."""

from __future__ import annotations

import torch
from torch import Tensor

from unival.kernels.attention.relative import RelativeBias
from unival.kernels.backend import check_values

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_heads(query: Tensor, key: Tensor, value: Tensor, backend: str) -> None:
    """query [B, H, S, d], key and value [B, H, T, d], one dtype and device."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name}: shape {list(x.shape)}; wanted [batch, heads, length, width]")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: {x.dtype}, but query is {query.dtype}; wanted one dtype")
        if x.device != query.device:
            raise ValueError(f"{name}: on {x.device}, but query is on {query.device}")
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
            raise ValueError(
                f"{name}: shape {list(x.shape)} with strides {list(x.stride())}; the elements of a "
                "head must lie side by side (stride 1 in the last dimension)"
            )
    batch, heads, _, width = query.shape
    if (key.shape[0], key.shape[1], key.shape[3]) != (batch, heads, width):
        raise ValueError(
            f"key: shape {list(key.shape)}; with query {list(query.shape)} wanted "
            f"[{batch}, {heads}, keys, {width}]"
        )
    if value.shape != key.shape:
        raise ValueError(f"value: shape {list(value.shape)}; wanted key's, {list(key.shape)}")
    if backend == "triton":
        if width not in WIDTHS:
            raise ValueError(
                f"query: shape {list(query.shape)} has heads of width {width}; the Triton kernels "
                f"take {', '.join(map(str, WIDTHS))}"
            )
        if query.dtype not in DTYPES:
            raise ValueError(
                f"query: {query.dtype}; the Triton kernels take float32, float16 and bfloat16"
            )


def check_positions(
    query: Tensor, key: Tensor, position_query: Tensor | None, position_key: Tensor | None
) -> None:
    """Both [B or 1, H, S or T, d], or neither."""
    if (position_query is None) != (position_key is None):
        raise ValueError("position_query, position_key: give both or neither")
    if position_query is None or position_key is None:
        return
    for name, x, like in (
        ("position_query", position_query, query),
        ("position_key", position_key, key),
    ):
        fits = x.ndim == 4 and x.shape[0] in (1, like.shape[0]) and x.shape[1:] == like.shape[1:]
        if not fits:
            raise ValueError(
                f"{name}: shape {list(x.shape)}; wanted {list(like.shape)}, or a batch of 1"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name}: {x.dtype} on {x.device}; wanted query's, {query.dtype} on {query.device}"
            )
        if x.stride(-1) != 1 and x.numel():
            raise ValueError(
                f"{name}: strides {list(x.stride())}; the elements of a head must lie side by side"
            )


def check_relative(query: Tensor, key: Tensor, relative: RelativeBias | None) -> None:
    """table [H, L] in query's dtype or float32; codes int32 [B or 1, S or T]."""
    if relative is None:
        return
    table, *codes = relative
    if table.ndim != 2 or table.shape[0] != query.shape[1]:
        raise ValueError(
            f"relative.table: shape {list(table.shape)}; wanted [{query.shape[1]} heads, offsets]"
        )
    if table.dtype not in (query.dtype, torch.float32):
        raise ValueError(f"relative.table: {table.dtype}; wanted float32 or query's {query.dtype}")
    for name, code, like in (
        ("relative.query_codes", codes[0], query),
        ("relative.key_codes", codes[1], key),
    ):
        if code.dtype != torch.int32:
            raise ValueError(f"{name}: {code.dtype}; wanted int32")
        batch, length = like.shape[0], like.shape[2]
        if code.ndim != 2 or code.shape[0] not in (1, batch) or code.shape[1] != length:
            raise ValueError(f"{name}: shape {list(code.shape)}; wanted [{batch} or 1, {length}]")
        if code.stride(-1) != 1 and code.shape[-1] > 1:
            raise ValueError(f"{name}: strides {list(code.stride())}; wanted contiguous rows")
    for name, x in zip(("table", "query_codes", "key_codes"), relative, strict=True):
        if x.device != query.device:
            raise ValueError(f"relative.{name}: on {x.device}, but query is on {query.device}")


def check_rest(
    query: Tensor,
    key: Tensor,
    head_scale: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """head_scale [H]; key_padding_mask bool [B, T]; 0 <= dropout < 1; seed int64 [1]."""
    heads = query.shape[1]
    for name, x in (
        ("head_scale", head_scale),
        ("key_padding_mask", key_padding_mask),
        ("seed", seed),
    ):
        if x is not None and x.device != query.device:
            raise ValueError(f"{name}: on {x.device}, but query is on {query.device}")
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (1,)):
        raise ValueError(f"seed: shape {list(seed.shape)}, {seed.dtype}; wanted int64 [1]")
    if head_scale is not None and (
        head_scale.shape != (heads,) or head_scale.dtype not in (query.dtype, torch.float32)
    ):
        raise ValueError(
            f"head_scale: shape {list(head_scale.shape)}, {head_scale.dtype}; wanted [{heads}] in "
            f"float32 or query's {query.dtype}"
        )
    if key_padding_mask is not None:
        wanted = (key.shape[0], key.shape[2])
        if key_padding_mask.shape != wanted or key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"key_padding_mask: shape {list(key_padding_mask.shape)}, "
                f"{key_padding_mask.dtype}; wanted bool {list(wanted)}"
            )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: {dropout}; wanted at least 0 and less than 1")


def check_packed(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    """cu_seqlens int32 [sequences + 1] from 0 to the packed length, and the longest lengths."""
    given = [x is not None for x in (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)]
    if not any(given):
        return
    if not all(given):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: give all four or none"
        )
    if query.shape[0] != 1:
        raise ValueError(f"query: shape {list(query.shape)}; packed sequences have a batch of 1")
    if key_padding_mask is not None:
        raise ValueError("key_padding_mask: packed sequences have no padding; leave it out")
    for name, starts, longest, length in (
        ("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, query.shape[2]),
        ("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, key.shape[2]),
    ):
        if starts.ndim != 1 or starts.dtype != torch.int32 or starts.numel() < 1:
            raise ValueError(
                f"{name}: shape {list(starts.shape)}, {starts.dtype}; wanted int32 [sequences + 1]"
            )
        if starts.device != query.device:
            raise ValueError(f"{name}: on {starts.device}, but query is on {query.device}")
        steps = starts.diff()
        fine = (starts[0] == 0) & (starts[-1] == length) & (steps >= 0).all()
        fine &= (steps <= longest).all()
        message = (
            f"{name}: wanted starts that grow from 0 to the packed length {length}, and no "
            f"sequence longer than max_seqlen {longest}"
        )
        check_values(fine, message)
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_k: {cu_seqlens_k.numel() - 1} sequences; cu_seqlens_q has "
            f"{cu_seqlens_q.numel() - 1}"
        )
