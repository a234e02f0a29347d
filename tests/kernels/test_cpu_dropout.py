"""Dropout by counter on a CPU: the numbers of the kernels, and nothing kept of them."""

from __future__ import annotations

import pytest
import torch

from unival.kernels.cpu import native
from unival.kernels.layernorm.op import residual_layer_norm
from unival.kernels.layernorm.reference import branch_factor, residual_layer_norm_reference

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=native.NOT_AVAILABLE)

SHAPES = [(1, 1, 1), (2, 3, 7), (3, 2, 8), (2, 5, 13), (4, 33, 768)]
RATES = [(0.1, 0.0), (0.0, 0.5), (0.3, 0.4), (0, 0.25)]


@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_dropped_is_what_the_kernels_drop(shape, rates, poisoned: None) -> None:
    for value in (0, 12345, -7, 2**63 - 1):
        seed = torch.tensor([value])
        branch, residual = torch.rand(2, *shape) + 1  # nothing is 0 by itself
        branch.requires_grad_(), residual.requires_grad_()
        weight, bias = torch.rand(shape[2]) + 0.5, torch.rand(shape[2])
        total, y = residual_layer_norm(branch, residual, weight, bias, 1e-5, *rates, seed=seed)
        factor = branch_factor(shape, *rates, seed)
        wanted = residual_layer_norm_reference(branch, residual, weight, bias, factor=factor)
        torch.testing.assert_close(total, wanted[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(y, wanted[1], rtol=1e-4, atol=1e-4)
        upstream = torch.rand(shape) + 1
        found = torch.autograd.grad(total, [branch, residual], upstream)
        assert torch.equal(found[0] == 0, factor == 0)
        torch.testing.assert_close(found[0], factor * upstream, rtol=1e-6, atol=0)
        assert torch.equal(found[1], upstream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_rounded_once(shape, poisoned: None) -> None:
    seed, rates = torch.tensor([12345]), (0.3, 0.4)
    branch, residual, upstream = (torch.rand(3, *shape) + 1).bfloat16()
    branch.requires_grad_()
    weight = torch.ones(shape[2]).bfloat16()
    total, _ = residual_layer_norm(branch, residual, weight, weight, 1e-5, *rates, seed=seed)
    (found,) = torch.autograd.grad(total, [branch], upstream)
    factor = branch_factor(shape, *rates, seed).double()
    for value, wanted in (
        (total, residual.double() + factor * branch.double()),
        (found, factor * upstream.double()),
    ):
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), wanted, rtol=2**-8, atol=0)


def test_seeds_come_from_pytorch_s_generator() -> None:
    branch, residual = torch.rand(2, 2, 40, 64)
    weight = torch.ones(64)

    def drawn() -> torch.Tensor:
        return residual_layer_norm(branch, residual, weight, weight, dropout=0.5)[0]

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert torch.equal(drawn(), first) and not torch.equal(first, second)


def test_the_share_that_is_kept() -> None:
    """Of 4 million, 5 standard deviations; and no two neighbours, rows or samples alike."""
    ones, zeros = torch.ones(4, 1024, 1024), torch.zeros(4, 1024, 1024)
    weight = torch.ones(1024)
    total, _ = residual_layer_norm(ones, zeros, weight, weight, dropout=0.1)
    kept = (total > 0).double()
    assert abs(float(kept.mean()) - 0.9) < 5 * (0.09 / kept.numel()) ** 0.5
    torch.testing.assert_close(total.max(), torch.tensor(1 / 0.9))
    for axis in range(3):
        rolled = (kept * kept.roll(1, axis)).mean()
        assert abs(float(rolled) - 0.81) < 1e-3


def test_no_mask_is_kept() -> None:
    branch, residual = (torch.rand(4, 64, 256).requires_grad_() for _ in range(2))
    weight, saved = torch.ones(256), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total, _ = residual_layer_norm(branch, residual, weight, weight, dropout=0.1)
    large = {p for p in saved if p != weight.data_ptr()}
    assert total.untyped_storage().data_ptr() in large
    assert len(large) <= 3  # the sum, and the norm's mean and deviation of each row
