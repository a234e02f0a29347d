"""The loss in PyTorch, a chunk of the vocabulary at a time; made for CPUs, runs everywhere.

Logits lie as [ids, tokens]: all operands of the three products are then read along their rows, and
a chunk stays in the cache between a product and the arithmetic on it. Computed in float32.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unival.kernels.linear_cross_entropy.per_token import (
    AT_TARGET,
    IGNORED,
    LOG_SUM,
    PEAK,
    ROWS,
    SCALE,
    SPREAD,
    TOTAL,
    WEIGHT,
    Finished,
    Inputs,
    Options,
    Seen,
    bonus_and_slope,
    finish,
    settle,
)

CHUNK_ELEMENTS = 1 << 19  # of a chunk's logits, 2 MiB, where they are made twice
# Where the logits are kept, few large operations are better than ones that stay in the cache:
# threads wait for one another at the end of each, long on a machine that others use too.
KEPT_CHUNK_ELEMENTS = 1 << 22
COPIED_ELEMENTS = 1 << 21  # of a 16-bit embedding that are copied to float32 at a time, 8 MiB
LONGEST_SUM = 1 << 14  # ids; the product that sums over more was measured slower than its parts
SHORTEST = 128  # ids of a chunk
FULL = 8  # tokens; of more, those that fill no eight cost a CPU's product more than eight do
KEEP_BYTES = 48_000_000  # logits of the whole vocabulary are kept up to this size


def kept_elements(n: int, options: Options) -> int:
    """Logits that the forward pass keeps for the backward pass: all, or 0."""
    elements = n * options.columns.count
    return elements if elements * 4 <= KEEP_BYTES else 0


class Chunk(NamedTuple):
    """Columns start..stop-1, whose ids follow one another from `first`."""

    start: int
    stop: int
    first: int


class Walk:
    """Logits of the tokens that count, chunk by chunk: float32 [ids, tokens]."""

    def __init__(
        self, inputs: Inputs, options: Options, counted: Tensor, chunk_elements: int
    ) -> None:
        hidden, _, target, weight, allowed = inputs
        everyone = len(counted) == len(target)
        self.hidden = (hidden if everyone else hidden[counted]).float()
        self.target = target if everyone else target[counted]
        self.weight = weight if everyone or weight is None else weight[counted]
        self.allowed = allowed if everyone or allowed is None else allowed[counted]
        self.embedding = inputs.embedding
        self.tokens = len(counted)
        missing = -self.tokens % FULL if self.tokens > FULL else 0
        self.filled = F.pad(self.hidden, (0, 0, 0, missing)) if missing else self.hidden
        self.columns = options.columns
        fitting = chunk_elements // max(self.tokens, 1)
        if self.embedding.dtype != torch.float32:
            fitting = min(fitting, COPIED_ELEMENTS // max(self.embedding.shape[1], 1))
        fitting = max(fitting, SHORTEST)
        self.height = min(fitting, self.columns.count)
        self.order = self.target.argsort()
        self.sorted = self.target[self.order]
        self.sorted_list = self.sorted.tolist()

    def buffer(self) -> Tensor:
        return torch.empty(self.height, self.tokens, dtype=torch.float32, device=self.hidden.device)

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, self.columns.count, self.height):
            stop = min(start + self.height, self.columns.count)
            yield from (Chunk(*piece) for piece in self.columns.pieces(start, stop))

    def embedded(self, chunk: Chunk) -> Tensor:
        return self.embedding[chunk.first : chunk.first + chunk.stop - chunk.start].float()

    def mask(self, chunk: Chunk) -> Tensor | None:
        """bool [ids, tokens]."""
        if self.allowed is None:
            return None
        return self.allowed[:, chunk.first : chunk.first + chunk.stop - chunk.start].T

    def logits(self, chunk: Chunk, out: Tensor) -> Tensor:
        """Logits before any mask, in the first rows of out."""
        out = out[: chunk.stop - chunk.start]
        if self.filled is self.hidden:
            return torch.mm(self.embedded(chunk), self.hidden.T, out=out)
        return out.copy_(torch.mm(self.embedded(chunk), self.filled.T)[:, : self.tokens])

    def targets(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(row of the chunk, token) of the targets inside."""
        low = bisect_left(self.sorted_list, chunk.first)
        high = bisect_left(self.sorted_list, chunk.first + chunk.stop - chunk.start)
        return self.sorted[low:high] - chunk.first, self.order[low:high]


def forward(inputs: Inputs, options: Options, keep: bool) -> tuple[Finished, Tensor]:
    """The loss, and float32 [elements] logits for the backward pass (none where too many)."""
    device, n = inputs.hidden.device, len(inputs.target)
    counted = torch.nonzero(inputs.target != IGNORED).squeeze(-1)
    elements = kept_elements(n, options) if keep else 0
    walk = Walk(inputs, options, counted, _chunk_elements(elements))
    kept = torch.empty(elements, dtype=torch.float32, device=device)
    logits = _view(kept, walk)
    seen = _first_walk(walk, logits)
    settled = settle(seen, walk.target, walk.weight, options)
    every = _bonus_walk(walk, logits, settled.rows, options) if options.bonus_share else None
    done = finish(settled, options, every)
    if walk.tokens < n:
        token_nll = done.token_nll.new_zeros(n)
        token_nll[counted] = done.token_nll
        rows = done.rows.new_zeros((ROWS, n))
        rows[:, counted] = done.rows
        done = done._replace(token_nll=token_nll, rows=rows)
    return done, kept


def _chunk_elements(kept: int) -> int:
    return KEPT_CHUNK_ELEMENTS if kept else CHUNK_ELEMENTS


def _view(kept: Tensor, walk: Walk) -> Tensor | None:
    """[columns, tokens] of the kept logits."""
    if not kept.numel():
        return None
    count = walk.columns.count
    return kept[: count * walk.tokens].view(count, walk.tokens)


def _first_walk(walk: Walk, kept: Tensor | None) -> Seen:
    tokens, hidden = walk.tokens, walk.hidden
    peak = hidden.new_full((tokens,), -torch.inf)
    sum_exp, logit_sum, allowed = hidden.new_zeros((3, tokens)).unbind()
    target_logit = peak.clone()
    scratch = walk.buffer()
    work = walk.buffer() if kept is None else scratch
    for chunk in walk.chunks():
        z = walk.logits(chunk, work if kept is None else kept[chunk.start : chunk.stop])
        mask = walk.mask(chunk)
        if mask is None:
            logit_sum += z.sum(0)
            allowed += len(z)
        else:
            z.masked_fill_(~mask, 0.0)
            logit_sum += z.sum(0)
            allowed += mask.sum(0)
            z.masked_fill_(~mask, -torch.inf)
        row, token = walk.targets(chunk)
        target_logit[token] = z[row, token]
        new = torch.maximum(peak, z.amax(0))
        safe = new.masked_fill(new == -torch.inf, 0.0)  # before the first allowed id
        exponents = torch.sub(z, safe, out=scratch[: len(z)]).exp_()
        sum_exp.mul_((peak - safe).exp()).add_(exponents.sum(0))
        peak = new
    return Seen(peak, sum_exp, logit_sum, target_logit, allowed)


def _log_probabilities(
    walk: Walk, chunk: Chunk, kept: Tensor | None, rows: Tensor, out: Tensor
) -> Tensor:
    """[ids, tokens] in the first rows of out; -inf where an id is not allowed."""
    if kept is None:
        z = walk.logits(chunk, out)
        mask = walk.mask(chunk)
        if mask is not None:
            z.masked_fill_(~mask, -torch.inf)
    else:
        z = kept[chunk.start : chunk.stop]
    return torch.sub(z, rows[PEAK], out=out[: len(z)]).sub_(rows[LOG_SUM])


def _weighted(walk: Walk, chunk: Chunk, logp: Tensor, weight: Tensor) -> Tensor:
    """exp(weight * logp); 0 where an id is not allowed, also for a weight of 0."""
    probability = (logp * weight).exp_()
    mask = walk.mask(chunk)
    return probability if mask is None else probability.masked_fill_(~mask, 0.0)


def _bonus_walk(
    walk: Walk, kept: Tensor | None, rows: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    bonus_sum, slope_sum = rows.new_zeros((2, walk.tokens)).unbind()
    work = walk.buffer()
    for chunk in walk.chunks():
        logp = _log_probabilities(walk, chunk, kept, rows, work)
        probability = _weighted(walk, chunk, logp, rows[WEIGHT])
        bonus, slope = bonus_and_slope(probability, options.tangent)
        bonus_sum += bonus.sum(0)
        slope_sum += slope.sum(0)
    return bonus_sum, slope_sum


def _logit_gradient(
    walk: Walk, chunk: Chunk, logp: Tensor, rows: Tensor, options: Options
) -> Tensor:
    """Overwrites logp; rows have the upstream gradient in SCALE."""
    scale = rows[SCALE]
    extra = None
    if options.bonus_share:
        weighted = _weighted(walk, chunk, logp, rows[WEIGHT])
        extra = bonus_and_slope(weighted, options.tangent)[1]
    gradient, factor, spread = logp.exp_(), -scale * rows[TOTAL], scale * rows[SPREAD]
    mask = walk.mask(chunk)
    if options.label_smoothing and mask is None:
        torch.addcmul(-spread, gradient, factor, out=gradient)
    else:
        gradient *= factor
        if options.label_smoothing:
            gradient -= mask * spread
    if extra is not None:
        gradient += extra.mul_(scale * options.bonus_share)
    row, token = walk.targets(chunk)
    at_target = scale * rows[AT_TARGET]
    if walk.allowed is not None:
        at_target = at_target.where(walk.allowed.gather(1, walk.target[:, None])[:, 0], 0.0)
    gradient[row, token] += at_target[token]
    return gradient


def backward(
    upstream: Tensor,
    inputs: Inputs,
    rows: Tensor,
    kept: Tensor,
    options: Options,
    need_hidden: bool,
    need_embedding: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and embedding, None where not needed. upstream: float32, 0-d."""
    hidden, embedding, target, _, _ = inputs
    counted = torch.nonzero(target != IGNORED).squeeze(-1)
    walk = Walk(inputs, options, counted, _chunk_elements(kept.numel()))
    rows = rows.clone() if walk.tokens == len(target) else rows[:, counted]
    rows[SCALE] *= upstream
    logits = _view(kept, walk)
    by_token = hidden.new_zeros((walk.tokens, hidden.shape[1]), dtype=torch.float32)
    d_embedding = None
    if need_embedding:
        d_embedding = embedding.new_empty(embedding.shape)
        if walk.columns.count < options.classes:
            d_embedding.zero_()  # ids outside the constraint range are in no chunk
    work = walk.buffer()
    for chunk in walk.chunks():
        logp = _log_probabilities(walk, chunk, logits, rows, work)
        gradient = _logit_gradient(walk, chunk, logp, rows, options)
        if need_hidden:
            parts = walk.embedded(chunk).split(LONGEST_SUM), gradient.split(LONGEST_SUM)
            for part, slopes in zip(*parts, strict=True):
                by_token.addmm_(slopes.T, part)  # part.T @ slopes: up to 8 times slower
        if d_embedding is not None:
            out = d_embedding[chunk.first : chunk.first + len(gradient)]
            if out.dtype == torch.float32:
                torch.mm(gradient, walk.hidden, out=out)
            else:
                out.copy_(torch.mm(gradient, walk.hidden))
    return _scattered(by_token, hidden, counted) if need_hidden else None, d_embedding


def _scattered(by_token: Tensor, hidden: Tensor, counted: Tensor) -> Tensor:
    """[n, D] in hidden's dtype from float32 [tokens, D]; 0 at ignored tokens."""
    by_token = by_token.to(hidden.dtype)
    if len(counted) == len(hidden):
        return by_token
    return hidden.new_zeros(hidden.shape).index_copy_(0, counted, by_token)
