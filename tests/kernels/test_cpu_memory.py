"""Large CPU buffers that are used again."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from unival.kernels.cpu import memory

CPU = torch.device("cpu")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> deque:
    """No idle blocks yet, and blocks from a megabyte on."""
    monkeypatch.setattr(memory, "SMALLEST", 1 << 20)
    monkeypatch.setattr(memory, "_idle", blocks := deque())
    return blocks


def test_large_memory_is_used_again_when_no_tensor_has_it(idle: deque) -> None:
    shape = (1000, 1100)
    one = memory.fresh(shape, torch.float32, CPU)
    two = memory.fresh(shape, torch.float32, CPU)
    place, view = one.data_ptr(), one[3:].T
    assert one.shape == shape and two.data_ptr() != place and not idle
    del one
    assert not idle  # a view still has it
    del view
    assert len(idle) == 1
    # Of other sizes: one that does not fit, one that would waste it, one that does.
    large = memory.fresh((1001, 1100), torch.float32, CPU)
    small = memory.fresh((700, 1100), torch.float32, CPU)
    assert place not in (large.data_ptr(), small.data_ptr())
    again = memory.fresh((900, 1100), torch.float32, CPU)
    assert again.data_ptr() == place and not idle
    del large, again, two, small
    assert len(idle) == 4


def test_the_oldest_idle_memory_goes_back(idle: deque, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_IDLE", 10 << 20)
    sizes = [4 << 20, 5 << 20, 3 << 20]
    held = [memory.fresh((size,), torch.uint8, CPU) for size in sizes]
    while held:
        del held[0]
    assert [len(block) for block in idle] == [5 << 20, 3 << 20]


def test_small_memory_is_left_to_malloc(idle: deque) -> None:
    memory.fresh((1 << 18,), torch.uint8, CPU)
    assert not idle
