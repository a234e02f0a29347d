"""Attention: every implementation against float64, over the model's shapes and hostile ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    Problem,
    assert_as_exact_as_pytorch,
    decoder,
    encoder,
    image_codes,
    problem,
    random_patches,
)
from torch import Tensor

from unival.kernels.attention import backward, blocked
from unival.kernels.attention.forward import attention_forward
from unival.kernels.attention.inputs import Inputs
from unival.kernels.attention.op import attention
from unival.kernels.attention.relative import RelativeBias

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = [("triton", FP32), ("triton", FP16), ("triton", BF16), ("sdpa", FP32), ("sdpa", BF16)]

CASES: dict[str, Callable[[torch.device], Problem]] = {
    # Shared positions and codes, padding: gradients of positions and table are sums over samples.
    "encoder of image and text": lambda d: encoder(d, 5, 6, 9),
    "encoder of text alone": lambda d: encoder(d, 0, 0, 17),
    "encoder of an image alone": lambda d: encoder(d, 6, 6, 0, padding=False),
    # Own positions and codes in every sample: one scatter a sample.
    "random patches": lambda d: random_patches(d, 20, 7, batch=3),
    # Two kinds of rows in a batch; the slot before the first code has biases of its own.
    "text and image codes": lambda d: image_codes(d, 5),
    "decoder": lambda d: decoder(d, 21),
    # More keys than queries: the causal diagonal is shifted.
    "decoder with a past": lambda d: decoder(d, 5, past=14),
    # S != T, no relative bias, padded keys.
    "cross attention": lambda d: problem(d, queries=13, keys=45, padding=True),
    "no positions, no head scale": lambda d: problem(d, positions=None, head_scale=False),
    "more heads than a block of samples": lambda d: encoder(d, 2, 3, 4, batch=5, heads=3, width=16),
    "wide heads": lambda d: encoder(d, 4, 4, 5, width=128, batch=1, heads=1),
    "dropout": lambda d: add_dropout(encoder(d, 4, 4, 9), d),
}


def add_dropout(given: Problem, device: torch.device) -> Problem:
    given.options |= {"dropout": 0.3, "seed": torch.tensor([2**40 + 5], device=device)}
    return given


# float32 interprets many small blocks: most of its cases are slow.
QUICK = ("encoder of image and text", "random patches", "decoder with a past", "cross attention")
EXACT = [
    pytest.param(
        backend,
        dtype,
        name,
        marks=[] if name in QUICK or (backend, dtype) != ("triton", FP32) else pytest.mark.slow,
    )
    for backend, dtype in KERNELS
    for name in CASES
]


@pytest.mark.parametrize(("backend", "dtype", "name"), EXACT)
def test_as_exact_as_pytorch(
    device: torch.device,
    poisoned: None,
    surrounded: Callable[[Tensor], Tensor],
    name: str,
    backend: str,
    dtype: torch.dtype,
) -> None:
    given = CASES[name](device)
    found = given.rounded(dtype).run(backend, dtype, surrounded)
    assert_as_exact_as_pytorch(given, found, dtype)


# 1: the smallest; 17 and 63: just over and under a block; 111, 224, 301: several blocks, the last
# one odd or whole.
LENGTHS = [1, 17, 63, 111, 224, 301]
SLOW = [pytest.param("triton", FP32, length, marks=pytest.mark.slow) for length in (111, 224, 301)]
ODD = [("triton", FP32, n) for n in LENGTHS[:3]] + SLOW
ODD += [
    (backend, dtype, n) for backend, dtype in (("triton", BF16), ("sdpa", FP32)) for n in LENGTHS
]


@pytest.mark.parametrize(("backend", "dtype", "length"), ODD)
def test_odd_lengths(
    device: torch.device, poisoned: None, length: int, backend: str, dtype: torch.dtype
) -> None:
    given = encoder(device, 0, 0, length, batch=1, heads=1, padding=length > 2)
    assert_as_exact_as_pytorch(given, given.rounded(dtype).run(backend, dtype), dtype)


# Encoder lengths of the model: image 144 and video 49 (pretraining), 225 and 256 and audio 150
# (fine-tuning), each with text.
@pytest.mark.parametrize(
    ("rows", "columns", "text"), [(12, 12, 24), (7, 7, 24), (15, 15, 24), (16, 16, 24), (10, 15, 8)]
)
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_lengths_of_the_model(
    device: torch.device, backend: str, rows: int, columns: int, text: int
) -> None:
    given = encoder(device, rows, columns, text, batch=2, heads=1, width=64)
    assert_as_exact_as_pytorch(given, given.rounded(BF16).run(backend, BF16), BF16)


# OFA's fine-tuning lengths and the image-code decoder of 1,024 places.
@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda d: encoder(d, 30, 30, 24, batch=1, heads=1, width=64),
    lambda d: encoder(d, 32, 32, 24, batch=1, heads=1, width=64),
    lambda d: image_codes(d, 32, heads=1, width=64),
], ids=["900+24", "1024+24", "1025 causal"])  # fmt: skip
def test_long_lengths(device: torch.device, make: Callable[[torch.device], Problem]) -> None:
    given = make(device)
    assert_as_exact_as_pytorch(given, given.rounded(BF16).run("triton", BF16), BF16)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_head_scale_of_zero_has_the_exact_gradient(
    device: torch.device, poisoned: None, backend: str
) -> None:
    given = encoder(device, 4, 4, 5)
    given.tensors["head_scale"][0] = 0.0
    found = given.rounded(FP32).run(backend, FP32)
    assert_as_exact_as_pytorch(given, found, FP32)
    assert not found["output"][:, 0].any() and not found["value"][:, 0].any()
    assert found["head_scale"][0].abs() > 0.1


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_no_key_give_zeros(
    device: torch.device, poisoned: None, backend: str, causal: bool
) -> None:
    given = encoder(device, 4, 4, 5)
    mask = torch.zeros(2, 21, dtype=torch.bool, device=device)
    mask[0] = True
    mask[1, :3] = True  # causal: the first three queries of this sample see nothing
    given.options |= {"key_padding_mask": mask, "causal": causal}
    found = given.rounded(FP32).run(backend, FP32)
    assert_as_exact_as_pytorch(given, found, FP32)
    assert not found["output"][0].any() and not found["key"][0].any()
    if causal:
        assert not found["output"][1, :, :3].any() and not found["query"][1, :, :3].any()


def test_more_queries_than_keys_with_a_causal_mask(device: torch.device, poisoned: None) -> None:
    given = problem(device, queries=40, keys=11, causal=True)  # the first 29 queries see nothing
    assert_as_exact_as_pytorch(given, given.rounded(FP32).run("triton", FP32), FP32)
    assert_as_exact_as_pytorch(given, given.rounded(FP32).run("sdpa", FP32), FP32)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 5, 2), (5, 0, 2), (5, 5, 0)])
def test_empty_inputs(
    device: torch.device, backend: str, queries: int, keys: int, batch: int
) -> None:
    given = problem(device, batch, queries=queries, keys=keys)
    found = given.run(backend, FP32)
    assert found["output"].shape == (batch, 2, queries, 32)
    for name, value in found.items():
        assert value.shape == (given.tensors | {"output": given.grad})[name].shape
        assert not value.any()


@pytest.mark.parametrize("name", ["encoder of image and text", "random patches", "dropout"])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_small_chunks_change_nothing_but_rounding(
    device: torch.device,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    backend: str,
) -> None:
    """Chunks of one sample, several query blocks a sample, groups of two samples."""
    monkeypatch.setattr(backward, "CHUNK_OF_CACHE", 0.0)
    monkeypatch.setattr(blocked, "SCRATCH_BYTES", 4096)
    monkeypatch.setattr(blocked, "LEAST_ROWS", 1)
    given = CASES[name](device)
    assert_as_exact_as_pytorch(given, given.rounded(FP32).run(backend, FP32), FP32)


def test_groups_of_samples_are_summed(
    device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five samples in groups of two: two whole groups and a half."""
    monkeypatch.setattr(backward, "MAX_GROUP", 2)
    given = encoder(device, 3, 3, 4, batch=5, heads=1)
    assert_as_exact_as_pytorch(given, given.rounded(FP32).run("triton", FP32), FP32)
    found = given.rounded(FP32).run("triton", FP32, deterministic=True)
    assert_as_exact_as_pytorch(given, found, FP32)


@pytest.mark.parametrize("make", [
    lambda d: encoder(d, 3, 3, 4, heads=1),
    lambda d: random_patches(d, 8, 3, batch=2, heads=1),
], ids=["shared codes", "own codes"])  # fmt: skip
def test_deterministic_runs_have_equal_bits(
    device: torch.device, make: Callable[[torch.device], Problem]
) -> None:
    given = make(device)
    first = given.run("triton", BF16, deterministic=True)
    assert_as_exact_as_pytorch(
        given, given.rounded(BF16).run("triton", BF16, deterministic=True), BF16
    )
    # The interpreter runs one program after the other; only a GPU can bring them out of order.
    for _ in range(19 if device.type == "cuda" else 2):
        again = given.run("triton", BF16, deterministic=True)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_gradients_of_some_inputs_only(device: torch.device) -> None:
    given = encoder(device, 3, 3, 4)
    everything = given.run("triton", FP32)
    for wanted in given.tensors:
        leaves = {name: x.float() for name, x in given.tensors.items()}
        leaves[wanted].requires_grad_()
        relative = RelativeBias(leaves.pop("table"), *given.codes)
        output = attention(**leaves, relative=relative, backend="triton", **given.options)
        output.backward(given.grad.float())
        leaf = relative.table if wanted == "table" else leaves[wanted]
        assert torch.equal(leaf.grad, everything[wanted]), wanted


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_strided_heads_are_read_in_place(device: torch.device, backend: str) -> None:
    """Heads cut out of one [B, S, 3 H d] projection, and a gradient that is a transposed view."""
    given = problem(device, heads=3, width=16).rounded(FP32)
    plain = given.run(backend, FP32)
    packed = torch.cat(
        [given.tensors[n].float().transpose(1, 2).flatten(2) for n in ("query", "key", "value")], -1
    )
    query, key, value = (
        part.unflatten(-1, (3, 16)).transpose(1, 2) for part in packed.split(48, dim=-1)
    )
    others = {n: x.float() for n, x in given.tensors.items() if n not in ("query", "key", "value")}
    output = attention(query, key, value, backend=backend, **others, **given.options)
    assert torch.equal(output, plain["output"])


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_packed_sequences_equal_single_ones(
    device: torch.device, poisoned: None, backend: str, dtype: torch.dtype
) -> None:
    """Lengths of one, none, more than a block; queries and keys of different lengths."""
    query_lengths, key_lengths = [1, 40, 0, 19], [7, 40, 3, 70]
    given = random_patches(device, 40, 100, batch=1).rounded(dtype)
    codes, tensors = given.codes, dict(given.tensors)
    rows, columns = slice(0, sum(query_lengths)), slice(0, sum(key_lengths))
    cut = {"query": rows, "key": columns, "value": columns}
    cut |= {"position_query": rows, "position_key": columns}
    tensors |= {name: tensors[name][:, :, part].contiguous() for name, part in cut.items()}
    packed_codes = (codes[0][:, rows].contiguous(), codes[1][:, columns].contiguous())
    starts = [
        torch.tensor([0, *lengths], device=device).cumsum(0).int()
        for lengths in (query_lengths, key_lengths)
    ]
    options = {
        "scale": 0.125, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1],
        "max_seqlen_q": 40, "max_seqlen_k": 70,
    }  # fmt: skip
    packed = Problem(tensors, given.grad[:, :, rows], packed_codes, options)
    found = packed.run(backend, dtype)
    exact: dict[str, list[Tensor]] = {}
    worst: dict[str, float] = {}
    for q0, q1, k0, k1 in zip(
        *(s[i:e] for s in starts for i, e in ((0, -1), (1, None))), strict=True
    ):
        parts = {"query": (q0, q1), "position_query": (q0, q1)}
        parts |= {name: (k0, k1) for name in ("key", "value", "position_key")}
        single = Problem(
            {n: x[:, :, slice(*parts[n])] if n in parts else x for n, x in tensors.items()},
            packed.grad[:, :, q0:q1],
            (packed_codes[0][:, q0:q1].contiguous(), packed_codes[1][:, k0:k1].contiguous()),
            {"scale": 0.125},
        )
        reference, eager = single.run("eager", torch.float64), single.run("eager", dtype)
        for name, value in reference.items():
            exact.setdefault(name, []).append(value)
            if value.numel():
                error = float((eager[name].double() - value).abs().max())
                worst[name] = max(worst.get(name, 0.0), error)
    for name, value in found.items():
        summed = name in ("table", "head_scale")
        whole = sum(exact[name]) if summed else torch.cat(exact[name], dim=2)
        # Rounded once more where four sequences are summed.
        rounding = torch.finfo(dtype).eps * whole.abs().max()
        assert (value.double() - whole).abs().max() <= 3 * worst[name] + rounding, name


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("name", ["decoder with a past", "cross attention", "random patches"])
def test_decoding_one_query_equals_the_last_row(
    device: torch.device, poisoned: None, backend: str, dtype: torch.dtype, name: str
) -> None:
    given = CASES[name](device).rounded(dtype)
    exact = given.run("eager", torch.float64)["output"][:, :, -1:]
    eager = given.run("eager", dtype)["output"][:, :, -1:]
    last = {
        n: x[:, :, -1:] if n in ("query", "position_query") else x for n, x in given.tensors.items()
    }
    codes = given.codes and (given.codes[0][:, -1:].contiguous(), given.codes[1])
    one = Problem(last, given.grad[:, :, -1:], codes, given.options)
    arguments = {n: x.to(dtype) for n, x in one.tensors.items()}
    relative = codes and RelativeBias(arguments.pop("table"), *codes)
    found = attention(**arguments, relative=relative, backend=backend, **one.options)
    ours, theirs = ((x.double() - exact).abs().max() for x in (found, eager))
    assert ours <= 2 * theirs + 0.5 * torch.finfo(dtype).eps * exact.abs().max()


def test_decoding_a_row_without_keys_gives_zeros(device: torch.device, poisoned: None) -> None:
    query, key = torch.randn(2, 2, 1, 16, device=device), torch.randn(2, 2, 40, 16, device=device)
    mask = torch.tensor([[True] * 40, [True] * 39 + [False]], device=device)
    found = attention(query, key, key, key_padding_mask=mask, backend="triton")
    assert not found[0].any()
    torch.testing.assert_close(found[1], key[1, :, -1:])


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_dropout_keeps_the_share_it_says(device: torch.device, backend: str) -> None:
    """With equal scores and values of one, a row's output is its share of kept keys / 0.75."""
    zeros = torch.zeros(2, 2, 64, 16, device=device)
    seeds = [torch.tensor([n], device=device) for n in (1, 2)]
    one, two = (
        attention(zeros, zeros, zeros + 1, dropout=0.25, seed=seed, backend=backend)[..., 0]
        for seed in seeds
    )
    shares = torch.cat([one, two]).double() * 0.75
    assert abs(float(shares.mean()) - 0.75) < 0.01
    # 64 keys kept independently: the share's standard deviation is (0.75 * 0.25 / 64)^1/2.
    assert abs(float(shares.std()) - 0.054) < 0.01
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("make", [
    lambda d: encoder(d, 12, 12, 24, batch=16, heads=12, width=64),
    lambda d: encoder(d, 32, 32, 20, batch=8, heads=12, width=64),
    lambda d: random_patches(d, 40, 24, batch=16, heads=12, width=64),
    lambda d: image_codes(d, 32, heads=12, width=64),
], ids=["168", "1044", "patches", "codes"])  # fmt: skip
def test_full_size_on_a_gpu(
    device: torch.device, dtype: torch.dtype, make: Callable[[torch.device], Problem]
) -> None:
    given = make(device)
    for deterministic in (False, True):
        found = given.rounded(dtype).run("triton", dtype, deterministic=deterministic)
        assert_as_exact_as_pytorch(given, found, dtype)
    for _ in range(20):
        again = given.rounded(dtype).run("triton", dtype, deterministic=True)
        assert all(torch.equal(found[name], again[name]) for name in found)


def test_rows_too_far_apart_for_32_bit_offsets_are_refused() -> None:
    near = torch.empty(1, 1, 2, 16, device="meta")
    far = torch.empty_strided((1, 1, 2, 16), (2**31, 2**31, 2**30, 1), device="meta")
    x = Inputs(
        near, far, near, *[None] * 10,
        scale=1.0, causal=False, dropout=0.0, max_queries=2, max_keys=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="key: rows 1073741824 elements apart"):
        attention_forward(x)
