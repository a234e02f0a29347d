"""Convolutions as matrix products, against float64 and against torch's own in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unival.kernels.convolution import op, winograd
from unival.kernels.convolution.op import convolution
from unival.kernels.cpu import native
from unival.model.convolution import Conv2d, Conv3d, differentiate

SHAPES = [  # rows, channels, outputs, height, width, kernel, stride
    (2, 5, 7, 6, 8, 3, 1),
    (2, 32, 16, 8, 12, 3, 1),
    (1, 16, 48, 5, 3, 3, 1),  # the last tiles hang over
    (3, 16, 16, 1, 1, 3, 1),
    (2, 48, 16, 1, 6, 3, 1),
    (2, 16, 32, 7, 10, 3, 1),
    (2, 5, 7, 5, 4, 1, 1),
    (2, 5, 7, 6, 5, 3, 2),
    (2, 5, 7, 1, 8, 3, 2),
    (2, 5, 7, 5, 8, 1, 2),
    (4, 128, 144, 12, 12, 3, 1),
    (2, 256, 64, 9, 9, 1, 1),
    (4, 128, 130, 12, 12, 3, 2),
]


@pytest.fixture(autouse=True)
def few_channels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3x3 by Winograd's form wherever its transforms take the channels, and by torch's."""
    monkeypatch.setattr(op, "LEAST_CHANNELS", 1)


def given(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    rows, channels, outputs, height, width, kernel, stride = shape
    source = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(rows, channels, height, width, generator=source)
    weight = torch.randn(outputs, channels, kernel, kernel, generator=source) / kernel
    places = (math.ceil(height / stride), math.ceil(width / stride))
    grad = torch.randn(rows, outputs, *places, generator=source)
    x = x.to(memory_format=torch.channels_last)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad.to(dtype)


def results(form, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    stride = 1 if grad.shape[2:] == x.shape[2:] else 2
    y = form(x, weight, None, stride)
    return y.detach(), *torch.autograd.grad(y, [x, weight], grad)


def plain(x: Tensor, weight: Tensor, bias: None, stride: int) -> Tensor:
    return torch.conv2d(x, weight, bias, stride, weight.shape[2] // 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape: tuple[int, ...]) -> None:
    exact = results(plain, *given(shape, torch.float64))
    theirs, ours = results(plain, *given(shape)), results(convolution, *given(shape))
    for name, a, b, c in zip(("y", "dx", "dw"), ours, theirs, exact, strict=True):
        assert a.shape == c.shape
        error, allowed = (a - c).abs().max(), 3 * (b - c).abs().max() + 1e-6 * c.abs().max()
        assert error <= allowed, (name, float(error), float(allowed))


def test_in_float64_the_products_are_exact() -> None:
    """Nothing but rounding separates products and torch's form."""
    for shape in SHAPES:
        exact, ours = (results(form, *given(shape, torch.float64)) for form in (plain, convolution))
        for a, c in zip(ours, exact, strict=True):
            assert (a - c).abs().max() <= 1e-13 * c.abs().max()


def test_groups_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, and five rows in groups of two."""
    shape = (5, 16, 32, 6, 6, 3, 1)
    whole = results(convolution, *given(shape))
    for block in (1, 2 * 36 * 4 * 16):
        monkeypatch.setattr(winograd, "BLOCK", block)
        for a, b in zip(results(convolution, *given(shape)), whole, strict=True):
            assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_layouts_of_maps_and_weights_do_not_matter() -> None:
    for shape in SHAPES:
        x, weight, grad = given(shape)
        expected = results(convolution, x, weight, grad)
        other = (
            x.detach().contiguous().requires_grad_(),
            weight.detach().to(memory_format=torch.channels_last).requires_grad_(),
            grad.to(memory_format=torch.channels_last),
        )
        for a, b in zip(results(convolution, *other), expected, strict=True):
            torch.testing.assert_close(a, b)
        assert expected[0].is_contiguous(memory_format=torch.channels_last)


def test_output_does_not_depend_on_what_was_in_memory(poisoned: None) -> None:
    for shape in SHAPES:
        assert all(torch.isfinite(x).all() for x in results(convolution, *given(shape)))


def test_an_only_gradient_is_the_same() -> None:
    x, weight, grad = given((2, 16, 32, 6, 8, 3, 1))
    _, d_x, d_weight = results(convolution, x, weight, grad)
    assert torch.equal(
        torch.autograd.grad(convolution(x.detach(), weight), weight, grad)[0], d_weight
    )
    assert torch.equal(torch.autograd.grad(convolution(x, weight.detach()), x, grad)[0], d_x)


def test_bias_is_added() -> None:
    x, weight, _ = given((2, 5, 7, 6, 8, 3, 1))
    bias = torch.arange(7.0)
    torch.testing.assert_close(convolution(x, weight, bias), torch.conv2d(x, weight, bias, 1, 1))


def test_flops_are_those_of_the_convolution() -> None:
    """Forward and one gradient each: 3 x 2 x 4 rows x 6 x 5 places x 7 x 3 x 9 products."""
    for stride, places in ((1, 6 * 5), (2, 3 * 3)):
        x, weight, grad = given((4, 3, 7, 6, 5, 3, stride))
        with FlopCounterMode(display=False) as counter:
            convolution(x, weight, None, stride).backward(grad)
        assert counter.get_total_flops() == 3 * 2 * 4 * places * 7 * 3 * 9


def test_operators_are_well_formed() -> None:
    """Fake implementation, autograd and aliasing, as torch.compile needs them."""
    for shape in SHAPES[:10]:
        x, weight, _ = given(shape)
        inputs = (x, weight, shape[-1])
        torch.library.opcheck(torch.ops.unival.convolution_forward.default, inputs)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((2, 5, 4, 4), (7, 5, 5, 5), r"weight is \[7, 5, 5, 5\]; expected \[K, C, 1, 1\]"),
        ((2, 5, 4, 4), (7, 4, 3, 3), r"x is \[2, 5, 4, 4\]; expected \[B, 4, h, w\]"),
        ((5, 4, 4), (7, 5, 3, 3), r"x is \[5, 4, 4\]; expected \[B, 5, h, w\]"),
    ],
)
def test_bad_shapes_are_named(x, weight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convolution(torch.zeros(x), torch.zeros(weight))


@pytest.mark.parametrize(
    ("options", "size", "taken"),
    [
        ({"kernel_size": 1}, (2, 64, 8, 8), True),
        ({"kernel_size": 1, "stride": 2}, (2, 64, 8, 7), True),
        ({"kernel_size": 1, "stride": 3}, (2, 64, 8, 8), False),
        ({"kernel_size": 3, "padding": 1}, (2, 64, 8, 8), None),  # where transforms are compiled
        ({"kernel_size": 3, "padding": 1}, (2, 72, 8, 8), False),  # not whole lines
        ({"kernel_size": 3, "padding": 1}, (2, 32, 8, 8), False),  # too few channels
        ({"kernel_size": 3, "padding": 1, "stride": 2}, (2, 128, 8, 7), True),
        ({"kernel_size": 3}, (2, 128, 8, 8), False),
        ({"kernel_size": 7, "padding": 3}, (2, 128, 8, 8), False),
        ({"kernel_size": 3, "padding": 1, "dilation": 2}, (2, 128, 8, 8), False),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, (2, 256, 8, 8), False),
        ({"kernel_size": 3, "padding": (1, 0)}, (2, 128, 8, 8), False),
        ({"kernel_size": 3, "padding": 1, "stride": (1, 2)}, (2, 128, 8, 8), False),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (2, 128, 8, 8), False),
        ({"kernel_size": 3, "padding": "same"}, (2, 128, 8, 8), False),
        ({"kernel_size": 1}, (0, 64, 8, 8), False),
    ],
    ids=str,
)
def test_the_module_computes_what_torch_does(
    monkeypatch, options, size, taken: bool | None
) -> None:
    monkeypatch.setattr(op, "PRODUCTS_ARE_FASTER", True)
    monkeypatch.setattr(op, "LEAST_CHANNELS", 64)
    ours = Conv2d(size[1], 144, **options)
    theirs = torch.nn.Conv2d(size[1], 144, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(size).to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert op.takes(x, ours.weight, ours) is (native.AVAILABLE if taken is None else taken)


def test_other_processors_keep_torch_s_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "PRODUCTS_ARE_FASTER", False)
    (x, weight, _), module = given((2, 5, 7, 5, 4, 1, 1)), Conv2d(5, 7, 1)
    assert not op.takes(x, weight, module)
    monkeypatch.setattr(op, "PRODUCTS_ARE_FASTER", True)
    assert op.takes(x, weight, module)
    assert not op.takes(x.bfloat16(), weight.bfloat16(), module)


CLIPS = [  # channels, outputs, kernel, stride, padding, groups; frames, height, width
    (6, 4, 3, (1, 1, 1), 1, 2, (1, 5, 4)),
    (6, 4, 3, (2, 2, 2), 1, 2, (1, 5, 4)),
    (6, 4, 3, (1, 1, 1), 1, 2, (2, 5, 4)),
    (3, 4, (7, 5, 3), (1, 2, 2), (3, 2, 1), 1, (1, 6, 7)),
    (3, 4, (2, 3, 3), 1, 1, 1, (1, 6, 7)),  # every tap of time sees the frame once
    (6, 5, 1, (1, 1, 1), 0, 1, (3, 4, 2)),
    (6, 5, 1, (1, 2, 2), 0, 1, (3, 4, 2)),
]


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("sizes", CLIPS, ids=str)
def test_clips(sizes: tuple, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the module and by `differentiate`, against torch's own in float64."""
    monkeypatch.setattr(op, "PRODUCTS_ARE_FASTER", products)
    channels, outputs, kernel, stride, padding, groups, places = sizes
    torch.manual_seed(0)
    module = Conv3d(channels, outputs, kernel, stride, padding, groups=groups, bias=False)
    exact = torch.nn.Conv3d(channels, outputs, kernel, stride, padding, groups=groups, bias=False)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(2, channels, *places).to(memory_format=torch.channels_last_3d)
    wide = x.double().requires_grad_()
    wanted = exact.double()(wide)
    grad = torch.randn(wanted.shape)
    wanted.backward(grad.double())
    x.requires_grad_()
    y = module(x)
    y.backward(grad)
    told = differentiate(module, grad, x.detach(), module.weight.detach())
    for found, value in (
        (y, wanted),
        (x.grad, wide.grad),
        (module.weight.grad, exact.weight.grad),
        (told[0], wide.grad),
        (told[1], exact.weight.grad),
    ):
        assert found.shape == value.shape
        assert (found - value).abs().max() <= 1e-5 * value.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": (2, 1, 1), "dilation": (2, 1, 1)},
        {"kernel_size": (3, 1, 1), "padding": (2, 0, 0)},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
    ],
    ids=str,
)
def test_one_frame_in_other_padding(options: dict) -> None:
    module, plain = Conv3d(4, 6, groups=2, **options), torch.nn.Conv3d(4, 6, groups=2, **options)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 4, 1, 5, 6)
    torch.testing.assert_close(module(x), plain(x))


def test_one_frame_between_padding_takes_a_third_of_the_operations() -> None:
    module = Conv3d(8, 8, 3, padding=1, groups=4, bias=False)
    found = []
    for frames in (1, 2):
        with FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, 8, frames, 4, 4))
        found.append(counter.get_total_flops() / frames)
    assert found[0] * 3 == found[1] == 2 * 4 * 4 * 8 * 2 * 27
