"""Wrong arguments of attention: each is refused with a sentence that names it."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_refused
from torch import Tensor

from unival.kernels.attention.op import attention
from unival.kernels.attention.relative import RelativeBias, RelativeLayout
from unival.kernels.triton_tools import launch

OPS = torch.ops.unival
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

Z = torch.zeros(2, 3, 5, 16)
LAYOUT = RelativeLayout(5)
TABLE = torch.zeros(3, LAYOUT.size)
CODES = torch.zeros(1, 5, dtype=torch.int32)


def relative(**changes: Tensor) -> RelativeBias:
    return RelativeBias(**{"table": TABLE, "query_codes": CODES, "key_codes": CODES} | changes)


WRONG = [
    # Heads.
    ({"query": Z[0]}, "query: shape [3, 5, 16]; wanted [batch, heads, length, width]"),
    ({"value": Z[..., 0]}, "value: shape [2, 3, 5]; wanted [batch, heads, length, width]"),
    ({"key": Z.half()}, "key: torch.float16, but query is torch.float32; wanted one dtype"),
    ({"value": Z.bfloat16()}, "value: torch.bfloat16, but query is torch.float32"),
    ({"key": Z.to("meta")}, "key: on meta, but query is on cpu"),
    ({"query": torch.zeros(2, 3, 16, 5).mT}, "query: shape [2, 3, 5, 16] with strides [240, 80, 1"),
    ({"value": torch.zeros(2, 3, 5, 32)[..., ::2]}, "value: shape [2, 3, 5, 16] with strides"),
    ({"key": Z[:1]}, "key: shape [1, 3, 5, 16]; with query [2, 3, 5, 16] wanted [2, 3, keys, 16]"),
    ({"key": Z[:, :2]}, "key: shape [2, 2, 5, 16]; with query [2, 3, 5, 16] wanted [2, 3, keys,"),
    ({"key": Z[..., :8]}, "key: shape [2, 3, 5, 8]; with query [2, 3, 5, 16] wanted [2, 3, keys,"),
    ({"value": Z[:, :, :4]}, "value: shape [2, 3, 4, 16]; wanted key's, [2, 3, 5, 16]"),
    # Positions.
    ({"position_query": Z}, "position_query, position_key: give both or neither"),
    ({"position_key": Z}, "position_query, position_key: give both or neither"),
    (
        {"position_query": Z[:, :, :4], "position_key": Z},
        "position_query: shape [2, 3, 4, 16]; wanted [2, 3, 5, 16], or a batch of 1",
    ),
    (
        {"position_query": Z, "position_key": Z.expand(3, 2, 3, 5, 16)[:, 0]},
        "position_key: shape [3, 3, 5, 16]; wanted [2, 3, 5, 16], or a batch of 1",
    ),
    (
        {"position_query": Z, "position_key": Z[0]},
        "position_key: shape [3, 5, 16]; wanted [2, 3, 5, 16], or a batch of 1",
    ),
    (
        {"position_query": Z.half(), "position_key": Z},
        "position_query: torch.float16 on cpu; wanted query's, torch.float32 on cpu",
    ),
    (
        {"position_query": Z, "position_key": Z.to("meta")},
        "position_key: torch.float32 on meta; wanted query's, torch.float32 on cpu",
    ),
    (
        {"position_query": Z, "position_key": torch.zeros(2, 3, 16, 5).mT},
        "position_key: strides [240, 80, 1, 5]; the elements of a head must lie side by side",
    ),
    # Relative bias.
    ({"relative": relative(table=TABLE[:2])}, "relative.table: shape [2, 9]; wanted [3 heads"),
    ({"relative": relative(table=TABLE[0])}, "relative.table: shape [9]; wanted [3 heads, of"),
    (
        {"relative": relative(table=TABLE.half())},
        "relative.table: torch.float16; wanted float32 or query's torch.float32",
    ),
    ({"relative": relative(query_codes=CODES.long())}, "relative.query_codes: torch.int64; want"),
    ({"relative": relative(key_codes=CODES.short())}, "relative.key_codes: torch.int16; wanted"),
    (
        {"relative": relative(key_codes=CODES[:, :4])},
        "relative.key_codes: shape [1, 4]; wanted [2 or 1, 5]",
    ),
    (
        {"relative": relative(query_codes=CODES[0])},
        "relative.query_codes: shape [5]; wanted [2 or 1, 5]",
    ),
    (
        {"relative": relative(query_codes=CODES.expand(3, -1))},
        "relative.query_codes: shape [3, 5]; wanted [2 or 1, 5]",
    ),
    (
        {"relative": relative(query_codes=CODES.repeat(1, 2)[:, ::2])},
        "relative.query_codes: strides [10, 2]; wanted contiguous rows",
    ),
    ({"relative": relative(table=TABLE.to("meta"))}, "relative.table: on meta, but query is o"),
    ({"relative": relative(key_codes=CODES.to("meta"))}, "relative.key_codes: on meta, but query"),
    # The rest.
    (
        {"head_scale": torch.ones(2)},
        "head_scale: shape [2], torch.float32; wanted [3] in float32 or query's torch.float32",
    ),
    ({"head_scale": torch.ones(3, 1)}, "head_scale: shape [3, 1], torch.float32; wanted [3] in"),
    ({"head_scale": torch.ones(3).half()}, "head_scale: shape [3], torch.float16; wanted [3] in"),
    ({"head_scale": torch.ones(3, device="meta")}, "head_scale: on meta, but query is on cpu"),
    (
        {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
        "key_padding_mask: shape [2, 4], torch.bool; wanted bool [2, 5]",
    ),
    (
        {"key_padding_mask": torch.zeros(2, 5)},
        "key_padding_mask: shape [2, 5], torch.float32; wanted bool [2, 5]",
    ),
    (
        {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)},
        "key_padding_mask: shape [1, 5], torch.bool; wanted bool [2, 5]",
    ),
    (
        {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool, device="meta")},
        "key_padding_mask: on meta, but query is on cpu",
    ),
    ({"dropout": 1.0}, "dropout: 1.0; wanted at least 0 and less than 1"),
    ({"dropout": -0.1}, "dropout: -0.1; wanted at least 0 and less than 1"),
    ({"seed": torch.tensor([1, 2])}, "seed: shape [2], torch.int64; wanted int64 [1]"),
    ({"seed": torch.tensor([1], device="meta")}, "seed: on meta, but query is on cpu"),
    ({"dropout": float("nan")}, "dropout: nan; wanted at least 0 and less than 1"),
    (
        {"backend": "cuda"},
        "attention: backend='cuda'; known: auto, sdpa, triton, flash_attn, eager",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_named(arguments, message) -> None:
    assert_refused(arguments, message)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 1, 2, 24), "query: shape [1, 1, 2, 24] has heads of width 24; the Triton "
         "kernels take 16, 32, 64, 128"),
        (torch.zeros(1, 1, 2, 8), "has heads of width 8; the Triton kernels take 16"),
        (torch.zeros(1, 1, 2, 256), "has heads of width 256; the Triton kernels take 16"),
        (Z.double(), "query: torch.float64; the Triton kernels take float32, float16 and bfloat16"),
    ],
)  # fmt: skip
def test_what_only_triton_does_not_take_is_named(device, x, message) -> None:
    x = x.to(device)
    assert_refused({"query": x, "key": x, "value": x, "backend": "triton"}, message)
    found = attention(x, x, x + 1, backend="sdpa")
    assert torch.equal(found, torch.ones_like(x)) and found.dtype == x.dtype


P = torch.zeros(1, 2, 7, 16)
ALL_FOUR = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: give all four or none"
GROWS = "wanted starts that grow from 0 to the packed length 7, and no sequence longer than max_seq"


def starts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_k": None}, ALL_FOUR),
        ({"max_seqlen_q": None}, ALL_FOUR),
        ({"cu_seqlens_q": starts(0, 3, 7).long()}, "cu_seqlens_q: shape [3], torch.int64; wanted "
         "int32 [sequences + 1]"),
        ({"cu_seqlens_k": starts(0, 3, 7)[None]}, "cu_seqlens_k: shape [1, 3], torch.int32; want"),
        ({"cu_seqlens_k": starts()}, "cu_seqlens_k: shape [0], torch.int32; wanted int32 [seq"),
        ({"cu_seqlens_q": starts(1, 3, 7)}, f"cu_seqlens_q: {GROWS}len 4"),
        ({"cu_seqlens_q": starts(0, 3, 6)}, f"cu_seqlens_q: {GROWS}len 4"),
        ({"cu_seqlens_k": starts(0, 3, 8)}, f"cu_seqlens_k: {GROWS}len 5"),
        ({"cu_seqlens_k": starts(0, 4, 3, 7)}, f"cu_seqlens_k: {GROWS}len 5"),  # shrinks
        ({"max_seqlen_q": 3}, f"cu_seqlens_q: {GROWS}len 3"),
        ({"cu_seqlens_k": starts(0, 2, 4, 7)}, "cu_seqlens_k: 3 sequences; cu_seqlens_q has 2"),
        (dict.fromkeys(("query", "key", "value"), torch.zeros(2, 2, 7, 16)),
         "query: shape [2, 2, 7, 16]; packed sequences have a batch of 1"),
        ({"key_padding_mask": torch.zeros(1, 7, dtype=torch.bool)},
         "key_padding_mask: packed sequences have no padding; leave it out"),
        ({"backend": "eager"}, "cu_seqlens_q: backend='eager' takes no packed sequences here"),
        ({"backend": "flash_attn"}, "cu_seqlens_q: backend='flash_attn' takes no packed sequences"),
    ],
)  # fmt: skip
def test_wrong_packing_is_named(changes, message) -> None:
    right = {
        "query": P, "key": P, "value": P, "cu_seqlens_q": starts(0, 3, 7),
        "cu_seqlens_k": starts(0, 5, 7), "max_seqlen_q": 4, "max_seqlen_k": 5,
    }  # fmt: skip
    assert attention(**right).shape == P.shape
    assert_refused(right | changes, message)


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    message = (
        "attention: backend='triton' with tensors on cpu: Triton's kernels need an NVIDIA GPU, or "
        "TRITON_INTERPRET=1 in the environment before Python starts"
    )
    assert_refused({"backend": "triton"}, message)
    # A relative bias takes flash_attn to Triton, which cannot run here either.
    assert_refused({"backend": "flash_attn", "relative": relative()}, message)
    assert attention(Z, Z, Z + 1).min() == 1
