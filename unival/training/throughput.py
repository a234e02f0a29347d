"""How fast a run computes: operations of a step, and the most that its chip could do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unival.data.batch import MEDIUM_KEYS
from unival.kernels.triton_tools.resources import CHIPS, Chip
from unival.model import flops
from unival.model.configuration import UnivalConfig
from unival.training.batches import Batch

FORMULA = (
    "operations of one rank's forward passes, counted by unival/model/flops.py with padding as "
    f"tokens, times {1 + flops.BACKWARD} for forward and backward (1 + BACKWARD; recomputation is "
    "not counted), over the seconds of the step; MFU is that over the chip's dense peak in the "
    "run's precision (fp32: without TF32)"
)
SAME_PROCESSOR = {"H200": "H100"}  # a name that differs by its memory only
SLOWER = {"NVL"}  # editions that have as many multiprocessors as the table's chip, but lower clocks


def step_flops(config: UnivalConfig, batches: Sequence[Batch]) -> int:
    """Operations of the forward and backward passes over a step's micro-batches on this rank.

    Media that rows share are encoded once and counted once. Frozen parts count as trained ones,
    and passes without a target, which a rank runs because others have another medium, not at all.
    """
    return (1 + flops.BACKWARD) * sum(_forward(config, batch.tensors) for batch in batches)


def _forward(config: UnivalConfig, tensors: Mapping[str, Tensor]) -> int:
    rows, text = tensors["input_ids"].shape
    text += config.num_virtual_tokens
    target = tensors["decoder_input_ids"].shape[1]
    total = tokens = channels = 0
    for medium, key in MEDIUM_KEYS.items():
        if key in tensors:
            media, *size = tensors[key].shape
            one, tokens, channels = _encoder(config, medium, size)
            total += media * one
    encoder, length = flops.lm_encoder(config, rows, text, tokens, channels)
    # Positions differ between rows where each keeps image tokens of its own.
    position_rows = rows if length < tokens + text else 1
    decoder = flops.lm_decoder(config, rows, target, length, position_rows)
    return total + encoder + decoder + flops.head(config, rows * target)


def _encoder(config: UnivalConfig, medium: str, size: Sequence[int]) -> tuple[int, int, int]:
    """One medium of the size that collate gives, without its row: operations, tokens, channels."""
    if medium == "image":
        _, height, width = size
        return flops.image_encoder(config, (height, width))
    if medium == "video":
        _, frames, height, width = size
        return flops.video_encoder(config, (frames, height, width))
    return flops.audio_encoder(config, size[0])


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense operations per second that a device could do at most, from its datasheet.

    Args:
        precision: fp32 (multiply-adds outside the tensor cores), bf16 or fp16.

    Returns:
        None on a CPU, on a chip that the table of kernels/triton_tools/resources.py does not hold,
        and on a part of a chip.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision {precision!r}; known are fp32, bf16 and fp16")
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    chip = _chip(properties.name, properties.multi_processor_count)
    if chip is None:
        return None
    return chip.float32_flops if precision == "fp32" else chip.tensor_flops


def _chip(name: str, multiprocessors: int) -> Chip | None:
    """The chip by the name that CUDA gives it, such as `NVIDIA A100-SXM4-80GB`."""
    words = set(re.split(r"[\s-]+", name))
    words |= {SAME_PROCESSOR[word] for word in words & SAME_PROCESSOR.keys()}
    for chip in CHIPS.values():
        # Smaller editions and slices (MIG) have the name too, but fewer multiprocessors.
        if chip.name in words and chip.multiprocessors == multiprocessors and not words & SLOWER:
            return chip
    return None
