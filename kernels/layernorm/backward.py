"""Backward of the three norms: one Triton kernel, and PyTorch's own kernels for other devices.

Mean and rstd are computed again from the row, which is in registers anyway: nothing but the input
and the weight is kept from the forward pass, and no per-row scalars are loaded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unival.kernels.layernorm.forward import (
    branch_scale,
    centre,
    drop,
    flat_rows,
)
from unival.kernels.triton_tools.arithmetic import gelu, gelu_derivative
from unival.kernels.triton_tools.launch import Config, launch, multiprocessors

# Tiles as in forward.py, half as many elements a thread: it also holds dy, the weight and the two
# sums. Of wide rows a multiprocessor holds one or two programs, too few to hide each other's waits,
# hence the loop loads two rows ahead into shared memory (STAGES - 1).
CONFIGS = {
    768: Config({"ROWS": 2, "BLOCK": 1024, "STAGES": 1}, num_warps=4),
    1024: Config({"ROWS": 2, "BLOCK": 1024, "STAGES": 1}, num_warps=4),
    3072: Config({"ROWS": 1, "BLOCK": 4096, "STAGES": 3}, num_warps=16),
    4096: Config({"ROWS": 1, "BLOCK": 4096, "STAGES": 3}, num_warps=16),
}


def backward_config(width: int, narrow: bool) -> Config:
    """The tuned configuration of a width, else tiles of about 2048 elements.

    narrow: one row a tile, where float32 or drawing random numbers again takes the registers of a
    second one.
    """
    if width in CONFIGS:
        config = CONFIGS[width]
        return config._replace(blocks=config.blocks | {"ROWS": 1}) if narrow else config
    block = triton.next_power_of_2(width)
    rows = min(32, max(1, 2048 // block))
    blocks = {"ROWS": rows, "BLOCK": block, "STAGES": 1}
    return Config(blocks, num_warps=min(16, max(4, block // 256)))


def program_count(rows: int, element_size: int, config: Config, device: torch.device) -> int:
    """Programs that share the rows, each of which writes one partial gradient of the parameters.

    As many as multiprocessors hold (about 16 warps on each), or two each of the large ones. Written
    partials (8 bytes a column and program) stay under 5 % of the bytes of dy, x and dx, except
    where that would leave multiprocessors idle. Of all counts with the same longest walk, the
    smallest is taken.
    """
    units = multiprocessors(device)
    resident = max(2, 16 // config.num_warps) * units
    cheap = int(0.05 * 3 * rows * element_size / 8)
    tiles = triton.cdiv(rows, config.blocks["ROWS"])
    most = max(1, min(tiles, resident, max(units, cheap)))
    return triton.cdiv(tiles, max(1, triton.cdiv(tiles, most)))


@triton.jit(do_not_specialize=("M", "length"))
def backward_kernel(
    dy,
    dtotal,
    x,
    weight,
    dx,
    dbranch,
    partials,
    seed,
    M,
    dy_stride,
    dtotal_stride,
    x_stride,
    length,
    eps,
    dropout,
    drop_path,
    scale,
    N: tl.constexpr,
    GELU: tl.constexpr,
    DTOTAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    dweight = tl.zeros([1, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([1, BLOCK], dtype=tl.float32)
    if DROPOUT or DROP_PATH:
        key = tl.load(seed)
    for start in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)[:, None]
        inside = (rows < M) & (columns < N)
        before = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + rows * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value = gelu(before) if GELU else before
        deviation, rstd = centre(value, inside, eps, N)
        normed = deviation * rstd
        dweight += tl.sum(slope * normed, axis=0, keep_dims=True)
        dbias += tl.sum(slope, axis=0, keep_dims=True)
        slope *= w
        along = tl.sum(slope * normed, axis=1, keep_dims=True) / N
        level = tl.sum(slope, axis=1, keep_dims=True) / N
        result = (slope - level - normed * along) * rstd
        if GELU:
            result *= gelu_derivative(before)
        if DTOTAL:
            direct = tl.load(dtotal + rows * dtotal_stride + columns, mask=inside, other=0.0)
            result += direct.to(tl.float32)
        tl.store(dx + rows * N + columns, result.to(dx.dtype.element_ty), mask=inside)
        if DROPOUT or DROP_PATH:
            kept = drop(
                result,
                key,
                rows,
                columns,
                length,
                dropout,
                drop_path,
                scale,
                DROPOUT,
                DROP_PATH,
            )
            tl.store(dbranch + rows * N + columns, kept.to(dbranch.dtype.element_ty), mask=inside)
    tl.store(partials + program * N + columns, dweight, mask=columns < N)
    tl.store(partials + (programs + program) * N + columns, dbias, mask=columns < N)


def backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, gelu: bool
) -> tuple[Tensor, Tensor]:
    """dx [..., N] and dweight, dbias as rows of [2, N]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parameters = _launch((dy, None, x, weight, dx, None, None), 1, eps, 0.0, 0.0, GELU=gelu)
    return dx, parameters


def residual_backward_triton(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dresidual and dbranch [B, S, N], and dweight, dbias as rows of [2, N].

    Without a seed nothing was dropped: dbranch is dresidual, and empty here.
    """
    shape = total.shape
    dresidual = torch.empty(shape, dtype=total.dtype, device=total.device)
    dbranch = torch.empty(shape if seed is not None else 0, dtype=total.dtype, device=total.device)
    tensors = (dy, dtotal, total, weight, dresidual, dbranch, seed)
    parameters = _launch(tensors, shape[1], eps, dropout, drop_path, GELU=False)
    return dresidual, dbranch, parameters


def _launch(
    tensors: tuple[Any, ...],
    length: int,
    eps: float,
    dropout: float,
    drop_path: float,
    GELU: bool,
) -> Tensor:
    dy, dtotal, x, weight, dx, dbranch, seed = tensors
    dy, x = flat_rows(dy), flat_rows(x)
    dtotal = None if dtotal is None else flat_rows(dtotal)
    rows, width = x.shape
    drops = dropout > 0.0 or drop_path > 0.0
    config = backward_config(width, drops or x.dtype == torch.float32)
    programs = program_count(rows, x.element_size(), config, x.device)
    partials = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel,
        (programs,),
        config,
        (
            dy,
            dtotal,
            x,
            weight.contiguous(),
            dx,
            dbranch,
            partials,
            seed,
            rows,
            dy.stride(0),
            0 if dtotal is None else dtotal.stride(0),
            x.stride(0),
            length,
            eps,
            dropout,
            drop_path,
            branch_scale(dropout, drop_path),
        ),
        N=width,
        GELU=GELU,
        DTOTAL=dtotal is not None,
        DROPOUT=dropout > 0.0,
        DROP_PATH=drop_path > 0.0,
    )
    return partials.sum(1).to(weight.dtype)
