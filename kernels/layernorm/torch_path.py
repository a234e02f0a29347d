"""The norms by PyTorch's own operators, differentiated by autograd: the fast path of a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unival.kernels.cpu import native
from unival.kernels.layernorm.reference import branch_factor
from unival.kernels.triton_tools.philox import draw_seed


def norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    """LN(x), or LN(GELU(x)), of x [..., N]; statistics and sums in float32.

    PyTorch's CPU kernels keep statistics in the dtype of the parameters and sum dweight in that of
    x (of 8192 rows in bfloat16, a tenth is lost), and its CUDA kernels take one dtype: both get
    float32 where they need it.
    """
    if x.numel() and native.takes(maps=(x,)) and native.takes(maps=(weight, bias)):
        return _Norm.apply(x, weight, bias, float(eps), gelu)
    dtype = x.dtype
    if x.is_cpu or weight.dtype != dtype:
        x, weight, bias = x.float(), weight.float(), bias.float()
    value = F.gelu(x) if gelu else x
    return F.layer_norm(value, weight.shape, weight, bias, eps).to(dtype)


def residual_norm_torch(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """residual + DropPath(Dropout(branch)) and its norm; [B, S, N].

    The numbers are the kernels' where they are compiled for a CPU, and where a seed is given,
    otherwise slowly; without a seed PyTorch's generator draws what is dropped.
    """
    drops = (dropout > 0.0 or drop_path > 0.0) and branch.numel() > 0
    if drops and native.takes(maps=(branch, residual)):
        seed = draw_seed(branch.device) if seed is None else seed
        number = 0 if seed.is_meta else int(seed)
        total = _DropBranch.apply(branch, residual, number, dropout, drop_path)
        return total, norm_torch(total, weight, bias, eps, gelu=False)
    if seed is not None:
        branch = branch * branch_factor(branch.shape, dropout, drop_path, seed).to(branch.dtype)
    else:
        branch = F.dropout(branch, dropout)
        if drop_path > 0.0:
            keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1.0 - drop_path)
            branch = branch * (keep / (1.0 - drop_path))
    total = residual + branch
    return total, norm_torch(total, weight, bias, eps, gelu=False)


class _DropBranch(torch.autograd.Function):
    """residual + DropPath(Dropout(branch)) on a CPU, rounded once; no mask is kept."""

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, residual: Tensor, seed: int, dropout: float, drop_path: float
    ) -> Tensor:
        rates = (float(dropout), float(drop_path))
        ctx.drawn = (seed, *branch.shape, *rates, native.is_half(branch))
        total = torch.empty_like(branch)
        native.call("drop_branch", branch, residual, total, *ctx.drawn)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_branch = None
        if ctx.needs_input_grad[0]:
            grad = grad.contiguous()
            d_branch = torch.empty_like(grad)
            native.call("drop_branch", grad, None, d_branch, *ctx.drawn)
        return d_branch, grad, None, None, None


class _Norm(torch.autograd.Function):
    """LN(x) or LN(GELU(x)) on a CPU; the activation is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool
    ) -> Tensor:
        width, half = x.shape[-1], native.is_half(x)
        ctx.sizes = (x.numel() // width, width)
        y = torch.empty_like(x)
        mean, scale = (x.new_empty(ctx.sizes[0], dtype=torch.float32) for _ in range(2))
        given = (x, weight.float(), bias.float(), y, mean, scale)
        native.call("layer_norm_forward", *given, *ctx.sizes, eps, gelu, half)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.options = (gelu, half)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        grad, d_x = grad.contiguous(), torch.empty_like(x)
        d_weight, d_bias = (torch.empty_like(weight, dtype=torch.float32) for _ in range(2))
        given = (grad, x, weight.float(), mean, scale, d_x, d_weight, d_bias)
        native.call("layer_norm_backward", *given, *ctx.sizes, *ctx.options)
        return d_x, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None
