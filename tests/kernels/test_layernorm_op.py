"""The norms as operators: registration, compilation, errors, launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from unival.kernels import backend as backends
from unival.kernels.layernorm.backward import backward_triton, residual_backward_triton
from unival.kernels.layernorm.forward import forward_triton, residual_forward_triton
from unival.kernels.layernorm.op import gelu_layer_norm, layer_norm, residual_layer_norm
from unival.kernels.triton_tools.launch import recorded_launches

OPS = torch.ops.unival
X = torch.zeros(2, 3, 8)
ONES = torch.ones(8)
SEED = torch.tensor([4])


def leaf(*shape: int, device) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


@pytest.mark.parametrize("gelu", [False, True])
def test_norm_operators_are_registered_correctly(device, gelu) -> None:
    x, w, b = leaf(2, 3, 40, device=device), leaf(40, device=device), leaf(40, device=device)
    torch.library.opcheck(OPS.layer_norm, (x, w, b, 1e-5, gelu))
    rows = torch.randn(2, 3, 80, device=device)[..., :40].requires_grad_()
    torch.library.opcheck(OPS.layer_norm, (rows, w, b, 1e-5, gelu))
    dy, x, w = torch.randn_like(x), x.detach(), w.detach()
    torch.library.opcheck(OPS.layer_norm_backward, (dy, x, w, 1e-5, gelu))


@pytest.mark.parametrize("drops", [False, True])
def test_residual_operators_are_registered_correctly(device, drops) -> None:
    options = (1e-5, 0.2, 0.3, SEED.to(device)) if drops else (1e-5, 0.0, 0.0, None)
    branch, residual = leaf(2, 3, 40, device=device), leaf(2, 3, 40, device=device)
    w, b = leaf(40, device=device), leaf(40, device=device)
    torch.library.opcheck(OPS.residual_layer_norm, (branch, residual, w, b, *options))
    slope, total, w = torch.randn_like(branch), branch.detach(), w.detach()
    for dtotal in (None, slope):
        torch.library.opcheck(OPS.residual_layer_norm_backward, (slope, dtotal, total, w, *options))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_and_eager_give_the_same(device, backend) -> None:
    rates = {"dropout": 0.2, "drop_path": 0.3, "seed": SEED.to(device)}
    options = rates if backend == "triton" else {}

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = gelu_layer_norm(x, weight, bias, backend=backend)
        return residual_layer_norm(y, x, weight, bias, backend=backend, **options)

    leaves = [leaf(4, 3, 40, device=device), leaf(40, device=device), leaf(40, device=device)]
    slopes = [torch.randn(4, 3, 40, device=device) for _ in range(2)]
    compiled = torch.compile(block, fullgraph=True)
    outputs = [function(*leaves) for function in (block, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0])
    gradients = [torch.autograd.grad(output, leaves, slopes) for output in outputs]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_outputs_nobody_differentiates_get_no_gradient(device) -> None:
    leaves = [leaf(2, 3, 8, device=device) for _ in range(2)]
    parameters = [leaf(8, device=device) for _ in range(2)]
    total, _ = residual_layer_norm(*leaves, *parameters, backend="triton")
    total.sum().backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in leaves)
    assert not parameters[0].grad.any() and not parameters[1].grad.any()


def test_only_matrix_products_count_as_flops() -> None:
    leaves = [leaf(2, 3, 8, device="cpu"), leaf(8, device="cpu"), leaf(8, device="cpu")]
    with FlopCounterMode(display=False) as counter:
        total, y = residual_layer_norm(layer_norm(*leaves, backend="triton"), *leaves)
        (total + y).sum().backward()
    assert counter.get_total_flops() == 0


def test_auto_runs_pytorch_on_a_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    backends._log_once.cache_clear()
    with caplog.at_level("INFO", logger=backends.__name__):
        layer_norm(X, ONES, ONES)
        gelu_layer_norm(X, ONES, ONES)
        residual_layer_norm(X, X, ONES, ONES)
    assert caplog.messages == [
        f"{name}: backend auto runs torch (the tensors are on the cpu)"
        for name in ("layer_norm", "gelu_layer_norm", "residual_layer_norm")
    ]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (X.double(), ONES, ONES, "x is torch.float64; allowed: torch.float32, torch.float16"),
        (X, ONES.half(), ONES, "weight is torch.float16; allowed: torch.float32 or torch.float32"),
        (X.half(), ONES.half(), ONES.bfloat16(), "bias is torch.bfloat16; allowed: torch.float32"),
        (X.half(), ONES.half(), ONES, "bias is torch.float32; allowed: torch.float16"),
        (X, ONES[:7], ONES, r"weight has shape \[7\]; allowed: \[8\], the last dimension of x"),
        (X, ONES, ONES[None], r"bias has shape \[1, 8\]; allowed: \[8\]"),
        (X.mT, ONES[:3], ONES[:3], r"x has shape \[2, 8, 3\] and strides \[24, 1, 8\]; allowed"),
        (X[0, 0, 0], ONES, ONES, r"x has shape \[\]; allowed: a last dimension from 1 to 4096"),
        (X[..., :0], ONES[:0], ONES[:0], r"x has shape \[2, 3, 0\]; allowed: a last dimension"),
        (torch.zeros(1, 4097), ONES, ONES, r"x has shape \[1, 4097\]; allowed: .* 4096"),
        (X, ONES.to("meta"), ONES, "weight is on meta; allowed: cpu, as x"),
    ],
)
@pytest.mark.parametrize("function", [layer_norm, gelu_layer_norm])
def test_wrong_tensors_are_named(function, x, weight, bias, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(x, weight, bias)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual": X[:1]}, r"residual has shape \[1, 3, 8\]; allowed: \[2, 3, 8\]"),
        ({"residual": X.half()}, "residual is torch.float16; allowed: torch.float32, that of"),
        ({"residual": X.mT.contiguous().mT}, "residual has shape .* and strides"),
        ({"residual": X.to("meta")}, "residual is on meta; allowed: cpu, as branch"),
        ({"branch": X[0], "residual": X[0]}, r"branch has shape \[3, 8\]; allowed: three"),
        ({"weight": ONES[:7]}, r"weight has shape \[7\]; .* of branch"),
        ({"dropout": 1.0}, r"dropout=1.0; allowed: 0 <= dropout < 1"),
        ({"drop_path": -0.1}, r"drop_path=-0.1; allowed: 0 <= drop_path < 1"),
        (
            {"seed": SEED.int()},
            r"seed is torch.int32 of shape \[1\]; allowed: torch.int64 of \[1\]",
        ),
        ({"seed": SEED[0]}, r"seed is torch.int64 of shape \[\]"),
        ({"seed": SEED.to("meta")}, "seed is on meta; allowed: cpu, as branch"),
        ({"eps": 0.0}, "eps=0.0; allowed: positive numbers"),
        ({"backend": "cuda"}, "residual_layer_norm: backend='cuda'; known: auto, torch, triton"),
    ],
)
def test_wrong_arguments_of_the_residual_form_are_named(arguments, message) -> None:
    right = {"branch": X, "residual": X, "weight": ONES, "bias": ONES}
    with pytest.raises(ValueError, match=message):
        residual_layer_norm(**right | arguments)


def test_launches_can_be_recorded_without_a_gpu() -> None:
    """Shapes that a pretraining step has; the partial gradients cost little memory traffic."""
    with FakeTensorMode(), recorded_launches() as launches:
        x = torch.empty(64, 512, 768, device="cuda", dtype=torch.bfloat16)
        w, seed = x.new_empty(768), torch.empty(1, device="cuda", dtype=torch.int64)
        forward_triton(x, w, w, 1e-5, gelu=True)
        residual_forward_triton(x, x, w, w, 1e-5, 0.1, 0.1, seed)
        backward_triton(x, x, w, 1e-5, gelu=True)
        residual_backward_triton(x, x, x, w, 1e-5, 0.1, 0.1, seed)
    for launch in launches[:2]:
        assert launch.grid[0] * launch.config.blocks["ROWS"] == 64 * 512
    for launch in launches[2:]:
        partials = launch.arguments["partials"]
        assert partials.shape == (2, launch.grid[0], 768)
        assert partials.numel() * 4 <= 0.05 * 3 * x.numel() * 2
        assert launch.grid[0] >= 132  # no multiprocessor is idle
