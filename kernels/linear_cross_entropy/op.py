"""The operators, their gradients and FLOPs, and the function that the training code calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from unival.kernels.backend import resolve_backend
from unival.kernels.linear_cross_entropy import torch_path
from unival.kernels.linear_cross_entropy.per_token import IGNORED, ROWS, Inputs, Options
from unival.kernels.linear_cross_entropy.reference import LossSums

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("torch", "triton")
DIM_MULTIPLE = 16  # the smallest tile of a Triton product


def linear_cross_entropy(
    hidden: Tensor,
    embedding: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    allowed: Tensor | None = None,
    constraint_range: tuple[int, int] | None = None,
    drop_worst_ratio: float = 0.0,
    log_end: float | None = None,
    backend: str = "auto",
) -> LossSums:
    """`cross_entropy_sums` of hidden @ embedding^T, without holding the logits.

    The logits are float32 sums; with few tokens the CPU keeps them for the gradient. Nothing waits
    for a GPU.

    Args:
        hidden: [n, D] float32, float16 or bfloat16; D a multiple of 16 on a GPU.
        embedding: [V, D] of the same dtype.
        target: int64 [n]; -100 leaves a token out.
        label_smoothing: in [0, 1), spread over the allowed ids.
        weight: [n], multiplies the log-probabilities.
        allowed: bool [n, V], ids that have probability; not together with constraint_range.
        constraint_range: (first, last): only ids 0-3 and first..last-1 have probability.
        drop_worst_ratio: in [0, 1), share of the counted tokens with the largest losses left out.
        log_end: in [0, 1], adds the encouraging loss with this end of the logarithm.
        backend: auto, torch or triton.

    Returns:
        LossSums in float32. `tokens` is an int, or a 0-d tensor on a GPU, under torch.compile and
        for fake tensors. token_nll is 0 where a token is left out. Only `loss` is differentiable,
        by hidden and embedding.

    Raises:
        ValueError: an argument that does not fit; a target outside the vocabulary on a CPU (on a
            GPU that is a device-side assertion).
    """
    _check_matrices(hidden, embedding)
    _check_tokens(hidden, embedding, target, weight, allowed)
    _check_options(len(embedding), label_smoothing, drop_worst_ratio, log_end)
    _check_range(len(embedding), allowed, constraint_range)
    chosen = resolve_backend("linear_cross_entropy", backend, hidden.device, BACKENDS)
    if chosen == "triton" and hidden.shape[1] % DIM_MULTIPLE:
        raise ValueError(
            f"hidden has D = {hidden.shape[1]}; the triton backend takes multiples of 16"
        )
    differentiable = hidden.requires_grad or embedding.requires_grad
    loss, nll, tokens, token_nll, _, _ = linear_cross_entropy_op(
        hidden,
        embedding,
        target,
        weight,
        allowed,
        label_smoothing,
        constraint_range,
        drop_worst_ratio,
        log_end,
        differentiable and torch.is_grad_enabled(),
        chosen,
    )
    # A fake tensor has no value, and reading a GPU's would wait for it.
    known = type(tokens) is Tensor and tokens.device.type == "cpu"
    count = int(tokens) if known and not torch.compiler.is_compiling() else tokens
    return LossSums(loss, nll, count, token_nll)  # type: ignore[arg-type]


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_matrices(hidden: Tensor, embedding: Tensor) -> None:
    for name, tensor, expected in (
        ("hidden", hidden, "[n, D]"),
        ("embedding", embedding, "[V, D]"),
    ):
        if tensor.ndim != 2 or tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {_shape(tensor)}; expected {expected} of float32, float16 or bfloat16"
            )
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}; the last dimension must be contiguous"
            )
    if hidden.dtype != embedding.dtype or hidden.shape[1] != embedding.shape[1]:
        raise ValueError(
            f"hidden is {_shape(hidden)} and embedding {_shape(embedding)}; "
            "expected the same dtype and D"
        )
    if len(embedding) < 2:
        raise ValueError(f"embedding is {_shape(embedding)}; expected at least 2 ids")


def _check_tokens(
    hidden: Tensor, embedding: Tensor, target: Tensor, weight: Tensor | None, allowed: Tensor | None
) -> None:
    n, classes = len(hidden), len(embedding)
    if target.shape != (n,) or target.dtype != torch.int64:
        raise ValueError(f"target is {_shape(target)}; expected int64 [{n}] for hidden [{n}, D]")
    if weight is not None and (weight.shape != (n,) or not weight.is_floating_point()):
        raise ValueError(f"weight is {_shape(weight)}; expected a floating dtype, [{n}]")
    if allowed is not None:
        if allowed.shape != (n, classes) or allowed.dtype != torch.bool:
            raise ValueError(f"allowed is {_shape(allowed)}; expected bool [{n}, {classes}]")
        if allowed.stride(1) != 1:
            raise ValueError(
                f"allowed has strides {allowed.stride()}; the last dimension must be contiguous"
            )
    named = {"embedding": embedding, "target": target, "weight": weight, "allowed": allowed}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}")


def _check_options(
    classes: int, label_smoothing: float, drop_worst_ratio: float, log_end: float | None
) -> None:
    rates = {"label_smoothing": label_smoothing, "drop_worst_ratio": drop_worst_ratio}
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} is {rate}; expected 0 <= {name} < 1")
    if log_end is not None and not 0.0 <= log_end <= 1.0:
        raise ValueError(f"log_end is {log_end}; expected 0 <= log_end <= 1, or None")


def _check_range(
    classes: int, allowed: Tensor | None, constraint_range: tuple[int, int] | None
) -> None:
    if constraint_range is None:
        return
    if allowed is not None:
        raise ValueError("allowed and constraint_range are both given; expected at most one")
    first, last = constraint_range
    if not 0 <= first < last <= classes:
        raise ValueError(
            f"constraint_range is ({first}, {last}); expected 0 <= first < last <= V = {classes}"
        )


def _check_targets(target: Tensor, classes: int) -> None:
    fine = (((target >= 0) & (target < classes)) | (target == IGNORED)).all()
    if target.device.type == "cpu":
        if not fine:
            raise ValueError(
                f"target has values from {int(target.min())} to {int(target.max())}; "
                f"expected 0 <= target < V = {classes}, or {IGNORED}"
            )
    else:
        torch._assert_async(fine, "linear_cross_entropy: target outside the vocabulary")


def _options(
    classes: int,
    label_smoothing: float,
    constraint_range: Sequence[int] | None,
    drop_worst_ratio: float,
    log_end: float | None,
) -> Options:
    limits = None if constraint_range is None else (constraint_range[0], constraint_range[1])
    return Options(classes, label_smoothing, limits, drop_worst_ratio, log_end)


@torch.library.custom_op("unival::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    embedding: Tensor,
    target: Tensor,
    weight: Tensor | None,
    allowed: Tensor | None,
    label_smoothing: float,
    constraint_range: Sequence[int] | None,
    drop_worst_ratio: float,
    log_end: float | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll, tokens, token_nll [n], rows [7, n], kept logits or nothing)."""
    _check_targets(target, len(embedding))
    inputs = Inputs(hidden, embedding, target, weight, allowed)
    options = _options(len(embedding), label_smoothing, constraint_range, drop_worst_ratio, log_end)
    if backend == "torch":
        done, kept = torch_path.forward(inputs, options, keep)
        return (*done, kept)
    from unival.kernels.linear_cross_entropy import forward

    return (*forward.forward(inputs, options), hidden.new_empty(0, dtype=torch.float32))


@linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    embedding: Tensor,
    target: Tensor,
    weight: Tensor | None,
    allowed: Tensor | None,
    label_smoothing: float,
    constraint_range: Sequence[int] | None,
    drop_worst_ratio: float,
    log_end: float | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = hidden.shape[0]
    options = _options(
        embedding.shape[0], label_smoothing, constraint_range, drop_worst_ratio, log_end
    )
    kept = torch_path.kept_elements(n, options) if keep and backend == "torch" else 0
    shapes: tuple[tuple[int, ...], ...] = ((), (), (), (n,), (ROWS, n), (kept,))
    loss, nll, tokens, *rest = (hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return (loss, nll, tokens.to(torch.int64), *rest)  # type: ignore[return-value]


@torch.library.custom_op("unival::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(
    upstream: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    target: Tensor,
    allowed: Tensor | None,
    rows: Tensor,
    kept: Tensor,
    label_smoothing: float,
    constraint_range: Sequence[int] | None,
    log_end: float | None,
    need_hidden: bool,
    need_embedding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(d_hidden, d_embedding); one that is not needed has no elements. upstream: 0-d float32."""
    inputs = Inputs(hidden, embedding, target, None, allowed)
    options = _options(len(embedding), label_smoothing, constraint_range, 0.0, log_end)
    if backend == "torch":
        gradients = torch_path.backward(
            upstream, inputs, rows, kept, options, need_hidden, need_embedding
        )
    else:
        from unival.kernels.linear_cross_entropy import backward

        gradients = backward.backward(upstream, inputs, rows, options, need_hidden, need_embedding)
    d_hidden, d_embedding = (hidden.new_empty(0) if d is None else d for d in gradients)
    return d_hidden, d_embedding


@linear_cross_entropy_backward_op.register_fake
def _(
    upstream: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    target: Tensor,
    allowed: Tensor | None,
    rows: Tensor,
    kept: Tensor,
    label_smoothing: float,
    constraint_range: Sequence[int] | None,
    log_end: float | None,
    need_hidden: bool,
    need_embedding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    return d_hidden, embedding.new_empty(embedding.shape if need_embedding else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, embedding, target, _, allowed, *options, backend = inputs
    *_, rows, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, embedding, target, allowed, rows, kept)
    label_smoothing, constraint_range, _, log_end, _ = options
    ctx.options = (label_smoothing, constraint_range, log_end)
    ctx.backend = backend


def _gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    need_hidden, need_embedding = ctx.needs_input_grad[:2]
    if upstream is None:
        return (None, None, *nothing)
    d_hidden, d_embedding = linear_cross_entropy_backward_op(
        upstream, *ctx.saved_tensors, *ctx.options, need_hidden, need_embedding, ctx.backend
    )
    return (d_hidden if need_hidden else None, d_embedding if need_embedding else None, *nothing)


linear_cross_entropy_op.register_autograd(_gradients, setup_context=_setup_context)


@register_flop_formula(torch.ops.unival.linear_cross_entropy)
def forward_flops(
    hidden: Sequence[int],
    embedding: Sequence[int],
    target: Sequence[int],
    weight: Sequence[int] | None,
    allowed: Sequence[int] | None,
    label_smoothing: float,
    constraint_range: Sequence[int] | None,
    drop_worst_ratio: float,
    log_end: float | None,
    keep: bool,
    backend: str,
    *,
    out_shape: Any = None,
) -> int:
    """Products that are computed: the logits, again for the bonus of every class if not kept."""
    options = _options(embedding[0], label_smoothing, constraint_range, drop_worst_ratio, log_end)
    kept = keep and backend == "torch" and torch_path.kept_elements(hidden[0], options)
    products = 2 if options.bonus_share and not kept else 1
    return products * 2 * hidden[0] * options.columns.count * hidden[1]


@register_flop_formula(torch.ops.unival.linear_cross_entropy_backward)
def backward_flops(
    upstream: Sequence[int],
    hidden: Sequence[int],
    embedding: Sequence[int],
    target: Sequence[int],
    allowed: Sequence[int] | None,
    rows: Sequence[int],
    kept: Sequence[int],
    label_smoothing: float,
    constraint_range: Sequence[int] | None,
    log_end: float | None,
    need_hidden: bool,
    need_embedding: bool,
    backend: str,
    *,
    out_shape: Any = None,
) -> int:
    """Products that are computed: each gradient, and the logits again if they were not kept."""
    options = _options(embedding[0], label_smoothing, constraint_range, 0.0, log_end)
    products = int(need_hidden) + int(need_embedding) + int(kept[0] == 0)
    return products * 2 * hidden[0] * options.columns.count * hidden[1]
