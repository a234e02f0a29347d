"""3x3 convolutions of stride 1 by Winograd's F(4x4, 3x3): 36 products where there were 144.

A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015. A filter is evaluated
at the points 0, a, -a, b, -b and infinity, a = 5/8 and b = 3/2, whose rounding error is half that
of the usual 0, +-1, +-2:

    B^T = [a^2 b^2  0       -a^2-b^2  0         1  0]    A^T = [1  1    1    1    1   0]
          [0       -a b^2   -b^2      a         1  0]          [0  a   -a    b   -b   0]
          [0        a b^2   -b^2     -a         1  0]          [0  a^2  a^2  b^2  b^2 0]
          [0       -a^2 b   -a^2      b         1  0]          [0  a^3 -a^3  b^3 -b^3 1]
          [0        a^2 b   -a^2     -b         1  0]
          [0        a^2 b^2  0       -a^2-b^2   0  1]

and the rows of G are [1, p, p^2] / prod_(q != p) (p - q) for a point p, and [0, 0, 1].

4 x 4 outputs are A^T [(G w G^T) . (B^T x B)] A, x the 6 x 6 inputs that they see. For all tiles and
channels the products in the middle are 36 products of matrices; the transforms are compiled
(kernels/cpu/winograd.cpp).

Maps are [B, H, W, C] here, without gaps; T = B ceil(H / 4) ceil(W / 4) tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unival.kernels.cpu import native
from unival.kernels.cpu.memory import scratch

BLOCK = 1 << 22  # elements of transformed inputs at a time


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether there are compiled transforms, and of so many channels."""
    lines = all(size % native.LINE == 0 for size in weight.shape[:2])
    return native.AVAILABLE and lines and x.dtype == weight.dtype == torch.float32


def convolve(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the convolution of [B, H, W, C] with a weight [K, C, 3, 3] to [B, H, W, K]."""
    _multiply(x, _filters(weight, mirrored=False).transpose(1, 2), out)


def input_gradient(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the gradient of the input [B, H, W, C] for that of the output [B, H, W, K]."""
    _multiply(grad, _filters(weight, mirrored=True), out)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """[K, C, 3, 3] of [B, H, W, C] and the output's gradient [B, H, W, K]."""
    channels, outputs = x.shape[3], grad.shape[3]
    filters = scratch("filters", 36, outputs, channels)
    count = _at_a_time(x)
    for index, (one, upstream) in enumerate(zip(x.split(count), grad.split(count), strict=True)):
        seen = _spread("winograd_inputs", one)
        given = _spread("winograd_output_gradients", upstream).transpose(1, 2)
        torch.baddbmm(filters, given, seen, beta=min(index, 1), out=filters)
    found = x.new_empty(outputs, channels, 3, 3)
    native.call("winograd_filter_gradients", filters, found, outputs, channels)
    return found


def _multiply(x: Tensor, filters: Tensor, out: Tensor) -> None:
    count = _at_a_time(x)
    for one, result in zip(x.split(count), out.split(count), strict=True):
        seen = _spread("winograd_inputs", one)
        products = torch.bmm(seen, filters, out=scratch("products", *seen.shape[:2], out.shape[3]))
        native.call("winograd_outputs", products, result, *result.shape)


def _tiles(maps: Tensor) -> int:
    """Of one row of the batch."""
    return -(maps.shape[1] // -4) * -(maps.shape[2] // -4)


def _at_a_time(x: Tensor) -> int:
    """Rows of the batch whose transformed inputs make a block."""
    return max(1, BLOCK // (36 * _tiles(x) * x.shape[3]))


def _filters(weight: Tensor, mirrored: bool) -> Tensor:
    """G w G^T [36, K, C] of [K, C, 3, 3], or of the weight turned by 180 degrees."""
    found = scratch("filters", 36, *weight.shape[:2])
    native.call("winograd_filters", weight.contiguous(), found, *weight.shape[:2], mirrored)
    return found


def _spread(transform: str, maps: Tensor) -> Tensor:
    """[36, T, C] of [B, H, W, C]: B^T x B of inputs, A g A^T of outputs' gradients."""
    found = scratch(transform, 36, len(maps) * _tiles(maps), maps.shape[3])
    native.call(transform, maps, found, *maps.shape)
    return found
