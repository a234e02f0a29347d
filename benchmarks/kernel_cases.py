"""What benchmarks/kernels.py measures: inputs of the model's shapes, our operators, references.

Every kernel is a function of a case and its differentiable tensors. `ours` is what the model runs;
`reference` is made of the kernels' reference files alone, for float64.

Tables and positions are as a layer gets them: buckets by offset and position projections are made
once for all layers of a stack, therefore before the clock starts; a layer's biases are picked from
its tables, and the product of the positions is made, inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unival.kernels.attention.op import attention
from unival.kernels.attention.reference import attention_reference
from unival.kernels.attention.relative import RelativeBias, RelativeLayout
from unival.kernels.layernorm.op import gelu_layer_norm, layer_norm, residual_layer_norm
from unival.kernels.layernorm.reference import (
    gelu_layer_norm_reference,
    layer_norm_reference,
    residual_layer_norm_reference,
)
from unival.kernels.linear_cross_entropy.op import linear_cross_entropy
from unival.kernels.linear_cross_entropy.reference import cross_entropy_sums
from unival.model.configuration import UnivalConfig
from unival.model.norm import LayerNorm
from unival.model.positions import (
    grid_buckets,
    grid_cells,
    image_positions,
    num_grid_buckets,
    text_buckets,
)
from unival.model.transformer import EncoderLayer, PositionTerms

ROOT = Path(__file__).resolve().parents[1]
Tensors = dict[str, Tensor]
Shape = dict[str, int]
Run = Callable[["Case", Tensors], tuple[Tensor, ...]]

KERNELS = {
    "attention": ("attention", "cross_attention"),
    "layer": ("layer", "encoder_layer"),
    "layer_norm": ("layer_norm",),
    "gelu_layer_norm": ("gelu_layer_norm",),
    "residual_layer_norm": ("residual_layer_norm",),
    "loss": ("loss",),
}
EPS = 1e-5
SMOOTHING = 0.1
DROPOUT = DROP_PATH = 0.1  # of unival_base in training

_HEADS = {"batch": 4, "heads": 12, "width": 64}
_BASE = {"batch": 4, "rows": 12, "columns": 12, "text": 20}
_WIDTHS = (768, 1024, 3072, 4096)
_NORMS = ("layer_norm", "gelu_layer_norm", "residual_layer_norm")
SHAPES: dict[str, dict[str, list[Shape]]] = {
    "short": {
        "attention": [
            {**_HEADS, "rows": 12, "columns": 12, "text": 24},
            {**_HEADS, "rows": 15, "columns": 15, "text": 24},
        ],
        "cross_attention": [{**_HEADS, "queries": 16, "keys": 168}],
        "layer": [_BASE],
        "encoder_layer": [_BASE],
        **{
            norm: [{"batch": 4, "length": 168, "width": width} for width in _WIDTHS]
            for norm in _NORMS
        },
        "loss": [{"tokens": 4 * 16, "width": 768, "classes": 59457}],
    },
    "long": {
        "attention": [{**_HEADS, "rows": 30, "columns": 30, "text": 24}],
        **{
            norm: [{"batch": 8, "length": 1024, "width": width} for width in _WIDTHS]
            for norm in _NORMS
        },
    },
    # What every provider is checked on before it is timed.
    "tiny": {
        "attention": [{"batch": 2, "heads": 2, "width": 32, "rows": 3, "columns": 4, "text": 5}],
        "cross_attention": [{"batch": 2, "heads": 2, "width": 32, "queries": 5, "keys": 17}],
        "layer": [{"batch": 2, "rows": 3, "columns": 4, "text": 5, "tiny": 1}],
        "encoder_layer": [{"batch": 2, "rows": 3, "columns": 4, "text": 5, "tiny": 1}],
        **{norm: [{"batch": 2, "length": 5, "width": 96}] for norm in _NORMS},
        "loss": [{"tokens": 9, "width": 32, "classes": 301, "ignored": 2}],
    },
}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    x        its name, its label and its value, for tables and plots
    tensors  inputs that get a gradient
    slopes   gradients of the outputs
    fixed    all other inputs, and rates
    """

    kernel: str
    shape: Shape
    x: tuple[str, str, str]
    tensors: Tensors
    slopes: tuple[Tensor, ...]
    fixed: dict[str, Any] = field(default_factory=dict)

    def doubled(self) -> Tensors:
        """Copies of the tensors in float64, where the case's values are exact."""
        return {k: v.detach().double().requires_grad_() for k, v in self.tensors.items()}


class Maker:
    """Random tensors of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, device=self.device) * scale
        return made.to(self.dtype).requires_grad_()

    def heads(self, batch: int, length: int, shape: Shape) -> Tensor:
        """[B, H, S, d], laid out as a projection leaves it."""
        made = torch.randn(batch, length, shape["heads"], shape["width"], device=self.device)
        return made.to(self.dtype).transpose(1, 2).requires_grad_()

    def slope(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


def make_case(
    kernel: str, shape: Shape, device: torch.device, dtype: torch.dtype, training: bool = True
) -> Case:
    """Inputs of a kernel; without `training` nothing is dropped at random."""
    torch.manual_seed(0)
    maker = Maker(device, dtype)
    rates = {"dropout": DROPOUT, "drop_path": DROP_PATH} if training else {}
    rates = {"dropout": 0.0, "drop_path": 0.0, **rates}
    if kernel in ("attention", "cross_attention"):
        return _attention_case(kernel, shape, maker)
    if kernel in ("layer", "encoder_layer"):
        return _layer_case(kernel, shape, maker, rates)
    if kernel == "loss":
        return _loss_case(kernel, shape, maker)
    return _norm_case(kernel, shape, maker, rates)


def _attention_case(kernel: str, shape: Shape, maker: Maker) -> Case:
    cross = kernel == "cross_attention"
    tokens = shape["keys"] if cross else shape["rows"] * shape["columns"] + shape["text"]
    queries = shape["queries"] if cross else tokens
    batch, heads = shape["batch"], shape["heads"]
    tensors = {
        "query": maker.heads(batch, queries, shape),
        "key": maker.heads(batch, tokens, shape),
        "value": maker.heads(batch, tokens, shape),
        "position_query": maker.heads(1, queries, shape),
        "position_key": maker.heads(1, tokens, shape),
        "head_scale": maker.leaf(heads),
    }
    fixed: dict[str, Any] = {"scale": (2 * shape["width"]) ** -0.5, "padding": None}
    if not cross:
        tensors |= relative_tables(heads, maker)
        fixed |= grid_and_text(shape, maker.device)
    x = (
        "S",
        "queries x keys" if cross else "tokens",
        f"{queries}x{tokens}" if cross else f"{tokens}",
    )
    slope = maker.slope(batch, queries, heads, shape["width"]).transpose(1, 2)
    return Case(kernel, shape, x, tensors, (slope,), fixed)


def relative_tables(heads: int, maker: Maker) -> Tensors:
    """A layer's tables by bucket, of unival_base's extents."""
    return {
        "text_table": maker.leaf(2 * 256 - 1, heads),
        "image_table": maker.leaf(num_grid_buckets(42), heads),
    }


@functools.cache
def _buckets(device: torch.device) -> tuple[Tensor, Tensor]:
    """Buckets of all text offsets, and of all pairs of grid positions, as the model keeps them."""
    every = torch.arange(42 * 42 + 1)
    return text_buckets(256, 1024).to(device), grid_buckets(every, every, 42).to(device)


def grid_and_text(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Where tokens are: ours as codes and rows of the tables, eager's as buckets of pairs."""
    rows, columns, text, batch = (shape[name] for name in ("rows", "columns", "text", "batch"))
    offsets, pairs = _buckets(device)
    layout = RelativeLayout(text, rows, columns)
    ids = image_positions(rows, columns, 42, device)
    position = torch.arange(text, device=device)
    codes = zip(layout.grid_codes(*grid_cells(ids, 42)), layout.text_codes(position), strict=True)
    row, column = layout.grid_offsets(device)
    padding = torch.zeros(batch, rows * columns + text, dtype=torch.bool, device=device)
    padding[-1, -(text // 4) :] = True  # rows of a batch differ in length
    return {
        "layout": layout,
        "codes": tuple(torch.cat(pair)[None] for pair in codes),
        "text_rows": offsets[layout.text_offsets(device) + 1023],
        "image_rows": 83 * (row + 41) + column + 41,
        "text_buckets": offsets[position[:, None] - position + 1023],
        "pair_buckets": pairs,
        "image_ids": ids.expand(batch, -1),
        "padding": padding,
    }


def _layer_case(kernel: str, shape: Shape, maker: Maker, rates: dict[str, float]) -> Case:
    small = {"d_model": 64, "num_heads": 2, "ffn_dim": 96} if shape.get("tiny") else {}
    config = UnivalConfig.from_yaml(ROOT / "configs" / "model" / "unival_base.yaml", **small)
    layer = EncoderLayer(config, rates["drop_path"]).to(maker.device, maker.dtype).train()
    layer.dropout = rates["dropout"]
    next_norm = LayerNorm(config.d_model, config).to(maker.device, maker.dtype).train()
    if kernel == "layer":  # ends with the norm that the feed-forward block starts with
        next_norm = layer.ffn_norm
    named = {**dict(layer.named_parameters()), **prefixed("next_norm", next_norm)}
    unused: tuple[str, ...] = ("self_attn_norm",)
    if kernel == "layer":
        unused += ("ffn.", "ffn_norm")
    tensors: Tensors = {k: v for k, v in named.items() if not k.startswith(unused)}
    for parameter in tensors.values():
        if parameter.ndim == 1:  # ones and zeros hide mistakes
            parameter.data.add_(torch.randn_like(parameter.data), alpha=0.1)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    heads = {"heads": config.num_heads, "width": config.d_model // config.num_heads}
    tokens = shape["rows"] * shape["columns"] + shape["text"]
    states = (shape["batch"], tokens, config.d_model)
    tensors |= {
        "x": maker.leaf(*states),
        "normed": maker.leaf(*states),
        "position_query": maker.heads(1, tokens, heads),
        "position_key": maker.heads(1, tokens, heads),
        **relative_tables(config.num_heads, maker),
    }
    fixed = {"layer": layer, "next_norm": next_norm, "config": config, **rates}
    fixed |= {"scale": layer.self_attn.scaling, **grid_and_text(shape, maker.device)}
    slopes = (maker.slope(*states), maker.slope(*states))
    return Case(kernel, shape, ("S", "tokens", str(tokens)), tensors, slopes, fixed)


def prefixed(prefix: str, module: nn.Module) -> Tensors:
    """A module's parameters by name, under a prefix."""
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def _norm_case(kernel: str, shape: Shape, maker: Maker, rates: dict[str, float]) -> Case:
    width, states = shape["width"], (shape["batch"], shape["length"], shape["width"])
    names = ("branch", "residual") if kernel == "residual_layer_norm" else ("x",)
    tensors = {name: maker.leaf(*states) for name in names}
    tensors |= {"weight": maker.leaf(width), "bias": maker.leaf(width)}
    slopes = tuple(maker.slope(*states) for _ in names)
    x = ("MxN", "rows x width", f"{shape['batch'] * shape['length']}x{width}")
    return Case(kernel, shape, x, tensors, slopes, rates)


def _loss_case(kernel: str, shape: Shape, maker: Maker) -> Case:
    tokens, width, classes = shape["tokens"], shape["width"], shape["classes"]
    target = torch.randint(classes, (tokens,), device=maker.device)
    target[: shape.get("ignored", 0)] = -100
    tensors = {
        "hidden": maker.leaf(tokens, width),
        "embedding": maker.leaf(classes, width, scale=width**-0.5),
    }
    slope = torch.ones((), device=maker.device)
    x = ("BT", "tokens", str(tokens))
    return Case(kernel, shape, x, tensors, (slope,), {"target": target})


def relative_bias(case: Case, t: Tensors) -> RelativeBias | None:
    """A layer's biases by offset, as encoder.RelativeTables makes them."""
    if "text_table" not in t:
        return None
    text = F.embedding(case.fixed["text_rows"], t["text_table"])
    grid = F.embedding(case.fixed["image_rows"], t["image_table"])
    return RelativeBias(case.fixed["layout"].table(text, grid), *case.fixed["codes"])


def ours(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """What the model runs, backend auto. `t` has the very parameters of a layer's module."""
    fixed = case.fixed
    if case.kernel in ("attention", "cross_attention"):
        names = ("position_query", "position_key", "head_scale")
        y = attention(
            t["query"],
            t["key"],
            t["value"],
            **{name: t[name] for name in names},
            relative=relative_bias(case, t),
            key_padding_mask=fixed["padding"],
            scale=fixed["scale"],
        )
        return (y,)
    if case.kernel in ("layer", "encoder_layer"):
        return _our_layer(case, t)
    if case.kernel == "loss":
        sums = linear_cross_entropy(
            t["hidden"], t["embedding"], fixed["target"], label_smoothing=SMOOTHING
        )
        return (sums.loss,)
    parameters = (t["weight"], t["bias"], EPS)
    if case.kernel == "residual_layer_norm":
        rates = (fixed["dropout"], fixed["drop_path"])
        return residual_layer_norm(t["branch"], t["residual"], *parameters, *rates)
    norm = gelu_layer_norm if case.kernel == "gelu_layer_norm" else layer_norm
    return (norm(t["x"], *parameters),)


def _our_layer(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    layer, relative = case.fixed["layer"], relative_bias(case, t)
    positions = PositionTerms(t["position_query"], t["position_key"])
    normed, padding = t["normed"], case.fixed["padding"]
    if case.kernel == "encoder_layer":
        return layer(t["x"], normed, case.fixed["next_norm"], positions, relative, padding)
    y = layer.self_attn(normed, layer.self_attn.project_keys(normed), positions, relative, padding)
    return layer.add(t["x"], layer.self_attn_post_norm(y), case.fixed["next_norm"])


def reference(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """The same from the kernels' reference files, in the tensors' dtype; nothing is dropped."""
    fixed = case.fixed
    if case.kernel in ("attention", "cross_attention"):
        return (_reference_attention(case, t, t["query"], t["key"], t["value"], t["head_scale"]),)
    if case.kernel in ("layer", "encoder_layer"):
        return _reference_layer(case, t)
    if case.kernel == "loss":
        counted = fixed["target"] != -100
        logits = t["hidden"][counted] @ t["embedding"].T
        sums = cross_entropy_sums(logits, fixed["target"][counted], label_smoothing=SMOOTHING)
        return (sums.loss,)
    parameters = (t["weight"], t["bias"], EPS)
    if case.kernel == "residual_layer_norm":
        return residual_layer_norm_reference(t["branch"], t["residual"], *parameters)
    if case.kernel == "gelu_layer_norm":
        return (gelu_layer_norm_reference(t["x"], *parameters),)
    return (layer_norm_reference(t["x"], *parameters),)


def _reference_attention(
    case: Case, t: Tensors, query: Tensor, key: Tensor, value: Tensor, head_scale: Tensor
) -> Tensor:
    return attention_reference(
        query,
        key,
        value,
        t["position_query"],
        t["position_key"],
        relative_bias(case, t),
        head_scale,
        case.fixed["padding"],
        scale=case.fixed["scale"],
    )[0]


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    """nn.Linear by the name of its parameters."""
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def _reference_layer(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm_reference(x, t[f"{name}.weight"], t[f"{name}.bias"], EPS)

    heads = t["self_attn.head_scale"].shape[0]
    q, k, v = (
        linear(t, f"self_attn.{name}_proj", t["normed"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in "qkv"
    )
    y = _reference_attention(case, t, q, k, v, t["self_attn.head_scale"])
    y = linear(t, "self_attn.out_proj", y.transpose(1, 2).flatten(2))
    total = t["x"] + norm("self_attn_post_norm", y)
    if case.kernel == "encoder_layer":
        y = F.gelu(linear(t, "ffn.fc1", norm("ffn_norm", total)))
        total = total + linear(t, "ffn.fc2", norm("ffn.norm", y))
    return total, norm("next_norm", total)
