"""The fused loss against `cross_entropy_sums` in float64, on both backends."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unival.kernels.linear_cross_entropy import backward, forward, op, torch_path
from unival.kernels.linear_cross_entropy.op import linear_cross_entropy
from unival.kernels.linear_cross_entropy.per_token import Inputs, Options
from unival.kernels.linear_cross_entropy.reference import cross_entropy_sums
from unival.kernels.triton_tools.launch import recorded_launches

V, D = 333, 64  # V is no multiple of a tile
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What 2 times PyTorch's own error may be exceeded by, relative to the largest value: sums in
# another order, in float32; and one rounding where PyTorch happens to hit the exact value.
FLOORS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


class Case:
    """Inputs of one call; target and masks fit the options."""

    def __init__(
        self,
        device: torch.device,
        n: int = 63,
        dtype: torch.dtype = torch.float32,
        ignored: str = "some",
        masked: bool = False,
        weighted: bool = False,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        self.options = options
        self.hidden = (scale * torch.randn(n, D, device=device)).to(dtype)
        self.embedding = (0.3 * torch.randn(V, D, device=device)).to(dtype)
        first, last = options.get("constraint_range", (0, V))
        self.target = torch.randint(first, last, (n,), device=device)
        if masked:
            allowed = torch.rand(n, V, device=device) < 0.2
            allowed[torch.arange(n), self.target] = True
            if n > 2:
                allowed[1] = False  # one id allowed: its probability is 1
                allowed[1, self.target[1]] = True
            options["allowed"] = allowed
        if weighted:
            options["weight"] = torch.rand(n, device=device)
        if ignored == "some":
            self.target[::5] = -100
            if masked:
                options["allowed"][::5] = False
        elif ignored == "all":
            self.target[:] = -100

    def run(self, backend: str, factor: float = 1.0) -> dict[str, Tensor]:
        hidden, embedding = self.hidden.clone(), self.embedding.clone()
        sums = linear_cross_entropy(
            hidden.requires_grad_(),
            embedding.requires_grad_(),
            self.target,
            **self.options,
            backend=backend,
        )
        return self.results(sums, hidden, embedding, factor)

    def expected(self, dtype: torch.dtype | None = None, factor: float = 1.0) -> dict[str, Tensor]:
        """By the reference, with logits in dtype (None: the dtype of the case)."""
        dtype = dtype or self.hidden.dtype
        hidden, embedding = self.hidden.to(dtype), self.embedding.to(dtype)
        hidden, embedding = hidden.clone().requires_grad_(), embedding.clone().requires_grad_()
        kept = self.target != -100
        options = dict(self.options)
        for name in ("weight", "allowed"):
            if name in options:
                options[name] = options[name][kept]
        sums = cross_entropy_sums((hidden @ embedding.T)[kept], self.target[kept], **options)
        token_nll = sums.token_nll.new_zeros(len(kept))
        token_nll[kept] = sums.token_nll
        return self.results(sums._replace(token_nll=token_nll), hidden, embedding, factor)

    @staticmethod
    def results(sums: Any, hidden: Tensor, embedding: Tensor, factor: float) -> dict[str, Tensor]:
        (sums.loss * factor).backward()
        return {
            "loss": sums.loss.detach(),
            "nll": sums.nll.detach(),
            "tokens": torch.as_tensor(sums.tokens),
            "token_nll": sums.token_nll,
            "d_hidden": hidden.grad,
            "d_embedding": embedding.grad,
        }

    def check(self, backend: str, factor: float = 1.0) -> dict[str, Tensor]:
        """Error at most 2 times (gradients 3 times) PyTorch's in the same dtype, and a floor."""
        exact, plain = self.expected(torch.float64, factor), self.expected(factor=factor)
        found = self.run(backend, factor)
        assert int(found["tokens"]) == int(exact["tokens"])
        floor = FLOORS[self.hidden.dtype]
        for name in ("loss", "nll", "token_nll", "d_hidden", "d_embedding"):
            want = exact[name].double()
            gradient = name.startswith("d_")
            # Only gradients are rounded to the dtype; losses are float32 in every case.
            slack = floor if gradient else FLOORS[torch.float32]
            size = float(want.abs().max()) if want.numel() else 0.0
            error, other = (
                float((x[name].double() - want).abs().max()) if want.numel() else 0.0
                for x in (found, plain)
            )
            assert error <= (3 if gradient else 2) * other + slack * size, (
                name,
                error,
                other,
                size,
            )
        return found


# VQA; captions; image codes; pretraining.
RECIPES: dict[str, dict[str, Any]] = {
    "vqa": {"label_smoothing": 0.1, "weighted": True, "masked": True},
    "captions": {"label_smoothing": 0.1, "log_end": 0.75, "drop_worst_ratio": 0.05},
    "image codes": {"constraint_range": (100, 301)},
    "pretraining": {"weighted": True},
    "video qa": {"label_smoothing": 0.1, "weighted": True, "masked": True, "log_end": 0.75},
}
ALONE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "smoothing": {"label_smoothing": 0.1},
    "mask": {"masked": True},
    "range": {"constraint_range": (50, 200), "label_smoothing": 0.1},
    "range from the start": {"constraint_range": (2, 77)},  # no gap after the special ids
    "dropping": {"drop_worst_ratio": 0.3},
    "bonus": {"log_end": 0.75},  # at the target only: no second walk
    "bonus without tangent": {"log_end": 1.0, "label_smoothing": 0.1},
    "weighted bonus": {"log_end": 0.5, "label_smoothing": 0.2, "weighted": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(device: torch.device, recipe: str, dtype: torch.dtype, backend: str) -> None:
    Case(device, dtype=dtype, **RECIPES[recipe]).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ALONE)
def test_options_alone(device: torch.device, option: str, backend: str) -> None:
    Case(device, **ALONE[option]).check(backend)


# 0: nothing is launched; 1 and 17: less than a tile; 111: two blocks of tokens in float32, and the
# taller tile of the 16-bit types.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1, 17, 111])
def test_numbers_of_tokens(device: torch.device, n: int, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = Case(device, n=n, dtype=dtype, ignored="none", label_smoothing=0.1).check(backend)
        assert n or (found["loss"] == 0 and not found["d_embedding"].any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", ["none", "all"])
def test_ignored_tokens(device: torch.device, ignored: str, backend: str) -> None:
    found = Case(device, ignored=ignored, **RECIPES["captions"]).check(backend)
    if ignored == "all":
        assert found["loss"] == 0 and not found["d_hidden"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_end", [0.75, 1.0])  # the tangent; the clamp of 1 - p
def test_probabilities_near_one(device: torch.device, log_end: float, backend: str) -> None:
    case = Case(device, n=17, scale=8.0, label_smoothing=0.1, log_end=log_end)
    counted = case.target != -100
    best = (case.hidden @ case.embedding.T).argmax(-1)
    case.target = torch.where(counted, best, case.target)
    assert case.run(backend)["token_nll"][counted].min() < 1e-4
    case.check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(device: torch.device, poisoned: None, backend: str) -> None:
    for recipe in ("video qa", "image codes"):
        Case(device, **RECIPES[recipe]).check(backend)


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of the vocabulary on both backends."""
    monkeypatch.setattr(backward, "CHUNK_BYTES", 63 * 4 * 130)
    monkeypatch.setattr(torch_path, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(torch_path, "KEPT_CHUNK_ELEMENTS", 63 * 200)
    monkeypatch.setattr(torch_path, "COPIED_ELEMENTS", 1)
    monkeypatch.setattr(torch_path, "LONGEST_SUM", 100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["video qa", "captions", "image codes"])
def test_chunks_of_the_vocabulary(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, recipe: str, dtype, backend: str
) -> None:
    small_chunks(monkeypatch)
    Case(device, dtype=dtype, **RECIPES[recipe]).check(backend)


@pytest.mark.parametrize("recipe", ["video qa", "image codes"])
def test_cpu_makes_logits_again_if_they_are_too_many(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    small_chunks(monkeypatch)
    monkeypatch.setattr(torch_path, "KEEP_BYTES", 0)
    Case(device, **RECIPES[recipe]).check("torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient(device: torch.device, backend: str) -> None:
    Case(device, **RECIPES["captions"]).check(backend, factor=-3.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(device: torch.device, backend: str) -> None:
    case = Case(device, n=17, **RECIPES["captions"])
    first = case.run(backend)
    # The interpreter runs one program after the other; only a GPU can bring them out of order.
    for _ in range(19 if device.type == "cuda" else 2):
        for name, value in case.run(backend).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_input(device: torch.device, backend: str) -> None:
    case = Case(device, n=17)
    both = case.run(backend)
    for name in ("hidden", "embedding"):
        inputs = {"hidden": case.hidden, "embedding": case.embedding}
        inputs[name] = inputs[name].clone().requires_grad_()
        sums = linear_cross_entropy(**inputs, target=case.target, backend=backend)
        (gradient,) = torch.autograd.grad(sums.loss, inputs[name])
        assert torch.equal(gradient, both[f"d_{name}"])
        assert not sums.nll.requires_grad and not sums.token_nll.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_logits_are_kept_without_gradients(device: torch.device, backend: str) -> None:
    case = Case(device, n=17)
    with torch.no_grad():
        sums = linear_cross_entropy(case.hidden, case.embedding, case.target, backend=backend)
    torch.testing.assert_close(sums.loss, case.run(backend)["loss"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_strided_and_dims_odd_multiples_of_16(
    device: torch.device, backend: str
) -> None:
    wide, table = torch.randn(17, 96, device=device), torch.randn(V, 96, device=device)
    target = torch.randint(0, V, (17,), device=device)
    hidden, embedding = wide[:, 16:].requires_grad_(), table[:, :80].requires_grad_()
    sums = linear_cross_entropy(hidden, embedding, target, backend=backend)
    found = torch.autograd.grad(sums.loss, (hidden, embedding))
    want = cross_entropy_sums(hidden.double() @ embedding.double().T, target)
    torch.testing.assert_close(sums.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(found, torch.autograd.grad(want.loss, (hidden, embedding)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_opcheck(device: torch.device) -> None:
    case = Case(device, n=17, masked=True, weighted=True)
    hidden, embedding = case.hidden.requires_grad_(), case.embedding.requires_grad_()
    extras = (case.options["weight"], case.options["allowed"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for backend in BACKENDS:
        arguments = (hidden, embedding, case.target, *extras, 0.1, None, 0.05, 0.75, True, backend)
        torch.library.opcheck(op.linear_cross_entropy_op, arguments, test_utils=tests)
        with torch.no_grad():
            _, _, _, _, rows, kept = op.linear_cross_entropy_op(*arguments)
        inputs = (hidden.detach(), embedding.detach(), case.target, extras[1], rows, kept)
        arguments = (torch.ones((), device=device), *inputs, 0.1, None, 0.75, True, True, backend)
        torch.library.opcheck(op.linear_cross_entropy_backward_op, arguments, test_utils=tests)


# Computed: logits, again for the bonus and the gradient where they are not kept; two gradients.
@pytest.mark.parametrize(("backend", "products"), [("torch", 3), ("triton", 5)])
def test_flops(device: torch.device, backend: str, products: int) -> None:
    case = Case(device, n=17, **RECIPES["captions"])
    with FlopCounterMode(display=False) as counter:
        case.run(backend)
    assert counter.get_total_flops() == products * 2 * 17 * V * D


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(8, 64).double()}, r"hidden is float64 \[8, 64\]; expected \[n, D\]"),
    ({"hidden": torch.zeros(2, 4, 64)}, r"hidden is float32 \[2, 4, 64\]"),
    ({"hidden": torch.zeros(64, 8).T}, "hidden has strides"),
    ({"embedding": torch.zeros(64, V).T}, "embedding has strides"),
    ({"embedding": torch.zeros(V, 64).half()}, "expected the same dtype and D"),
    ({"embedding": torch.zeros(V, 32)}, "expected the same dtype and D"),
    ({"embedding": torch.zeros(1, 64)}, "at least 2 ids"),
    ({"hidden": torch.zeros(8, 72), "embedding": torch.zeros(V, 72)}, "multiples of 16"),
    ({"target": torch.zeros(7).long()}, r"target is int64 \[7\]; expected int64 \[8\]"),
    ({"target": torch.zeros(8).int()}, r"target is int32 \[8\]"),
    ({"target": torch.full((8,), V)}, f"target has values from {V} to {V}"),
    ({"target": torch.full((8,), -1)}, "or -100"),
    ({"weight": torch.zeros(8, 1)}, r"weight is float32 \[8, 1\]"),
    ({"weight": torch.zeros(8).long()}, "weight is int64"),
    ({"allowed": torch.ones(8, V)}, f"allowed is float32 .*expected bool .8, {V}"),
    ({"allowed": torch.ones(V, 8).bool().T}, "allowed has strides"),
    ({"weight": torch.zeros(8, device="meta")}, "weight is on meta and hidden on cpu"),
    ({"allowed": torch.ones(8, V).bool(), "constraint_range": (4, 9)}, "at most one"),
    ({"constraint_range": (9, 9)}, "first < last"),
    ({"constraint_range": (4, V + 1)}, f"V = {V}"),
    ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    ({"drop_worst_ratio": -0.1}, "drop_worst_ratio is -0.1"),
    ({"log_end": 1.5}, "log_end is 1.5"),
    ({"backend": "cuda"}, "known: auto, torch, triton"),
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted on this machine")
@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_what_does_not_fit_is_refused(
    device: torch.device, wrong: dict[str, Any], message: str
) -> None:
    fine = {"hidden": torch.zeros(8, 64), "embedding": torch.zeros(V, 64), "backend": "triton"}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(fine | {"target": torch.zeros(8).long()} | wrong))


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {id(a.untyped_storage()) for a in args if isinstance(a, Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor, given)
        return made

    def note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen or id(storage) in given:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self.live -= size
            self.seen.discard(key)

        weakref.finalize(storage, gone)


@contextmanager
def allocations() -> Iterator[Allocations]:
    with Allocations() as found:
        yield found


BOUND = 4096 * 59_457 * 4 // 20  # a twentieth of the float32 logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(0.0, None), (0.1, 0.75)], ids=["plain", "bonus"])
def test_memory_of_the_gpu_path(options: tuple[float, float | None], dtype: torch.dtype) -> None:
    """Fake CUDA tensors: buffers are allocated, kernels are only recorded."""
    n, classes, dim = 4096, 59_457, 768
    asked = Options(classes, options[0], None, 0.0, options[1])
    with FakeTensorMode(), recorded_launches() as launches:
        hidden = torch.empty(n, dim, dtype=dtype, device="cuda")
        embedding = torch.empty(classes, dim, dtype=dtype, device="cuda")
        target = torch.empty(n, dtype=torch.int64, device="cuda")
        inputs = Inputs(hidden, embedding, target, None, None)
        with allocations() as found:
            done = forward.forward(inputs, asked)
            upstream = torch.ones((), device="cuda")
            backward.backward(upstream, inputs, done.rows, asked, True, True)
    gradients = (hidden.numel() + embedding.numel()) * dtype.itemsize
    assert len(launches) > 3
    assert 0 < found.peak - gradients <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(0.0, None), (0.1, 0.75)], ids=["plain", "bonus"])
def test_memory_of_the_cpu_path(
    monkeypatch: pytest.MonkeyPatch, options: tuple[float, float | None], dtype: torch.dtype
) -> None:
    """Of the buffers, only the embedding's gradient depends on the vocabulary: a small one does."""
    n, classes, dim = 4096, 600, 768
    monkeypatch.setattr(torch_path, "KEEP_BYTES", 0)
    hidden = torch.randn(n, dim).to(dtype)
    embedding = (0.02 * torch.randn(classes, dim)).to(dtype)
    inputs = Inputs(hidden, embedding, torch.randint(0, classes, (n,)), None, None)
    asked = Options(classes, options[0], None, 0.0, options[1])
    with allocations() as found:
        done, kept = torch_path.forward(inputs, asked, True)
        torch_path.backward(torch.ones(()), inputs, done.rows, kept, asked, True, True)
    gradients = (hidden.numel() + embedding.numel()) * dtype.itemsize
    assert torch_path.kept_elements(n, asked._replace(classes=59_457)) == 0
    assert 0 < found.peak - gradients <= BOUND


def test_no_float32_copy_of_a_16_bit_vocabulary_is_made() -> None:
    n, classes, dim = 16, 30_000, 768
    hidden = torch.randn(n, dim).bfloat16()
    embedding = (0.02 * torch.randn(classes, dim)).bfloat16()
    inputs = Inputs(hidden, embedding, torch.randint(0, classes, (n,)), None, None)
    asked = Options(classes, 0.1, None, 0.0, None)
    with allocations() as found:
        done, kept = torch_path.forward(inputs, asked, True)
        torch_path.backward(torch.ones(()), inputs, done.rows, kept, asked, True, True)
    gradients = (hidden.numel() + embedding.numel()) * hidden.itemsize
    logits = 4 * n * classes
    assert kept.numel() * 4 == logits
    # The embedding has 92 MB in float32, a part of it 8.
    assert 0 < found.peak - gradients - logits <= 20 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes_on_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setitem(globals(), "V", 59_457)
    monkeypatch.setitem(globals(), "D", 768)
    for options in (*RECIPES.values(), *ALONE.values()):
        Case(torch.device("cuda"), n=1000, dtype=dtype, **options).check("triton")
