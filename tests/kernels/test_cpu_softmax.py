"""The compiled passes over attention's scores, against float64 and PyTorch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unival.kernels.attention.op import attention
from unival.kernels.cpu import native

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=native.NOT_AVAILABLE)

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 7), (2, 2, 5, 8), (3, 1, 6, 9), (1, 2, 40, 31), (2, 3, 33, 600)]


class Given:
    """Scores [n, H, rows, T], what is added, and what a hidden key means."""

    def __init__(self, shape: tuple[int, ...], bias: str, padding: bool, ahead: int) -> None:
        sequences, _, rows, keys = shape
        source = torch.Generator().manual_seed(sum(shape))
        self.scores = 4 * torch.randn(shape, generator=source)
        self.bias = None
        if bias != "none":
            batch = 1 if bias == "shared" else sequences
            self.bias = 4 * torch.randn(batch, *shape[1:], generator=source)
        self.padding = None
        if padding:
            self.padding = torch.zeros(sequences, keys)
            self.padding[0, keys // 2 :] = -torch.inf
            self.padding[-1, :] = -torch.inf  # a sequence that sees nothing
        self.ahead, self.shared = ahead, bias == "shared"
        hidden = torch.arange(keys) >= torch.arange(rows)[:, None] + keys - ahead
        self.hidden = hidden if ahead >= 0 else torch.zeros_like(hidden)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Scores with all that is added."""
        found = self.scores.to(dtype)
        found = found if self.bias is None else found + self.bias.to(dtype)
        if self.padding is not None:
            found = found + self.padding.to(dtype)[:, None, None]
        return found.masked_fill(self.hidden, -torch.inf)

    def arguments(self) -> tuple[int, ...]:
        return *self.scores.shape, self.shared, self.ahead


CASES = [
    ("none", False, -1),
    ("shared", False, -1),
    ("own", True, -1),
    ("none", True, 0),
    ("shared", True, 3),  # with few keys whole rows are hidden
    ("own", False, 0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_are_as_exact_as_torch(shape, case, poisoned: None) -> None:
    given = Given(shape, *case)
    weights = given.scores.clone()
    largest, summed = (torch.empty(shape[:3]) for _ in range(2))
    added = (given.bias, given.padding)
    native.call("softmax_forward", weights, *added, largest, summed, *given.arguments())

    plain, exact = given.whole(torch.float32), given.whole(torch.float64)
    top = exact.amax(-1)
    top[top == -torch.inf] = 0
    torch.testing.assert_close(largest, top.float(), rtol=1e-6, atol=1e-6)
    shifted = exact - largest.double()[..., None]
    wanted, theirs = shifted.exp(), (plain - largest[..., None]).exp()
    assert (weights - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + 2e-7
    assert torch.equal(weights == 0, wanted < 1.18e-38)
    sums = wanted.sum(-1)
    sums[sums == 0] = 1
    torch.testing.assert_close(summed.double(), sums, rtol=2e-6, atol=0)

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    delta = grad.mean(-1)
    again, slopes = given.scores.clone(), grad.clone()
    given_rows = (largest, delta, slopes)
    native.call("softmax_backward", again, *added, *given_rows, *given.arguments())
    assert torch.equal(again, weights)
    expected = (grad.double() - delta.double()[..., None]) * wanted
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-5, atol=2e-6)


def test_small_exponentials_are_0_and_what_is_no_number_stays() -> None:
    scores = torch.tensor([0.0, -87.0, -87.4, -1e4, -torch.inf, torch.nan]).view(1, 1, 1, 6)
    largest, summed = torch.empty(1, 1, 1), torch.empty(1, 1, 1)
    native.call("softmax_forward", scores, None, None, largest, summed, 1, 1, 1, 6, 0, -1)
    assert scores.flatten()[:5].tolist() == [1.0, pytest.approx(1.6458115e-38), 0.0, 0.0, 0.0]
    assert scores.flatten()[5].isnan() and summed.isnan().all()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_what_it_is_without_them(causal: bool, monkeypatch) -> None:
    """Blocks of several queries and sequences, positions, padding and head scales."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).requires_grad_()

    query, key, value = draw(3, 4, 150, 16), draw(3, 4, 170, 16), draw(3, 4, 170, 16)
    positions = {"position_query": draw(1, 4, 150, 16), "position_key": draw(1, 4, 170, 16)}
    scale = draw(4)
    padding = torch.zeros(3, 170, dtype=torch.bool)
    padding[1, 100:] = True
    leaves = [query, key, value, *positions.values(), scale]
    grad = torch.randn(3, 4, 150, 16, generator=source)

    def run() -> list[Tensor]:
        y = attention(
            query, key, value, **positions, head_scale=scale, key_padding_mask=padding,
            causal=causal, backend="eager",
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    ours = run()
    monkeypatch.setattr(native, "AVAILABLE", False)
    for found, wanted in zip(ours, run(), strict=True):
        assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max()
