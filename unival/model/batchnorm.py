"""Batch norm whose statistics are local, shared by all ranks, frozen, or part of a convolution.

The released model trained with ordinary per-rank statistics ("local"). "sync" makes a step
independent of how many ranks share its batch. "frozen" norms by the running statistics, and
"folded" does the same inside the convolution before each norm: one pass over the map, not two. On
a CPU the training arithmetic is ours: torch's statistics of channels-last maps there take longer
than the sums and are ten times less exact than those of contiguous ones.

Running statistics stay in float32 when a model is cast to half precision: an average of 0.1 of the
new and 0.9 of the old value soon stops moving in bfloat16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from unival.kernels.cpu import rows as passes
from unival.kernels.cpu.rows import Norm, as_maps, as_rows, wide

Statistics = Literal["local", "sync", "frozen", "folded"]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] in the shape that multiplies maps [B, C, ...]."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


class _NormalizeBatch(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the batch of one or of all ranks, then
    y + shortcut where there is one, then max(y, 0) where asked for.

    With n_r elements a channel on rank r, 0 where it does not contribute, and N their sum:
    mean = sum_r n_r mean_r / N, and E[x^2] likewise. Backward, of a rank that contributes,
    dx = weight / sqrt(var + eps) * (dy - sum(dy) / N - x' sum(dy x') / N), where x' is the
    normalized x and the sums are over all ranks; of one that does not, the first term alone.

    Gives y, the mean and the unbiased variance.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shortcut: Tensor | None,
        eps: float,
        relu: bool,
        sync: bool,
        contributes: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = as_rows(x)
        variance, mean = passes.moments(rows)
        total = torch.full_like(mean, len(rows))
        if sync:
            # In float64: E[x^2] - E[x]^2 cancels.
            own, square = mean.double(), mean.double().square()
            sums = torch.stack([own, variance + square, torch.ones_like(own)])
            sums *= len(rows) if contributes else 0
            dist.all_reduce(sums)
            shared = sums[0] / sums[2]
            variance = (sums[1] / sums[2] - shared.square()).clamp(min=0).to(mean.dtype)
            mean, total = shared.to(mean.dtype), sums[2].to(mean.dtype)
        scale = torch.rsqrt(variance + eps)
        beside = None if shortcut is None else as_rows(shortcut)
        y = as_maps(passes.normalize(rows, Norm(mean, scale, weight, bias, relu), beside), x)
        unbiased = variance * (total / (total - 1).clamp(min=1))
        ctx.save_for_backward(x, weight, bias, mean, scale, total, y if relu else None)
        ctx.has_shortcut, ctx.sync, ctx.contributes = shortcut is not None, sync, contributes
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale, total, y = ctx.saved_tensors
        rows, upstream = as_rows(x), as_rows(grad)
        if y is not None:
            upstream, _ = passes.mask(upstream, as_rows(y))
        norm = Norm(mean, scale, weight, bias)
        d_bias, d_weight = passes.gradients(rows, upstream, norm)
        sums = torch.stack([d_bias, d_weight])
        if ctx.sync:
            dist.all_reduce(sums)
        if ctx.contributes or not ctx.sync:
            d_x = passes.input_gradient(rows, upstream, norm, *sums, total)
        else:
            d_x = (upstream * norm.factor).to(x.dtype)
        return (
            as_maps(d_x, x),
            d_weight.to(weight.dtype),
            d_bias.to(weight.dtype),
            as_maps(upstream, x) if ctx.has_shortcut else None,
            None,
            None,
            None,
            None,
        )


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    statistics: Statistics = "local"
    contributes = True
    folded = False  # a convolution has taken this norm over

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("running_mean", "running_var"):
            buffer = getattr(self, name)
            setattr(self, name, buffer.to(wide(buffer.dtype)))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 4:
            raise ValueError(f"batch norm of maps wants 4 or 5 dimensions, got {input.ndim}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BatchNorm:
        """Cast weight and bias, and move the statistics, which half precision would stop."""
        before = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            cast = getattr(self, name)
            if wide(cast.dtype) != cast.dtype:
                setattr(self, name, exact.to(cast.device, wide(cast.dtype)))
        return self

    def forward(self, x: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
        """norm(x), plus a shortcut where there is one, and no less than 0 where asked for."""
        if self.folded:
            return finish(x, shortcut, relu)
        # torch takes half-precision maps with float32 statistics only if the weights are float32.
        dtype = wide(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not self.training or self.statistics in ("frozen", "folded"):
            mean, variance = self.running_mean.to(dtype), self.running_var.to(dtype)
            y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)
            return finish(y, shortcut, relu)
        sync = not self.norms_by_batch()
        counted = sync or self.contributes
        if x.is_cuda and not sync:
            if counted:
                self.num_batches_tracked += 1
            running = (self.running_mean, self.running_var) if counted else (None, None)
            y = F.batch_norm(x, *running, weight, bias, True, self.momentum, self.eps)
            return finish(y, shortcut, relu)
        y, mean, variance = _NormalizeBatch.apply(
            x, weight, bias, shortcut, self.eps, relu, sync, self.contributes
        )
        self.track(mean, variance)
        return y

    def norms_by_batch(self) -> bool:
        """Whether the statistics are those of this rank's batch alone."""
        if not self.training or self.statistics in ("frozen", "folded"):
            return False
        shared = self.statistics == "sync" and dist.is_initialized()
        return not shared or dist.get_world_size() == 1

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards a batch's, if it counts; variance is unbiased."""
        if self.norms_by_batch() and not self.contributes:
            return
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def finish(y: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """What follows a norm, in place: no gradient needs what the norm or convolution gave."""
    if shortcut is not None:
        y = y.add_(shortcut)
    return y.relu_() if relu else y


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm of [B, C, h, w]; keys as in torch."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch norm of [B, C, F, h, w]; keys as in torch."""


def set_batchnorm_statistics(model: nn.Module, statistics: Statistics) -> None:
    """Choose where the norms of a model take their statistics from; can be called again.

    Args:
        statistics: in training, "local": this rank's batch; "sync": the batches of all ranks,
            weighted by their sizes; "frozen": the running statistics, and weight and bias get no
            gradient; "folded": as frozen, in evaluation too as a part of the convolution that comes
            before a norm (`convolutions` says which that is; a norm without one is frozen).

    Raises:
        ValueError: another word.
    """
    if statistics not in get_args(Statistics):
        known = ", ".join(get_args(Statistics))
        raise ValueError(f"batch norm statistics {statistics!r}; known: {known}")
    for module in model.modules():
        if _is_folded(module):
            del module.forward
        if isinstance(module, _BatchNorm):
            module.statistics, module.folded = statistics, False
            module.requires_grad_(statistics in ("local", "sync"))
    if statistics == "folded":
        for convolution, norm in convolutions(model):
            convolution.forward = partial(_folded_forward, convolution, norm)
            norm.folded = True


def set_batchnorm_contribution(model: nn.Module, contributes: bool) -> None:
    """Say whether the next batches are this rank's own, or stand in for a medium it does not have.

    What a stand-in holds counts for nothing. With "sync" statistics the rank still takes part in
    the collectives, with no elements: its maps are normed by what the others have, and at least one
    rank must contribute. With "local" ones the running statistics stay as they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.contributes = contributes


def convolutions(model: nn.Module) -> Iterator[tuple[nn.Conv2d | nn.Conv3d, _BatchNorm]]:
    """The convolutions whose output goes to a norm and nowhere else, each with its norm.

    By the names that all three encoders use: `bn1` norms `conv1` beside it, and in an
    nn.Sequential a norm follows what is before it.
    """
    for parent in model.modules():
        children = dict(parent.named_children())
        pairs: list[tuple[nn.Module | None, nn.Module]]
        if isinstance(parent, nn.Sequential):
            pairs = [*itertools.pairwise(children.values())]
        else:
            pairs = [(children.get(n.replace("bn", "conv")), norm) for n, norm in children.items()]
        for convolution, norm in pairs:
            if isinstance(convolution, nn.Conv2d | nn.Conv3d) and isinstance(norm, _BatchNorm):
                yield convolution, norm


def _is_folded(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _folded_forward


def _folded_forward(convolution: nn.Conv2d | nn.Conv3d, norm: _BatchNorm, x: Tensor) -> Tensor:
    """norm(convolution(x)) as one convolution, whose weights are made anew: they are trained."""
    dtype = wide(convolution.weight.dtype)
    factor = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    bias = norm.bias.to(dtype) - norm.running_mean.to(dtype) * factor
    if convolution.bias is not None:
        bias = bias + convolution.bias.to(dtype) * factor
    weight = convolution.weight.to(dtype) * factor.view(-1, *[1] * (x.ndim - 1))
    cast = convolution.weight.dtype
    return convolution._conv_forward(x, weight.to(cast), bias.to(cast))
