"""Attention backward: which kernels run over which sequences, and where their results go."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unival.kernels.attention.backward_kernels import (
    attention_keys_kernel,
    attention_queries_kernel,
    attention_relative_kernel,
    attention_rowdot_kernel,
)
from unival.kernels.attention.inputs import Gradients, Inputs
from unival.kernels.triton_tools.launch import Config, launch, multiprocessors

# Sequences are walked in chunks whose tensors stay in an A100's 40 MB second-level cache, so that
# the kernels after the first read them from there.
CHUNK_BYTES = 24 << 20
MAX_GROUP = 8  # sequences a program sums dpq, dpk or the table's gradient over


def backward_config(width: int, dtype: torch.dtype) -> Config:
    """Blocks of the three backward kernels."""
    if dtype == torch.float32:
        return Config({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1)
    if width <= 64:
        return Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 1)
    return Config({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1)


def attention_backward(
    x: Inputs, grad: Tensor, unscaled: Tensor, lse: Tensor, deterministic: bool
) -> Gradients:
    """Gradients from that of the output; `unscaled` and `lse` are the forward pass's."""
    batch, heads = x.query.shape[:2]
    # Sums over sequences are kept in float32; what a program writes alone has its final dtype.
    summed = torch.float32 if x.shared_positions else x.query.dtype
    grads = Gradients(
        x.new_output(),
        _like_transposed(x.key),
        _like_transposed(x.value),
        _zeros(x.position_query, summed),
        _zeros(x.position_key, summed),
        _zeros(x.table, torch.float32),
        _zeros(x.head_scale, torch.float32),
    )
    # q, o, dy, dq of a sequence, and k, v, dk, dv.
    row_bytes = 4 * heads * x.query.shape[-1] * x.query.element_size()
    step = max(1, CHUNK_BYTES // max((x.max_queries + x.max_keys) * row_bytes, 1))
    if x.packed:
        step = max(batch, 1)
    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))
        part = grads._replace(query=grads.query[rows], key=grads.key[rows], value=grads.value[rows])
        if x.position_query is not None and not x.shared_positions:
            part = part._replace(
                position_query=grads.position_query[rows], position_key=grads.position_key[rows]
            )
        chunk = Chunk(
            x.rows(rows.start, rows.stop) if len(grad) > step else x,
            grad[rows],
            lse[rows],
            rowdots(grad[rows], unscaled[rows], lse[rows]),
        )
        chunk.keys_and_queries(part)
        if part.head_scale is not None:
            part.head_scale.add_(chunk.rowdot.sum((0, 2)))
        if part.table is not None:
            chunk.table(part.table, deterministic)
    return grads


def _like_transposed(x: Tensor) -> Tensor:
    """[B, H, T, d] in the memory order [B, T, H, d]."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device)


def rowdots(grad: Tensor, unscaled: Tensor, lse: Tensor) -> Tensor:
    """Sum of dy * o of every row: float32 [B, H, S]."""
    batch, heads, queries, width = grad.shape
    rowdot = torch.empty_like(lse)
    config = Config({"BLOCK_M": 64}, 4, 1)
    launch(
        attention_rowdot_kernel,
        (triton.cdiv(queries, 64), heads, batch),
        config,
        (grad, unscaled, rowdot, *grad.stride()[:3], *unscaled.stride()[:3], *rowdot.stride()[:2],
         queries),
        WIDTH=width,
    )  # fmt: skip
    return rowdot


class Chunk(NamedTuple):
    """Some sequences of a batch in the backward pass."""

    x: Inputs
    grad: Tensor
    lse: Tensor
    rowdot: Tensor

    def keys_and_queries(self, grads: Gradients) -> None:
        """Write dq, dk, dv; write dpq and dpk, or add to them where sequences share positions."""
        x = self.x
        config = backward_config(x.query.shape[-1], x.query.dtype)
        for kernel, length, block, outputs, position in (
            (attention_keys_kernel, x.max_keys, "BLOCK_N", (grads.key, grads.value),
             grads.position_key),
            (attention_queries_kernel, x.max_queries, "BLOCK_M", (grads.query,),
             grads.position_query),
        ):  # fmt: skip
            blocks = triton.cdiv(length, config.blocks[block])
            group = self.group(blocks) if x.shared_positions else 1
            partial = position
            if position is not None and x.shared_positions:
                groups = triton.cdiv(x.sequences, group)
                partial = position.new_empty(groups, *position.shape[1:])
            strides = (0, 0, 0) if partial is None else partial.stride()[:3]
            self.run(
                kernel,
                blocks,
                group,
                config,
                (*outputs, partial),
                (*outputs[0].stride()[:3], *strides),
            )
            if partial is not position:
                position.add_(partial.sum(0, keepdim=True))

    def table(self, grad_table: Tensor, deterministic: bool) -> None:
        """Add to the table's gradient [H, L]."""
        x = self.x
        config = backward_config(x.query.shape[-1], x.query.dtype)
        blocks = triton.cdiv(x.max_queries, config.blocks["BLOCK_M"])
        group = self.group(blocks) if x.shared_codes or deterministic else 1
        target = grad_table
        if deterministic:
            programs = blocks * triton.cdiv(x.sequences, group)
            target = torch.zeros(programs, *grad_table.shape, device=grad_table.device)
        self.run(
            attention_relative_kernel,
            blocks,
            group,
            config,
            (target,),
            (),
            SHARED=x.shared_codes,
            DETERMINISTIC=deterministic,
        )
        if deterministic:
            grad_table.add_(target.sum(0))

    def group(self, blocks: int) -> int:
        """Sequences a program walks and sums over: several where the chip stays full."""
        programs = blocks * self.x.query.shape[1] * self.x.sequences
        fill = 2 * multiprocessors(self.x.query.device)
        return max(1, min(MAX_GROUP, self.x.sequences, programs // fill))

    def run(
        self,
        kernel: Any,
        blocks: int,
        group: int,
        config: Config,
        outputs: tuple[Tensor | None, ...],
        output_strides: tuple[int, ...],
        **flags: bool,
    ) -> None:
        """Launch one of the three kernels over blocks of rows, heads, and groups of sequences."""
        x = self.x
        _, heads, queries, width = x.query.shape
        launch(
            kernel,
            (blocks, heads, triton.cdiv(x.sequences, group)),
            config,
            (
                *x.tensors(), x.head_scale, x.padding, x.query_starts, x.key_starts, x.seed,
                self.grad, self.lse, self.rowdot, *outputs,
                *x.strides(), *self.grad.stride()[:3], *output_strides,
                *x.code_strides(), *self.lse.stride()[:2], x.padding_stride(),
                heads, queries, x.key.shape[2], x.sequences, group, x.table_size(),
                x.scale, x.dropout,
            ),
            WIDTH=width,
            CAUSAL=x.causal,
            PACKED=x.packed,
            **flags,
        )  # fmt: skip
