"""Fixtures of the kernel tests: a device, poisoned memory, seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unival.kernels.triton_tools.launch import interpreted


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; else the CPU, with Triton interpreted and bfloat16 rounded."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert interpreted()
    from interpreter import install

    install()
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN (integers: a large number), so that unwritten elements show."""

    def poison(make):
        def poisoned_make(*args, **kwargs):
            fresh = make(*args, **kwargs)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else 2**30)

        return poisoned_make

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    yield
