"""Where the time of a step goes, without making the device wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PartClock:
    """Seconds by part of the steps since the last reading.

    On a GPU a part is timed by two events on the current stream, which are read when the log is
    written; on a CPU by the clock. A part inside another one counts in both.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self.seconds[name] += begin.elapsed_time(end) / 1000
        found, self.seconds, self._events = dict(self.seconds), defaultdict(float), []
        return found
