"""Attention in PyTorch's own operators, a bounded block of scores at a time.

Runs on every device; on a CPU it is the fast path. The position part and the relative bias of a
block of queries are computed once and shared by all sequences that have the same positions, so the
largest buffers are a block of scores and, where positions are shared, one block of biases. The
backward pass computes the scores again, as the kernels do. Arithmetic is in float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unival.kernels.attention.inputs import Gradients, Inputs
from unival.kernels.cpu import native
from unival.kernels.triton_tools.philox import uniform_torch

SCRATCH_BYTES = 4 << 20  # of a block of scores
LEAST_ROWS = 128  # of a block: with fewer, products mostly read keys and values


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 as it is, everything else in float32."""
    return dtype if dtype == torch.float64 else torch.float32


def forward_blocked(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, output before head scaling (empty without a head scale) and statistics.

    Statistics: [2, B, H, S], the largest score of a row and its sum of exponentials.
    """
    output, unscaled = x.new_output(), x.new_output()
    shape = (2, *x.query.shape[:3])
    statistics = x.query.new_empty(shape, dtype=wide_dtype(x.query.dtype))
    if x.packed:
        for index, rows, _ in _packed_rows(x):
            scores = Scores(x.sequence(index))
            scores.attend(output[:, :, rows], unscaled[:, :, rows], statistics[..., rows])
    else:
        Scores(x).attend(output, unscaled, statistics)
    return output, output.new_empty(0) if x.head_scale is None else unscaled, statistics


def backward_blocked(x: Inputs, grad: Tensor, unscaled: Tensor, statistics: Tensor) -> Gradients:
    """Gradients from that of the output; `unscaled` and `statistics` are the forward pass's."""
    wide = wide_dtype(x.query.dtype)
    grads = Gradients(
        *(
            None if tensor is None else torch.zeros(tensor.shape, dtype=wide, device=grad.device)
            for tensor in (
                x.query, x.key, x.value, x.position_query, x.position_key, x.table, x.head_scale,
            )
        )
    )  # fmt: skip
    if x.packed:
        for index, rows, columns in _packed_rows(x):
            part = Gradients(
                *(
                    tensor if tensor is None or cut is None else tensor[:, :, cut]
                    for tensor, cut in zip(
                        grads, (rows, columns, columns, rows, columns, None, None), strict=True
                    )
                )
            )
            scores = Scores(x.sequence(index))
            scores.differentiate(
                grad[:, :, rows], unscaled[:, :, rows], statistics[..., rows], part
            )
    else:
        Scores(x).differentiate(grad, unscaled, statistics, grads)
    return grads


def _packed_rows(x: Inputs) -> Iterator[tuple[int, slice, slice]]:
    """Index, query rows and key rows of each packed sequence."""
    queries, keys = x.query_starts.tolist(), x.key_starts.tolist()
    for index in range(x.sequences):
        yield index, slice(*queries[index : index + 2]), slice(*keys[index : index + 2])


@dataclass(frozen=True)
class Block:
    """Some sequences and some queries of them."""

    batch: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """The block's part of a [B or 1, H, S, ...] tensor, a view."""
        batch = slice(None) if len(x) == 1 else self.batch
        return x[batch, :, self.rows]


def _scaled(x: Tensor, factor: Tensor | float) -> Tensor:
    """x times factor, contiguous, in one pass."""
    return torch.mul(x, factor, out=x.new_empty(x.shape))


class Scores:
    """The scores of an unpacked attention, block by block."""

    def __init__(self, x: Inputs) -> None:
        wide = wide_dtype(x.query.dtype)
        self.x = x
        # Contiguous once: batched products would copy strided heads in every block. Queries are
        # scaled here, not scores.
        self.query = _scaled(x.query.to(wide), x.scale)
        self.key, self.value = x.key.to(wide).contiguous(), x.value.to(wide).contiguous()
        self.position_key, self.table, self.head_scale = (
            None if t is None else t.to(wide) for t in (x.position_key, x.table, x.head_scale)
        )
        self.position_query = None
        if x.position_query is not None:
            self.position_query = x.position_query.to(wide) * x.scale
        # Added to scores, several times faster than filling where a mask is set.
        self.padding = None
        if x.padding is not None:
            zeros = self.query.new_zeros(x.padding.shape)
            self.padding = zeros.masked_fill_(x.padding.bool(), -torch.inf)[:, None, None]

    def blocks(self) -> Iterator[tuple[slice, list[Block]]]:
        """Ranges of queries, each with the blocks of sequences over it."""
        batch, heads, queries, _ = self.query.shape
        row_bytes = heads * self.key.shape[2] * self.query.element_size()
        rows_of_scratch = SCRATCH_BYTES // max(row_bytes, 1)
        step = max(1, min(queries, max(LEAST_ROWS, rows_of_scratch)))
        together = max(1, SCRATCH_BYTES // max(row_bytes * step, 1))
        for i in range(0, queries, step):
            rows = slice(i, min(i + step, queries))
            yield (
                rows,
                [
                    Block(slice(b, min(b + together, batch)), rows)
                    for b in range(0, batch, together)
                ],
            )

    def bias(self, block: Block) -> Tensor | None:
        """Position part and relative bias [n or 1, H, rows, T]; None where there is neither."""
        found = None
        if self.position_query is not None:
            queries = block.of(self.position_query)
            keys = self._batch(self.position_key, block)
            found = queries @ keys.transpose(-1, -2)
        if self.table is not None:
            index = self._entries(block)
            padded = F.pad(self.table, (0, 1))
            dense = padded.index_select(1, index.flatten()).unflatten(1, index.shape)
            dense = dense.movedim(0, 1)
            found = dense if found is None else found.add_(dense)
        return found

    def products(self, block: Block) -> Tensor:
        """Scores [n, H, rows, T] of a block without what is added to them."""
        return block.of(self.query) @ self._batch(self.key, block).transpose(-1, -2)

    def _of(self, block: Block, bias: Tensor | None) -> Tensor:
        """Scores [n, H, rows, T] of a block, -inf where a query does not see a key."""
        scores = self.products(block)
        if bias is not None:
            scores.add_(bias)
        if self.padding is not None:
            scores.add_(self.padding[block.batch])
        if self.x.causal:
            scores.add_(self._ahead(block.rows))
        return scores

    def exponentials(self, block: Block, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """exp(score - largest) [n, H, rows, T], the largest score of a row [n, H, rows] and the
        sum of its exponentials.
        """
        if self._compiled():
            weights = self.products(block)
            largest, summed = (weights.new_empty(weights.shape[:3]) for _ in range(2))
            self._call("softmax_forward", weights, block, bias, largest, summed)
            return weights, largest, summed
        scores = self._of(block, bias)
        largest = scores.amax(-1, keepdim=True)
        # A row that sees no key: subtracting -inf would give NaN.
        largest.masked_fill_(largest == -torch.inf, 0.0)
        weights = scores.sub_(largest).exp_()
        summed = weights.sum(-1)
        return weights, largest.squeeze(-1), summed.masked_fill_(summed == 0.0, 1.0)

    def slopes(
        self, block: Block, bias: Tensor | None, largest: Tensor, dy: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """exp(score - largest) and the scores' gradient, both [n, H, rows, T], for the output's
        over the sum of exponentials, dy [n, H, rows, d], and its product with the output, delta.
        """
        ds = dy @ self._batch(self.value, block).transpose(-1, -2)
        if self._compiled():
            weights = self.products(block)
            rows = (largest.contiguous(), delta.contiguous())
            self._call("softmax_backward", weights, block, bias, *rows, ds)
            return weights, ds
        weights = self._of(block, bias).sub_(largest[..., None]).exp_()
        self._drop(ds, block)
        ds.sub_(delta[..., None]).mul_(weights)
        return weights, ds

    def _ahead(self, rows: slice) -> Tensor:
        """[rows, T]: -inf where the key is ahead of the query, else 0."""
        total = self.key.shape[2]
        hidden = self.query.new_full((rows.stop - rows.start, total), -torch.inf)
        return hidden.triu_(total - self.query.shape[2] + rows.start + 1)

    def attend(self, output: Tensor, unscaled: Tensor, statistics: Tensor) -> None:
        """Fill the output, the output before head scaling, and the statistics."""
        if self.key.shape[2] == 0:  # torch has no largest of nothing
            for empty, value in (
                (output, 0),
                (unscaled, 0),
                (statistics[0], 0),
                (statistics[1], 1),
            ):
                empty.fill_(value)
            return
        for rows, blocks in self.blocks():
            bias = self.bias(Block(slice(None), rows)) if self.x.shared else None
            for block in blocks:
                own = bias if self.x.shared else self.bias(block)
                weights, largest, summed = self.exponentials(block, own)
                block.of(statistics[0])[...] = largest
                block.of(statistics[1])[...] = summed
                self._drop(weights, block)
                attended = weights @ self._batch(self.value, block)
                attended /= summed[..., None]
                block.of(unscaled)[...] = attended
                if self.head_scale is not None:
                    attended *= self.head_scale[:, None, None]
                block.of(output)[...] = attended

    def differentiate(
        self, grad: Tensor, unscaled: Tensor, statistics: Tensor, grads: Gradients
    ) -> None:
        """Add the gradients of all inputs to `grads`, which starts at zero."""
        wide, scale = self.query.dtype, self.x.scale
        grad = grad.to(wide)
        rowdot = (grad * unscaled.to(wide)).sum(-1)
        # Probabilities are exponentials over their sum: dy is divided instead of every one of them.
        factor = statistics[1].reciprocal()
        if self.head_scale is not None:
            grads.head_scale.add_(rowdot.sum((0, 2)))
            factor *= self.head_scale[:, None]
        delta, slopes = rowdot * factor, _scaled(grad, factor[..., None])
        for rows, blocks in self.blocks():
            whole = Block(slice(None), rows)
            bias = self.bias(whole) if self.x.shared else None
            summed = None if bias is None else torch.zeros_like(bias)
            for block in blocks:
                own, dy = bias if self.x.shared else self.bias(block), block.of(slopes)
                largest = block.of(statistics[0])
                weights, ds = self.slopes(block, own, largest, dy, block.of(delta))
                self._drop(weights, block)
                grads.value[block.batch].add_(weights.transpose(-1, -2) @ dy)
                block.of(grads.query)[...] = (ds @ self._batch(self.key, block)).mul_(scale)
                grads.key[block.batch].add_(ds.transpose(-1, -2) @ block.of(self.query))
                if not self.x.shared:
                    self._bias_gradient(ds, block, grads)
                elif summed is not None:
                    summed.add_(ds if len(ds) == 1 else ds.sum(0, keepdim=True))
            if summed is not None:
                self._bias_gradient(summed, whole, grads)

    def _batch(self, x: Tensor, block: Block) -> Tensor:
        """[n or 1, H, T, d]: all keys of the block's sequences."""
        return x if len(x) == 1 else x[block.batch]

    def _compiled(self) -> bool:
        """Whether the compiled passes take the scores."""
        return self.x.seed is None and native.takes(self.query)

    def _call(
        self, name: str, scores: Tensor, block: Block, bias: Tensor | None, *given: Tensor
    ) -> None:
        """A compiled pass over a block of scores, with what is added to them."""
        padding = None if self.padding is None else self.padding[block.batch].contiguous()
        shared = bias is not None and len(bias) == 1
        bias = None if bias is None else bias.contiguous()
        # Keys that the block's first query does not see.
        ahead = self.query.shape[2] - block.rows.start - 1 if self.x.causal else -1
        native.call(name, scores, bias, padding, *given, *scores.shape, shared, ahead)

    def _entries(self, block: Block) -> Tensor:
        """Table entry of every pair, int64 [n or 1, rows, T]; without a bias the one behind it."""
        query, key = self.x.query_codes, self.x.key_codes
        if len(query) > 1:
            query, key = query[block.batch], key[block.batch]
        size = self.table.shape[1]
        index = query[:, block.rows, None] - key[:, None]
        return torch.where((index < 0) | (index >= size), size, index).long()

    def _drop(self, weights: Tensor, block: Block) -> None:
        """Dropout of [n, H, rows, T] in place, by counter."""
        if self.x.seed is None:
            return
        heads, total = weights.shape[1], weights.shape[3]
        device = weights.device
        row = torch.arange(block.rows.start, block.rows.stop, device=device)[:, None]
        first = (self.x.first + block.batch.start) * heads
        plane = torch.arange(first, first + len(weights) * heads, device=device)
        drawn = uniform_torch(
            self.x.seed, torch.arange(total, device=device), row, plane[:, None, None]
        )
        kept = (drawn >= self.x.dropout).view(weights.shape)
        weights.mul_(kept).div_(1.0 - self.x.dropout)

    def _bias_gradient(self, ds: Tensor, block: Block, grads: Gradients) -> None:
        """Add what the scores' gradient [n or 1, H, rows, T] gives to positions and table."""
        if self.position_query is not None:
            found = ds @ self._batch(self.position_key, block)
            block.of(grads.position_query).add_(found, alpha=self.x.scale)
            found = ds.transpose(-1, -2) @ block.of(self.position_query)
            self._batch(grads.position_key, block).add_(found)
        if self.table is not None:
            heads, size = self.table.shape
            summed = ds.new_zeros(heads, size + 1)
            for entries, part in zip(self._entries(block), ds, strict=True):
                summed.index_add_(1, entries.flatten(), part.flatten(1))
            grads.table.add_(summed[:, :size])
