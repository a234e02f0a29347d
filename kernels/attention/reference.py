"""What the attention of UnIVAL computes, in plain PyTorch; runs on every device.

    score[b,h,i,j] = q_i . k_j + pq_i . pk_j + r_h(i, j)
    y[b,h,i]       = c_h * sum_j softmax_j(score) v_j

Queries come already scaled by s = (2d)^-1/2, content and position alike. The position part is
exactly
of low rank, so one product of the concatenated [q, pq] and [k, pk] gives both (the observation of
FlashBias, arXiv 2505.12044); the relative bias is added in place, one [H, n, n] block for the whole
batch, so that no [B, H, S, T] bias ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RelativeBlock(NamedTuple):
    """A relative bias on a diagonal block of the scores.

    start  first query and key of the block
    bias   [P, H, S', T'] for P distinct patterns of positions
    rows   int64 [B]: the pattern of each sample; None where P is 1 and every sample has it
    """

    start: int
    bias: Tensor
    rows: Tensor | None = None


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_query: Tensor | None = None,
    position_key: Tensor | None = None,
    relative: Sequence[RelativeBlock] = (),
    head_scale: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention output and probabilities.

    Args:
        query: [B, H, S, d], already scaled.
        key, value: [B, H, T, d].
        position_query, position_key: [B or 1, H, S or T, d]; the query side already scaled.
        relative: biases of blocks on the diagonal; with a cache, the block's rows are the last S of
            its positions.
        head_scale: [H].
        key_padding_mask: bool [B, T], True where a key must not be seen. A row that sees no key
        gives
            the mean of all values: finite, and meaningless by definition.
        causal: query i sees keys up to i + T - S.

    Returns:
        output [B, H, S, d] in the dtype of value, probabilities [B, H, S, T] (before head scaling).
    """
    batch = query.shape[0]
    if position_query is not None and position_key is not None:
        query = torch.cat([query, position_query.expand(batch, -1, -1, -1)], dim=-1)
        key = torch.cat([key, position_key.expand(batch, -1, -1, -1)], dim=-1)
    scores = query @ key.transpose(-1, -2)
    for block in relative:
        rows, columns = block.bias.shape[-2:]
        part = scores[:, :, block.start : block.start + rows, block.start : block.start + columns]
        if block.rows is None:
            part += block.bias
        else:
            for sample, pattern in enumerate(block.rows.tolist()):
                part[sample] += block.bias[pattern]
    lowest = torch.finfo(scores.dtype).min
    if key_padding_mask is not None:
        scores.masked_fill_(key_padding_mask[:, None, None, :], lowest)
    if causal:
        length, total = scores.shape[-2:]
        hidden = torch.ones(length, total, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(hidden.triu(total - length + 1), lowest)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    output = probabilities @ value
    if head_scale is not None:
        output = output * head_scale[:, None, None]
    return output, probabilities
