"""The tensors of one attention and what its kernels ask about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


def empty_heads(like: Tensor) -> Tensor:
    """New [B, H, S, d] in the memory order [B, S, H, d]."""
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


@dataclass(frozen=True)
class Inputs:
    """Checked arguments of an attention (see op.py), as kernels take them.

    query, key, value are [B, H, S or T, d]; packed sequences have B = 1 and `query_starts`,
    `key_starts` int32 [sequences + 1]. Positions and codes all have a batch of 1, or all of B.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position_query: Tensor | None
    position_key: Tensor | None
    table: Tensor | None
    query_codes: Tensor | None
    key_codes: Tensor | None
    head_scale: Tensor | None
    padding: Tensor | None
    query_starts: Tensor | None
    key_starts: Tensor | None
    seed: Tensor | None
    scale: float
    causal: bool
    dropout: float
    max_queries: int
    max_keys: int
    first: int = 0  # the first sequence's number in the whole batch, for dropout's counters

    @property
    def sequences(self) -> int:
        """Sequences of the batch, packed or not."""
        return self.query.shape[0] if self.query_starts is None else self.query_starts.numel() - 1

    @property
    def packed(self) -> bool:
        return self.query_starts is not None

    @property
    def shared(self) -> bool:
        """Whether all sequences have the same position terms and codes."""
        if self.packed:
            return False
        return all(x is None or len(x) == 1 for x in (self.position_query, self.query_codes))

    def new_output(self) -> Tensor:
        """Memory for the output, as the next linear map wants it."""
        return empty_heads(self.query)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that scores depend on, in the order of the kernels."""
        return (
            self.query, self.key, self.value, self.position_query, self.position_key,
            self.table, self.query_codes, self.key_codes,
        )  # fmt: skip

    def strides(self) -> tuple[int, ...]:
        """Batch, head and row strides of query, key, value and the two position terms.

        Raises:
            ValueError: rows of a sequence lie too far apart for the kernels' 32-bit offsets.
        """
        found: list[int] = []
        for name in ("query", "key", "value", "position_query", "position_key"):
            x = getattr(self, name)
            if x is None:
                found += [0, 0, 0]
                continue
            if x.stride(2) * max(self.max_queries, self.max_keys) >= 2**31:
                raise ValueError(
                    f"{name}: rows {x.stride(2)} elements apart; a sequence may span less than 2^31"
                )
            found += [0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2)]
        return tuple(found)

    def code_strides(self) -> tuple[int, int]:
        """Batch strides of query and key codes; 0 where all sequences share them."""
        query, key = (
            0 if codes is None or codes.shape[0] == 1 else codes.stride(0)
            for codes in (self.query_codes, self.key_codes)
        )
        return query, key

    def padding_stride(self) -> int:
        return 0 if self.padding is None else self.padding.stride(0)

    def table_size(self) -> int:
        return 0 if self.table is None else self.table.shape[1]

    def rows(self, start: int, stop: int) -> Inputs:
        """The same attention for sequences start..stop of an unpacked batch."""
        names = ("query", "key", "value", "padding")
        shareable = ("position_query", "position_key", "query_codes", "key_codes")
        cut = {}
        for name in names + shareable:
            x = getattr(self, name)
            shared = x is None or (name in shareable and x.shape[0] == 1)
            cut[name] = x if shared else x[start:stop]
        return replace(self, **cut, first=self.first + start)

    def sequence(self, index: int) -> Inputs:
        """One sequence of a packed batch, as an unpacked batch of one."""
        q0, q1 = self.query_starts[index : index + 2].tolist()
        k0, k1 = self.key_starts[index : index + 2].tolist()

        def cut(x: Tensor | None, dim: int, start: int, stop: int) -> Tensor | None:
            return None if x is None else x.narrow(dim, start, stop - start)

        return replace(
            self,
            query=cut(self.query, 2, q0, q1),
            key=cut(self.key, 2, k0, k1),
            value=cut(self.value, 2, k0, k1),
            position_query=cut(self.position_query, 2, q0, q1),
            position_key=cut(self.position_key, 2, k0, k1),
            query_codes=cut(self.query_codes, 1, q0, q1),
            key_codes=cut(self.key_codes, 1, k0, k1),
            query_starts=None,
            key_starts=None,
            max_queries=q1 - q0,
            max_keys=k1 - k0,
            first=self.first + index,
        )


class Gradients(NamedTuple):
    """Gradients of attention's inputs; None where the input is absent."""

    query: Tensor
    key: Tensor
    value: Tensor
    position_query: Tensor | None
    position_key: Tensor | None
    table: Tensor | None
    head_scale: Tensor | None
