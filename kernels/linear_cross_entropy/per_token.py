"""What happens once for each token: the loss, and the numbers that its gradient needs.

Both backends walk the vocabulary and hand what they saw to `settle`; README.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
SPECIAL = 4  # ids 0 to 3 stay allowed under a constraint range
FLOOR = 1e-5  # the smallest 1 - p that has a logarithm of its own
NEVER = 2.0  # no probability is above

# Rows of the [7, n] float32 tensor that the backward pass reads.
PEAK, LOG_SUM, WEIGHT, SCALE, AT_TARGET, SPREAD, TOTAL = range(7)
ROWS = 7


class Columns(NamedTuple):
    """The ids that are visited: column c is id c below SPECIAL and id c + gap from there on."""

    count: int
    gap: int

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first column, last column + 1, first id) of the runs of ids in columns start..stop-1."""
        split = SPECIAL if self.gap else start
        if start < min(stop, split):
            yield start, min(stop, split), start
        if max(start, split) < stop:
            yield max(start, split), stop, max(start, split) + self.gap


class Inputs(NamedTuple):
    """hidden [n, D], embedding [V, D], target int64 [n], weight [n], allowed bool [n, V]."""

    hidden: Tensor
    embedding: Tensor
    target: Tensor
    weight: Tensor | None
    allowed: Tensor | None

    @property
    def strides(self) -> tuple[int, int, int]:
        """From row to row: hidden, embedding, allowed."""
        allowed = 0 if self.allowed is None else self.allowed.stride(0)
        return self.hidden.stride(0), self.embedding.stride(0), allowed


class Options(NamedTuple):
    """The loss that is asked for; the fields are those of `linear_cross_entropy`."""

    classes: int
    label_smoothing: float
    constraint_range: tuple[int, int] | None
    drop_worst_ratio: float
    log_end: float | None

    @property
    def columns(self) -> Columns:
        if self.constraint_range is None:
            return Columns(self.classes, 0)
        first, last = self.constraint_range
        beyond = max(first, SPECIAL)
        return Columns(min(SPECIAL, self.classes) + max(last - beyond, 0), beyond - SPECIAL)

    @property
    def bonus_share(self) -> float:
        """Factor of the bonus of every class; 0: the vocabulary needs no second walk."""
        return 0.0 if self.log_end is None else self.label_smoothing / self.classes

    @property
    def tangent(self) -> tuple[float, float, float]:
        """(start, value there, slope) of the tangent that continues the bonus."""
        if self.log_end is None or self.log_end == 1.0:
            return NEVER, 0.0, 0.0
        return self.log_end, math.log(1.0 - self.log_end), -1.0 / (1.0 - self.log_end)


class Seen(NamedTuple):
    """A walk over the allowed ids, float32 [n] each.

    The largest logit, sum of exp(logit - peak), sum of the logits, the target's logit (-inf where
    it is not allowed) and how many ids are allowed.
    """

    peak: Tensor
    sum_exp: Tensor
    logit_sum: Tensor
    target_logit: Tensor
    allowed: Tensor


class Settled(NamedTuple):
    """Losses [n] before the bonus, whether a token counts, whether it is kept, and the rows."""

    loss: Tensor
    nll: Tensor
    kept: Tensor
    rows: Tensor


class Finished(NamedTuple):
    """Sums over the kept tokens (0-d), then token_nll [n] and the rows [7, n] for the gradient."""

    loss: Tensor
    nll: Tensor
    tokens: Tensor
    token_nll: Tensor
    rows: Tensor


def bonus_and_slope(
    probability: Tensor, tangent: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """ln(1 - p), continued by its tangent, and its derivative by ln p."""
    start, value, slope = tangent
    rest = 1.0 - probability
    above = probability > start
    bonus = torch.where(above, value + slope * (probability - start), rest.clamp(min=FLOOR).log())
    curved = torch.where(rest >= FLOOR, -1.0 / rest.clamp(min=FLOOR), 0.0)
    return bonus, torch.where(above, slope, curved) * probability


def settle(seen: Seen, target: Tensor, weight: Tensor | None, options: Options) -> Settled:
    """Everything but the bonus."""
    counted = target != IGNORED
    smoothing = options.label_smoothing
    # A token that is ignored may have no allowed id; its rows must be finite all the same.
    empty = seen.sum_exp == 0.0
    peak = seen.peak.masked_fill(empty, 0.0)
    log_sum = seen.sum_exp.log().masked_fill(empty, 0.0)
    weights = torch.ones_like(peak) if weight is None else weight.float()
    nll = -weights * ((seen.target_logit - peak) - log_sum)
    spread = _spread(seen.allowed, options)
    loss = nll
    if smoothing > 0.0:
        logp_sum = (seen.logit_sum - seen.allowed * peak) - seen.allowed * log_sum
        loss = (1.0 - smoothing - spread) * nll - spread * (weights * logp_sum)
    loss, nll = loss.masked_fill(~counted, 0.0), nll.masked_fill(~counted, 0.0)
    kept = _without_the_worst(loss, counted, options.drop_worst_ratio)
    at_target = spread - (1.0 - smoothing)
    total = at_target - spread * seen.allowed
    scale = torch.where(kept, weights, 0.0)
    rows = torch.stack([peak, log_sum, weights, scale, at_target, spread, total])
    return Settled(loss, nll, kept, rows)


def _spread(allowed: Tensor, options: Options) -> Tensor:
    """Smoothing that each allowed id gets."""
    smoothing = options.label_smoothing
    if options.constraint_range is not None:
        first, last = options.constraint_range
        return torch.full_like(allowed, smoothing / (SPECIAL + last - first - 1 + 1e-6))
    # With one allowed id the loss is 0 whatever the spread, which would be 1e6 times the smoothing:
    # without it, what cancels in the gradient is small.
    others = allowed - 1.0
    return torch.where(others > 0.0, smoothing / (others + 1e-6), 0.0)


def _without_the_worst(loss: Tensor, counted: Tensor, ratio: float) -> Tensor:
    """bool [n]: counted, and not among the share of tokens with the largest losses."""
    if ratio == 0.0:
        return counted
    # By rank, because a count on the host would wait for the GPU. NaN sorts last.
    order = loss.masked_fill(~counted, torch.nan).argsort(stable=True)
    limit = (counted.sum().double() * (1.0 - ratio)).floor()
    return counted & (order.argsort() < limit)


def finish(settled: Settled, options: Options, every: tuple[Tensor, Tensor] | None) -> Finished:
    """Adds the bonus and sums over the kept tokens.

    every: sums over the vocabulary of the bonus and of its slope, where bonus_share is not 0.
    """
    loss, nll, kept, rows = settled
    if options.log_end is not None:
        share = 1.0 - options.label_smoothing
        bonus, slope = bonus_and_slope((-nll).exp(), options.tangent)
        loss = loss + share * bonus
        rows[AT_TARGET] += share * slope
        rows[TOTAL] += share * slope
    if every is not None:
        loss = loss + options.bonus_share * every[0]
        rows[TOTAL] += options.bonus_share * every[1]
    # Dropped losses may be infinite, so they are left out, not multiplied by 0.
    total = torch.where(kept, loss, 0.0).sum()
    return Finished(total, torch.where(kept, nll, 0.0).sum(), kept.sum(), nll, rows)
