"""Attention as operators: registration, compilation, memory, FLOPs, choice of operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unival.kernels import backend as backends
from unival.kernels.attention import blocked
from unival.kernels.attention.backward import attention_backward
from unival.kernels.attention.blocked import backward_blocked, forward_blocked
from unival.kernels.attention.forward import attention_decode, attention_forward
from unival.kernels.attention.inputs import Inputs
from unival.kernels.attention.op import attention
from unival.kernels.attention.reference import attention_reference
from unival.kernels.attention.relative import RelativeBias, RelativeLayout
from unival.kernels.triton_tools.launch import recorded_launches
from unival.kernels.triton_tools.philox import draw_seed
from unival.model.configuration import UnivalConfig
from unival.model.transformer import EncoderLayer, PositionTerms

OPS = torch.ops.unival
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
HEADS, WIDTH = 2, 16
FLOATING = (0, 1, 2, 3, 4, 5, 8)  # query, key, value, positions, table, head scale


class Call(NamedTuple):
    """Arguments of the operators: 13 tensors as in Inputs, and scale to max_keys."""

    tensors: tuple[Tensor | None, ...]
    options: tuple[Any, ...]

    def forward(self, backend: str) -> tuple[Any, ...]:
        return (*self.tensors, *self.options, False, backend)

    def leaves(self) -> Call:
        """With gradients asked for."""
        leaves = [
            x.detach().requires_grad_() if index in FLOATING and x is not None else x
            for index, x in enumerate(self.tensors)
        ]
        return Call(tuple(leaves), self.options)

    def on(self, place: Callable[[Tensor], Tensor]) -> Call:
        return Call(tuple(None if x is None else place(x) for x in self.tensors), self.options)


def make_call(
    device: torch.device,
    dtype: torch.dtype = FP32,
    *,
    batch: int = 2,
    queries: int = 5,
    keys: int = 7,
    positions: int | None = 1,
    codes: int | None = 1,
    rest: bool = True,
    causal: bool = False,
    dropout: float = 0.0,
    strided: bool = False,
) -> Call:
    """positions, codes: their batch, or None for no position part or relative bias."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    query, key = normal(batch, HEADS, queries, WIDTH), normal(batch, HEADS, keys, WIDTH)
    value, pq, pk, table, qc, kc, head_scale, padding, seed = normal(*key.shape), *[None] * 8
    if strided:  # heads cut out of one projection
        cut = normal(batch, keys, 2 * HEADS * WIDTH).split(HEADS * WIDTH, dim=-1)
        key, value = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in cut)
    if positions is not None:
        pq = normal(positions, HEADS, queries, WIDTH)
        pk = normal(positions, HEADS, keys, WIDTH)
    if codes is not None:
        layout = RelativeLayout(keys)
        table = torch.randn(HEADS, layout.size, device=device)  # float32 beside every dtype
        qc, kc = layout.text_codes(torch.arange(keys, device=device).expand(codes, -1))
        qc = qc[:, keys - queries :].contiguous()
    if rest:
        head_scale = normal(HEADS)
        padding = torch.zeros(batch, keys, dtype=torch.uint8, device=device)
        padding[-1, keys // 2 :] = 1
    if dropout:
        seed = torch.tensor([11], device=device)
    tensors = (query, key, value, pq, pk, table, qc, kc, head_scale, padding, None, None, seed)
    return Call(tensors, (0.2, causal, dropout, queries, keys))


def packed_call(device: torch.device, dtype: torch.dtype = FP32) -> Call:
    call = make_call(device, dtype, batch=1, queries=6, keys=9)
    tensors = list(call.tensors)
    tensors[9] = None
    tensors[10], tensors[11] = (
        torch.tensor(starts, dtype=torch.int32, device=device) for starts in ([0, 2, 6], [0, 5, 9])
    )
    return Call(tuple(tensors), (0.2, False, 0.0, 4, 5))


CALLS: dict[str, Callable[..., Call]] = {
    # Every optional tensor absent; the output is saved for backward, not a second one.
    "bare": lambda *a: make_call(*a, positions=None, codes=None, rest=False),
    # Positions and codes shared by the batch, a table, head scale and padding.
    "everything": make_call,
    # Positions and codes for each sequence, heads that are views, a seed.
    "own positions, strided, dropout": lambda *a: make_call(
        *a, positions=2, codes=2, strided=True, dropout=0.3
    ),
    # The table without the position part: dpq and dpk are absent, the bias kernel runs.
    "table alone, causal": lambda *a: make_call(*a, positions=None, rest=False, causal=True),
    # Several sequences in a batch of one, with the longest lengths.
    "packed": packed_call,
}
CHOICES = [(backend, name) for backend in ("sdpa", "triton") for name in CALLS]
# The registration is one for all cases, and each takes seconds where kernels are interpreted.
REGISTERED = [("sdpa", name) for name in CALLS] + [("triton", "everything"), ("triton", "packed")]


@pytest.mark.parametrize(("backend", "name"), REGISTERED)
def test_forward_is_registered_correctly(device, backend, name) -> None:
    torch.library.opcheck(OPS.attention_forward, CALLS[name](device).leaves().forward(backend))


@pytest.mark.parametrize(("backend", "name"), REGISTERED)
def test_backward_is_registered_correctly(device, backend, name) -> None:
    call = CALLS[name](device)
    y, unscaled, statistics = OPS.attention_forward(*call.forward(backend))
    saved = y if call.tensors[8] is None else unscaled
    arguments = (torch.randn_like(y), saved, statistics, *call.forward(backend))
    torch.library.opcheck(OPS.attention_backward, arguments)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("optional", [False, True])
def test_decode_is_registered_correctly(device, backend, optional) -> None:
    given = {} if optional else {"positions": None, "codes": None, "rest": False}
    call = make_call(device, queries=1, **given)
    torch.library.opcheck(OPS.attention_decode, (*call.tensors[:10], 0.2, backend))


def metadata(x: Tensor) -> tuple:
    return tuple(x.shape), x.dtype, x.stride()


@pytest.mark.parametrize(("backend", "name"), CHOICES)
def test_fake_results_are_laid_out_as_real_ones(device, backend, name) -> None:
    """On a CPU and on a GPU that is not there; the table is float32 beside bfloat16."""
    call = CALLS[name](device, BF16)

    def run(call: Call) -> list[Tensor]:
        found = OPS.attention_forward(*call.forward(backend))
        saved = found[0] if call.tensors[8] is None else found[1]
        grad = torch.ones_like(found[0])
        return [*found, *OPS.attention_backward(grad, saved, found[2], *call.forward(backend))]

    real = [metadata(x) for x in run(call)]
    for where in ("cpu", "cuda"):
        with FakeTensorMode():
            fake = run(
                call.on(
                    lambda x, where=where: torch.empty_strided(
                        x.shape, x.stride(), dtype=x.dtype, device=where
                    )
                )
            )
        assert [metadata(x) for x in fake] == real
        assert {x.device.type for x in fake} == {where}
    # The memory order [B, S, H, d], which the output projection reads as [B, S, D].
    assert real[0][2] == call.tensors[0].transpose(1, 2).contiguous().transpose(1, 2).stride()


class Watch(TorchDispatchMode):
    """Elements of every tensor that an operator gives, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor):
                self.seen.append((x.numel(), str(func)))
        return found

    @property
    def names(self) -> set[str]:
        return {name for _, name in self.seen}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shared", [True, False])  # own codes: one scatter a sequence
def test_triton_allocates_nothing_of_the_size_of_the_scores(deterministic, shared) -> None:
    """OFA's 1,024 patches and 20 words: the outputs themselves are the largest tensors."""
    batch, heads, length, width = 8, 12, 1044, 64
    layout = RelativeLayout(20, 32, 32)
    with FakeTensorMode(), Watch() as watch, recorded_launches() as launches:
        query, key, value, grad = (
            torch.empty(batch, heads, length, width, device="cuda", dtype=BF16) for _ in range(4)
        )
        own = 1 if shared else batch
        pq, pk = (query.new_empty(own, heads, length, width) for _ in range(2))
        codes = torch.empty(own, length, device="cuda", dtype=torch.int32)
        padding = torch.empty(batch, length, device="cuda", dtype=torch.uint8)
        x = Inputs(
            query, key, value, pq, pk, torch.empty(heads, layout.size, device="cuda"), codes, codes,
            query.new_empty(heads), padding, None, None, None, 0.1, False, 0.0, length, length,
        )  # fmt: skip
        _, unscaled, statistics = attention_forward(x)
        attention_backward(x, grad, unscaled, statistics, deterministic)
    largest = max(watch.seen)
    assert largest[0] == query.numel(), largest
    assert query.numel() < batch * heads * length * length
    kernels = {launch.kernel.__name__ for launch in launches}
    assert len(kernels) == 5, kernels
    with FakeTensorMode(), Watch() as watch:  # what the watch says of an implementation that does
        attention_reference(*(torch.empty(batch, heads, length, width) for _ in range(3)))
    assert max(watch.seen)[0] == batch * heads * length * length


def test_triton_decodes_without_a_tensor_but_the_output() -> None:
    with FakeTensorMode(), Watch() as watch, recorded_launches() as launches:
        query, key = (torch.empty(40, 12, n, 64, device="cuda", dtype=BF16) for n in (1, 1044))
        watch.seen.clear()
        attention_decode(
            Inputs(query, key, key, *[None] * 10, 0.1, False, 0.0, 1, 1044)  # type: ignore[misc]
        )
    assert {numel for numel, _ in watch.seen} == {query.numel()}
    assert [launch.grid for launch in launches] == [(12, 40)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scratch", [2**13, 2**15])  # some queries of a sequence; all of one
def test_the_blocked_path_works_in_bounded_scratch(
    device, monkeypatch: pytest.MonkeyPatch, shared, scratch
) -> None:
    monkeypatch.setattr(blocked, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(blocked, "LEAST_ROWS", 1)
    batch, length = 3, 64
    own = 1 if shared else batch
    call = make_call(
        device, batch=batch, queries=length, keys=length, positions=own, codes=own, dropout=0.1
    )
    x = Inputs(*call.tensors, *call.options)
    with Watch() as watch:
        y, unscaled, statistics = forward_blocked(x)
        backward_blocked(x, torch.ones_like(y), unscaled, statistics)
    # An input, or a block of scores in float32.
    bound = max(y.numel(), scratch // 4)
    assert max(watch.seen)[0] <= bound < batch * HEADS * length**2, max(watch.seen)
    blocks = [numel for numel, name in watch.seen if "exp_." in name]
    assert scratch // 8 < max(blocks) <= scratch // 4  # no smaller than they need to be


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiled_attention_equals_eager(device, backend) -> None:
    layout = RelativeLayout(9)
    query_codes, key_codes = layout.text_codes(torch.arange(9, device=device)[None])
    padding = torch.zeros(2, 9, dtype=torch.bool, device=device)
    padding[1, 6:] = True

    def block(query, key, value, pq, pk, table, scale) -> Tensor:
        return attention(
            query * 2, key, value, position_query=pq, position_key=pk,
            relative=RelativeBias(table, query_codes, key_codes), head_scale=scale,
            key_padding_mask=padding, causal=True, backend=backend,
        ).transpose(1, 2).flatten(2)  # fmt: skip

    shapes = [(2, 2, 9, 16)] * 3 + [(1, 2, 9, 16)] * 2 + [(2, layout.size), (2,)]
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    outputs = [f(*leaves) for f in (block, torch.compile(block, fullgraph=True))]
    torch.testing.assert_close(outputs[1], outputs[0])
    slope = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, leaves, slope) for output in outputs]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(gradient.any() for gradient in gradients[0])


def test_a_compiled_encoder_layer_equals_eager() -> None:
    config = UnivalConfig(
        vocab_size=11, d_model=32, ffn_dim=48, num_heads=2, encoder_layers=1, decoder_layers=1,
        image_layers=None, video_layers=None, dropout=0.0, encoder_drop_path=0.0,
    )  # fmt: skip
    layer, following = EncoderLayer(config, 0.0), EncoderLayer(config, 0.0).self_attn_norm
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    layout = RelativeLayout(7)
    codes = layout.text_codes(torch.arange(7)[None])
    x = torch.randn(2, 7, 32, requires_grad=True)
    terms = PositionTerms(*(torch.randn(1, 2, 7, 16, requires_grad=True) for _ in range(2)))
    bias = RelativeBias(torch.randn(2, layout.size, requires_grad=True), *codes)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    leaves = [x, *terms, bias.table, *layer.parameters()]
    slopes = [torch.randn(2, 7, 32) for _ in range(2)]
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        found = run(x, layer.self_attn_norm(x), following, terms, bias, padding)
        results.append((found, torch.autograd.grad(found, leaves, slopes)))
    torch.testing.assert_close(results[1], results[0])
    assert all(gradient.any() for gradient in results[0][1])


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize(
    ("positions", "forward", "backward"),
    [
        # q.k, w.v; then q.k, dy.v, ds.k, ds.q, w.dy
        (False, 2, 5),
        # pq.pk more; then pq.pk, ds.pk, ds.pq more
        (True, 3, 8),
    ],
)
def test_flops_are_those_of_the_products(device, backend, positions, forward, backward) -> None:
    call = make_call(device, positions=1 if positions else None, queries=6, keys=10).leaves()
    q, k, v, pq, pk, table, qc, kc, scale, *_ = call.tensors
    relative = RelativeBias(table, qc, kc)
    options = {"position_query": pq, "position_key": pk, "head_scale": scale, "backend": backend}
    product = 2 * 2 * HEADS * 6 * 10 * WIDTH
    with FlopCounterMode(display=False) as counter:
        y = attention(q, k, v, relative=relative, **options)
    assert counter.get_total_flops() == forward * product
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == backward * product
    last = {"position_query": pq[:, :, -1:], "position_key": pk} if positions else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(q[:, :, -1:], k, v, backend=backend, **last)
    assert counter.get_total_flops() == forward * product // 6


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("name", ["everything", "bare"])
def test_only_inputs_the_output_and_statistics_are_saved(device, backend, name) -> None:
    """bare: no second output is kept where there is no head scale."""
    call = CALLS[name](device, BF16).leaves()
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        y, *_ = OPS.attention_forward(*call.forward(backend))
    given = [x for x in call.tensors if x is not None]
    expected = {x.data_ptr() for x in given}
    kept = [x for x in saved if x.data_ptr() not in expected]
    assert len(saved) == len(given) + 2 and len(kept) == 2
    assert sum(x.nbytes for x in kept) == y.nbytes + 2 * 4 * 2 * HEADS * 5
    if name == "bare":
        assert y.data_ptr() in {x.data_ptr() for x in kept}


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_gradients_of_any_layout_are_taken(device, backend) -> None:
    """Expanded by sum(), transposed, and with every second element of a wider tensor."""
    leaves = [torch.randn(2, 2, 5, 16, device=device, requires_grad=True) for _ in range(3)]
    y = attention(*leaves, backend=backend)
    values = torch.randn(2, 2, 5, 32, device=device)[..., ::2]
    for given, same in (
        (torch.ones(1, device=device).expand_as(y), torch.ones_like(y)),
        (values.mT.contiguous().mT, values.contiguous()),
        (values, values.contiguous()),
    ):
        assert given.stride(-1) != 1
        found, wanted = (
            torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in (given, same)
        )
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_one_query_without_gradient_or_dropout_is_decoded(device) -> None:
    query, key = torch.randn(2, 2, 1, 16, device=device), torch.randn(2, 2, 5, 16, device=device)
    cases = [
        ({}, "attention_decode"),
        ({"causal": True}, "attention_decode"),
        ({"dropout": 0.5}, "attention_forward"),
        ({"query": query.clone().requires_grad_()}, "attention_forward"),
        ({"query": query.expand(-1, -1, 2, -1)}, "attention_forward"),
    ]
    for options, name in cases:
        with Watch() as watch:
            attention(**{"query": query, "key": key, "value": key} | options)
        assert f"unival.{name}.default" in watch.names, options
    with Watch() as watch, torch.no_grad():
        attention(query.clone().requires_grad_(), key, key)
    assert "unival.attention_decode.default" in watch.names


@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
def test_dropout_without_a_seed_draws_one_from_pytorchs_generator(device, backend) -> None:
    x = torch.randn(1, 2, 9, 16, device=device)
    torch.manual_seed(5)
    drawn = attention(x, x, x, dropout=0.4, backend=backend)
    torch.manual_seed(5)
    again = attention(x, x, x, dropout=0.4, seed=draw_seed(x.device), backend=backend)
    other = attention(x, x, x, dropout=0.4, backend=backend)
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    plain = attention(x, x, x, seed=torch.tensor([3], device=device), backend=backend)
    assert torch.equal(plain, attention(x, x, x, backend=backend))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("name", ["mask", "mask columns", "head scale", "table", "table columns"])
def test_tensors_with_gaps_give_what_contiguous_ones_do(device, backend, name) -> None:
    layout = RelativeLayout(7)
    codes = layout.text_codes(torch.arange(7, device=device)[None])
    mask = torch.arange(7, device=device) >= torch.tensor([[4], [7]], device=device)
    options = {
        "key_padding_mask": mask,
        "head_scale": torch.tensor([0.5, 2.0], device=device),
        "relative": torch.randn(2, layout.size, device=device),
    }
    spread = {
        "mask": ("key_padding_mask", lambda x: x.T.contiguous().T),
        "mask columns": ("key_padding_mask", lambda x: torch.stack([x, ~x], -1)[..., 0]),
        "head scale": ("head_scale", lambda x: torch.stack([x, -x], -1)[..., 0]),
        "table": ("relative", lambda x: x.T.contiguous().T),
        "table columns": ("relative", lambda x: torch.stack([x, -x], -1)[..., 0]),
    }
    argument, gap = spread[name]
    x = torch.randn(2, 2, 7, 16, device=device)
    found = []
    for change in (lambda x: x, gap):
        given = options | {argument: change(options[argument])}
        given["relative"] = RelativeBias(given["relative"], *codes)
        found.append(attention(x, x, x, backend=backend, **given))
    torch.testing.assert_close(found[1], found[0])


def test_auto_says_once_what_it_runs_and_why(caplog: pytest.LogCaptureFixture) -> None:
    backends._log_once.cache_clear()
    x = torch.zeros(2, 3, 5, 16)
    with caplog.at_level("INFO", logger=backends.__name__):
        attention(x, x, x)
        attention(x, x, x, causal=True)
        with FakeTensorMode(), Watch() as watch:
            attention(*(torch.empty(1, 1, 4, 16, device="cuda") for _ in range(3)))
    assert caplog.messages == [
        "attention: backend auto runs sdpa (the tensors are on the cpu)",
        "attention: backend auto runs triton (the tensors are on a GPU)",
    ]
    assert "unival.attention_forward.default" in watch.names
