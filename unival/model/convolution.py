"""Convolutions of the media encoders, in the form that a CPU computes fastest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unival.kernels.convolution.op import convolution, takes


class Conv2d(nn.Conv2d):
    """nn.Conv2d; where products of matrices are faster, they compute it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if takes(x, weight, self):
            return convolution(x, weight, bias)
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
