"""The three norms as functions: checks, custom operators, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from unival.kernels.backend import resolve_backend
from unival.kernels.layernorm.backward import backward_triton, residual_backward_triton
from unival.kernels.layernorm.forward import forward_triton, residual_forward_triton
from unival.kernels.layernorm.torch_path import norm_torch, residual_norm_torch
from unival.kernels.triton_tools.philox import draw_seed

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 4096  # the kernels' registers hold no wider row


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """LN(x): rows with mean 0 and variance 1, times weight, plus bias; float32 statistics.

    Args:
        x: [..., N], N from 1 to 4096; float32, float16 or bfloat16. Columns adjacent in memory,
            rows at any distance.
        weight, bias: [N], both in the dtype of x or both float32.
        eps: added to the variance; positive.
        backend: auto (Triton on a GPU, else torch), torch or triton.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable once in x, weight and bias; sums over
        rows have a fixed order, so that gradients repeat bit for bit.

    Raises:
        ValueError: a shape, dtype, device, layout or name that is not as above.
    """
    _check({"x": x}, weight, bias, eps)
    backend = resolve_backend("layer_norm", backend, x.device, BACKENDS)
    norm = layer_norm_op if backend == "triton" else norm_torch
    return norm(x, weight, bias, eps, False)


def gelu_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """LN(GELU(x)) in one pass, with the exact GELU(x) = x * Phi(x).

    Arguments, result, gradients and errors are those of `layer_norm`. Triton keeps the activation
    nowhere: backward computes it again from x.
    """
    _check({"x": x}, weight, bias, eps)
    backend = resolve_backend("gelu_layer_norm", backend, x.device, BACKENDS)
    norm = layer_norm_op if backend == "triton" else norm_torch
    return norm(x, weight, bias, eps, True)


def residual_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """total = residual + DropPath(Dropout(branch)) and LN(total), in one pass.

    Stochastic depth drops the whole branch of a sample. Triton draws what is dropped again in
    backward and stores no mask. `total` is rounded to its dtype before it is normed.

    Args:
        branch, residual: [B, S, N] of one dtype, as x in `layer_norm`.
        weight, bias, eps: as in `layer_norm`.
        dropout, drop_path: rates in [0, 1); survivors are scaled by 1 / (1 - rate).
        seed: int64 [1] on the device: the same seed drops the same, whatever the backend. None
            draws from PyTorch's generator.
        backend: as in `layer_norm`.

    Returns:
        total and y, both [B, S, N] in the dtype of branch, contiguous. Differentiable once, through
        both outputs, in branch, residual, weight and bias.

    Raises:
        ValueError: a shape, dtype, device, layout, rate or name that is not as above.
    """
    _check({"branch": branch, "residual": residual}, weight, bias, eps)
    _check_residual(branch, residual, dropout, drop_path, seed)
    backend = resolve_backend("residual_layer_norm", backend, branch.device, BACKENDS)
    if backend == "torch":
        return residual_norm_torch(branch, residual, weight, bias, eps, dropout, drop_path, seed)
    if dropout == 0.0 and drop_path == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(branch.device)
    return residual_layer_norm_op(branch, residual, weight, bias, eps, dropout, drop_path, seed)


def _check(inputs: dict[str, Tensor], weight: Tensor, bias: Tensor, eps: float) -> None:
    first = next(iter(inputs))
    like = inputs[first]
    for name, tensor in inputs.items():
        _check_rows(name, tensor)
        if tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; allowed: {like.dtype}, that of {first}")
    width = like.shape[-1]
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor.shape != (width,):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; allowed: [{width}], the last dimension "
                f"of {first}"
            )
        if tensor.dtype not in (like.dtype, torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype}; allowed: torch.float32 or {like.dtype}, that of {first}"
            )
    if weight.dtype != bias.dtype:
        raise ValueError(f"bias is {bias.dtype}; allowed: {weight.dtype}, that of weight")
    for name, tensor in {**inputs, "weight": weight, "bias": bias}.items():
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {like.device}, as {first}")
    if not eps > 0.0:
        raise ValueError(f"eps={eps}; allowed: positive numbers")


def _check_rows(name: str, tensor: Tensor) -> None:
    shape = list(tensor.shape)
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype}; allowed: torch.float32, torch.float16, torch.bfloat16"
        )
    if tensor.dim() == 0 or not 1 <= tensor.shape[-1] <= WIDEST:
        raise ValueError(f"{name} has shape {shape}; allowed: a last dimension from 1 to {WIDEST}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has shape {shape} and strides {list(tensor.stride())}; allowed: stride 1 in "
            "the last dimension (any in the others); call .contiguous()"
        )


def _check_residual(
    branch: Tensor, residual: Tensor, dropout: float, drop_path: float, seed: Tensor | None
) -> None:
    if branch.dim() != 3:
        raise ValueError(f"branch has shape {list(branch.shape)}; allowed: three dimensions")
    if residual.shape != branch.shape:
        raise ValueError(
            f"residual has shape {list(residual.shape)}; allowed: {list(branch.shape)}, that of "
            "branch"
        )
    for name, rate in {"dropout": dropout, "drop_path": drop_path}.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name}={rate}; allowed: 0 <= {name} < 1")
    if seed is not None:
        if seed.dtype != torch.int64 or seed.shape != (1,):
            raise ValueError(
                f"seed is {seed.dtype} of shape {list(seed.shape)}; allowed: torch.int64 of [1]"
            )
        if seed.device != branch.device:
            raise ValueError(f"seed is on {seed.device}; allowed: {branch.device}, as branch")


@torch.library.custom_op("unival::layer_norm", mutates_args=())
def layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    return forward_triton(x, weight, bias, eps, gelu)


@layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("unival::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, gelu: bool
) -> tuple[Tensor, Tensor]:
    return backward_triton(dy, x, weight, eps, gelu)


@layer_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(2, x.shape[-1])


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight)
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    dx, parameters = layer_norm_backward_op(dy, *ctx.saved_tensors, *ctx.options)
    return dx, parameters[0], parameters[1], None, None


layer_norm_op.register_autograd(_norm_gradients, setup_context=_save_norm)


@torch.library.custom_op("unival::residual_layer_norm", mutates_args=())
def residual_layer_norm_op(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return residual_forward_triton(branch, residual, weight, bias, eps, dropout, drop_path, seed)


@residual_layer_norm_op.register_fake
def _(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), branch.new_empty(branch.shape)


@torch.library.custom_op("unival::residual_layer_norm_backward", mutates_args=())
def residual_layer_norm_backward_op(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dresidual, dbranch (empty where it is dresidual), dweight and dbias [2, N]."""
    return residual_backward_triton(dy, dtotal, total, weight, eps, dropout, drop_path, seed)


@residual_layer_norm_backward_op.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dbranch = total.new_empty(0 if seed is None else total.shape)
    return total.new_empty(total.shape), dbranch, weight.new_empty(2, total.shape[-1])


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, _, eps, dropout, drop_path, seed = inputs
    ctx.save_for_backward(output[0], weight, *([] if seed is None else [seed]))
    ctx.rates = (eps, dropout, drop_path)
    ctx.set_materialize_grads(False)


def _residual_gradients(
    ctx: Any, dtotal: Tensor | None, dy: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dtotal is None and dy is None:
        return (None,) * 8
    total, weight, *rest = ctx.saved_tensors
    seed = rest[0] if rest else None
    if dy is None:  # rare: a sum whose norm nobody uses
        dy = torch.zeros_like(total)
    dresidual, dbranch, parameters = residual_layer_norm_backward_op(
        dy, dtotal, total, weight, *ctx.rates, seed
    )
    if seed is None:
        dbranch = dresidual
    return dbranch, dresidual, parameters[0], parameters[1], None, None, None, None


residual_layer_norm_op.register_autograd(_residual_gradients, setup_context=_save_residual)


@register_flop_formula(
    [
        torch.ops.unival.layer_norm,
        torch.ops.unival.layer_norm_backward,
        torch.ops.unival.residual_layer_norm,
        torch.ops.unival.residual_layer_norm_backward,
    ]
)
def _no_flops(*args: Any, **kwargs: Any) -> int:
    # torch's counter counts matrix products only.
    return 0
