"""`convolution`: an operator that PyTorch knows, each of whose products takes its fastest form.

On a CPU without AVX-512, PyTorch's convolutions of channels-last maps (oneDNN) reach 110 to 150
GFLOP/s forward and half of that for weights' gradients, on cores whose matrix products (MKL) run at
160. Products do all of 1x1 and of weights' gradients, and 3x3 in fewer operations (winograd.py);
where that is no faster, PyTorch's own is called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from unival.kernels.convolution import winograd
from unival.kernels.cpu import native

# Here a constant: torch.compile does not see through the question.
PRODUCTS_ARE_FASTER = torch.backends.cpu.get_cpu_capability() == "AVX2"
LEAST_CHANNELS = 64  # of a 3x3; fewer were not measured


def takes(x: Tensor, weight: Tensor, module: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether `convolution` computes what a module does with a weight, and is the faster way.

    Clips [B, C, F, h, w] are pictures of F h rows to a kernel of one place.
    """
    if not native.is_cpu(x) or not PRODUCTS_ARE_FASTER or x.numel() == 0:
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    kernel, axes = tuple(weight.shape[2:]), weight.ndim - 2
    if module.dilation != (1,) * axes or module.groups != 1:
        return False
    padding = tuple(size // 2 for size in kernel)
    if module.padding_mode != "zeros" or module.padding != padding:
        return False
    if axes == 3:
        return kernel == (1, 1, 1) and module.stride == (1, 1, 1)
    if module.stride not in ((1, 1), (2, 2)) or kernel not in ((1, 1), (3, 3)):
        return False
    if kernel == (1, 1):
        return True
    enough = min(weight.shape[:2]) >= LEAST_CHANNELS
    return enough and (module.stride == (2, 2) or winograd.takes(x, weight))


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolution with a kernel of 1x1, or of 3x3 with padding 1.

    Args:
        x: [B, C, h, w] float32 on a CPU; channels last in memory, or it is copied.
        weight: [K, C, 1, 1] or [K, C, 3, 3].
        bias: [K].
        stride: in both axes.

    Returns:
        [B, K, ceil(h / stride), ceil(w / stride)], channels last in memory. Differentiable in all
        arguments.

    Raises:
        ValueError: another kernel, or shapes that do not fit.
    """
    if weight.ndim != 4 or weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(f"weight is {list(weight.shape)}; expected [K, C, 1, 1] or [K, C, 3, 3]")
    if x.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}; expected [B, {weight.shape[1]}, h, w]")
    y = _forward(x, weight, stride)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _last(maps: Tensor) -> Tensor:
    """[B, h, w, C], contiguous."""
    return maps.permute(0, 2, 3, 1).contiguous()


def _like(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    batch, _, height, width = x.shape
    places = (math.ceil(height / stride), math.ceil(width / stride))
    return x.new_empty(batch, *places, channels).permute(0, 3, 1, 2)


def _rows(maps: Tensor) -> Tensor:
    """[B h w, C], a view of channels-last maps."""
    return maps.permute(0, 2, 3, 1).view(-1, maps.shape[1])


def _by_winograd(x: Tensor, weight: Tensor, stride: int) -> bool:
    enough = min(weight.shape[:2]) >= LEAST_CHANNELS
    return weight.shape[2] == 3 and stride == 1 and enough and winograd.takes(x, weight)


@torch.library.custom_op("unival::convolution_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """[B, K, h, w], channels last."""
    if weight.shape[2] == 1 and stride == 1:
        y = _like(x, len(weight))
        torch.mm(_last(x).flatten(0, 2), weight.flatten(1).t(), out=_rows(y))
    elif _by_winograd(x, weight, stride):
        y = _like(x, len(weight))
        winograd.convolve(_last(x), weight, y.permute(0, 2, 3, 1))
    else:
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        y = y.contiguous(memory_format=torch.channels_last)
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return _like(x, weight.shape[0], stride)


@torch.library.custom_op("unival::convolution_backward", mutates_args=())
def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; one that is not needed has no elements."""
    d_x, d_weight = grad.new_empty(0), grad.new_empty(0)
    upstream = _last(grad)
    if need_x:
        if weight.shape[2] == 1 and stride == 1:
            d_x = _like(x, x.shape[1])
            torch.mm(upstream.flatten(0, 2), weight.flatten(1), out=_rows(d_x))
        elif _by_winograd(x, weight, stride):
            d_x = _like(x, x.shape[1])
            winograd.input_gradient(upstream, weight, d_x.permute(0, 2, 3, 1))
        else:
            d_x = _torch_backward(grad, x, weight, stride, (True, False))[0]
            d_x = d_x.contiguous(memory_format=torch.channels_last)
    if need_weight:
        if weight.shape[2] == 1:
            seen = _last(x)[:, ::stride, ::stride].reshape(-1, x.shape[1])
            d_weight = (upstream.flatten(0, 2).t() @ seen).view(weight.shape)
        elif _by_winograd(x, weight, stride):
            d_weight = winograd.weight_gradient(_last(x), upstream)
        elif stride > 1:
            d_weight = _gradient_by_windows(_last(x), upstream, stride)
        else:
            d_weight = _torch_backward(grad, x, weight, stride, (False, True))[1]
    return d_x, d_weight


def _torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    sizes = ([stride] * 2, [weight.shape[2] // 2] * 2, [1, 1])
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *sizes, False, [0, 0], 1, [*needs, False]
    )
    return found[0], found[1]


def _gradient_by_windows(x: Tensor, grad: Tensor, stride: int) -> Tensor:
    """[K, C, 3, 3] of [B, H, W, C] and the output's gradient [B, h, w, K]: windows of x in memory,
    9 / stride^2 times as large, and a product for each row of the batch.
    """
    channels, outputs = x.shape[3], grad.shape[3]
    found = x.new_zeros(outputs, 9 * channels)
    for one, upstream in zip(x.split(1), grad.split(1), strict=True):
        windows = F.pad(one, (0, 0, 1, 1, 1, 1)).unfold(1, 3, stride).unfold(2, 3, stride)
        windows = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)
        found.addmm_(upstream.flatten(0, 2).t(), windows)
    return found.view(outputs, 3, 3, channels).permute(0, 3, 1, 2).contiguous()


@convolution_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    d_x = _like(x, x.shape[1]) if need_x else grad.new_empty(0)
    return d_x, weight.new_empty(weight.shape if need_weight else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_x, need_weight, _ = ctx.needs_input_grad
    saved = (*ctx.saved_tensors, ctx.stride)
    d_x, d_weight = convolution_backward(grad, *saved, need_x, need_weight)
    return d_x if need_x else None, d_weight if need_weight else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.unival.convolution_forward)
def _forward_flops(
    x: Sequence[int], weight: Sequence[int], stride: int, *, out_shape: Any = None
) -> int:
    """Those of the convolution; Winograd's form does 4 / 9 of them and the transforms."""
    batch, _, height, width = x
    outputs, channels, rows, columns = weight
    places = batch * math.ceil(height / stride) * math.ceil(width / stride)
    return 2 * places * outputs * channels * rows * columns


@register_flop_formula(torch.ops.unival.convolution_backward)
def _backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    stride: int,
    need_x: bool,
    need_weight: bool,
    *,
    out_shape: Any = None,
) -> int:
    """As many as forward for each gradient."""
    return (int(need_x) + int(need_weight)) * _forward_flops(x, weight, stride)
