"""What the three norms compute, in plain PyTorch; runs on every device and in float64.

    LN(x)[r, c] = (x[r, c] - mean[r]) * rstd[r] * weight[c] + bias[c]
    mean[r] = sum_c x[r, c] / N,    rstd[r] = (sum_c (x[r, c] - mean[r])^2 / N + eps)^-1/2

M rows of N columns; a row is one token. Statistics are float32, or float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unival.kernels.triton_tools.philox import uniform_torch


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LN of x [..., N] with weight and bias [N], in the dtype of x; everything differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide)
    deviation = value - value.mean(-1, keepdim=True)
    rstd = (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (deviation * rstd * weight.to(wide) + bias.to(wide)).to(x.dtype)


def gelu_layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LN(GELU(x)), GELU(x) = x * Phi(x); shapes as in `layer_norm_reference`."""
    return layer_norm_reference(F.gelu(x), weight, bias, eps)


def residual_layer_norm_reference(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    factor: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """total = residual + factor * branch and LN(total), both [B, S, N].

    factor: what dropout and stochastic depth multiply by, as `branch_factor` makes it.
    """
    total = residual + factor * branch
    return total, layer_norm_reference(total, weight, bias, eps)


def branch_factor(
    shape: tuple[int, int, int], dropout: float, drop_path: float, seed: Tensor
) -> Tensor:
    """float32 [B, S, N]: 0 where the Triton kernels drop, else 1 / ((1-dropout) (1-drop_path))."""
    batch, length, width = shape
    row = torch.arange(batch * length, device=seed.device).view(batch, length, 1)
    column = torch.arange(width, device=seed.device)
    zero = torch.zeros_like(column[:1])
    keep = uniform_torch(seed, column, row, zero) >= dropout
    sample = torch.arange(batch, device=seed.device).view(batch, 1, 1)
    keep = keep & (uniform_torch(seed, zero, sample, zero + 1) >= drop_path)
    return keep.float() / ((1.0 - dropout) * (1.0 - drop_path))
