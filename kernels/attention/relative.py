"""The relative bias of tokens as one table by offset, and one integer a token to index it.

A query's code minus a key's code is the row of the table; a difference outside the table means no
bias. Tokens of a grid (row, column) get codes whose difference grows by one with the column offset
and by the table's width with the row offset; tokens of a text (position) get codes that lie so far
away that text and grid never meet inside the table. Kernels therefore read one number a score, and
no code can make them read outside the table.

    grid        [0, G)              G = (2 rows - 1) (2 columns - 1)
    start slot  [G, 2 G + C + 2)    query at the slot, key at the slot, both; C the grid's center
    text        the last 2 text - 1

The start slot is the place before the first image code; it has a bias of its own with every cell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unival.kernels.backend import check_values


class RelativeBias(NamedTuple):
    """A bias for pairs of tokens: table[h, query_code - key_code], 0 outside the table.

    table        [H, L], floating; its gradient is exact
    query_codes  int32 [B or 1, S]
    key_codes    int32 [B or 1, T]
    """

    table: Tensor
    query_codes: Tensor
    key_codes: Tensor


class RelativeLayout:
    """Where the offsets of a text of `text` tokens and a grid of rows x columns are in the table.

    Only offsets that these extents can show have a place, so that tables stay small.
    """

    def __init__(self, text: int, rows: int = 0, columns: int = 0, start_slot: bool = False):
        if min(text, rows, columns) < 0 or (rows == 0) != (columns == 0):
            raise ValueError(
                f"text={text}, rows={rows}, columns={columns}: extents are at least 0, and rows "
                "and columns are both 0 or both positive"
            )
        if start_slot and not rows:
            raise ValueError("start_slot needs a grid: rows and columns of at least 1")
        self.text, self.rows, self.columns, self.start_slot = text, rows, columns, start_slot
        self.side = max(2 * columns - 1, 0)
        self.center = self.side * (rows - 1) + columns - 1 if rows else 0
        self.grid_size = (2 * rows - 1) * self.side if rows else 0
        # Query at the slot, key at the slot, both: the last entry is the sum of the two shifts.
        self.slot_key = self.grid_size + self.center + 1
        self.text_start = self.grid_size + (self.slot_key + 1 if start_slot else 0)
        self.size = self.text_start + max(2 * text - 1, 0)
        self.text_shift = self.size + self.center + text

    def grid_codes(
        self, row: Tensor, column: Tensor, slot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Query and key codes (int32) of grid cells, shaped as `row`.

        slot: bool, True where the token is the start slot; its row and column do not matter.

        Raises:
            ValueError: a cell outside the grid, or a slot in a layout without one (on a GPU: an
                assertion on the device, since a check here would wait for it).
        """
        free = torch.zeros_like(row, dtype=torch.bool) if slot is None else slot
        if slot is not None and not self.start_slot:
            raise ValueError("slot: this layout has no start slot")
        inside = (row >= 0) & (row < self.rows) & (column >= 0) & (column < self.columns)
        check_values(
            (inside | free).all(),
            f"row, column: coordinates outside the table's grid of {self.rows} x {self.columns}",
        )
        code = self.side * row + column
        query = torch.where(free, self.grid_size, code) + self.center
        key = torch.where(free, self.center - self.slot_key, code)
        return query.to(torch.int32), key.to(torch.int32)

    def text_codes(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key codes (int32) of text positions, shaped as `position`.

        Raises:
            ValueError: a position outside 0..text-1 (on a GPU: an assertion on the device).
        """
        check_values(
            ((position >= 0) & (position < self.text)).all(),
            f"position: outside the table's text of {self.text} positions",
        )
        key = position + self.text_shift
        return (key + self.text_start + self.text - 1).to(torch.int32), key.to(torch.int32)

    def text_offsets(self, device: torch.device) -> Tensor:
        """Query minus key position of each text entry: int64 [2 text - 1]."""
        return torch.arange(1 - self.text, max(self.text, 1), device=device)

    def grid_offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column offsets, query minus key, of each grid entry: two int64 [G]."""
        row = torch.arange(1 - self.rows, max(self.rows, 1), device=device)
        column = torch.arange(1 - self.columns, max(self.columns, 1), device=device)
        return row.repeat_interleave(self.side), column.repeat(row.numel())

    def table(self, text: Tensor, grid: Tensor | None = None, slot: Tensor | None = None) -> Tensor:
        """Put biases by offset into the layout's order: [H, size].

        Args:
            text: [2 text - 1, H], in the order of `text_offsets`.
            grid: [G, H], in the order of `grid_offsets`.
            slot: [3, H]: query at the start slot, key at the start slot, both.
        """
        parts = [] if grid is None else [grid]
        if slot is not None:
            cells, heads = self.center + 1, slot.shape[1]
            parts += [slot[0].expand(cells, heads), slot[1].expand(cells, heads)]
            unused = self.text_start - self.grid_size - 2 * cells - 1
            parts += [slot.new_zeros(unused, heads), slot[2:]]
        return torch.cat([*parts, text]).T.contiguous()
