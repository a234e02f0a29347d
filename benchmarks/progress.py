"""How far a measurement is, and how long the rest takes at its pace."""

from __future__ import annotations

import sys
import time

from unival.training.logs import clock


class Progress:
    """A line on stderr for each of `total` parts."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._start = time.monotonic()

    def line(self, said: str) -> None:
        """A part is done."""
        self.done += 1
        left = (time.monotonic() - self._start) * (self.total - self.done) / self.done
        print(
            f"[{self.done} of {self.total}] {said}; about {clock(left)} to go",
            file=sys.stderr,
            flush=True,
        )
