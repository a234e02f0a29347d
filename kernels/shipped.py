"""Every kernel and configuration that is shipped, as the launches of real calls at real shapes.

Nothing runs: calls are made with fake CUDA tensors while launches are recorded, so that the
resource report compiles what a GPU would get, with the same specialisations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from unival.kernels.attention.backward import attention_backward
from unival.kernels.attention.forward import attention_decode, attention_forward
from unival.kernels.attention.inputs import Inputs
from unival.kernels.layernorm.backward import backward_triton, residual_backward_triton
from unival.kernels.layernorm.forward import forward_triton, residual_forward_triton
from unival.kernels.linear_cross_entropy import backward as loss_backward
from unival.kernels.linear_cross_entropy import forward as loss_forward
from unival.kernels.linear_cross_entropy.per_token import ROWS, Options
from unival.kernels.linear_cross_entropy.per_token import Inputs as LossInputs
from unival.kernels.triton_tools.launch import Launch, recorded_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (768, 1024, 3072, 4096)  # of the norms
VOCABULARY, WIDTH = 59_457, 768


class Call(NamedTuple):
    """A call of an operator and the launches it makes.

    op       attention, attention_decode, layer_norm, ..., linear_cross_entropy
    shape    in words
    dtype    bf16, fp16 or fp32
    forward, backward
             launches of each pass
    """

    op: str
    shape: str
    dtype: str
    forward: list[Launch]
    backward: list[Launch]


def calls(dtypes: tuple[str, ...] = tuple(DTYPES)) -> Iterator[Call]:
    """All calls, those that users make most first."""
    for dtype in dtypes:
        yield from attention_calls(dtype)
        yield from norm_calls(dtype)
        yield from loss_calls(dtype)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def recorded(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Launch]]:
    """What a call returns, and the launches it makes."""
    with recorded_launches() as launches:
        result = function(*arguments)
    return result, launches


class AttentionShape(NamedTuple):
    """Batch, queries, keys, head width, entries of the table; and what differs from an encoder."""

    batch: int
    queries: int
    keys: int
    width: int = 64
    table: int = 576
    causal: bool = False
    own_positions: bool = False
    packed: bool = False
    dropout: float = 0.0


# Most shapes are those of section "Shapes that matter": pretraining, fine-tuning, OFA's length.
ENCODER = {
    "encoder 144+24, batch 128": AttentionShape(128, 168, 168),
    "encoder 316+24, batch 8": AttentionShape(8, 340, 340, table=1_600),
    "encoder 1024+20, batch 8": AttentionShape(8, 1044, 1044, table=4_008),
}
OTHERS = {
    "decoder 16 causal, batch 128": AttentionShape(128, 16, 16, table=31, causal=True),
    "decoder 24 causal, batch 128": AttentionShape(128, 24, 24, table=47, causal=True),
    "decoder 40 causal, batch 128": AttentionShape(128, 40, 40, table=79, causal=True),
    "cross 40 x 168, batch 128": AttentionShape(128, 40, 168, table=0),
    "encoder 144+24, random patches, batch 128": AttentionShape(128, 168, 168, own_positions=True),
    "packed 64 x up to 340": AttentionShape(64, 340, 340, packed=True, own_positions=True),
    "image codes 1024 causal, batch 8": AttentionShape(8, 1024, 1024, table=4_450, causal=True),
    "encoder 144+24 with dropout, batch 128": AttentionShape(128, 168, 168, dropout=0.1),
}
WIDTHS_OF_HEADS = {
    f"encoder 144+24, heads of {width}, batch 64": AttentionShape(64, 168, 168, width)
    for width in (16, 32, 128)
}


def attention_inputs(shape: AttentionShape, dtype: torch.dtype) -> Inputs:
    heads = 768 // shape.width
    batch, rows = shape.batch, (shape.queries, shape.keys)
    if shape.packed:
        rows, batch = (shape.queries * batch, shape.keys * batch), 1
    own = batch if shape.own_positions else 1

    def of_heads(first: int, length: int) -> Tensor:
        return empty(first, length, heads, shape.width, dtype=dtype).transpose(1, 2)

    codes: list[Tensor | None] = [None, None, None]
    if shape.table:
        codes = [empty(heads, shape.table, dtype=dtype)]
        codes += [empty(own, length, dtype=torch.int32) for length in rows]
    starts = empty(shape.batch + 1, dtype=torch.int32) if shape.packed else None
    return Inputs(
        of_heads(batch, rows[0]),
        of_heads(batch, rows[1]),
        of_heads(batch, rows[1]),
        of_heads(own, rows[0]),
        of_heads(own, rows[1]),
        *codes,
        head_scale=empty(heads, dtype=dtype),
        padding=None if shape.packed else empty(batch, rows[1], dtype=torch.uint8),
        query_starts=starts,
        key_starts=starts,
        seed=empty(1, dtype=torch.int64) if shape.dropout else None,
        scale=(2 * shape.width) ** -0.5,
        causal=shape.causal,
        dropout=shape.dropout,
        max_queries=shape.queries,
        max_keys=shape.keys,
    )


def attention_calls(dtype: str) -> Iterator[Call]:
    shapes = ENCODER | WIDTHS_OF_HEADS
    if dtype == "bf16":
        shapes |= OTHERS
    for name, shape in shapes.items():
        for deterministic in (False, True) if name in ENCODER else (False,):
            with FakeTensorMode():
                x = attention_inputs(shape, DTYPES[dtype])
                (output, *saved), forward = recorded(attention_forward, x)
                grad = torch.empty_like(output)
                _, backward = recorded(attention_backward, x, grad, *saved, deterministic)
            label = name + (", deterministic" if deterministic else "")
            yield Call("attention", label, dtype, forward, backward)
    for width in (16, 32, 64, 128):
        with FakeTensorMode():
            x = attention_inputs(AttentionShape(80, 1, 40, width, table=79), DTYPES[dtype])
            _, forward = recorded(attention_decode, x)
        name = f"16 sentences, 5 beams, 40 keys, heads of {width}"
        yield Call("attention_decode", name, dtype, forward, [])


def norm_calls(dtype: str, samples: int = 128, length: int = 168) -> Iterator[Call]:
    for width in WIDTHS:
        shape = f"{samples * length} rows of {width}"
        with FakeTensorMode():
            x, y, z = (empty(samples, length, width, dtype=DTYPES[dtype]) for _ in range(3))
            w, b = (empty(width, dtype=DTYPES[dtype]) for _ in range(2))
            seed = empty(1, dtype=torch.int64)
            for op, gelu in (("layer_norm", False), ("gelu_layer_norm", True)):
                _, forward = recorded(forward_triton, x, w, b, 1e-5, gelu)
                _, backward = recorded(backward_triton, y, x, w, 1e-5, gelu)
                yield Call(op, shape, dtype, forward, backward)
            for op, rate, key in (("", 0.0, None), (" with dropout", 0.1, seed)):
                options = (1e-5, rate, rate, key)
                _, forward = recorded(residual_forward_triton, x, y, w, b, *options)
                _, backward = recorded(residual_backward_triton, x, y, z, w, *options)
                yield Call("residual_layer_norm" + op, shape, dtype, forward, backward)


def loss_calls(dtype: str, tokens: int = 4096) -> Iterator[Call]:
    plain = Options(VOCABULARY, 0.1, None, 0.0, None)
    for n, name, options, masked in (
        (tokens, "smoothing", plain, False),
        (64, "smoothing", plain, False),
        (tokens, "captions", plain._replace(log_end=0.75, drop_worst_ratio=0.05), False),
        (tokens, "answers (trie masks)", plain, True),
        (tokens, "image codes", plain._replace(constraint_range=(50_265, 58_457)), False),
    ):
        with FakeTensorMode():
            inputs = LossInputs(
                empty(n, WIDTH, dtype=DTYPES[dtype]),
                empty(VOCABULARY, WIDTH, dtype=DTYPES[dtype]),
                empty(n, dtype=torch.int64),
                empty(n, dtype=torch.float32),
                empty(n, VOCABULARY, dtype=torch.bool) if masked else None,
            )
            upstream, rows = empty(dtype=torch.float32), empty(ROWS, n, dtype=torch.float32)
            _, forward = recorded(loss_forward.forward, inputs, options)
            _, backward = recorded(
                loss_backward.backward, upstream, inputs, rows, options, True, True
            )
        yield Call("linear_cross_entropy", f"{n} tokens, {name}", dtype, forward, backward)
