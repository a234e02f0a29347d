"""Which tokens count, and the loss over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unival.kernels.linear_cross_entropy.op import linear_cross_entropy
from unival.kernels.linear_cross_entropy.reference import LossSums, cross_entropy_sums
from unival.vocabulary import EOS, IGNORE


@dataclass(frozen=True)
class Criterion:
    """Options of the loss (data_and_recipes: pretraining uses label_smoothing 0).

    log_end turns the encouraging loss on (captioning and video QA: 0.75). drop_worst_ratio acts
    after drop_worst_after updates. constraint_range limits the vocabulary (image codes: 50265,
    58457).
    """

    label_smoothing: float = 0.0
    log_end: float | None = None
    drop_worst_ratio: float = 0.0
    drop_worst_after: int = 0
    constraint_range: tuple[int, int] | None = None
    ignore_prefix_size: int = 0
    ignore_eos: bool = False
    rdrop_alpha: float = 0.0

    def counted(self, target: Tensor) -> Tensor:
        """bool [B, U]: positions that count in the loss."""
        counted = target != IGNORE
        if self.ignore_eos:
            counted &= target != EOS
        if self.ignore_prefix_size:
            counted[:, : self.ignore_prefix_size] = False
        return counted

    def kept(self, target: Tensor, update: int) -> int:
        """How many tokens of int64 [B, U] count in the loss after dropping the worst."""
        count = int(self.counted(target).sum())
        return int(count * (1.0 - self.dropping(update))) if self.dropping(update) else count

    def dropping(self, update: int) -> float:
        """Share of tokens dropped at this update."""
        return self.drop_worst_ratio if update > self.drop_worst_after else 0.0

    def of_states(
        self,
        states: Tensor,
        embedding: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        allowed: Tensor | None = None,
        update: int = 0,
        backend: str = "auto",
    ) -> LossSums:
        """Loss sums of the decoder's states, without their logits.

        Args:
            states: [B, U, D].
            embedding: [V, D], the output projection.
            target: int64 [B, U], IGNORE where there is no loss.
            weight: [B], multiplies the log-probabilities of a row.
            allowed: bool [B, U, V].
            update: optimizer updates so far.
            backend: of the kernel (linear_cross_entropy).

        Returns:
            Sums; token_nll [B * U], 0 where a position does not count.
        """
        counted = self.counted(target)
        if self.rdrop_alpha:  # compares whole distributions: needs the logits
            logits = F.linear(states_at(states, counted), embedding)
            chosen = None if allowed is None else allowed[counted]
            sums = self(logits, target, weight=weight, allowed=chosen, update=update)
            every = sums.token_nll.new_zeros(target.numel())
            every[counted.flatten()] = sums.token_nll
            return sums._replace(token_nll=every)
        weights = None
        if weight is not None:
            weights = weight[:, None].expand_as(target).flatten().to(torch.float32)
        return linear_cross_entropy(
            states.flatten(0, 1),
            embedding,
            target.masked_fill(~counted, IGNORE).flatten(),
            label_smoothing=self.label_smoothing,
            weight=weights,
            allowed=None if allowed is None else allowed.flatten(0, 1),
            constraint_range=self.constraint_range,
            drop_worst_ratio=self.dropping(update),
            log_end=self.log_end,
            backend=backend,
        )

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        allowed: Tensor | None = None,
        update: int = 0,
    ) -> LossSums:
        """Loss sums of logits that are there already, by the reference.

        Args:
            logits: [n, V] of the counted positions, in row-major order of `counted(target)`.
            target: int64 [B, U], IGNORE where there is no loss.
            weight: [B], multiplies the log-probabilities of a row.
            allowed: bool [n, V].
            update: optimizer updates so far.
        """
        counted = self.counted(target)
        weights = None
        if weight is not None:
            weights = weight[:, None].expand_as(target)[counted].to(logits.dtype)
        return cross_entropy_sums(
            logits,
            target[counted],
            label_smoothing=self.label_smoothing,
            weight=weights,
            allowed=allowed,
            constraint_range=self.constraint_range,
            drop_worst_ratio=self.dropping(update),
            log_end=self.log_end,
            rdrop_alpha=self.rdrop_alpha,
        )


def states_at(states: Tensor, counted: Tensor) -> Tensor:
    """Decoder states [n, D] at the counted positions: logits are computed only where they count."""
    return states.flatten(0, 1)[torch.nonzero(counted.flatten()).squeeze(-1)]
