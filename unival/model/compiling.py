"""Compiling a model by its parts: the encoders of the media and every transformer layer.

What lies between them (embeddings, position tables, the loss) is little, and makes shapes that the
parts should not be compiled anew for.
"""

from __future__ import annotations

import torch
from torch import nn

from unival.model.modeling import UnivalForConditionalGeneration

# Keyword arguments of torch.compile by the name that configs use.
MODES: dict[str, dict[str, str]] = {
    "off": {},
    "default": {},
    "cuda_graphs": {"mode": "reduce-overhead"},
}
# Shapes that a part is compiled for: in training and in evaluation four media and their stand-ins.
# Without fixed text lengths there are more, and those beyond run uncompiled.
SHAPES = 16


def compiled_parts(model: UnivalForConditionalGeneration) -> list[nn.Module]:
    """The media encoders that the model has, and the layers of its encoder and decoder."""
    named = dict(model.encoder.named_children())
    media = [named[f"{m}_encoder"] for m in ("image", "video", "audio") if f"{m}_encoder" in named]
    return [*media, *model.encoder.layers, *model.decoder.layers]


def compile_parts(model: UnivalForConditionalGeneration, mode: str) -> None:
    """Compile the parts of a model in place; names of weights stay. The first calls are slow.

    Args:
        mode: "off" leaves the model as it is; "default" compiles every part for each shape it meets
            (`SHAPES` of them); "cuda_graphs" also records each as a CUDA graph, whose results the
            next step overwrites.

    Raises:
        ValueError: another mode, or CUDA graphs without a CUDA device. A model that is still on the
            CPU of a machine with one is taken to be moved before it runs.
    """
    if mode not in MODES:
        raise ValueError(f"compile mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "off":
        return
    if mode == "cuda_graphs" and model.device.type != "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"compile mode 'cuda_graphs' for a model on {model.device} without a CUDA device: the "
            "graphs are of CUDA kernels; take 'default'"
        )
    parts = compiled_parts(model)
    # All parts count as one function (nn.Module.__call__) here, and layers differ by their rates.
    limit = SHAPES * len(parts)
    config = torch._dynamo.config
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    for part in parts:
        part.compile(dynamic=False, isolate_recompiles=True, recompile_limit=SHAPES, **MODES[mode])
