"""The losses of UnIVAL as sums over tokens, in plain PyTorch; runs on every device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LossSums(NamedTuple):
    """Sums over the kept tokens: the loss, its unsmoothed part, and how many were kept.

    token_nll [n] is the negative log-likelihood of every token, dropped ones too; no gradient.
    """

    loss: Tensor
    nll: Tensor
    tokens: int
    token_nll: Tensor


def encouraging_bonus(probability: Tensor, log_end: float) -> Tensor:
    """ln(1 - p), continued by its tangent above p = log_end (log_end = 1: never)."""
    bonus = torch.log((1.0 - probability).clamp(min=1e-5))
    if log_end == 1.0:
        return bonus
    tangent = math.log(1.0 - log_end) - (probability - log_end) / (1.0 - log_end)
    return torch.where(probability > log_end, tangent, bonus)


def cross_entropy_sums(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    allowed: Tensor | None = None,
    constraint_range: tuple[int, int] | None = None,
    drop_worst_ratio: float = 0.0,
    log_end: float | None = None,
    rdrop_alpha: float = 0.0,
) -> LossSums:
    """Label-smoothed cross-entropy and its encouraging variant, per kept token, summed.

    Args:
        logits: [n, V] of the tokens that count, any floating dtype; computed in float32 or better.
        target: int64 [n].
        label_smoothing: epsilon, spread over the allowed ids.
        weight: [n], multiplies the log-probabilities (answer confidence).
        allowed: bool [n, V]; ids outside have no probability (trie masks).
        constraint_range: (first, last): only ids 0-3 and first..last-1 have probability.
        drop_worst_ratio: share of tokens with the largest losses that is left out.
        log_end: adds the encouraging loss with this end of the logarithm.
        rdrop_alpha: adds the symmetric divergence between the first and second half of the tokens.

    Gradients flow to logits.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    classes = logits.shape[-1]
    spread: Tensor | float = label_smoothing / (classes - 1)
    if constraint_range is not None:
        first, last = constraint_range
        index = torch.arange(classes, device=logits.device)
        inside = (index < 4) | ((index >= first) & (index < last))
        allowed = inside.expand_as(logits)
        spread = label_smoothing / (4 + last - first - 1 + 1e-6)
    elif allowed is not None:
        spread = label_smoothing / (allowed.sum(-1).to(logits.dtype) - 1 + 1e-6)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    logp = torch.log_softmax(logits, dim=-1)
    if weight is not None:
        logp = logp * weight[:, None]
    nll = -logp.gather(-1, target[:, None]).squeeze(-1)
    token_nll = nll.detach()
    if label_smoothing > 0.0:
        counted = logp if allowed is None else logp.masked_fill(~allowed, 0.0)
        loss = (1.0 - label_smoothing - spread) * nll - spread * counted.sum(-1)
    else:
        loss = nll
    if drop_worst_ratio > 0.0:
        kept = loss.topk(int(loss.numel() * (1.0 - drop_worst_ratio)), largest=False).indices
        loss, nll, logp, target = loss[kept], nll[kept], logp[kept], target[kept]
    total = loss.sum()
    if log_end is not None:
        hit = encouraging_bonus(logp.gather(-1, target[:, None]).exp(), log_end)
        total = total + (1.0 - label_smoothing) * hit.sum()
        if label_smoothing > 0.0:
            every = encouraging_bonus(logp.exp(), log_end)
            total = total + label_smoothing / classes * every.sum()
    if rdrop_alpha > 0.0:
        one, two = logp.chunk(2)
        difference = (one.exp() - two.exp()) * (one - two)
        total = total + rdrop_alpha * 0.5 * difference.sum()
    return LossSums(total, nll.sum(), loss.numel(), token_nll)
