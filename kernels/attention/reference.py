"""What the attention of UnIVAL computes, in plain PyTorch; runs on every device, in every dtype.

score[b,h,i,j] = s (q_i . k_j + pq_i . pk_j) + r_h(i, j)          s = scale
y[b,h,i]       = c_h * sum_j softmax_j(score) v_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from unival.kernels.attention.relative import RelativeBias
from unival.kernels.triton_tools.philox import uniform_torch


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_query: Tensor | None = None,
    position_key: Tensor | None = None,
    relative: RelativeBias | None = None,
    head_scale: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and probabilities, with everything in memory.

    Arguments as in `attention` (op.py), without packed sequences.

    Returns:
        output [B, H, S, d] in the dtype of value, probabilities [B, H, S, T] (before dropout and
        head scaling).
    """
    scores = query @ key.transpose(-1, -2) * scale
    if position_query is not None and position_key is not None:
        scores = scores + position_query @ position_key.transpose(-1, -2) * scale
    if relative is not None:
        scores = scores + dense_bias(relative)
    hidden = hidden_pairs(scores.shape, scores.device, key_padding_mask, causal)
    scores = scores.masked_fill(hidden, -torch.inf)
    # A row that sees no key: zeros, where a softmax would give NaN.
    scores = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(scores, dim=-1, dtype=wide).masked_fill(hidden, 0.0)
    probabilities = probabilities.to(value.dtype)
    kept = probabilities
    if dropout > 0.0 and seed is not None:
        kept = kept * keep_mask(scores.shape, dropout, seed) / (1.0 - dropout)
    output = kept @ value
    if head_scale is not None:
        output = (output * head_scale[:, None, None]).to(value.dtype)
    return output, probabilities


def dense_bias(relative: RelativeBias) -> Tensor:
    """The relative bias of every pair: [B or 1, H, S, T]."""
    index = relative.query_codes.long()[:, :, None] - relative.key_codes.long()[:, None, :]
    size = relative.table.shape[1]
    inside = (index >= 0) & (index < size)
    found = relative.table[:, index.clamp(0, max(size - 1, 0))] * inside
    return found.movedim(0, 1)


def hidden_pairs(
    shape: torch.Size, device: torch.device, key_padding_mask: Tensor | None, causal: bool
) -> Tensor:
    """bool, broadcast to [B, H, S, T]: True where query i must not see key j."""
    batch, _, length, total = shape
    hidden = torch.zeros(batch, 1, length, total, dtype=torch.bool, device=device)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    if causal:
        ones = torch.ones(length, total, dtype=torch.bool, device=device)
        hidden = hidden | ones.triu(total - length + 1)
    return hidden


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor) -> Tensor:
    """bool [B, H, S, T]: probabilities that dropout keeps, by counter (see triton_tools.philox)."""
    batch, heads, length, total = shape
    plane, row, column = (
        torch.arange(n, device=seed.device) for n in (batch * heads, length, total)
    )
    drawn = uniform_torch(seed, column, row[:, None], plane[:, None, None])
    return (drawn >= dropout).unflatten(0, (batch, heads))
