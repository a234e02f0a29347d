"""Convolutions of the media encoders, in the form that a CPU computes fastest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unival.kernels.convolution.op import convolution, convolution_backward, takes


class Conv2d(nn.Conv2d):
    """nn.Conv2d; where products of matrices are faster, they compute it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if takes(x, weight, self):
            return convolution(x, weight, bias, self.stride[0])
        return super()._conv_forward(x, weight, bias)


class Conv3d(nn.Conv3d):
    """A 3-D convolution that computes half precision in float32 on a CPU.

    torch 2.14 returns bf16 weight gradients there that hold uninitialised memory now and then, and
    aborts the process in the stem's.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
            return super()._conv_forward(x, weight, bias)
        wide = None if bias is None else bias.float()
        return super()._conv_forward(x.float(), weight.float(), wide).to(x.dtype)


def differentiate(
    module: nn.Conv2d | nn.Conv3d, grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what a module convolves with a weight, and of the weight; no bias."""
    if isinstance(module, Conv2d) and takes(x, weight, module):
        return convolution_backward(grad, x, weight, module.stride[0], True, True)
    sizes = (module.stride, module.padding, module.dilation)
    places = [0] * (x.ndim - 2)
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *sizes, False, places, module.groups, [True, True, False]
    )
    return d_x, d_weight
