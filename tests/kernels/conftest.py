"""Fixtures of the kernel tests: a device, poisoned memory between guards, seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor

from unival.kernels.cpu import native
from unival.kernels.triton_tools.launch import INTERPRETED

GUARD = 64  # elements before and after a tensor; keeps 16-byte alignment in every dtype
CANARY = 77  # in uint8, int32, int64, bool (as 1) and every floating type exact


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; else the CPU, with Triton interpreted and bfloat16 rounded."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert INTERPRETED
    from interpreter import install

    install()
    return torch.device("cpu")


@pytest.fixture(params=["compiled", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of a CPU's passes: compiled, and by PyTorch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip(native.NOT_AVAILABLE)
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def between_guards(values: Tensor, guard: float) -> tuple[Tensor, Tensor]:
    """A copy of the values, contiguous, inside a larger buffer; and the buffer."""
    size = values.numel()
    buffer = torch.full((size + 2 * GUARD,), guard, dtype=values.dtype, device=values.device)
    view = buffer[GUARD : GUARD + size].view(values.shape)
    view.copy_(values)
    return view, buffer


@pytest.fixture
def surrounded() -> Callable[[Tensor], Tensor]:
    """Put a floating input between NaNs, so that reading beside it shows in the results."""
    return lambda values: between_guards(values, float("nan"))[0]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN (integers: a large number), so that unwritten elements show, and lies
    between guards, so that writing beside it shows at the end of the test."""
    # The compiler lists torch's functions once: it must not meet the patched ones.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    buffers: list[Tensor] = []

    def poison(make: Callable[..., Tensor], zero: bool) -> Callable[..., Tensor]:
        def guarded_make(*args: object, **kwargs: object) -> Tensor:
            fresh = make(*args, **kwargs)
            if fresh.device.type == "meta" or not fresh.is_contiguous() or fresh.requires_grad:
                return fresh
            if not zero:
                fresh.fill_(float("nan") if fresh.is_floating_point() else 99)
            view, buffer = between_guards(fresh, CANARY)
            buffers.append(buffer)
            return view

        return guarded_make

    for name in ("empty", "empty_like", "zeros", "zeros_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, poison(make, name.startswith("zeros")))
    for name in ("new_empty", "new_zeros"):
        make = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, poison(make, name == "new_zeros"))
    yield
    for buffer in buffers:
        for guard in (buffer[:GUARD], buffer[-GUARD:]):
            assert (guard == torch.tensor(CANARY, dtype=buffer.dtype)).all(), (
                "wrote beside a tensor"
            )
