"""Forward of the three norms: one Triton kernel, and PyTorch's own kernels for other devices."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unival.kernels.triton_tools.arithmetic import gelu
from unival.kernels.triton_tools.launch import Config, launch
from unival.kernels.triton_tools.philox import uniform

# Triton lays warps along the columns before it lays them along the rows, so every thread holds the
# same columns of all rows of a tile: sums over rows stay in a thread, weights are held once, and
# the sums over columns of all rows share their barriers. 4096 elements on 128 threads are 32 floats
# each, loaded before the first is used; 16 for wide rows, where dropout takes many registers.
CONFIGS = {
    768: Config({"ROWS": 4, "BLOCK": 1024}, num_warps=4),
    1024: Config({"ROWS": 4, "BLOCK": 1024}, num_warps=4),
    3072: Config({"ROWS": 1, "BLOCK": 4096}, num_warps=8),
    4096: Config({"ROWS": 1, "BLOCK": 4096}, num_warps=8),
}


def forward_config(width: int) -> Config:
    """The tuned configuration of a width, else tiles of about 2048 elements."""
    if width in CONFIGS:
        return CONFIGS[width]
    block = triton.next_power_of_2(width)
    rows = min(32, max(1, 2048 // block))
    return Config({"ROWS": rows, "BLOCK": block}, num_warps=min(16, max(4, block // 512)))


@triton.jit
def centre(value, inside, eps, N: tl.constexpr):
    """Deviations from the rows' means, meaningless outside, and the rows' 1 / standard deviation.

    The first mean is rounded to the precision of the values, so a mean far from zero would shift
    every deviation; the mean of the deviations takes that back. Both sums of the second pass are
    independent and cancel nothing, unlike the mean of squares minus the squared mean.
    """
    mean = tl.sum(value, axis=1, keep_dims=True) / N
    deviation = tl.where(inside, value - mean, 0.0)
    shift = tl.sum(deviation, axis=1, keep_dims=True) / N
    variance = tl.sum(deviation * deviation, axis=1, keep_dims=True) / N - shift * shift
    return deviation - shift, tl.rsqrt(tl.maximum(variance, 0.0) + eps)


@triton.jit
def drop(
    value,
    key,
    rows,
    columns,
    length,
    dropout,
    drop_path,
    scale,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
):
    """Dropout of elements and stochastic depth of samples; the same numbers on every call."""
    row = rows.to(tl.int32)
    if DROPOUT:
        value = tl.where(uniform(key, columns, row, 0) >= dropout, value, 0.0)
    if DROP_PATH:
        sample = row // length
        value = tl.where(uniform(key, sample * 0, sample, 1) >= drop_path, value, 0.0)
    return value * scale


@triton.jit(do_not_specialize=("M", "length"))
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    y,
    seed,
    M,
    x_stride,
    residual_stride,
    length,
    eps,
    dropout,
    drop_path,
    scale,
    N: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (columns < N)
    value = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value = gelu(value)
    if RESIDUAL:
        base = tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0)
        if DROPOUT or DROP_PATH:
            value = drop(
                value,
                tl.load(seed),
                rows,
                columns,
                length,
                dropout,
                drop_path,
                scale,
                DROPOUT,
                DROP_PATH,
            )
        # The norm is that of the stored sum, which is all that backward will see.
        stored = (base.to(tl.float32) + value).to(total.dtype.element_ty)
        tl.store(total + rows * N + columns, stored, mask=inside)
        value = stored.to(tl.float32)
    deviation, rstd = centre(value, inside, eps, N)
    w = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    normed = deviation * rstd * w + b
    tl.store(y + rows * N + columns, normed.to(y.dtype.element_ty), mask=inside)


def flat_rows(x: Tensor) -> Tensor:
    """[..., N] as [M, N] with any row stride and adjacent columns; a copy only where no view is."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def forward_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    """LN(x) or LN(GELU(x)) of [..., N], contiguous."""
    rows = flat_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = (rows, None, weight.contiguous(), bias.contiguous(), None, y, None)
    _launch(tensors, 1, eps, 0.0, 0.0, GELU=gelu, RESIDUAL=False)
    return y


def residual_forward_triton(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """residual + DropPath(Dropout(branch)) and its LN, both [B, S, N], contiguous."""
    total, y = (torch.empty(branch.shape, dtype=branch.dtype, device=branch.device) for _ in "ty")
    tensors = (
        flat_rows(branch),
        flat_rows(residual),
        weight.contiguous(),
        bias.contiguous(),
        total,
        y,
        seed,
    )
    _launch(tensors, branch.shape[1], eps, dropout, drop_path, GELU=False, RESIDUAL=True)
    return total, y


def _launch(
    tensors: tuple[Any, ...],
    length: int,
    eps: float,
    dropout: float,
    drop_path: float,
    **flags: bool,
) -> None:
    x, residual = tensors[:2]
    rows, width = x.shape
    config = forward_config(width)
    launch(
        forward_kernel,
        (triton.cdiv(rows, config.blocks["ROWS"]),),
        config,
        (
            *tensors,
            rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            length,
            eps,
            dropout,
            drop_path,
            branch_scale(dropout, drop_path),
        ),
        N=width,
        DROPOUT=dropout > 0.0,
        DROP_PATH=drop_path > 0.0,
        **flags,
    )


def branch_scale(dropout: float, drop_path: float) -> float:
    """What survivors are multiplied by."""
    return 1.0 / ((1.0 - dropout) * (1.0 - drop_path))
