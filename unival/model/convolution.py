"""Convolutions of the media encoders, in the form that a CPU computes fastest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unival.kernels.convolution.op import convolution, convolution_backward, takes


class Conv2d(nn.Conv2d):
    """nn.Conv2d; where products of matrices are faster, they compute it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if takes(x, weight, self):
            return convolution(x, weight, bias, self.stride[0])
        return super()._conv_forward(x, weight, bias)


class Conv3d(nn.Conv3d):
    """A 3-D convolution that computes half precision in float32 on a CPU, and one frame in 2-D.

    torch 2.14 returns bf16 weight gradients there that hold uninitialised memory now and then, and
    aborts the process in the stem's. With one frame between two of padding, as in the last two
    stages of an encoder of 8 frames, all weights but the middle ones see zeros alone.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if takes(x, weight, self):
            y = convolution(x.flatten(2, 3), weight.flatten(2, 3), bias)
            return y.unflatten(2, x.shape[2:4])
        if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            return self._convolve(x, weight, bias)
        wide = None if bias is None else bias.float()
        return self._convolve(x.float(), weight.float(), wide).to(x.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        part, padding = seeing(self, x, weight)
        if part is weight:
            return super()._conv_forward(x, weight, bias)
        return F.conv3d(x, part, bias, self.stride, padding, self.dilation, self.groups)


def seeing(
    module: nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor
) -> tuple[Tensor, tuple[int, ...] | str]:
    """The part of a weight that sees more than zeros, and the padding that it takes."""
    padding = module.padding
    if x.ndim == 4 or x.shape[2] > 1 or module.padding_mode != "zeros" or isinstance(padding, str):
        return weight, padding
    before, *places = padding
    if module.kernel_size[0] != 2 * before + 1 or module.dilation[0] != 1 or before == 0:
        return weight, padding
    return weight.narrow(2, before, 1), (0, *places)


def differentiate(
    module: nn.Conv2d | nn.Conv3d, grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what a module convolves with a weight, and of the weight; no bias."""
    if isinstance(module, Conv2d) and takes(x, weight, module):
        return convolution_backward(grad, x, weight, module.stride[0], True, True)
    part, padding = seeing(module, x, weight)
    sizes = (module.stride, padding, module.dilation)
    places = [0] * (x.ndim - 2)
    d_x, d_part, _ = torch.ops.aten.convolution_backward(
        grad, x, part, None, *sizes, False, places, module.groups, [True, True, False]
    )
    if part is weight:
        return d_x, d_part
    d_weight = torch.zeros_like(weight)
    d_weight.narrow(2, weight.shape[2] // 2, 1).copy_(d_part)
    return d_x, d_weight
