"""Passes over rows, compiled and by PyTorch's operators, against float64."""

from __future__ import annotations

import ctypes
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unival.kernels.cpu import native, rows
from unival.kernels.cpu.rows import Norm

# Both forms; what they write to holds NaN and lies between guards.
pytestmark = pytest.mark.usefixtures("form", "poisoned")

# Rows and channels: one, fewer than a block of 32 or a vector, and shares of two threads.
SHAPES = [(1, 1), (3, 5), (33, 64), (1000, 17), (4097, 48), (70, 2048)]


def given(shape: tuple[int, int], relu: bool = True) -> tuple[Tensor, Tensor, Norm]:
    """Rows whose channels have levels of their own, a gradient, and the norm of the rows."""
    count, channels = shape
    source = torch.Generator().manual_seed(count + channels)
    x, grad = torch.randn(2, count, channels, generator=source)
    level, weight, bias = torch.randn(3, channels, generator=source)
    x = x * 0.5 + 3 * level
    variance, mean = torch.var_mean(x.double(), 0, correction=0)
    scale = torch.rsqrt(variance + 1e-5)
    return x, grad + 0.2, Norm(mean.float(), scale.float(), weight + 1.5, bias, relu)


def exact(norm: Norm) -> Norm:
    return Norm(*(value.double() for value in norm[:4]), norm.relu)


def close(found: Tensor, wanted: Tensor, theirs: Tensor) -> None:
    """No further from float64 than three times what torch is in float32, or 5 units in the last
    place: torch's variances are summed in float64, ours are of 32 rows in float32 and then so.
    """
    assert found.dtype == theirs.dtype == torch.float32
    error, allowed = ((one - wanted).abs().max() for one in (found, theirs))
    assert error <= 3 * allowed + 6e-7 * wanted.abs().max(), (float(error), float(allowed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(shape: tuple[int, int]) -> None:
    x, _, _ = given(shape)
    variance, mean = rows.moments(x)
    wanted = torch.var_mean(x.double(), 0, correction=0)
    theirs = torch.var_mean(x, 0, correction=0)
    close(variance, wanted[0], theirs[0])
    close(mean, wanted[1], theirs[1])


def test_moments_far_from_zero_do_not_cancel() -> None:
    """E[x^2] - E[x]^2 would be off by more than the variance of 1e-2 around 1e4."""
    x = 1e4 + 0.1 * torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
    variance, mean = rows.moments(x)
    torch.testing.assert_close(
        variance.double(), x.double().var(0, correction=0), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalize(shape: tuple[int, int], relu: bool) -> None:
    x, _, norm = given(shape, relu)

    def plain(x: Tensor, norm: Norm) -> Tensor:
        y = (x - norm.mean) * norm.scale * norm.weight + norm.bias
        return torch.relu(y) if relu else y

    before = x.clone()
    found = rows.normalize(x, norm)
    # x scale weight and mean scale weight are subtracted from each other.
    cancelled = 2e-7 * float((norm.mean * norm.factor).abs().max())
    wanted = plain(x.double(), exact(norm))
    error = (found - wanted).abs().max()
    assert error <= 3 * (plain(x, norm) - wanted).abs().max() + 3 * cancelled
    assert torch.equal(x, before)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_autograd(shape, relu: bool, shift: bool) -> None:
    """Through a norm by the batch's own statistics and a ReLU."""
    x, grad, norm = given(shape, relu)
    less = torch.linspace(-1, 1, shape[1]) if shift and relu else None
    wide = x.double().requires_grad_()
    weight, bias = (value.double().requires_grad_() for value in (norm.weight, norm.bias))
    variance, mean = torch.var_mean(wide, 0, correction=0)
    y = (wide - mean) * torch.rsqrt(variance + 1e-5) * weight + bias
    before = rows.normalize(x, norm._replace(relu=False))
    sure = (before.abs() > 1e-4) | (not relu)  # a sign that rounding does not change
    kept = grad.clone()
    kept[~sure] = 0 if less is None else less.expand_as(kept)[~sure]
    upstream = (kept if less is None else kept - less) * sure
    (torch.relu(y) if relu else y).backward(upstream.double())

    d_bias, d_weight = rows.gradients(x, kept, norm, less)
    if relu:
        expected = torch.where(before > 0, upstream, 0)
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-6)
    d_x = rows.input_gradient(x, kept, norm, d_bias, d_weight, shape[0])
    size = float(upstream.abs().sum(0).max())
    for found, wanted, bound in (
        (d_bias, bias.grad, 1e-6 * size),
        (d_weight, weight.grad, 1e-5 * size),
        (d_x, wide.grad, 2e-5 * float(upstream.abs().max() * norm.factor.abs().max())),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=bound)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finish_and_mask(shape: tuple[int, int]) -> None:
    x, grad, norm = given(shape)
    shortcut = x.flip(0)
    wanted = torch.relu(x + norm.bias + shortcut)
    y = x.clone()
    assert rows.finish(y, norm.bias, shortcut) is y
    torch.testing.assert_close(y, wanted)
    masked, sums = rows.mask(grad, y)
    assert torch.equal(masked, torch.where(y > 0, grad, 0))
    close(sums, masked.double().sum(0), masked.sum(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_maps_are_computed_in_float32_and_rounded_once(shape: tuple[int, int]) -> None:
    x, grad, norm = given(shape)
    x, grad, count = x.bfloat16(), grad.bfloat16(), shape[0]
    wide, dy = x.double(), grad.double()
    plain = exact(norm)
    apart = (wide - plain.mean) * plain.scale
    size = float(apart.abs().max() * plain.weight.abs().max() + plain.bias.abs().max())

    def rounded(found: Tensor, wanted: Tensor) -> None:
        assert found.dtype == torch.bfloat16
        excess = (found.double() - wanted).abs() - 2**-8 * wanted.abs()
        assert excess.max() <= 3e-6 * (size + float(dy.abs().max() * plain.factor.abs().max()))

    variance, mean = rows.moments(x)
    close(variance, wide.var(0, correction=0), x.float().var(0, correction=0))
    close(mean, wide.mean(0), x.float().mean(0))
    wanted = apart * plain.weight + plain.bias
    rounded(rows.normalize(x, norm), wanted.relu())
    rounded(rows.normalize(x, norm, x.flip(0)), (wanted + wide.flip(0)).relu())

    y = rows.normalize(x, norm)
    masked, sums = rows.mask(grad, y)
    assert torch.equal(masked, torch.where(y > 0, grad, 0))
    close(sums, masked.double().sum(0), masked.float().sum(0))

    for shift in (torch.zeros(shape[1]), torch.linspace(-1, 1, shape[1])):
        upstream = (dy - shift.double()) * (y > 0)
        kept = grad.clone()
        d_bias, d_weight = rows.gradients(x, kept, norm, shift)
        assert kept.dtype == torch.bfloat16
        torch.testing.assert_close(kept.double(), upstream, rtol=2**-8, atol=1e-6)
        # By PyTorch's operators the sums are of what was rounded.
        bound = 2**-8 * upstream.abs().sum(0).max()
        assert (d_bias.double() - upstream.sum(0)).abs().max() <= bound
        bound = 2**-8 * (upstream * apart).abs().sum(0).max()
        assert (d_weight.double() - (upstream * apart).sum(0)).abs().max() <= bound + 1e-5
    smooth = norm._replace(relu=False)
    d_bias, d_weight = rows.gradients(x, grad.clone(), smooth)
    sums = dy.sum(0), (dy * apart).sum(0)
    assert (d_bias.double() - sums[0]).abs().max() <= 1e-6 * dy.abs().sum(0).max()
    assert (d_weight.double() - sums[1]).abs().max() <= 1e-5 * dy.abs().sum(0).max()
    d_x = rows.input_gradient(x, grad, smooth, d_bias, d_weight, count)
    rounded(d_x, plain.factor * (dy - sums[0] / count - apart * sums[1] / count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_rows_beside_are_refused_and_not_read_beyond(dtype: torch.dtype) -> None:
    x, _, norm = given((40, 16))
    x = x.to(dtype)
    for run in (rows.normalize, lambda x, norm, beside: rows.finish(x, norm.bias, beside)):
        with pytest.raises(RuntimeError, match="must match the size"):
            run(x.clone(), norm, x[:10].clone())


def test_rounding_to_bfloat16_is_pytorch_s() -> None:
    """Of every kind of float32: ties, subnormal numbers, what overflows, infinities, NaN."""
    source = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=source, dtype=torch.int64)
    ties = (torch.arange(-32768, 32768, 7) << 16) + 0x8000
    ends = torch.tensor([0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FFFFFFF])
    level = torch.cat([bits, ties, ends, ends - 2**31]).to(torch.int32).view(torch.float32)
    zeros, ones = torch.zeros(3, len(level)), torch.ones(len(level))
    norm = Norm(zeros[0], ones, ones, level)
    wanted = level.bfloat16()
    for found in rows.normalize(zeros.bfloat16(), norm):
        number = ~level.isnan()
        assert torch.equal(found.isnan(), level.isnan())
        assert torch.equal(found[number], wanted[number])


def test_what_is_not_a_number_is_passed_on() -> None:
    x, grad, norm = given((40, 16))
    x[3, 2], x[4, 5] = float("nan"), float("inf")
    y = rows.normalize(x, norm)
    assert y[3, 2].isnan() and y[4, 5] == float("inf") and y.isnan().sum() == 1
    assert rows.finish(x.clone(), norm.bias, x)[3, 2].isnan()
    masked, sums = rows.mask(grad, y)
    assert masked[3, 2] == grad[3, 2]
    grad[7, 1] = float("nan")
    masked, sums = rows.mask(grad, y.abs() + 1)
    assert masked.isnan().sum() == 1 and sums[1].isnan()
    assert [bool(value[2].isnan()) for value in rows.moments(x)] == [True, True]


def test_gaps_and_other_dtypes_are_taken_too() -> None:
    x, _, norm = given((50, 32))
    wide = torch.stack([x, x], 2).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    for found, wanted in zip(rows.moments(wide), rows.moments(x), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(rows.normalize(wide, norm), rows.normalize(x, norm))
    half = rows.moments(x.bfloat16())
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[1], x.bfloat16().float().mean(0))


def test_results_do_not_depend_on_the_run() -> None:
    x, grad, norm = given((4097, 48))
    first = [*rows.moments(x), *rows.gradients(x, grad.clone(), norm), rows.mask(grad, x)[1]]
    for _ in range(5):
        again = [*rows.moments(x), *rows.gradients(x, grad.clone(), norm), rows.mask(grad, x)[1]]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_threads_are_torchs(form: str) -> None:
    """Two pools of threads would wait for each other's cores."""
    if form == "torch":
        pytest.skip("nothing compiled to ask")
    native.LIBRARY.unival_threads.restype = ctypes.c_int64
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert native.LIBRARY.unival_threads() == count
    finally:
        torch.set_num_threads(before)


def test_a_build_that_does_not_fit_is_named(tmp_path: Path, monkeypatch, form: str) -> None:
    if form == "torch":
        pytest.skip("nothing is built to be copied")
    built = next(Path(native.__file__).parent.glob("_passes*.so"))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._load() is None  # nothing there, which is no reason to warn
    shutil.copy(built, tmp_path / "_passes.so")
    assert native._load() is not None
    monkeypatch.setattr(native, "INTERFACE", 10**6)
    with pytest.warns(UserWarning, match=r"_passes.so is of interface \d+, expected 1000000"):
        assert native._load() is None
    other = tmp_path / "other"  # the loader remembers paths
    other.mkdir()
    (other / "_passes.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "__file__", str(other / "native.py"))
    with pytest.warns(UserWarning, match="invalid ELF header|file too short"):
        assert native._load() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._load() is None
