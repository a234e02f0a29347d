"""`attention`: checks, the choice of an implementation, and the operators PyTorch knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from unival.kernels.attention import checks
from unival.kernels.attention.backward import attention_backward
from unival.kernels.attention.blocked import backward_blocked, forward_blocked, wide_dtype
from unival.kernels.attention.flash import flash_attention
from unival.kernels.attention.forward import attention_decode, attention_forward
from unival.kernels.attention.inputs import Inputs, empty_heads
from unival.kernels.attention.reference import attention_reference
from unival.kernels.attention.relative import RelativeBias
from unival.kernels.backend import log_once, resolve_backend
from unival.kernels.triton_tools.philox import draw_seed

BACKENDS = ("sdpa", "triton", "flash_attn", "eager")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position_query: Tensor | None = None,
    position_key: Tensor | None = None,
    relative: RelativeBias | None = None,
    head_scale: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y[b,h,i] = c_h sum_j softmax_j(s (q_i . k_j + pq_i . pk_j) + r_h(i, j)) v_j.

    No tensor of [B, H, S, T] is made, except by `eager`.

    Args:
        query: [B, H, S, d]; float32, float16 or bfloat16. Elements of a head lie side by side.
        key, value: [B, H, T, d].
        position_query, position_key: [B or 1, H, S or T, d], the untied position part.
        relative: r, a table by offset and a code a token (relative.py).
        head_scale: c [H]; may be 0.
        key_padding_mask: bool [B, T], True where a key must not be seen.
        causal: query i sees keys up to i + T - S.
        scale: s; d^-1/2 where absent.
        dropout: rate on the probabilities.
        seed: int64 [1] of the dropout; drawn where absent. Not with `flash_attn`.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], starts of packed sequences; then B = 1
            and S and T are the packed lengths.
        max_seqlen_q, max_seqlen_k: the longest packed sequences.
        deterministic: equal bits on every run; otherwise the table's gradient is summed by atomics.
        backend: `auto` (Triton on a GPU, `sdpa` on a CPU), `triton`, `sdpa` (PyTorch's operators on
            blocks of scores), `flash_attn` (the package, where there is no relative bias, and
            Triton where there is), `eager` (reference.py).

    Returns:
        [B, H, S, d] in query's dtype; from `triton` and `sdpa` laid out as [B, S, H, d]. A row that
        sees no key gives zeros. Differentiable in query, key, value, positions, table, head_scale.

    Raises:
        ValueError: an argument of a wrong shape, dtype, layout or device, or an implementation that
            cannot run; the message names it and what is allowed.
    """
    chosen = resolve_backend("attention", backend, query.device, BACKENDS)
    if chosen == "flash_attn":
        lacks = None
        if relative is not None:
            lacks = "has no relative bias: Triton runs where there is one"
        elif causal and key_padding_mask is not None:
            # It would count its diagonal from the last key that is not padding.
            lacks = "has no causal mask beside padding: Triton runs where there are both"
        if lacks is not None:
            log_once(f"attention: flash_attn {lacks}")
            chosen = resolve_backend("attention", "triton", query.device, BACKENDS)
    checks.check_heads(query, key, value, chosen)
    checks.check_positions(query, key, position_query, position_key)
    checks.check_relative(query, key, relative)
    checks.check_rest(query, key, head_scale, key_padding_mask, dropout, seed)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check_packed(query, key, key_padding_mask, *packing)
    if chosen in ("flash_attn", "eager") and cu_seqlens_q is not None:
        raise ValueError(f"cu_seqlens_q: backend={chosen!r} takes no packed sequences here")
    if chosen == "flash_attn" and seed is not None:
        raise ValueError("seed: backend='flash_attn' draws dropout from PyTorch's generator")
    if chosen == "sdpa" and deterministic and query.is_cuda:
        raise ValueError("deterministic: on a GPU only backend='triton' promises equal bits")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "flash_attn":
        return flash_attention(
            query, key, value, position_query, position_key, head_scale, key_padding_mask,
            causal, scale, dropout, deterministic,
        )  # fmt: skip
    if dropout > 0.0 and seed is None:
        seed = draw_seed(query.device)
    seed = seed if dropout > 0.0 else None
    if chosen == "eager":
        return attention_reference(
            query, key, value, position_query, position_key, relative, head_scale,
            key_padding_mask, causal, scale, dropout, seed,
        )[0]  # fmt: skip
    table, query_codes, key_codes = (None, None, None) if relative is None else relative
    position_query, position_key, query_codes, key_codes = _one_batch(
        (position_query, position_key, query_codes, key_codes), query.shape[0]
    )
    # Small tensors, which kernels read without strides.
    table, head_scale, padding, query_starts, key_starts = (
        None if x is None else x.contiguous()
        for x in (table, head_scale, key_padding_mask, cu_seqlens_q, cu_seqlens_k)
    )
    tensors = (
        query, key, value, position_query, position_key, table, query_codes, key_codes,
        head_scale, None if padding is None else padding.view(torch.uint8),
        query_starts, key_starts, seed,
    )  # fmt: skip
    differentiable = (query, key, value, position_query, position_key, table, head_scale)
    wants_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in differentiable
    )
    if query.shape[2] == 1 and cu_seqlens_q is None and seed is None and not wants_gradient:
        return _decode(*tensors[:10], scale, chosen)
    return _forward(
        *tensors, scale, causal, dropout,
        query.shape[2] if max_seqlen_q is None else max_seqlen_q,
        key.shape[2] if max_seqlen_k is None else max_seqlen_k,
        deterministic, chosen,
    )[0]  # fmt: skip


def _one_batch(tensors: tuple[Tensor | None, ...], batch: int) -> tuple[Tensor | None, ...]:
    """All as they are where each has a batch of 1, else all expanded to the batch."""
    if all(x is None or x.shape[0] == 1 for x in tensors):
        return tensors
    return tuple(None if x is None else x.expand(batch, *[-1] * (x.ndim - 1)) for x in tensors)


@torch.library.custom_op("unival::attention_decode", mutates_args=())
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_query: Tensor | None,
    position_key: Tensor | None,
    table: Tensor | None,
    query_codes: Tensor | None,
    key_codes: Tensor | None,
    head_scale: Tensor | None,
    padding: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    """One query a sequence, without a gradient."""
    x = Inputs(
        query, key, value, position_query, position_key, table, query_codes, key_codes,
        head_scale, padding, None, None, None, scale, False, 0.0, 1, key.shape[2],
    )  # fmt: skip
    return attention_decode(x) if backend == "triton" else forward_blocked(x)[0]


@_decode.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return empty_heads(query)


@torch.library.custom_op("unival::attention_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_query: Tensor | None,
    position_key: Tensor | None,
    table: Tensor | None,
    query_codes: Tensor | None,
    key_codes: Tensor | None,
    head_scale: Tensor | None,
    padding: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
    max_queries: int,
    max_keys: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, output before head scaling (empty without a head scale), statistics [2, B, H, S]."""
    x = Inputs(
        query, key, value, position_query, position_key, table, query_codes, key_codes,
        head_scale, padding, query_starts, key_starts, seed, scale, causal, dropout,
        max_queries, max_keys,
    )  # fmt: skip
    return attention_forward(x) if backend == "triton" else forward_blocked(x)


@_forward.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    head_scale, backend = rest[7], rest[-1]
    output = empty_heads(query)
    unscaled = output.new_empty(0) if head_scale is None else empty_heads(query)
    dtype = torch.float32 if backend == "triton" else wide_dtype(query.dtype)
    return output, unscaled, query.new_empty(2, *query.shape[:3], dtype=dtype)


@torch.library.custom_op("unival::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    unscaled: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_query: Tensor | None,
    position_key: Tensor | None,
    table: Tensor | None,
    query_codes: Tensor | None,
    key_codes: Tensor | None,
    head_scale: Tensor | None,
    padding: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
    max_queries: int,
    max_keys: int,
    deterministic: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of query, key, value, positions, table and head_scale; empty where absent."""
    x = Inputs(
        query, key, value, position_query, position_key, table, query_codes, key_codes,
        head_scale, padding, query_starts, key_starts, seed, scale, causal, dropout,
        max_queries, max_keys,
    )  # fmt: skip
    if backend == "triton":
        found = attention_backward(x, grad, unscaled, statistics, deterministic)
    else:
        found = backward_blocked(x, grad, unscaled, statistics)
    inputs = (query, key, value, position_query, position_key, table, head_scale)
    return [
        grad.new_empty(0) if like is None else gradient.to(like.dtype)
        for like, gradient in zip(inputs, found, strict=True)
    ]


@_backward.register_fake
def _(grad: Tensor, unscaled: Tensor, statistics: Tensor, *rest: Any) -> list[Tensor]:
    backend = rest[-1]
    found = []
    for index, like in enumerate((*rest[:6], rest[8])):
        if like is None:
            found.append(grad.new_empty(0))
        elif backend == "triton" and index < 3:
            found.append(empty_heads(like))
        else:
            found.append(like.new_empty(like.shape))
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    y, unscaled, statistics = output
    has_scale = inputs[8] is not None
    ctx.save_for_backward(*inputs[:13], unscaled if has_scale else y, statistics)
    ctx.options = inputs[13:]
    ctx.mark_non_differentiable(unscaled, statistics)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 20
    *tensors, unscaled, statistics = ctx.saved_tensors
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    found = _backward(grad, unscaled, statistics, *tensors, *ctx.options)
    q, k, v, pq, pk, table, scale = (
        gradient if needed else None
        for gradient, needed in zip(
            found, (*ctx.needs_input_grad[:6], ctx.needs_input_grad[8]), strict=True
        )
    )
    return (q, k, v, pq, pk, table, None, None, scale, *[None] * 11)


_forward.register_autograd(_differentiate, setup_context=_save)


def _pairs_flops(query: tuple[int, ...], key: tuple[int, ...], position: Any) -> tuple[int, int]:
    """2 B H S T d, and how many products of width d the scores take. Causal is not halved."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * width, 1 if position is None else 2


@register_flop_formula([torch.ops.unival.attention_forward, torch.ops.unival.attention_decode])
def _forward_flops(query: Any, key: Any, value: Any, position: Any, *_: Any, **__: Any) -> int:
    """Scores and the weighted sum of values."""
    pairs, products = _pairs_flops(query, key, position)
    return pairs * (products + 1)


@register_flop_formula(torch.ops.unival.attention_backward)
def _backward_flops(
    grad: Any,
    o: Any,
    statistics: Any,
    query: Any,
    key: Any,
    value: Any,
    position: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Scores once more, dp, dv, and dq, dk, dpq, dpk."""
    pairs, products = _pairs_flops(query, key, position)
    return pairs * (3 * products + 2)
