"""Attention backward: which kernels run over which sequences, and where their results go."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unival.kernels.attention.backward_kernels import (
    attention_bias_kernel,
    attention_keys_kernel,
    attention_queries_kernel,
    attention_rowdot_kernel,
)
from unival.kernels.attention.forward import EXACT_CONFIG
from unival.kernels.attention.inputs import Gradients, Inputs, empty_heads
from unival.kernels.triton_tools.launch import Config, launch, level_two_cache, multiprocessors

# Sequences are walked in chunks whose tensors stay in the second-level cache, so that the kernels
# after the first read them from there.
CHUNK_OF_CACHE = 0.6
MAX_GROUP = 8  # sequences that share positions and are summed before positions and table get theirs


def content_config(width: int, dtype: torch.dtype, dropout: bool) -> dict[str, Config]:
    """Blocks of the kernels that own keys ("BLOCK_N") and queries ("BLOCK_M")."""
    if dtype == torch.float32:
        return {"BLOCK_N": EXACT_CONFIG, "BLOCK_M": EXACT_CONFIG}
    if width > 64:
        both = Config({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1)
        return {"BLOCK_N": both, "BLOCK_M": both}
    return {
        "BLOCK_N": Config({"BLOCK_M": 16 if dropout else 32, "BLOCK_N": 64}, 4, 1),
        "BLOCK_M": Config({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 1),
    }


def bias_config(width: int, dtype: torch.dtype) -> Config:
    """Blocks of the kernel of positions and table."""
    if dtype == torch.float32:
        return EXACT_CONFIG if width < 64 else EXACT_CONFIG._replace(num_warps=4)
    return Config({"BLOCK_M": 64 if width <= 64 else 32, "BLOCK_N": 32}, 8, 1)


def attention_backward(
    x: Inputs, grad: Tensor, unscaled: Tensor, statistics: Tensor, deterministic: bool
) -> Gradients:
    """Gradients from that of the output; `unscaled` and `statistics` are the forward pass's."""
    batch, heads = x.query.shape[:2]
    # Sums over sequences are kept in float32; what a program writes alone has its final dtype.
    summed = torch.float32 if x.shared else x.query.dtype
    grads = Gradients(
        x.new_output(),
        empty_heads(x.key),
        empty_heads(x.value),
        _zeros(x.position_query, summed),
        _zeros(x.position_key, summed),
        _zeros(x.table, torch.float32),
        _zeros(x.head_scale, torch.float32),
    )
    # q, o, dy, dq of a sequence, and k, v, dk, dv.
    row_bytes = 4 * heads * x.query.shape[-1] * x.query.element_size()
    chunk_bytes = CHUNK_OF_CACHE * level_two_cache(grad.device)
    step = max(1, int(chunk_bytes / max((x.max_queries + x.max_keys) * row_bytes, 1)))
    if x.packed:
        step = max(batch, 1)
    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))
        part = grads._replace(query=grads.query[rows], key=grads.key[rows], value=grads.value[rows])
        if x.position_query is not None and not x.shared:
            part = part._replace(
                position_query=grads.position_query[rows], position_key=grads.position_key[rows]
            )
        chunk = Chunk(
            x.rows(rows.start, rows.stop) if len(grad) > step else x,
            grad[rows],
            statistics[:, rows],
            rowdots(grad[rows], unscaled[rows]),
        )
        chunk.content(part)
        if part.head_scale is not None:
            part.head_scale.add_(chunk.rowdot.sum((0, 2)))
        if x.position_query is not None or x.table is not None:
            chunk.bias(part, deterministic)
    return grads


def _zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device)


def rowdots(grad: Tensor, unscaled: Tensor) -> Tensor:
    """Sum of dy * o of every row: float32 [B, H, S]."""
    batch, heads, queries, width = grad.shape
    rowdot = torch.empty(batch, heads, queries, dtype=torch.float32, device=grad.device)
    config = Config({"BLOCK_M": 64 if width <= 64 else 32}, 4, 1)
    launch(
        attention_rowdot_kernel,
        (triton.cdiv(queries, config.blocks["BLOCK_M"]), heads, batch),
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
    statistics: Tensor
    rowdot: Tensor

    def content(self, grads: Gradients) -> None:
        """Write dq, dk and dv."""
        x = self.x
        blocks = content_config(x.query.shape[-1], x.query.dtype, x.seed is not None)
        for kernel, length, block, outputs in (
            (attention_keys_kernel, x.max_keys, "BLOCK_N", (grads.key, grads.value)),
            (attention_queries_kernel, x.max_queries, "BLOCK_M", (grads.query,)),
        ):
            config = blocks[block]
            programs = (triton.cdiv(length, config.blocks[block]), x.query.shape[1], x.sequences)
            self.run(kernel, programs, config, outputs, outputs[0].stride()[:3], ())

    def bias(self, grads: Gradients, deterministic: bool) -> None:
        """Write dpq and dpk, or add to them where sequences share positions; add to the table's."""
        x = self.x
        width, dtype = x.query.shape[-1], x.query.dtype
        config = bias_config(width, dtype)
        passes = [(False, grads.position_query, grads.table), (True, grads.position_key, None)]
        if dtype == torch.float32 and width > 64:  # both at once would spill registers
            passes[:1] = [(False, grads.position_query, None), (False, None, grads.table)]
        for of_keys, position, total in passes:
            if position is None and total is None:
                continue
            block = "BLOCK_N" if of_keys else "BLOCK_M"
            length = x.max_keys if of_keys else x.max_queries
            blocks = triton.cdiv(length, config.blocks[block])
            group = self.group(blocks) if x.shared else 1
            groups = triton.cdiv(x.sequences, group)
            partial, table = position, total
            if position is not None and x.shared:
                partial = position.new_empty(groups, *position.shape[1:])
            if table is not None and deterministic:
                table = table.new_zeros(groups * blocks, *table.shape)
            self.run(
                attention_bias_kernel,
                (blocks, x.query.shape[1], groups),
                config,
                (partial, table),
                (0, 0, 0) if partial is None else partial.stride()[:3],
                (x.sequences, group),
                OF_KEYS=of_keys,
                DETERMINISTIC=deterministic,
            )
            if partial is not position:
                position.add_(partial.sum(0, keepdim=True))
            if table is not None and deterministic:
                total.add_(table.sum(0))

    def group(self, blocks: int) -> int:
        """Sequences a program sums over: several where the chip stays full."""
        programs = blocks * self.x.query.shape[1] * self.x.sequences
        fill = 2 * multiprocessors(self.x.query.device)
        return max(1, min(MAX_GROUP, self.x.sequences, programs // fill))

    def run(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        config: Config,
        outputs: tuple[Tensor | None, ...],
        output_strides: tuple[int, ...],
        groups: tuple[int, ...],
        **flags: bool,
    ) -> None:
        """Launch one of the kernels over blocks of rows, heads, and sequences or groups of them."""
        x = self.x
        _, heads, queries, width = x.query.shape
        launch(
            kernel,
            grid,
            config,
            (
                *x.tensors(), x.head_scale, x.padding, x.query_starts, x.key_starts, x.seed,
                self.grad, self.statistics[0], self.statistics[1], self.rowdot, *outputs,
                *x.strides(), *self.grad.stride()[:3], *output_strides,
                *x.code_strides(), *self.rowdot.stride()[:2], x.padding_stride(),
                heads, x.first, queries, x.key.shape[2], *groups, x.table_size(),
                x.scale, x.dropout,
            ),
            WIDTH=width,
            CAUSAL=x.causal,
            PACKED=x.packed,
            **flags,
        )  # fmt: skip
