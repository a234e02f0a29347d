"""3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): 16 products where there were 36.

A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015. With the matrices

    B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1],  G = [1 0 0; .5 .5 .5; .5 -.5 .5; 0 0 1],
    A^T = [1 1 1 0; 0 1 -1 -1],

2 x 2 outputs are A^T [(G w G^T) . (B^T x B)] A, x the 4 x 4 inputs that they see. For all tiles and
channels the products in the middle are 16 products of matrices.

Maps are [B, H, W, C] here; T = B ceil(H / 2) ceil(W / 2) tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
BLOCK = 1 << 22  # elements of transformed inputs at a time: below what malloc gives back at once


def convolve(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the convolution of [B, H, W, C] with a weight [K, C, 3, 3] to [B, H, W, K]."""
    _multiply(x, _filters(weight).transpose(1, 2), out)


def input_gradient(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the gradient of the input [B, H, W, C] for that of the output [B, H, W, K]."""
    _multiply(grad, _filters(weight.flip(2, 3)), out)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """[K, C, 3, 3] of [B, H, W, C] and the output's gradient [B, H, W, K]."""
    channels, outputs = x.shape[3], grad.shape[3]
    filters = x.new_zeros(16, outputs, channels)
    count = _at_a_time(x)
    for one, upstream in zip(x.split(count), grad.split(count), strict=True):
        filters.baddbmm_(_output_gradients(upstream).transpose(1, 2), _inputs(one))
    found = _both_axes(x).t() @ filters.view(16, -1)
    return found.t().reshape(outputs, channels, 3, 3)


def _multiply(x: Tensor, filters: Tensor, out: Tensor) -> None:
    count = _at_a_time(x)
    for one, result in zip(x.split(count), out.split(count), strict=True):
        _outputs(torch.bmm(_inputs(one), filters), result)


def _at_a_time(x: Tensor) -> int:
    """Rows of the batch whose transformed inputs, four times as many elements, make a block."""
    return max(1, BLOCK // (4 * x[0].numel()))


def _both_axes(like: Tensor) -> Tensor:
    """G for rows and columns at once: [16, 9], place 4 a + b of tiles and 3 i + j of weights."""
    g = torch.tensor(_G, dtype=like.dtype, device=like.device)
    return torch.kron(g, g)


def _filters(weight: Tensor) -> Tensor:
    """G w G^T: [16, K, C] of [K, C, 3, 3]."""
    found = _both_axes(weight) @ weight.reshape(-1, 9).t()
    return found.view(16, *weight.shape[:2])


def _inputs(x: Tensor) -> Tensor:
    """B^T x B of every tile: [16, T, C] of [B, H, W, C]."""
    batch, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = F.pad(x, (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
    high = x.new_empty(4, batch, rows, x.shape[2], channels)
    _differences([x[:, i : i + 2 * rows - 1 : 2] for i in range(4)], high.unbind(0))
    both = x.new_empty(4, 4, batch, rows, columns, channels)
    _differences([high[:, :, :, i : i + 2 * columns - 1 : 2] for i in range(4)], both.unbind(1))
    return both.view(16, -1, channels)


def _differences(x: list[Tensor], out: tuple[Tensor, ...]) -> None:
    """B^T of four neighbours."""
    torch.sub(x[0], x[2], out=out[0])
    torch.add(x[1], x[2], out=out[1])
    torch.sub(x[2], x[1], out=out[2])
    torch.sub(x[1], x[3], out=out[3])


def _outputs(products: Tensor, out: Tensor) -> None:
    """Write A^T m A of every tile's [16, T, K] to [B, H, W, K]."""
    batch, height, width, channels = out.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    m = products.view(4, 4, batch, rows, columns, channels)
    high = products.new_empty(2, 4, batch, rows, columns, channels)
    _sums(m.unbind(0), high.unbind(0))
    even = height % 2 == 0 and width % 2 == 0
    whole = out if even else out.new_empty(batch, 2 * rows, 2 * columns, channels)
    tiles = whole.unflatten(2, (columns, 2)).unflatten(1, (rows, 2)).movedim(2, 0)
    _sums(high.unbind(1), tiles.unbind(4))
    if not even:
        out.copy_(whole[:, :height, :width])


def _sums(x: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """A^T of four products."""
    torch.add(x[0], x[1], out=out[0]).add_(x[2])
    torch.sub(x[1], x[2], out=out[1]).sub_(x[3])


def _output_gradients(grad: Tensor) -> Tensor:
    """A g A^T of every tile: [16, T, K] of [B, H, W, K]."""
    batch, height, width, channels = grad.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    if height % 2 or width % 2:
        grad = F.pad(grad, (0, 0, 0, width % 2, 0, height % 2))
    tiles = grad.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
    high = grad.new_empty(4, batch, rows, columns, 2, channels)
    _spread(tiles.unbind(2), high.unbind(0))
    both = grad.new_empty(4, 4, batch, rows, columns, channels)
    _spread(high.unbind(4), both.unbind(1))
    return both.view(16, -1, channels)


def _spread(x: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """A of two gradients."""
    out[0].copy_(x[0])
    torch.add(x[0], x[1], out=out[1])
    torch.sub(x[0], x[1], out=out[2])
    torch.neg(x[1], out=out[3])
