"""A bottleneck block in training as one function, for maps that a CPU passes over slowly.

Module by module, the wide maps [N, K] of a block (N places, K = 2 C or 4 C channels) are read or
written sixteen times beside the products of matrices, and three maps are kept that can be computed
again. Here the last convolution takes its norm over, whose statistics follow from its input: with W
[K, C] the convolution, z [N, C] its centered input and S = z^T z / N their covariance,

    var = diag(W S W^T),  scale = 1 / sqrt(var + eps),  out = relu(z (g scale W)^T + b + shortcut),

and, with dy the gradient before the ReLU and P = dy^T z,

    dg = scale sum_c(W P),  db = sum(dy),
    dW = g scale P - g scale^2 dg W S,
    dz = dy (g scale W) - z W^T diag(g scale^2 dg / N) W, less its mean db (g scale W) / N.

The two products with S cost a sixth of the convolution's own. Kept for the backward pass are the
block's input and output and what the first two convolutions gave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unival.kernels.cpu import rows as passes
from unival.kernels.cpu.rows import Norm, as_maps, as_rows
from unival.model.convolution import differentiate


class Parameters(NamedTuple):
    """The weights [K, C, ...] of three convolutions, and the weights and biases of their norms."""

    conv1: Tensor
    weight1: Tensor
    bias1: Tensor
    conv2: Tensor
    weight2: Tensor
    bias2: Tensor
    conv3: Tensor
    weight3: Tensor
    bias3: Tensor


def bottleneck(
    x: Tensor, shortcut: Tensor | None, parameters: Parameters, middle: nn.Module, eps: float
) -> tuple[Tensor, ...]:
    """relu(norm(conv3(relu(norm(conv2(relu(norm(conv1(x)))))))) + shortcut).

    Args:
        x: [B, C, ...] float32 or float64 on a CPU; channels last in memory, or it is copied.
        shortcut: [B, K, ...]; none: x itself.
        middle: conv2 as a module, for its stride, padding and groups.
        eps: of all three norms.

    Returns:
        [B, K, ...], and the mean and the unbiased variance of each norm.
    """
    return _Bottleneck.apply(x, shortcut, middle, eps, *parameters)


def _matrix(weight: Tensor) -> Tensor:
    """[K, C] of a kernel of one place."""
    return weight.flatten(1)


def _empty(rows: Tensor, channels: int) -> Tensor:
    return rows.new_empty(len(rows), channels)


def _norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Norm, Tensor]:
    """A norm with a ReLU by the statistics of [N, C], and the variance."""
    variance, mean = passes.moments(rows)
    return Norm(mean, torch.rsqrt(variance + eps), weight, bias, relu=True), variance


def _through(
    rows: Tensor, grad: Tensor, norm: Norm, level: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a norm's weight, bias and input; that of its output is overwritten."""
    d_bias, d_weight = passes.gradients(rows, grad, norm, level)
    return d_weight, d_bias, passes.input_gradient(rows, grad, norm, d_bias, d_weight, len(rows))


class _Bottleneck(torch.autograd.Function):
    """The formulas above; those of the first two norms are _NormalizeBatch's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        middle: nn.Module,
        eps: float,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        p, rows = Parameters(*tensors), as_rows(x)
        c1 = torch.mm(rows, _matrix(p.conv1).t(), out=_empty(rows, len(p.conv1)))
        norm1, variance1 = _norm(c1, p.weight1, p.bias1, eps)
        y1 = as_maps(passes.normalize(c1, norm1), x)
        second = middle._conv_forward(y1, p.conv2, None)
        c2 = as_rows(second)
        del y1
        norm2, variance2 = _norm(c2, p.weight2, p.bias2, eps)
        z = passes.normalize(c2, norm2)
        center = z.mean(0)
        z -= center
        covariance = z.t() @ z / len(z)
        conv3 = _matrix(p.conv3)
        variance3 = (conv3 @ covariance * conv3).sum(1)
        scale3 = torch.rsqrt(variance3 + eps)
        y = torch.mm(z, (conv3 * (p.weight3 * scale3)[:, None]).t(), out=_empty(c2, len(conv3)))
        passes.finish(y, p.bias3, rows if shortcut is None else as_rows(shortcut))
        out = as_maps(y, second)
        small = (norm1.mean, norm1.scale, norm2.mean, norm2.scale, center, covariance, scale3)
        ctx.save_for_backward(x, c1, c2, out, *small, *tensors)
        ctx.middle, ctx.has_shortcut = middle, shortcut is not None
        found = [norm1.mean, variance1, norm2.mean, variance2, conv3 @ center, variance3]
        for place, count in ((1, len(c1)), (3, len(c2)), (5, len(c2))):
            found[place] = found[place] * (count / max(count - 1, 1))
        ctx.mark_non_differentiable(*found)
        return out, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, c1, c2, out, *small = ctx.saved_tensors[:11]
        mean1, scale1, mean2, scale2, center, covariance, scale3 = small
        p = Parameters(*ctx.saved_tensors[11:])
        norm1 = Norm(mean1, scale1, p.weight1, p.bias1, relu=True)
        norm2 = Norm(mean2, scale2, p.weight2, p.bias2, relu=True)
        rows, conv3 = as_rows(x), _matrix(p.conv3)
        masked, d_bias3 = passes.mask(as_rows(grad), as_rows(out))
        del grad

        z = passes.normalize(c2, norm2)
        z -= center
        along = masked.t() @ z
        d_weight3 = scale3 * (conv3 * along).sum(1)
        factor = p.weight3 * scale3
        share = factor * scale3 * d_weight3
        d_conv3 = factor[:, None] * along - share[:, None] * (conv3 @ covariance)
        through = factor[:, None] * conv3
        d_y2 = torch.mm(masked, through, out=_empty(z, z.shape[1]))
        inner = conv3.t() @ (conv3 * (share / len(z))[:, None])
        torch.addmm(d_y2, z, inner, alpha=-1, out=d_y2)
        level = (d_bias3 / len(z)) @ through  # the mean of d_y2, for z has none
        del z

        d_weight2, d_bias2, d_c2 = _through(c2, d_y2, norm2, level)
        y1 = as_maps(passes.normalize(c1, norm1), x)
        d_y1, d_conv2 = differentiate(ctx.middle, as_maps(d_c2, out), y1, p.conv2)
        del y1, d_y2, d_c2
        d_weight1, d_bias1, d_c1 = _through(c1, as_rows(d_y1), norm1)
        d_conv1 = d_c1.t() @ rows
        d_x = None
        if ctx.needs_input_grad[0]:
            if ctx.has_shortcut:
                d_x = torch.mm(d_c1, _matrix(p.conv1), out=_empty(rows, rows.shape[1]))
            else:
                d_x = torch.addmm(masked, d_c1, _matrix(p.conv1), out=masked)
            d_x = as_maps(d_x, x)
        return (
            d_x,
            as_maps(masked, out) if ctx.has_shortcut else None,
            None,
            None,
            d_conv1.view_as(p.conv1),
            d_weight1,
            d_bias1,
            d_conv2,
            d_weight2,
            d_bias2,
            d_conv3.view_as(p.conv3),
            d_weight3,
            d_bias3,
        )
