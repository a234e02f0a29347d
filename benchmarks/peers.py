"""What the operators are measured against, and the check that all compute the same.

`eager` is the formulation of the released code: the position product is copied for every layer,
relative biases are gathered from the bucket tables for every pair of tokens, scores are in memory
and their softmax is float32, heads are scaled by a product; the loss makes the logits of all
positions and their log-softmax in float32; norms, activation, dropout and sums are operators of
their own. Two things differ from it: sequences come first in no tensor (batch does), and a
stack's position product is made in the layer, since here a stack has one.

Other peers do as much of it as they can: those that give no gradient of some input say so in their
note, and are timed without it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from kernel_cases import (
    EPS,
    SMOOTHING,
    Case,
    Run,
    Tensors,
    linear,
    make_case,
    ours,
    reference,
)
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

BIAS_INPUTS = ("position_query", "position_key", "text_table", "image_table")
# Of the largest value: a few roundings of float32; of 16-bit probabilities and gradients.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


class Peer(NamedTuple):
    """One provider of a kernel.

    absent           why it cannot run on a device in a dtype, or None
    without_gradient names of inputs it gives no gradient of
    """

    name: str
    run: Run
    absent: Callable[[torch.device, torch.dtype], str | None] = lambda *_: None
    without_gradient: tuple[str, ...] = ()
    note: str = ""

    def leaves(self, case: Case, t: Tensors) -> list[Tensor]:
        """The inputs that it is asked gradients of."""
        return [x for name, x in t.items() if name not in self.without_gradient]


class WrongPeer(Exception):
    """A peer computes something else than the reference."""


def differentiate(
    outputs: tuple[Tensor, ...], leaves: list[Tensor], slopes: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of the leaves from those of the outputs."""
    return torch.autograd.grad(
        outputs, leaves, [s.to(y.dtype) for s, y in zip(slopes, outputs, strict=True)]
    )


def check(peer: Peer, case: Case) -> float:
    """The largest error of outputs and gradients, each relative to its largest exact value.

    A value counts as at least a hundredth of the largest of all: the gradient of a key
    projection's bias is zero (a softmax does not see it), and only rounding is found there.

    Raises:
        WrongPeer: it is above the tolerance of the case's dtype.
    """

    def values(run: Run, t: Tensors) -> list[Tensor]:
        outputs = run(case, t)
        gradients = differentiate(outputs, peer.leaves(case, t), case.slopes)
        return [x.detach().double() for x in (*outputs, *gradients)]

    found, exact = values(peer.run, case.tensors), values(reference, case.doubled())
    names = [f"output {i}" for i in range(len(case.slopes))]
    names += [name for name in case.tensors if name not in peer.without_gradient]
    sizes = [float(x.abs().max()) for x in exact]
    errors = {
        name: float((one - other).abs().max()) / max(size, max(sizes) / 100)
        for name, one, other, size in zip(names, found, exact, sizes, strict=True)
    }
    allowed = TOLERANCES[next(iter(case.tensors.values())).dtype]
    for name, error in errors.items():
        if not error <= allowed:  # NaN too
            raise WrongPeer(
                f"{case.kernel}: {peer.name} differs from the reference: relative error "
                f"{error:.1e} in {name}, allowed {allowed:.0e}"
            )
    return max(errors.values())


def position_bias(case: Case, t: Tensors, batch: int) -> Tensor:
    """The scaled product of the positions: [B, H, S, T]."""
    query, key = (t[name].expand(batch, -1, -1, -1) for name in BIAS_INPUTS[:2])
    return (query * case.fixed["scale"]) @ key.transpose(-1, -2)


def eager_bias(case: Case, t: Tensors, batch: int) -> Tensor:
    """Positions and relative tables of every pair: [B, H, S, T]."""
    bias = position_bias(case, t, batch)
    if "text_table" not in t:
        return bias
    fixed = case.fixed
    bias = bias.clone()  # the product belongs to all layers
    text = F.embedding(fixed["text_buckets"], t["text_table"])
    text = text.expand(batch, -1, -1, -1).permute(0, 3, 1, 2).contiguous()
    words = text.shape[-1]
    bias[:, :, -words:, -words:] += text
    ids = fixed["image_ids"][:batch]
    count, cells = ids.shape[1], fixed["pair_buckets"].shape[0]
    buckets = (
        fixed["pair_buckets"]
        .expand(batch, cells, cells)
        .gather(1, ids[:, :, None].expand(batch, count, cells))
        .gather(2, ids[:, None, :].expand(batch, count, count))
    )
    bias[:, :, :count, :count] += F.embedding(buckets, t["image_table"]).permute(0, 3, 1, 2)
    return bias


def eager_attention(
    case: Case, t: Tensors, query: Tensor, key: Tensor, value: Tensor, head_scale: Tensor
) -> Tensor:
    """[B, H, S, d], with scores and probabilities in memory."""
    scores = (query * case.fixed["scale"]) @ key.transpose(-1, -2)
    scores += eager_bias(case, t, len(query))
    if case.fixed["padding"] is not None:
        scores = scores.masked_fill(case.fixed["padding"][:, None, None], -torch.inf)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
    return (probabilities @ value) * head_scale[:, None, None]


def eager_norm(t: Tensors, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], EPS)


def eager_gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float()).type_as(x)


def eager_sum(case: Case, residual: Tensor, branch: Tensor) -> Tensor:
    """residual + DropPath(Dropout(branch)) of [B, S, D]."""
    branch = F.dropout(branch, case.fixed["dropout"])
    rate = case.fixed["drop_path"]
    if rate > 0.0:
        keep = torch.floor(1.0 - rate + torch.rand(len(branch), 1, 1, device=branch.device))
        branch = branch.div(1.0 - rate) * keep.to(branch.dtype)
    return residual + branch


def eager_layer(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """The attention sub-layer, or the encoder layer: the sum and the norm that comes next."""
    heads = t["self_attn.head_scale"].shape[0]
    q, k, v = (
        linear(t, f"self_attn.{name}_proj", t["normed"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in "qkv"
    )
    y = eager_attention(case, t, q, k, v, t["self_attn.head_scale"])
    y = linear(t, "self_attn.out_proj", y.transpose(1, 2).flatten(2))
    total = eager_sum(case, t["x"], eager_norm(t, "self_attn_post_norm", y))
    if case.kernel == "encoder_layer":
        y = eager_gelu(linear(t, "ffn.fc1", eager_norm(t, "ffn_norm", total)))
        y = linear(t, "ffn.fc2", eager_norm(t, "ffn.norm", y))
        total = eager_sum(case, total, y)
    return total, eager_norm(t, "next_norm", total)


def eager_loss(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """Logits of all positions, their log-softmax, the target's and the sum of all."""
    target = case.fixed["target"]
    logp = torch.log_softmax(t["hidden"] @ t["embedding"].T, dim=-1, dtype=torch.float32)
    ignored = target == -100
    nll = -logp.gather(-1, target.masked_fill(ignored, 0)[:, None])
    smooth = -logp.sum(-1, keepdim=True)
    nll, smooth = (x.masked_fill(ignored[:, None], 0.0).sum() for x in (nll, smooth))
    spread = SMOOTHING / (logp.shape[-1] - 1)
    return ((1.0 - SMOOTHING - spread) * nll + spread * smooth,)


def eager(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """The released code's formulation of any kernel."""
    if case.kernel in ("attention", "cross_attention"):
        heads = (t["query"], t["key"], t["value"], t["head_scale"])
        return (eager_attention(case, t, *heads),)
    if case.kernel in ("layer", "encoder_layer"):
        return eager_layer(case, t)
    if case.kernel == "loss":
        return eager_loss(case, t)
    parameters = (t["weight"].shape, t["weight"], t["bias"], EPS)
    if case.kernel == "residual_layer_norm":
        total = eager_sum(case, t["residual"], t["branch"])
        return total, F.layer_norm(total, *parameters)
    x = eager_gelu(t["x"]) if case.kernel == "gelu_layer_norm" else t["x"]
    return (F.layer_norm(x, *parameters),)


def _dense_attention(case: Case, t: Tensors, bias: Tensor) -> tuple[Tensor, ...]:
    if case.fixed["padding"] is not None:
        bias = bias.masked_fill(case.fixed["padding"][:, None, None], -torch.inf)
    y = F.scaled_dot_product_attention(
        t["query"], t["key"], t["value"], attn_mask=bias, scale=case.fixed["scale"]
    )
    return (y * t["head_scale"][:, None, None],)


def sdpa(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """PyTorch's attention with a dense bias that gets its gradient."""
    return _dense_attention(case, t, eager_bias(case, t, 1))


def sdpa_constant_bias(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """PyTorch's attention with a dense bias that is a constant; making it is timed."""
    with torch.no_grad():
        bias = eager_bias(case, t, 1)
    return _dense_attention(case, t, bias)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def flex(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """FlexAttention whose score_mod reads the bias of a pair from memory."""
    bias, padding = eager_bias(case, t, 1)[0], case.fixed["padding"]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + bias[h, i, j]
        return score if padding is None else torch.where(padding[b, j], -torch.inf, score)

    y = _compiled_flex()(
        t["query"], t["key"], t["value"], score_mod=score_mod, scale=case.fixed["scale"]
    )
    return (y * t["head_scale"][:, None, None],)


def flash(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """flash-attn where there is no table: positions behind the content, values padded to them."""
    from flash_attn import flash_attn_func

    width = t["value"].shape[-1]
    positions = (t[name].expand(len(t["query"]), -1, -1, -1) for name in BIAS_INPUTS[:2])
    q, k = (
        torch.cat([x, p], dim=-1) for x, p in zip((t["query"], t["key"]), positions, strict=True)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, F.pad(t["value"], (0, width))))
    y = flash_attn_func(q, k, v, softmax_scale=case.fixed["scale"]).transpose(1, 2)[..., :width]
    return (y * t["head_scale"][:, None, None],)


def liger_norm(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_layer_norm

    return (liger_layer_norm(t["x"], t["weight"], t["bias"], EPS),)


def apex_norm(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return (fused_layer_norm_affine(t["x"], t["weight"], t["bias"], t["weight"].shape, EPS),)


def _uniform_smoothing(t: Tensors) -> float:
    """The rate of a smoothing that counts the target among the others, for the same loss."""
    classes = len(t["embedding"])
    return SMOOTHING * classes / (classes - 1)


def torch_cross_entropy(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """PyTorch's own smoothed cross-entropy of all logits."""
    logits = (t["hidden"] @ t["embedding"].T).float()
    smoothing = _uniform_smoothing(t)
    loss = F.cross_entropy(logits, case.fixed["target"], label_smoothing=smoothing, reduction="sum")
    return (loss,)


def liger_loss(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(
        t["hidden"],
        t["embedding"],
        case.fixed["target"],
        label_smoothing=_uniform_smoothing(t),
        reduction="sum",
    )
    return (loss,)


def _import_error(module: str, name: str | None) -> str | None:
    """Why an import fails; find_spec would find packages without their compiled part."""
    try:
        found = importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if name is None or hasattr(found, name) else f"{module} has no {name}"


def _needs_gpu(
    module: str, name: str | None = None
) -> Callable[[torch.device, torch.dtype], str | None]:
    def absent(device: torch.device, dtype: torch.dtype) -> str | None:
        reason = _import_error(module, name)
        return reason or (None if device.type == "cuda" else "its kernels need a GPU")

    return absent


def flash_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _needs_gpu("flash_attn")(device, dtype)
    return reason or (None if dtype.itemsize == 2 else f"it has no {dtype}; --dtype bf16 has it")


@functools.cache
def flex_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Tries it: what compiles where differs between versions of PyTorch."""
    case = make_case("attention", FLEX_TRIAL, device, dtype, training=False)
    try:
        differentiate(flex(case, case.tensors), list(case.tensors.values()), case.slopes)
    except (NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


FLEX_TRIAL = {"batch": 1, "heads": 2, "width": 32, "rows": 2, "columns": 2, "text": 4}
UNIVAL, EAGER = Peer("unival", ours), Peer("eager", eager)
SDPA = Peer("sdpa", sdpa, note="writes the gradient of the dense bias [B, H, S, T]")
SDPA_CONSTANT = Peer(
    "sdpa_constant_bias",
    sdpa_constant_bias,
    without_gradient=BIAS_INPUTS,
    note="no gradient of positions and tables",
)
FLEX = Peer("flex_attention", flex, flex_absent)
FLASH = Peer("flash_attn", flash, flash_absent)
LIGER_NORM = Peer(
    "liger",
    liger_norm,
    _needs_gpu("liger_kernel.transformers.functional", "liger_layer_norm"),
)
APEX_NORM = Peer(
    "apex",
    apex_norm,
    # The package of this name on PyPI is another one.
    _needs_gpu("apex.normalization.fused_layer_norm", "fused_layer_norm_affine"),
)
LIGER_LOSS = Peer(
    "liger",
    liger_loss,
    _needs_gpu("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
)
PEERS: dict[str, tuple[Peer, ...]] = {
    "attention": (UNIVAL, EAGER, SDPA, SDPA_CONSTANT, FLEX),
    "cross_attention": (UNIVAL, EAGER, SDPA, SDPA_CONSTANT, FLEX, FLASH),
    "layer": (UNIVAL, EAGER),
    "encoder_layer": (UNIVAL, EAGER),
    "layer_norm": (UNIVAL, EAGER, LIGER_NORM, APEX_NORM),
    "gelu_layer_norm": (UNIVAL, EAGER),
    "residual_layer_norm": (UNIVAL, EAGER),
    "loss": (UNIVAL, EAGER, Peer("torch_cross_entropy", torch_cross_entropy), LIGER_LOSS),
}
