"""Attention problems like the model's, and what every implementation makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from unival.kernels.attention.op import attention
from unival.kernels.attention.relative import RelativeBias, RelativeLayout

GRADIENTS = (
    "query", "key", "value", "position_query", "position_key", "table", "head_scale",
)  # fmt: skip


@dataclass
class Problem:
    """float64 tensors by argument name, the codes and masks, and the gradient of the output."""

    tensors: dict[str, Tensor]
    grad: Tensor
    codes: tuple[Tensor, Tensor] | None = None
    options: dict[str, object] = field(default_factory=dict)

    def run(
        self,
        backend: str,
        dtype: torch.dtype,
        place: Callable[[Tensor], Tensor] = lambda x: x,
        **more: object,
    ) -> dict[str, Tensor]:
        """Output and gradients in a dtype; `exact` inputs are those rounded to `dtype` before."""
        leaves = {
            name: place(tensor.to(dtype)).detach().requires_grad_()
            for name, tensor in self.tensors.items()
        }
        arguments = dict(leaves)
        relative = None
        if self.codes is not None:
            relative = RelativeBias(arguments.pop("table"), *self.codes)
        output = attention(**arguments, relative=relative, backend=backend, **self.options, **more)
        output.backward(self.grad.to(dtype))
        found = {name: leaf.grad for name, leaf in leaves.items()}
        return {"output": output.detach(), **found}

    def rounded(self, dtype: torch.dtype) -> Problem:
        """The problem whose float64 values are exactly representable in a dtype."""
        tensors = {name: tensor.to(dtype).double() for name, tensor in self.tensors.items()}
        return Problem(tensors, self.grad.to(dtype).double(), self.codes, self.options)


def problem(
    device: torch.device,
    batch: int = 2,
    heads: int = 2,
    width: int = 32,
    queries: int = 33,
    keys: int | None = None,
    positions: int | None = 1,
    head_scale: bool = True,
    padding: bool = False,
    **options: object,
) -> Problem:
    """Random tensors; positions: their batch (1, the batch's, or None for no position part)."""
    keys = queries if keys is None else keys

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    tensors = {
        "query": normal(batch, heads, queries, width),
        "key": normal(batch, heads, keys, width),
        "value": normal(batch, heads, keys, width),
    }
    if positions is not None:
        tensors["position_query"] = normal(positions, heads, queries, width)
        tensors["position_key"] = normal(positions, heads, keys, width)
    if head_scale:
        tensors["head_scale"] = normal(heads)
    if padding:
        mask = torch.zeros(batch, keys, dtype=torch.bool, device=device)
        mask[-1, keys - keys // 3 :] = True
        options["key_padding_mask"] = mask
    options.setdefault("scale", (2 * width) ** -0.5)
    return Problem(tensors, normal(batch, heads, queries, width), None, options)


def add_table(given: Problem, layout: RelativeLayout, codes: tuple[Tensor, Tensor]) -> Problem:
    """The problem with a relative bias."""
    heads = given.tensors["query"].shape[1]
    given.tensors["table"] = torch.randn(
        heads, layout.size, dtype=torch.float64, device=codes[0].device
    )
    given.codes = codes
    return given


def cells(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every cell of a grid, in reading order."""
    index = torch.arange(rows * columns, device=device)
    return index // columns, index % columns


def join(*codes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Query and key codes of tokens behind one another: [B or 1, S]."""
    parts = [[x if x.ndim == 2 else x[None] for x in pair] for pair in codes]
    batch = max(x.shape[0] for pair in parts for x in pair)
    query, key = (
        torch.cat([pair[side].expand(batch, -1) for pair in parts], dim=1).contiguous()
        for side in (0, 1)
    )
    return query, key


def encoder(
    device: torch.device, rows: int, columns: int, text: int, padding: bool = True, **shape: object
) -> Problem:
    """Grid tokens before text tokens, positions shared by the batch, the last text padded."""
    layout = RelativeLayout(text, rows, columns)
    parts = []
    if rows:
        parts.append(layout.grid_codes(*cells(rows, columns, device)))
    if text:
        parts.append(layout.text_codes(torch.arange(text, device=device)))
    given = problem(device, queries=rows * columns + text, padding=padding, **shape)
    return add_table(given, layout, join(*parts))


def decoder(device: torch.device, text: int, past: int = 0, **shape: object) -> Problem:
    """Causal text, the last `text` of past + text tokens as queries."""
    layout = RelativeLayout(past + text)
    query, key = layout.text_codes(torch.arange(past + text, device=device))
    given = problem(device, queries=text, keys=past + text, causal=True, **shape)
    return add_table(given, layout, (query[None, past:].contiguous(), key[None]))


def random_patches(
    device: torch.device, kept: int, text: int, batch: int, **shape: object
) -> Problem:
    """A random subset of a 6 x 7 grid in random order for every sample, then text."""
    layout = RelativeLayout(text, 6, 7)
    order = torch.stack([torch.randperm(42, device=device)[:kept] for _ in range(batch)])
    grid = layout.grid_codes(order // 7, order % 7)
    codes = join(grid, layout.text_codes(torch.arange(text, device=device)))
    given = problem(device, batch, queries=kept + text, positions=batch, padding=True, **shape)
    return add_table(given, layout, codes)


def image_codes(device: torch.device, side: int, **shape: object) -> Problem:
    """A causal decoder whose first sample is text and whose second writes image codes."""
    length = 1 + side * side
    layout = RelativeLayout(length, side, side, start_slot=True)
    row, column = cells(side, side, device)
    slot = torch.arange(length, device=device) == 0
    pad = torch.zeros(1, dtype=torch.int64, device=device)
    grid = layout.grid_codes(torch.cat([pad, row]), torch.cat([pad, column]), slot)
    text = layout.text_codes(torch.arange(length, device=device))
    codes = tuple(torch.stack([t, g]) for t, g in zip(text, grid, strict=True))
    given = problem(device, 2, queries=length, positions=2, causal=True, **shape)
    return add_table(given, layout, codes)


def assert_as_exact_as_pytorch(
    given: Problem, found: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Errors against float64 of at most twice eager PyTorch's in the dtype, gradients three times.

    Half a unit in the last place of the largest value is granted besides, since both results are
    rounded to the dtype once; a whole one to gradients, which also inherit the rounding of single
    scores, in which PyTorch may be lucky; two units where a few values are each a sum over the
    whole batch, four where that is one value a head: its terms may be 25 times larger than their
    sum and carry the output's rounding, which differs between processors (2.8 units were seen with
    AVX-512, where eager was 37 times nearer by luck). Gradients that are 0 because every row sees
    one key are differences of equal terms of size 1: sixteen units of that.
    """
    rounded = given.rounded(dtype)
    exact = rounded.run("eager", torch.float64)
    eager = rounded.run("eager", dtype)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == dtype and value.shape == exact[name].shape, name
        ours = (value.double() - exact[name]).abs().max()
        theirs = (eager[name].double() - exact[name]).abs().max()
        factor = 2 if name == "output" else 3
        units = {"output": 0.5, "table": 2.0, "head_scale": 4.0}.get(name, 1.0)
        largest = exact[name].abs().max()
        rounding = torch.finfo(dtype).eps * (units * largest if largest else 16.0)
        assert ours <= factor * theirs + rounding, (
            f"{name}: error {ours:.2e}, PyTorch's {theirs:.2e}, rounding {rounding:.2e}"
        )


def assert_refused(arguments: dict[str, Any], message: str) -> None:
    """A call with these arguments beside zeros for heads is a ValueError that says `message`."""
    zeros = torch.zeros(2, 3, 5, 16)
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**{"query": zeros, "key": zeros, "value": zeros} | arguments)
