"""Operations and memory traffic of launches, by formula."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor

from unival.kernels.shipped import Call
from unival.kernels.triton_tools.launch import Launch
from unival.kernels.triton_tools.resources import tensor_bytes

# Products of head width, per pair of query and key: scores (position part apart), and others.
# Causal pairs are not halved.
ATTENTION_PRODUCTS = {
    "attention_forward_kernel": (1, 1),
    "attention_decode_kernel": (1, 1),
    "attention_keys_kernel": (1, 3),
    "attention_queries_kernel": (1, 2),
}

# Arguments that are neither inputs nor outputs of an operator: results on their way.
SCRATCH = ("rowdot", "grad_position", "partials", "seen", "sums", "slopes", "out")


def flops(launch: Launch) -> int:
    """Multiplications and additions of a launch's matrix products; norms and sums count 0."""
    name, arguments = launch.kernel.__name__, launch.arguments
    if "layernorm" in launch.kernel.__module__ or name == "attention_rowdot_kernel":
        return 0
    if name.startswith("attention"):
        return _attention_flops(name, arguments)
    if name == "hidden_gradient_kernel":
        n, dim = arguments["out"].shape
        return 2 * n * dim * chunk_rows(launch)
    n, dim = arguments["hidden"].shape
    return 2 * n * dim * chunk_rows(launch)


def _attention_flops(name: str, arguments: dict[str, Any]) -> int:
    batch, heads, queries, width = arguments["query"].shape
    keys = arguments["key"].shape[2]
    starts = arguments.get("query_starts")
    if starts is not None:  # as if every packed sequence had the mean length
        batch = starts.numel() - 1
        queries, keys = queries // batch, keys // batch
    pair = 2 * batch * heads * queries * keys * width
    position = arguments["position_query"] is not None
    if name == "attention_bias_kernel":
        # Content scores and dp of every sequence; pq . pk and dpq or dpk once a group.
        return pair * 2 + (pair * 2 // arguments["group"] if position else 0)
    scores, others = ATTENTION_PRODUCTS[name]
    return pair * (scores * (2 if position else 1) + others)


def chunk_rows(launch: Launch) -> int:
    """Rows of the embedding that a launch of the loss works on."""
    arguments = launch.arguments
    if "slopes" in arguments:
        left = arguments["count"] - arguments["start"]
        return min(arguments["slopes"].shape[1], left)
    return arguments["count"]


def touched(launch: Launch) -> Iterator[tuple[str, Hashable, int]]:
    """Every tensor of a launch: the argument's name, what identifies the tensor, its bytes.

    The loss reads a part of the embedding and of the masks in each of its launches. The library's
    product that follows a launch of `slopes_kernel` reads the slopes and hidden states again and
    writes that part of the embedding's gradient.
    """
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            key: tuple = (value.untyped_storage()._cdata, value.storage_offset(), value.shape)
            size = tensor_bytes(value)
            if name == "embedding":
                key, size = (*key, launch.arguments.get("start")), part_bytes(launch)
            elif name == "allowed":
                key = (*key, launch.arguments.get("start"))
                size = value.shape[0] * chunk_rows(launch)
            yield name, key, size
    if launch.kernel.__name__ == "slopes_kernel":
        yield "gradient", ("gradient", launch.arguments["start"]), part_bytes(launch)


def part_bytes(launch: Launch) -> int:
    """Bytes of the rows of the embedding that a launch of the loss works on."""
    embedding = launch.arguments["embedding"]
    return chunk_rows(launch) * embedding.shape[1] * embedding.element_size()


def traffic(call: Call, cache: int) -> tuple[int, int]:
    """Bytes a call moves to and from memory, and the least: each input and output once.

    Forward and backward added; what forward keeps for backward is an output of the one and an input
    of the other. The second-level cache of `cache` bytes is modelled as holding whole tensors, of
    which the least recently used leave: a tensor that is in it costs nothing.
    """
    moved = least = 0
    for launches in (call.forward, call.backward):
        held: OrderedDict[Hashable, int] = OrderedDict()
        needed: dict[Hashable, int] = {}
        for launch in launches:
            for name, key, size in touched(launch):
                if key not in held:
                    moved += size
                held[key] = size
                held.move_to_end(key)
                if name not in SCRATCH:
                    needed[key] = size
            while sum(held.values()) > cache:
                held.popitem(last=False)
        least += sum(needed.values())
    return moved, least
