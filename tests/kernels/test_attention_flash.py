"""The flash-attn package as a backend, with a stand-in that does what its functions document."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import assert_as_exact_as_pytorch, assert_refused, problem
from torch import Tensor

from unival.kernels import backend as backends
from unival.kernels.attention.op import attention
from unival.kernels.attention.relative import RelativeBias, RelativeLayout

OPS = torch.ops.unival
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """The package's documented function: [B, S or T, H, D], causal aligned to the bottom right."""
    assert q.dtype in (FP16, BF16) and q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    assert dropout_p == 0.0  # its random numbers are its own
    queries, keys = q.shape[1], k.shape[1]
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * softmax_scale
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        row = torch.arange(queries, device=q.device)[:, None]
        hidden = torch.arange(keys, device=q.device) > row + keys - queries
    scores = scores.masked_fill(hidden, -torch.inf)
    scores = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    weights = scores.softmax(-1).masked_fill(hidden, 0.0)  # rows without keys: zeros, as documented
    return torch.einsum("bhst,bthd->bshd", weights, v.float()).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args: Any,
    **options: Any,
) -> Tensor:
    """The package's function of packed sequences: [total, H, D]."""
    for starts, longest, x in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(x)
        assert (starts.diff() <= longest).all()
    lengths = [starts.diff().tolist() for starts in (cu_seqlens_q, cu_seqlens_k)]
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    return torch.cat(
        [flash_attn_func(*(x[None] for x in part), *args, **options)[0] for part in parts]
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A flash_attn in plain PyTorch; the calls it gets, by name, with their arguments."""
    module, calls = ModuleType("flash_attn"), []

    def recorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            calls.append((function.__name__, given))
            return function(*args, **kwargs)

        return call

    for function in (flash_attn_func, flash_attn_varlen_func):
        setattr(module, function.__name__, recorded(function))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


FLASH = {
    # Padded keys are cut out, so that the packed function runs; S != T; positions double the width.
    "cross attention with padding": lambda d: problem(d, queries=13, keys=45, padding=True),
    "the same without positions": lambda d: problem(
        d, queries=13, keys=45, padding=True, positions=None, head_scale=False
    ),
    # The dense function; positions shared by the batch, or of every sample.
    "causal": lambda d: problem(d, queries=17, causal=True),
    "causal with a past": lambda d: problem(d, queries=4, keys=17, causal=True, positions=2),
    # The first queries see no key.
    "more queries than keys": lambda d: problem(d, queries=9, keys=5, causal=True),
    # One query against cached keys: no operator of its own here.
    "one query": lambda d: problem(d, queries=1, keys=9, padding=True),
    # Query i sees keys up to i + T - S, whatever lies behind the padding.
    "causal with padding": lambda d: problem(d, queries=17, padding=True, causal=True),
}


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_flash_attn_gives_what_eager_gives(device, stand_in, name, dtype) -> None:
    given = FLASH[name](device)
    assert_as_exact_as_pytorch(given, given.rounded(dtype).run("flash_attn", dtype), dtype)
    if name != "causal with padding":
        padded = "key_padding_mask" in given.options
        assert [name for name, _ in stand_in] == [
            "flash_attn_varlen_func" if padded else "flash_attn_func"
        ]


def test_flash_attn_sees_a_sample_whose_keys_are_all_padding(device, stand_in) -> None:
    given = problem(device, queries=6, keys=8)
    mask = torch.tensor([[True] * 8, [False] * 8], device=device)
    given.options["key_padding_mask"] = mask
    found = given.rounded(FP16).run("flash_attn", FP16)
    assert not found["output"][0].any() and not found["key"][0].any()
    assert_as_exact_as_pytorch(given, found, FP16)


def test_flash_attn_gets_the_options(device, stand_in) -> None:
    x = torch.randn(1, 2, 5, 16, device=device).half()
    attention(x, x, x, deterministic=True, scale=0.3, causal=True, backend="flash_attn")
    ((_, given),) = stand_in
    options = {n: given[n] for n in ("deterministic", "softmax_scale", "causal", "dropout_p")}
    assert options == {
        "deterministic": True, "softmax_scale": 0.3, "causal": True, "dropout_p": 0.0,
    }  # fmt: skip


def test_flash_attn_leaves_a_relative_bias_to_triton_and_says_so(
    device, stand_in, caplog: pytest.LogCaptureFixture
) -> None:
    """In float32 too, which the package does not take."""
    backends._log_once.cache_clear()
    x = torch.randn(1, 3, 5, 16, device=device)
    layout = RelativeLayout(5)
    table = torch.randn(3, layout.size, device=device)
    bias = RelativeBias(table, *layout.text_codes(torch.arange(5, device=device)[None]))
    with caplog.at_level("INFO", logger=backends.__name__):
        one, two = (attention(x, x, x, relative=bias, backend="flash_attn") for _ in range(2))
    assert caplog.messages == [
        "attention: flash_attn has no relative bias: Triton runs where there is one"
    ]
    assert not stand_in
    assert torch.equal(one, two)
    assert torch.equal(one, attention(x, x, x, relative=bias, backend="triton"))


def test_flash_attn_refuses_32_bits(stand_in) -> None:
    assert_refused(
        {"backend": "flash_attn"}, "query: torch.float32; flash_attn takes float16 and bfloat16"
    )
    assert not stand_in


def test_an_absent_flash_attn_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert_refused(
        {"backend": "flash_attn"},
        "backend='flash_attn': the package cannot be used: import of flash_attn halted",
    )


@pytest.mark.parametrize("error", ["OSError", "ImportError", "RuntimeError"])
def test_a_broken_flash_attn_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str
) -> None:
    """It is installed, and its compiled part does not load."""
    (tmp_path / "flash_attn.py").write_text(f"raise {error}('libcudart.so.11: no such file')\n")
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_refused(
        {"backend": "flash_attn"},
        "backend='flash_attn': the package cannot be used: libcudart.so.11: no such file",
    )


@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton", "flash_attn"])
def test_the_output_has_querys_dtype_beside_float32_parameters(device, stand_in, backend) -> None:
    x = torch.randn(1, 2, 5, 16, device=device).half()
    scale = torch.tensor([0.5, 2.0], device=device)
    found = attention(x, x, x, head_scale=scale, backend=backend)
    exact = attention(*[x.double()] * 3, head_scale=scale.double(), backend="eager")
    assert found.dtype == FP16
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-3)
