"""Layer norm on a CPU, compiled and by PyTorch's operators, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unival.kernels.layernorm.op import gelu_layer_norm, layer_norm
from unival.kernels.layernorm.reference import (
    gelu_layer_norm_reference,
    layer_norm_reference,
)

pytestmark = pytest.mark.usefixtures("form")

SHAPES = [(1, 1), (3, 7), (5, 8), (70, 13), (33, 768), (100, 3072)]
FORMS = {
    "plain": (layer_norm, layer_norm_reference),
    "gelu": (gelu_layer_norm, gelu_layer_norm_reference),
}


def results(norm, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    *inputs, grad = (tensor.clone().to(dtype) for tensor in tensors)
    for tensor in inputs:
        tensor.requires_grad_()
    y = norm(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("level", [0.0, 50.0])
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_exact_as_torch(shape, kind: str, level, poisoned) -> None:
    """Every column between NaNs where the last vector hangs over; rows of two and more blocks."""
    source = torch.Generator().manual_seed(sum(shape))
    x, grad = torch.randn(2, *shape, generator=source)
    weight, bias = torch.randn(2, shape[1], generator=source)
    tensors = (2 * x + level, weight + 1.5, bias, grad)
    ours, reference = FORMS[kind]
    exact = results(reference, torch.float64, *tensors)
    theirs = results(reference, torch.float32, *tensors)
    found = results(ours, torch.float32, *tensors)
    for name, a, b, c in zip(("y", "dx", "dw", "db"), found, theirs, exact, strict=True):
        error, allowed = ((one - c).abs().max() for one in (a, b))
        # One column is its own mean: all that is left is rounding, times eps^-1/2.
        bound = 3 * allowed + 2e-6 * c.abs().max() + (1e-4 if shape[1] == 1 else 0)
        assert error <= bound, (name, float(error), float(allowed))


def test_gelu_far_from_zero_and_what_is_no_number() -> None:
    """erf is 1 beyond 4, its slope 0; GELU of a large negative number is 0, and so is its slope."""
    x = torch.tensor([[-1e4, -30.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 30.0, 1e4]])
    weight, bias, grad = torch.ones(9), torch.zeros(9), torch.arange(9.0)[None]
    ours, reference = FORMS["gelu"]
    exact = results(reference, torch.float64, x, weight, bias, grad)
    found = results(ours, torch.float32, x, weight, bias, grad)
    for a, c in zip(found, exact, strict=True):
        assert (a - c).abs().max() <= 1e-5 * c.abs().max()
    for bad in (torch.nan, torch.inf):
        x[0, 3] = bad
        assert gelu_layer_norm(x, weight, bias).isnan().all()
