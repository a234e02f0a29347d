"""The exponential moving average of the weights (released: decay 0.9999, float32, no warm-up)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unival.training.zero_state import Piece


class Average:
    """average <- decay * average + (1 - decay) * weights, after every update.

    Of the trained parameters a rank averages the pieces whose masters it holds, so the average is
    sharded as the optimizer's state is. Floating-point buffers (batch norm's running statistics)
    are averaged too, on every rank its own.

    Args:
        pieces: this rank's.
        buffers: of the model by name.
    """

    def __init__(self, decay: float, pieces: list[Piece], buffers: dict[str, Tensor]) -> None:
        self._move = get_ema_multi_avg_fn(decay)
        self._masters = [piece.master for piece in pieces]
        self._sources = {n: b for n, b in buffers.items() if b.is_floating_point()}
        self.pieces = [master.clone() for master in self._masters]
        self.buffers = {n: b.detach().float().clone() for n, b in self._sources.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        if self.pieces:
            self._move(self.pieces, self._masters, None)
        if self.buffers:
            current = [buffer.float() for buffer in self._sources.values()]
            self._move(list(self.buffers.values()), current, None)
