"""A bottleneck as one function, against torch's own modules in float64 and in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from unival.model import residual
from unival.model.batchnorm import set_batchnorm_contribution, set_batchnorm_statistics
from unival.model.image_encoder import Bottleneck2d
from unival.model.residual import Bottleneck
from unival.model.video_encoder import Bottleneck3d

CASES = {  # block, its channels, planes, stride, projection and groups; maps
    "shortcut": (Bottleneck2d, (32, 8, 1, False, 1), (3, 32, 7, 5)),
    "projection": (Bottleneck2d, (12, 8, 1, True, 1), (2, 12, 4, 6)),
    "stride": (Bottleneck2d, (12, 8, 2, True, 1), (2, 12, 5, 7)),
    "one place of a channel": (Bottleneck2d, (32, 8, 1, False, 1), (1, 32, 1, 1)),
    "clips": (Bottleneck3d, (16, 8, 1, False, 4), (2, 16, 2, 3, 5)),
    "clips, stride": (Bottleneck3d, (6, 8, 2, True, 2), (1, 6, 3, 4, 5)),
    "clips of one frame": (Bottleneck3d, (16, 8, 1, False, 4), (2, 16, 1, 3, 5)),
}


@pytest.fixture(autouse=True)
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps here are small; which are worth it has a test of its own."""
    monkeypatch.setattr(residual, "LEAST_PLACES", 0.01)


def given(case: str) -> tuple[Bottleneck, Tensor, Tensor]:
    """A block whose norms have learnt something, its maps and a gradient."""
    kind, sizes, shape = CASES[case]
    torch.manual_seed(0)
    block = kind(*sizes).train()
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    # Maps after a ReLU, whose channels have levels of their own.
    level = torch.randn(shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    x = torch.relu(torch.randn(shape) + level)
    with torch.no_grad():
        places = copy.deepcopy(block).eval()(x)
    return block, x, torch.randn_like(places) + 0.3


def plain(block: Bottleneck, x: Tensor) -> Tensor:
    """The block by torch's functions, in their own layout."""

    def step(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        form = torch.conv2d if x.ndim == 4 else torch.conv3d
        y = form(x, conv.weight, None, conv.stride, conv.padding, groups=conv.groups)
        return nn.functional.batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum
        )

    y = torch.relu(step(block.conv1, block.bn1, x))
    y = torch.relu(step(block.conv2, block.bn2, y))
    shortcut = x if block.downsample is None else step(*block.downsample, x)
    return torch.relu(step(block.conv3, block.bn3, y) + shortcut)


def results(form, block: Bottleneck, x: Tensor, grad: Tensor, dtype=torch.float32):
    """The output, gradients of the maps and all weights, and the running statistics."""
    block, x = copy.deepcopy(block).to(dtype), x.to(dtype).requires_grad_()
    y = form(block, x)
    y.backward(grad.to(dtype))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in block.named_parameters()}
    return found | {n: b for n, b in block.named_buffers() if "tracked" not in n}


def ours(block: Bottleneck, x: Tensor) -> Tensor:
    assert block.is_one_function(x)
    return block(x)


@pytest.mark.parametrize("case", [case for case in CASES if "one place" not in case])
def test_in_float64_it_is_what_the_modules_are(case: str) -> None:
    exact, found = (results(form, *given(case), torch.float64) for form in (plain, ours))
    for name, wanted in exact.items():
        error = (found[name] - wanted).abs().max() / wanted.abs().max()
        # Running statistics begin and stay in float32.
        assert error <= (1e-6 if "running" in name else 1e-11), (name, float(error))


@pytest.mark.parametrize("case", [case for case in CASES if "one place" not in case])
def test_it_is_as_exact_as_torch(case: str) -> None:
    exact = results(plain, *given(case), torch.float64)
    theirs, found = (results(form, *given(case)) for form in (plain, ours))
    for name, wanted in exact.items():
        error, allowed = ((one[name] - wanted).norm() / wanted.norm() for one in (found, theirs))
        assert error <= 4 * allowed + 2e-7, (name, float(error), float(allowed))


def test_one_place_gives_the_bias() -> None:
    """The variance of one element is 0, so that x' is 0 and nothing flows back through it."""
    block, x, grad = given("one place of a channel")
    found = results(ours, block, x, grad)
    bias = block.bn3.bias.detach().view(1, -1, 1, 1)
    torch.testing.assert_close(found["y"], torch.relu(bias + x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["x"], grad * (found["y"] > 0), rtol=1e-6, atol=1e-6)
    assert torch.equal(found["conv1.weight"], torch.zeros_like(block.conv1.weight))


def test_a_channel_that_never_changes_has_finite_gradients() -> None:
    block, x, grad = given("shortcut")
    with torch.no_grad():
        block.bn2.weight[3] = 0.0
        block.bn2.bias[3] = -1.0  # dead behind its ReLU
        block.conv3.weight[5] = 0.0  # what the last norm sees of a channel is 0
    exact, found = results(plain, block, x, grad, torch.float64), results(ours, block, x, grad)
    assert all(torch.isfinite(value).all() for value in found.values())
    for name, wanted in exact.items():
        bound = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(found[name].double(), wanted.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("case", list(CASES))
def test_it_does_not_depend_on_what_was_in_memory(case: str, monkeypatch) -> None:
    def poisoned(x: Tensor, *shape: int, **options: torch.dtype) -> Tensor:
        shape = shape if isinstance(shape[0], int) else tuple(shape[0])
        return x.new_full(shape, float("nan") if x.is_floating_point() else 99, **options)

    clean = results(ours, *given(case))
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for name, value in results(ours, *given(case)).items():
        assert torch.equal(value, clean[name]), name


def test_neither_maps_nor_gradients_of_others_are_overwritten() -> None:
    block, x, grad = given("shortcut")
    before = x.clone(), grad.clone()
    x.requires_grad_()
    y = block(x)
    kept = y.detach().clone()
    torch.autograd.grad(y, [x, *block.parameters()], grad)
    for now, then in zip((x.detach(), grad, y.detach()), (*before, kept), strict=True):
        assert torch.equal(now, then)


def test_four_maps_are_kept() -> None:
    """Input, output and what two convolutions gave; the modules keep three more."""
    block, x, _ = given("shortcut")
    places = x.numel() // 32
    maps = x.requires_grad_().numel() * 2 + 2 * 8 * places
    small = sum(parameter.numel() for parameter in block.parameters()) + 8 * 8 + 5 * 8 + 32

    def kept(form) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            form(block, x.contiguous(memory_format=torch.channels_last))
        return sum(storages.values())

    assert kept(ours) <= maps + small
    assert kept(plain) >= maps + 2 * 8 * places + 32 * places


def test_who_waits_for_the_inside_gets_the_modules() -> None:
    block, x, grad = given("stride")
    wanted, seen = results(plain, block, x, grad), []
    block.conv2.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    assert not block.is_one_function(x)
    found = results(lambda block, x: block(x), block, x, grad)
    assert seen == [(2, 8, 3, 4)]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_not_trained_by_batches_gets_the_modules() -> None:
    block, x, _ = given("shortcut")
    assert block.is_one_function(x)
    assert not block.is_one_function(x[:0])
    assert not block.is_one_function(x.bfloat16())
    assert not copy.deepcopy(block).eval().is_one_function(x)
    assert not copy.deepcopy(block).double().is_one_function(x)
    for statistics in ("frozen", "folded"):
        set_batchnorm_statistics(block, statistics)
        assert not block.is_one_function(x)
    set_batchnorm_statistics(block, "sync")  # one rank: its batch is all
    assert block.is_one_function(x)


def test_few_places_get_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places of a step of 2 for each of the output's 32 channels."""
    monkeypatch.setattr(residual, "LEAST_PLACES", 2)
    block = given("stride")[0]
    assert block.is_one_function(torch.zeros(4, 12, 7, 8))
    assert not block.is_one_function(torch.zeros(4, 12, 7, 6))


def test_a_batch_that_stands_in_leaves_running_statistics_alone() -> None:
    block, x, _ = given("projection")
    before = {name: value.clone() for name, value in block.named_buffers()}
    set_batchnorm_contribution(block, False)
    ours(block, x)
    assert all(torch.equal(value, before[name]) for name, value in block.named_buffers())
    set_batchnorm_contribution(block, True)
    ours(block, x)
    assert not any(torch.equal(value, before[name]) for name, value in block.named_buffers())
    assert {int(norm.num_batches_tracked) for norm in (block.bn1, block.bn2, block.bn3)} == {1}


def test_maps_without_a_gradient_and_frozen_weights() -> None:
    block, x, grad = given("projection")
    wanted = results(plain, block, x, grad)
    block.conv1.requires_grad_(False)
    ours(block, x).backward(grad)
    assert block.conv1.weight.grad is None
    torch.testing.assert_close(
        block.conv2.weight.grad, wanted["conv2.weight"], rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        y = ours(block, x)
    torch.testing.assert_close(y, wanted["y"], rtol=1e-5, atol=1e-5)
