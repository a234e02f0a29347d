"""Passes over maps as rows [N, C]: what norms, ReLUs and shortcuts do between products.

In float32 and bfloat16 on a CPU one compiled pass each (rows.cpp); elsewhere by PyTorch's
operators, on a CPU part by part so that what lies between two of them stays in the cache.
Statistics are in at least float32, and maps are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unival.kernels.cpu import native

BLOCK = 1 << 20  # elements of a map that are summed at a time


class Norm(NamedTuple):
    """y = (x - mean) scale weight + bias for each channel, and max(y, 0) with `relu`; all of them
    [C] in what the dtype of x is computed in.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    relu: bool = False

    @property
    def factor(self) -> Tensor:
        return self.scale * self.weight

    @property
    def level(self) -> Tensor:
        return self.bias - self.mean * self.factor


def as_rows(x: Tensor) -> Tensor:
    """Maps [B, C, ...] as [N, C]; no copy where channels come last in memory."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """[N, C] as maps of another's places, channels last in memory."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).movedim(-1, 1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """[N, C] in the dtype that sums have; on a CPU part by part, so that what is made is small."""
    whole = rows.device.type != "cpu" or torch.compiler.is_compiling()
    for part in rows.split(max(1, len(rows) if whole else BLOCK // rows.shape[1])):
        yield part.to(wide(part.dtype))


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean over N of [N, C].

    PyTorch's variances of channels-last maps take longer than its sums and are no more exact.
    """
    if native.takes(maps=(rows,)):
        variance, mean = (rows.new_empty(rows.shape[1], dtype=torch.float32) for _ in range(2))
        native.call("rows_moments", rows, mean, variance, *rows.shape, native.is_half(rows))
        return variance, mean
    mean = rows.mean(0, dtype=wide(rows.dtype))
    squares = torch.zeros_like(mean)
    for part in _parts(rows):
        squares += (part - mean).square_().sum(0)
    return squares / len(rows), mean


def normalize(rows: Tensor, norm: Norm, shortcut: Tensor | None = None) -> Tensor:
    """y [N, C] of x, plus a shortcut [N, C] before the ReLU."""
    factor, level = norm.factor, norm.level
    if native.takes(factor, level, maps=(rows,) if shortcut is None else (rows, shortcut)):
        y, options = torch.empty_like(rows), (norm.relu, native.is_half(rows))
        native.call("rows_normalize", rows, factor, level, shortcut, y, *rows.shape, *options)
        return y
    y = torch.addcmul(level, rows, factor, out=rows.new_empty(rows.shape, dtype=factor.dtype))
    if shortcut is not None:
        y += shortcut
    return (y.relu_() if norm.relu else y).to(rows.dtype)


def gradients(
    rows: Tensor, grad: Tensor, norm: Norm, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the bias and the weight: sums over N of dy and of dy x'.

    With a ReLU dy is that before it: of the gradient [N, C] after it, less `shift` [C], which
    `grad` holds and which is overwritten.
    """
    if native.takes(norm.mean, maps=(rows, grad)):
        factor, level = norm.factor, norm.level
        d_bias, along, none = norm.mean.new_zeros(3, rows.shape[1])
        less = none if shift is None else shift
        options = (norm.relu, native.is_half(rows))
        arguments = (norm.mean, factor, level, less, d_bias, along, *rows.shape, *options)
        native.call("rows_gradients", rows, grad, *arguments)
        return d_bias, along * norm.scale
    if norm.relu:
        if shift is not None:
            grad -= shift
        y = normalize(rows, norm)
        torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    along = torch.zeros_like(norm.mean)
    for x, part in zip(_parts(rows), _parts(grad), strict=True):
        along += (x - norm.mean).mul_(part).sum(0)
    return grad.sum(0, dtype=along.dtype), along * norm.scale


def input_gradient(
    rows: Tensor, grad: Tensor, norm: Norm, d_bias: Tensor, d_weight: Tensor, total: Tensor | int
) -> Tensor:
    """dx [N, C] of a norm over `total` elements a channel, whose sums of gradients are given."""
    factor = norm.factor
    slope = d_weight / total * factor * norm.scale
    offset = slope * norm.mean - d_bias / total * factor
    if native.takes(factor, maps=(rows, grad)):
        d_x = torch.empty_like(rows)
        given = (factor, slope, offset, d_x, *rows.shape, native.is_half(rows))
        native.call("rows_input_gradient", rows, grad, *given)
        return d_x
    d_x = rows.new_empty(rows.shape, dtype=factor.dtype)
    torch.addcmul(offset, rows, slope, value=-1, out=d_x)
    return d_x.addcmul_(grad, factor).to(rows.dtype)


def finish(y: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
    """max(y + bias + shortcut, 0) of [N, C], in place."""
    if y.shape == shortcut.shape and native.takes(y, bias, shortcut):
        native.call("rows_finish", y, bias, shortcut, *y.shape)
        return y
    y += bias
    y += shortcut
    return y.relu_()


def mask(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [N, C] before a ReLU that gave y, and its sums over N."""
    masked = grad.new_empty(grad.shape)
    if native.takes(maps=(grad, y)):
        sums = grad.new_empty(grad.shape[1], dtype=torch.float32)
        native.call("rows_mask", grad, y, masked, sums, *grad.shape, native.is_half(grad))
        return masked, sums
    torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=masked)
    return masked, masked.sum(0, dtype=wide(grad.dtype))
