"""Batch norm against float64 and against torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unival.model.batchnorm import BatchNorm2d, set_batchnorm_statistics


def run(module: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad, module.weight.grad, module.bias.grad


def test_training_is_as_exact_as_torch_on_contiguous_maps():
    torch.manual_seed(0)
    x = torch.randn(3, 16, 24, 24) * 0.5 + 3.0
    grad = torch.randn_like(x)
    exact = run(nn.BatchNorm2d(16).double(), x.double(), grad.double())
    theirs = run(nn.BatchNorm2d(16), x, grad)
    layout = torch.channels_last
    ours = run(BatchNorm2d(16), x.to(memory_format=layout), grad.to(memory_format=layout))
    for name, a, b, c in zip(("y", "dx", "dw", "db"), ours, theirs, exact, strict=True):
        error, allowed = (a - c).abs().max(), 2 * (b - c).abs().max() + 1e-6
        assert error <= allowed, (name, float(error), float(allowed))


def test_running_statistics_equal_torch():
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(5), nn.BatchNorm2d(5)
    for _ in range(3):
        x = torch.randn(2, 5, 3, 3) * 2 + 1
        ours(x), theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert int(ours.num_batches_tracked) == 3


def test_frozen_norms_neither_learn_nor_count():
    norm = BatchNorm2d(4)
    set_batchnorm_statistics(norm, "frozen")
    x = torch.randn(2, 4, 3, 3) + 5
    torch.testing.assert_close(norm(x), x / (1 + 1e-5) ** 0.5)
    assert int(norm.num_batches_tracked) == 0
    assert not norm.weight.requires_grad


def test_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="4 or 5 dimensions"):
        BatchNorm2d(4)._check_input_dim(torch.zeros(2, 4))
