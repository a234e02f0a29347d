"""Batch norm whose statistics are local, shared by all ranks, or frozen.

The released model trained with ordinary per-rank statistics ("local"). "sync" makes a step
independent
of how many ranks share its batch. On a CPU the training arithmetic is ours as well: torch's
channels-last kernel there accumulates in one float32 pass, ten times less exactly than its
contiguous one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

Statistics = Literal["local", "sync", "frozen"]


def _average(values: Tensor, sync: bool) -> Tensor:
    """Mean over ranks; every rank holds as many elements as the others."""
    if sync:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


class _NormalizeBatch(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the batch of one or of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, sync: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(x.float(), dims, correction=0)
        moments = torch.stack([mean, variance + mean.square()]).double()
        if sync:
            moments = _average(moments, sync)
            mean = moments[0].float()
            variance = (moments[1] - moments[0].square()).float()
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = torch.rsqrt(variance + eps)
        factor = scale * weight.float()
        offset = bias.float() - mean * factor
        y = torch.addcmul(offset.view(shape), x.float(), factor.view(shape)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.sync = sync
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        grad32 = grad.float()
        normalized = (x.float() - mean.view(shape)) * scale.view(shape)
        grad_bias = grad32.sum(dims)
        grad_weight = (grad32 * normalized).sum(dims)
        count = x.numel() // x.shape[1]
        means = _average(torch.stack([grad_bias, grad_weight]) / count, ctx.sync)
        centered = grad32 - means[0].view(shape) - normalized * means[1].view(shape)
        grad_x = centered * (scale * weight.float()).view(shape)
        return (
            grad_x.to(x.dtype),
            grad_weight.to(weight.dtype),
            grad_bias.to(weight.dtype),
            None,
            None,
        )


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    statistics: Statistics = "local"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 4:
            raise ValueError(f"batch norm of maps wants 4 or 5 dimensions, got {input.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.statistics == "frozen":
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        sync = self.statistics == "sync" and dist.is_initialized() and dist.get_world_size() > 1
        if x.is_cuda and not sync:
            return super().forward(x)
        y, mean, variance = _NormalizeBatch.apply(x, self.weight, self.bias, self.eps, sync)
        self._update_running(x, mean, variance, dist.get_world_size() if sync else 1)
        return y

    @torch.no_grad()
    def _update_running(self, x: Tensor, mean: Tensor, variance: Tensor, ranks: int) -> None:
        count = x.numel() // x.shape[1] * ranks
        unbiased = variance * (count / max(count - 1, 1))
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm of [B, C, h, w]; keys as in torch."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch norm of [B, C, F, h, w]; keys as in torch."""


def set_batchnorm_statistics(model: nn.Module, statistics: Statistics) -> None:
    """Choose where training takes batch statistics from; frozen norms get no gradient either."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.statistics = statistics
            module.requires_grad_(statistics != "frozen")
