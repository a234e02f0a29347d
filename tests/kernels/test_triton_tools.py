"""Products, random numbers and launches."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from unival.kernels.backend import resolve_backend
from unival.kernels.triton_tools.arithmetic import dot, gelu, gelu_derivative
from unival.kernels.triton_tools.launch import INTERPRETED, Config, launch, recorded_launches
from unival.kernels.triton_tools.philox import philox_4x32, uniform, uniform_torch


@triton.jit
def product_kernel(a, b, out, RAW: tl.constexpr):
    rows = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x, y = tl.load(a + rows), tl.load(b + rows)
    tl.store(out + rows, tl.dot(x, y) if RAW else dot(x, y))


@triton.jit
def uniform_kernel(seed, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    drawn = uniform(tl.load(seed), column, row, tl.program_id(0))
    offset = tl.program_id(0) * ROWS * COLUMNS
    tl.store(out + offset + row * COLUMNS + column, drawn)


@triton.jit
def gelu_kernel(x, value, derivative, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(value + index, gelu(tl.load(x + index)))
    tl.store(derivative + index, gelu_derivative(tl.load(x + index)))


@triton.jit
def round_kernel(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.load(x + index).to(tl.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_multiplies_values_in_every_dtype(device: torch.device, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16, device=device).to(dtype).unbind()
    out = torch.full((16, 16), float("nan"), device=device)
    launch(product_kernel, (1,), Config({}), (a, b, out), RAW=False)
    # 16 products of 16-bit values are exact in float32; only their sum rounds.
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=2e-6)


@pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter; kernels are compiled")
def test_interpreter_still_multiplies_bit_patterns_of_bfloat16(device: torch.device) -> None:
    """When this fails, Triton is mended: `arithmetic.dot` can lose its upcast."""
    a, b = torch.randn(2, 16, 16, device=device).bfloat16().unbind()
    out = torch.zeros(16, 16, device=device)
    launch(product_kernel, (1,), Config({}), (a, b, out), RAW=True)
    assert (out.double() - a.double() @ b.double()).abs().max() > 1e3


def test_conversion_to_bfloat16_rounds_as_pytorch(device: torch.device) -> None:
    x = torch.cat([torch.randn(1020, device=device), torch.tensor([0.0, 1e38, -1e-40, torch.nan])])
    x[0] = 1.00390625  # a tie
    out = torch.zeros(1024, dtype=torch.bfloat16, device=device)
    launch(round_kernel, (1,), Config({}), (x, out), SIZE=1024)
    assert torch.equal(out.view(torch.int16)[:-1], x.bfloat16().view(torch.int16)[:-1])
    assert out[-1].isnan()


def test_philox_gives_the_published_vectors() -> None:
    """Random123's known answers of philox4x32-10: zero, all ones, digits of pi."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0), (0, 0, 0, 0), 0x6627E8D5),
        ((ones, ones), (ones, ones, ones, ones), 0x408F276D),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0xD16CFE09,
        ),
    ]
    for key, counter, expected in cases:
        words = tuple(torch.tensor(word) for word in counter)
        assert int(philox_4x32(key, words)) == expected


def test_uniform_is_the_same_in_triton_and_pytorch(device: torch.device) -> None:
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device=device)
    out = torch.full((3, 16, 64), float("nan"), device=device)
    launch(uniform_kernel, (3,), Config({}), (seed, out), ROWS=16, COLUMNS=64)
    plane, row, column = (
        torch.arange(n, device=device).reshape(shape)
        for n, shape in ((3, (3, 1, 1)), (16, (16, 1)), (64, (64,)))
    )
    assert torch.equal(out, uniform_torch(seed, column, row, plane))
    assert out.min() >= 0 and out.max() < 1 and abs(float(out.mean()) - 0.5) < 0.02
    assert out.unique().numel() > 3000


def test_gelu_and_its_derivative(device: torch.device) -> None:
    x = torch.linspace(-8, 8, 256, device=device)
    value, derivative = torch.full((2, 256), float("nan"), device=device).unbind()
    launch(gelu_kernel, (1,), Config({}), (x, value, derivative), SIZE=256)
    exact = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(derivative.double(), slope, rtol=1e-6, atol=1e-6)


def test_recorded_launches_do_not_run(device: torch.device) -> None:
    out = torch.zeros(3, 16, 64, device=device)
    config = Config({"ROWS": 16}, num_warps=2)
    with recorded_launches() as launches:
        launch(uniform_kernel, (3,), config, (torch.zeros(1), out), COLUMNS=64)
        launch(uniform_kernel, (3, 0), config, (torch.zeros(1), out), COLUMNS=64)
    assert not out.any()
    (found,) = launches
    assert found.arguments["COLUMNS"] == 64 and found.arguments["ROWS"] == 16
    assert found.arguments["out"] is out and found.config.num_warps == 2


def test_backend_names() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    known = ("torch", "triton")
    assert resolve_backend("norm", "auto", cpu, known) == "torch"
    assert resolve_backend("norm", "auto", gpu, known) == "triton"
    assert resolve_backend("norm", "torch", gpu, known) == "torch"
    with pytest.raises(ValueError, match="backend='cuda'; known: auto, torch, triton"):
        resolve_backend("norm", "cuda", cpu, known)


def test_auto_says_once_which_backend_runs_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="unival.kernels.backend"):
        for _ in range(2):
            resolve_backend("an op of this test", "auto", torch.device("cpu"), ("torch", "triton"))
    assert caplog.messages == [
        "an op of this test: backend auto runs torch (the tensors are on the cpu)"
    ]


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unival.kernels.triton_tools.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend("norm", "triton", torch.device("cpu"), ("torch", "triton"))
