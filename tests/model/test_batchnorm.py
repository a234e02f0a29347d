"""Batch norm against float64 and against torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unival.model.audio_encoder import AudioEncoder
from unival.model.batchnorm import (
    BatchNorm2d,
    BatchNorm3d,
    set_batchnorm_contribution,
    set_batchnorm_statistics,
)
from unival.model.configuration import UnivalConfig
from unival.model.image_encoder import ImageEncoder
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.video_encoder import Conv3d, VideoEncoder


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


def test_unknown_statistics_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'global'.*local, sync, frozen, folded"):
        set_batchnorm_statistics(BatchNorm2d(4), "global")


def shake(module: nn.Module) -> nn.Module:
    """Give norms and biases values that training could have given them."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in module.state_dict().items():
        noise = torch.rand(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise)
        elif "running_mean" in name or "bias" in name:
            tensor.copy_(noise - 0.5)
        elif tensor.ndim == 1 and tensor.is_floating_point() and "logmel" not in name:
            tensor.copy_(0.75 + 0.5 * noise)
    return module


class Pair(nn.Module):
    def __init__(self, conv1: nn.Module, bn1: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv1, bn1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn1(self.conv1(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("make", "norm", "shape"),
    [
        (lambda bias: nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=bias), BatchNorm2d, (9, 9)),
        (lambda bias: Conv3d(6, 8, 3, padding=1, groups=2, bias=bias), BatchNorm3d, (4, 7, 7)),
    ],
)
def test_a_folded_convolution_equals_batch_norm_after_it(make, norm, shape, training, bias):
    torch.manual_seed(0)
    pair = shake(Pair(make(bias), norm(8))).train(training)
    x = torch.randn(2, 6, *shape)
    exact = copy.deepcopy(pair).double()

    def by_torch(pair: Pair, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bn = pair.bn1
        y = F.batch_norm(
            pair.conv1(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps
        )
        return y.detach(), torch.autograd.grad(y.square().sum(), pair.conv1.weight)[0]

    theirs, reference = by_torch(pair, x), by_torch(exact, x.double())
    set_batchnorm_statistics(pair, "folded")
    y = pair(x)
    y.square().sum().backward()
    for ours, a, b in zip((y.detach(), pair.conv1.weight.grad), theirs, reference, strict=True):
        # The other order of multiplications: as many roundings, other ones.
        assert (ours - b).abs().max() <= 3 * (a - b).abs().max() + 1e-7 * b.abs().max()
    assert pair.bn1.weight.grad is None and pair.bn1.bias.grad is None
    assert int(pair.bn1.num_batches_tracked) == 0


def image() -> tuple[nn.Module, torch.Tensor, int]:
    return ImageEncoder((1, 2), (8, 16)), torch.randn(2, 3, 32, 32), 12


def video() -> tuple[nn.Module, torch.Tensor, int]:
    return VideoEncoder((1, 2), (8, 16), 4), torch.randn(2, 3, 4, 16, 16), 12


def audio() -> tuple[nn.Module, torch.Tensor, int]:
    encoder = AudioEncoder((4, 8), 16, 480, 48000, dropout=0.0, spec_augment=False)
    return encoder, torch.rand(2, 9600) - 0.5, 4


@pytest.mark.parametrize("make", [image, video, audio])
def test_all_convolutions_of_the_encoders_are_folded_and_can_be_unfolded(make):
    torch.manual_seed(0)
    encoder, x, folds = make()
    shake(encoder)
    keys = list(encoder.state_dict())
    exact = copy.deepcopy(encoder).double().eval()(x.double())
    plain = encoder.eval()(x)
    set_batchnorm_statistics(encoder, "folded")
    set_batchnorm_statistics(encoder, "folded")  # again: nothing is folded twice
    norms = [m for m in encoder.modules() if isinstance(m, BatchNorm2d | BatchNorm3d)]
    assert sum(norm.folded for norm in norms) == folds
    assert [n for n, m in encoder.named_modules() if m in norms and not m.folded] == (
        ["bn0"] if make is audio else []
    )
    assert list(encoder.state_dict()) == keys
    for training in (False, True):
        y = encoder.train(training)(x)
        assert (y - exact).abs().max() <= 3 * (plain - exact).abs().max() + 1e-6
    y.sum().backward()
    trained = {n for n, p in encoder.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in encoder.named_parameters() if p.ndim > 1}

    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any() and torch.equal(encoder(x), y)

    set_batchnorm_statistics(encoder, "local")
    assert torch.equal(encoder.eval()(x), plain)
    assert not any("forward" in vars(module) for module in encoder.modules())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [image, video, audio])
def test_folded_encoders_run_in_half_precision(make, dtype):
    torch.manual_seed(0)
    encoder, x, _ = make()
    exact = copy.deepcopy(shake(encoder)).double().eval()(x.double())
    encoder = encoder.to(dtype).eval()
    x = x if make is audio else x.to(dtype)
    plain = encoder(x)
    set_batchnorm_statistics(encoder, "folded")
    folded = encoder(x)
    assert folded.dtype == dtype
    assert (folded - exact).abs().mean() <= 2 * (plain - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", ["local", "frozen", "evaluation"])
def test_half_precision_maps_are_normed_as_exactly_as_torch_does(statistics, dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(4, 8, 6, 6) * 2 + 1, torch.randn(4, 8, 6, 6)
    training = statistics == "local"

    def made(kind: type) -> nn.Module:
        return shake(kind(8)).train(training)

    ours = made(BatchNorm2d).to(dtype)
    set_batchnorm_statistics(ours, "frozen" if statistics == "frozen" else "local")
    ours.requires_grad_()
    exact = run(made(nn.BatchNorm2d).double(), x.to(dtype).double(), grad.to(dtype).double())
    theirs = run(made(nn.BatchNorm2d).to(dtype), x.to(dtype), grad.to(dtype))
    found = run(ours, x.to(dtype), grad.to(dtype))
    for name, a, b, c in zip(("y", "dx", "dw", "db"), found, theirs, exact, strict=True):
        assert a.dtype == dtype
        error, allowed = (a - c).abs().max(), 2 * (b - c).abs().max() + 1e-6
        assert error <= allowed, (name, float(error), float(allowed))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_running_statistics_stay_in_float32_and_go_on_moving(cast):
    torch.manual_seed(0)
    exact, half = BatchNorm2d(5).double(), cast(BatchNorm2d(5))
    assert exact.running_var.dtype == torch.float64
    for _ in range(60):
        x = torch.randn(4, 5, 3, 3).to(half.weight.dtype)
        half(x), exact(x.double())
    assert half.running_mean.dtype == half.running_var.dtype == torch.float32
    # bfloat16 would be off by 2^-9 of the value, and more where it stops moving.
    torch.testing.assert_close(half.running_var.double(), exact.running_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(half.running_mean.double(), exact.running_mean, rtol=0, atol=1e-5)
    for target in (BatchNorm2d(5), cast(BatchNorm2d(5))):
        target.load_state_dict(half.state_dict())
        assert torch.equal(target.running_var, half.running_var)
        assert target.running_var.dtype == torch.float32
    assert torch.equal(half.float().running_var, target.running_var)


def test_models_made_or_loaded_in_bfloat16_have_float32_statistics(tmp_path):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert BatchNorm2d(3).running_var.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    sizes = {"vocab_size": 101, "d_model": 32, "ffn_dim": 64, "num_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "video_layers": None}
    config = UnivalConfig(**sizes, **layers, image_layers=(1, 1), image_channels=(8, 8))
    saved = shake(UnivalForConditionalGeneration(config))
    saved.save_pretrained(tmp_path)
    loaded = UnivalForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = loaded.state_dict()
    for name, value in saved.state_dict().items():
        if "running_" in name:
            assert state[name].dtype == torch.float32 and torch.equal(state[name], value), name
    assert loaded.encoder.image_encoder.bn1.weight.dtype == torch.bfloat16


def test_a_stand_in_does_not_move_local_running_statistics():
    torch.manual_seed(0)
    norm = BatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3) + 5
    expected = norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    set_batchnorm_contribution(nn.ModuleList([norm]), False)
    assert torch.equal(norm(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    set_batchnorm_contribution(norm, True)
    norm(x)
    assert int(norm.num_batches_tracked) == 2
    assert not torch.equal(norm.running_mean, before["running_mean"])
