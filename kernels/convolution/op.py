"""`convolution`: an operator that PyTorch knows, for the forms that matrix products compute faster.

On a CPU without AVX-512, PyTorch's convolutions of channels-last maps (oneDNN) reach 110 to 140
GFLOP/s forward and half of that for weights' gradients on cores whose matrix products (MKL) run at
165. Products do all of 1x1, and 3x3 in fewer operations (winograd.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from unival.kernels.convolution import winograd
from unival.kernels.cpu_memory import fresh

# Here a constant: torch.compile does not see through the question.
PRODUCTS_ARE_FASTER = torch.backends.cpu.get_cpu_capability() == "AVX2"
LEAST_CHANNELS = 128  # below, Winograd's transforms cost what its products save


def takes(x: Tensor, weight: Tensor, module: nn.Conv2d) -> bool:
    """Whether `convolution` computes what a module does with a weight, and is the faster way."""
    if x.device.type != "cpu" or not PRODUCTS_ARE_FASTER or x.numel() == 0:
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if module.stride != (1, 1) or module.dilation != (1, 1) or module.groups != 1:
        return False
    outputs, channels, *kernel = weight.shape
    if module.padding_mode != "zeros" or module.padding != tuple(size // 2 for size in kernel):
        return False
    return kernel == [1, 1] or (kernel == [3, 3] and min(outputs, channels) >= LEAST_CHANNELS)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of stride 1 that keeps the maps' size: kernels of 1x1, and 3x3 with padding 1.

    Args:
        x: [B, C, h, w] float32 on a CPU; channels last in memory, or it is copied.
        weight: [K, C, 1, 1] or [K, C, 3, 3].
        bias: [K].

    Returns:
        [B, K, h, w], channels last in memory. Differentiable in all arguments.

    Raises:
        ValueError: another kernel, or shapes that do not fit.
    """
    if weight.ndim != 4 or weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(f"weight is {list(weight.shape)}; expected [K, C, 1, 1] or [K, C, 3, 3]")
    if x.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}; expected [B, {weight.shape[1]}, h, w]")
    y = _forward(x, weight)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _last(maps: Tensor) -> Tensor:
    """[B, h, w, C], contiguous."""
    return maps.permute(0, 2, 3, 1).contiguous()


def _like(x: Tensor, channels: int) -> Tensor:
    batch, _, height, width = x.shape
    return fresh((batch, height, width, channels), x.dtype, x.device).permute(0, 3, 1, 2)


def _rows(maps: Tensor) -> Tensor:
    """[B h w, C], a view of channels-last maps."""
    return maps.permute(0, 2, 3, 1).view(-1, maps.shape[1])


@torch.library.custom_op("unival::convolution_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    """[B, K, h, w], channels last."""
    y = _like(x, len(weight))
    if weight.shape[2] == 1:
        torch.mm(_last(x).flatten(0, 2), weight.flatten(1).t(), out=_rows(y))
    else:
        winograd.convolve(_last(x), weight, y.permute(0, 2, 3, 1))
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _like(x, weight.shape[0])


@torch.library.custom_op("unival::convolution_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; one that is not needed has no elements."""
    d_x, d_weight = grad.new_empty(0), grad.new_empty(0)
    upstream = _last(grad)
    if need_x:
        d_x = _like(x, x.shape[1])
        if weight.shape[2] == 1:
            torch.mm(upstream.flatten(0, 2), weight.flatten(1), out=_rows(d_x))
        else:
            winograd.input_gradient(upstream, weight, d_x.permute(0, 2, 3, 1))
    if need_weight:
        if weight.shape[2] == 1:
            found = upstream.flatten(0, 2).t() @ _last(x).flatten(0, 2)
            d_weight = found.view(weight.shape)
        else:
            d_weight = winograd.weight_gradient(_last(x), upstream)
    return d_x, d_weight


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    d_x = _like(x, x.shape[1]) if need_x else grad.new_empty(0)
    return d_x, weight.new_empty(weight.shape if need_weight else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need_x, need_weight = ctx.needs_input_grad
    d_x, d_weight = _backward(grad, *ctx.saved_tensors, need_x, need_weight)
    return d_x if need_x else None, d_weight if need_weight else None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.unival.convolution_forward)
def _forward_flops(x: Sequence[int], weight: Sequence[int], *, out_shape: Any = None) -> int:
    """Those of the convolution; Winograd's form does 4 / 9 of them and the transforms."""
    batch, _, height, width = x
    outputs, channels, rows, columns = weight
    return 2 * batch * height * width * outputs * channels * rows * columns


@register_flop_formula(torch.ops.unival.convolution_backward)
def _backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    need_x: bool,
    need_weight: bool,
    *,
    out_shape: Any = None,
) -> int:
    """As many as forward for each gradient."""
    return (int(need_x) + int(need_weight)) * _forward_flops(x, weight)
