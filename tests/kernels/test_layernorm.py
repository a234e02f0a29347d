"""The three norms against float64, on both backends; without a GPU Triton is interpreted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from unival.kernels.layernorm.op import gelu_layer_norm, layer_norm, residual_layer_norm
from unival.kernels.layernorm.reference import (
    branch_factor,
    gelu_layer_norm_reference,
    layer_norm_reference,
    residual_layer_norm_reference,
)

FORMS = {
    "plain": (layer_norm, layer_norm_reference),
    "gelu": (gelu_layer_norm, gelu_layer_norm_reference),
    "residual": (residual_layer_norm, residual_layer_norm_reference),
}
BACKENDS = ("torch", "triton")
SHAPES = [  # (samples, tokens, width)
    (0, 4, 768),  # no rows: nothing is launched
    (1, 1, 768),  # most rows of the only tile are masked
    (1, 5, 768),  # last tile partly filled; a quarter of the lanes masked
    (3, 11, 768),  # programs of backward walk several tiles
    (1, 5, 3072),  # wide rows, one a tile; the loop that loads ahead
    (3, 11, 1),  # a tile of one column; variance 0
    (3, 11, 17),  # rows that start at odd addresses; 32 columns a tile
    (1, 5, 63),  # one column short of the block
    (3, 11, 100),  # the rule for widths that are not tuned, several rows a tile
    (1, 5, 1024),  # no masked lanes, several rows a tile
    (1, 5, 4096),  # no masked lanes, one row a tile
    (1, 2, 2000),  # the rule between the tuned widths, masked lanes
]
DTYPES = [  # (inputs, weight and bias)
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
MIXED = (torch.bfloat16, torch.float32)  # parameters kept in float32, gradients too
CASES = [*itertools.product(SHAPES, DTYPES), ((3, 11, 768), MIXED)]


def name(values: tuple) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in values)


def make(form: str, shape: Sequence[int], dtype, parameters, device) -> list[Tensor]:
    """Leaves in the order of the functions' arguments."""
    count = 2 if form == "residual" else 1
    inputs = [torch.randn(*shape, device=device).to(dtype) for _ in range(count)]
    weight, bias = torch.randn(2, shape[-1], device=device).to(parameters).unbind()
    return [tensor.clone().requires_grad_() for tensor in (*inputs, 1 + weight, bias)]


def results(function, leaves: Sequence[Tensor], slopes: Sequence[Tensor] | None = None, **options):
    """Outputs and gradients; without slopes, of random ones that depend on the shape only."""
    outputs = function(*leaves, **options)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if slopes is None:
        generator = torch.Generator().manual_seed(1)
        slopes = [torch.randn(y.shape, generator=generator) for y in outputs]
    slopes = [s.to(y.device, leaves[0].dtype) for s, y in zip(slopes, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, slopes)
    return [y.detach() for y in outputs], list(gradients)


def flat(found: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [*found[0], *found[1]]


def assert_same(mine: Tensor, right: Tensor, backend: str) -> None:
    """Equal bits; PyTorch's own GELU takes another path for other strides, which rounds anew."""
    tolerance = 0.0 if backend == "triton" else 1e-5
    torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


def copies(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


def peer(form: str, dtype: torch.dtype, factor: Tensor | float = 1.0):
    """PyTorch's own norm, in float32, of inputs in dtype; outputs and the stored sum in dtype.

    That is what PyTorch does on a GPU. On a CPU it sums dweight in 16 bits, too inexact a bound.
    """

    def norm(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(value, weight.shape, weight, bias).to(dtype)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm(torch.nn.functional.gelu(x) if form == "gelu" else x, weight, bias)

    def residual(branch: Tensor, base: Tensor, weight: Tensor, bias: Tensor):
        total = (base + factor * branch).to(dtype)
        return total, norm(total.float(), weight, bias)

    return residual if form == "residual" else plain


def assert_close_to_exact(form, leaves, ours, slopes=None, factor: Tensor | float = 1.0) -> None:
    """Errors against float64: outputs at most 2x, gradients at most 3x those of the peer.

    One unit in the last place of the largest value is always allowed: where the peer happens to be
    exact, ours may round the other way. The peer's gradients are float32, and rounded here to the
    dtype they would be stored in.
    """
    reference = FORMS[form][1]
    options = {"factor": factor.double()} if isinstance(factor, Tensor) else {}
    dtype = leaves[0].dtype
    if slopes is None:
        generator = torch.Generator().manual_seed(1)
        slopes = [torch.randn(y.shape, generator=generator).to(dtype) for y in ours[0]]
    exact = results(reference, copies(leaves, torch.float64), slopes, **options)
    wide = copies(leaves, torch.float32)
    outputs = peer(form, dtype, factor)(*wide)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    slopes = [slope.to(outputs[0].device, dtype) for slope in slopes]
    theirs = outputs, torch.autograd.grad(outputs, wide, slopes)
    for part, allowed in ((0, 2.0), (1, 3.0)):
        for mine, other, right in zip(ours[part], theirs[part], exact[part], strict=True):
            assert mine.shape == right.shape and mine.isfinite().all()
            if mine.numel() == 0:
                continue
            unit = torch.finfo(mine.dtype).eps * right.abs().max()
            bound = allowed * (other.to(mine.dtype).double() - right).abs().max() + unit
            assert (mine.double() - right).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "dtypes"), CASES, ids=name)
def test_values_and_gradients_are_as_exact_as_pytorch(
    device, poisoned, shape, dtypes, form, backend
) -> None:
    leaves = make(form, shape, *dtypes, device)
    ours = results(FORMS[form][0], leaves, backend=backend)
    assert [y.dtype for y in ours[0]] == [dtypes[0]] * len(ours[0])
    assert [g.dtype for g in ours[1]] == [leaf.dtype for leaf in leaves]
    assert_close_to_exact(form, leaves, ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_zero_gradients_of_the_parameters(device, poisoned, backend) -> None:
    for form, (function, _) in FORMS.items():
        leaves = make(form, (0, 4, 100), torch.float32, torch.float32, device)
        _, gradients = results(function, leaves, backend=backend)
        assert not gradients[-1].any() and not gradients[-2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["plain", "gelu"])
def test_a_large_mean_does_not_swallow_the_variance(device, form, backend) -> None:
    leaves = make(form, (2, 4, 768), torch.float32, torch.float32, device)
    with torch.no_grad():
        leaves[0] += 1e3
    assert_close_to_exact(form, leaves, results(FORMS[form][0], leaves, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [100, 768])  # odd row starts; vectors of 16 bytes
def test_rows_of_a_wider_buffer_are_read_in_place(device, poisoned, width, form, backend) -> None:
    function = FORMS[form][0]
    leaves = make(form, (3, 7, width), torch.float32, torch.float32, device)
    expected = results(function, leaves, backend=backend)
    buffers, views = [], []
    for leaf in leaves:
        buffer = torch.full((*leaf.shape[:-1], width + 32), float("nan"), device=device)
        buffer[..., 16 : 16 + width] = leaf.detach()
        buffers.append((buffer, buffer.clone()))
        views.append(buffer[..., 16 : 16 + width].detach().requires_grad_())
    found = results(function, views, backend=backend)
    for mine, right in zip(flat(found), flat(expected), strict=True):
        assert_same(mine, right, backend)
        assert mine.is_contiguous()
    for buffer, before in buffers:
        torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_transposed_samples_and_broadcast_slopes(device, form, backend) -> None:
    """Leading dimensions without a common stride; the slope of a sum, which has stride 0."""
    function = FORMS[form][0]
    leaves = make(form, (3, 4, 17), torch.float32, torch.float32, device)
    turned = [leaf.transpose(0, 1).contiguous().transpose(0, 1) for leaf in leaves[:-2]]
    for inputs in (leaves, [*turned, *leaves[-2:]]):
        outputs = function(*inputs, backend=backend)
        total = sum(y.sum() for y in ((outputs,) if form != "residual" else outputs))
        gradients = torch.autograd.grad(total, leaves)
        ones = [torch.ones(3, 4, 17)] * (2 if form == "residual" else 1)
        expected = results(function, leaves, ones, backend=backend)[1]
        for mine, right in zip(gradients, expected, strict=True):
            assert_same(mine, right, backend)


def dropped(device, shape, backend, **rates) -> tuple[Tensor, Tensor]:
    """What a branch is multiplied by, read off the sum and off its gradient."""
    branch = torch.ones(shape, device=device, requires_grad=True)
    ones = torch.ones(shape[-1], device=device)
    total, _ = residual_layer_norm(
        branch, torch.zeros_like(branch), ones, ones, backend=backend, **rates
    )
    return total.detach(), torch.autograd.grad(total.sum(), branch)[0]


RATES = [
    (0.0, 0.0),  # no seed; one gradient for branch and residual
    (0.3, 0.0),  # elements only
    (0.0, 0.4),  # samples only
    (0.3, 0.4),  # both
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("used", ["total", "y", "both"])
def test_gradients_of_the_sum_and_of_its_norm(device, poisoned, used, rates, backend) -> None:
    seed = torch.tensor([1 << 40 | 3], device=device)
    options = {"dropout": rates[0], "drop_path": rates[1], "seed": seed, "backend": backend}
    factor, slope = dropped(device, (3, 11, 100), **options)
    assert torch.equal(factor, slope)  # backward drops what forward dropped
    leaves = make("residual", (3, 11, 100), torch.float32, torch.float32, device)
    slopes = [torch.randn(3, 11, 100) * (used in (name, "both")) for name in ("total", "y")]
    outputs = residual_layer_norm(*leaves, **options)
    chosen = [index for index, name in enumerate(("total", "y")) if used in (name, "both")]
    gradients = torch.autograd.grad(
        [outputs[index] for index in chosen],
        leaves,
        [slopes[index].to(device) for index in chosen],
        materialize_grads=True,
    )
    ours = [y.detach() for y in outputs], gradients
    assert_close_to_exact("residual", leaves, ours, slopes, factor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rates", RATES[1:])
@pytest.mark.parametrize("shape", [(3, 11, 100), (5, 3, 768)])  # tiles that cross samples
def test_a_seed_drops_where_the_random_numbers_say(device, shape, rates, backend) -> None:
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device=device)
    factor, _ = dropped(device, shape, backend, dropout=rates[0], drop_path=rates[1], seed=seed)
    expected = branch_factor(shape, *rates, seed)
    assert torch.equal(factor == 0, expected == 0)
    torch.testing.assert_close(factor, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_repeats_and_rates_hold(device, backend) -> None:
    seeds = [torch.tensor([number], device=device) for number in (1, 1, 2)]
    options = {"dropout": 0.25, "backend": backend}
    first, again, other = (dropped(device, (2, 16, 768), seed=seed, **options)[0] for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)
    # 24,576 draws: the standard deviation of the kept share is 0.003.
    assert abs(float((first != 0).float().mean()) - 0.75) < 0.012
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    paths, _ = dropped(device, (512, 1, 2), backend, drop_path=0.25, seed=seeds[0])
    assert torch.equal(paths[..., 0], paths[..., 1])
    # 512 draws: 0.02.
    assert abs(float((paths != 0).float().mean()) - 0.75) < 0.08
    torch.manual_seed(5)
    drawn, different = (dropped(device, (1, 4, 64), **options)[0] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(drawn, dropped(device, (1, 4, 64), **options)[0])
    assert not torch.equal(drawn, different)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_twenty_runs_give_the_same_bits(device, form, backend) -> None:
    options = {"dropout": 0.1, "drop_path": 0.1} if form == "residual" else {}
    if options:
        options["seed"] = torch.tensor([9], device=device)
    leaves = make(form, (2, 9, 17), torch.float32, torch.float32, device)
    runs = [flat(results(FORMS[form][0], leaves, backend=backend, **options)) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", [*DTYPES, MIXED], ids=name)
@pytest.mark.parametrize("shape", [(64, 1024, 768), (16, 1021, 3072), (3, 1000, 4096)])
def test_large_shapes_on_a_gpu(device, shape, dtypes, form) -> None:
    """Many programs at once: each walks many tiles, and nothing is summed in a varying order."""
    leaves = make(form, shape, *dtypes, device)
    ours = results(FORMS[form][0], leaves, backend="triton")
    assert_close_to_exact(form, leaves, ours)
    again = results(FORMS[form][0], leaves, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(again), strict=True))
