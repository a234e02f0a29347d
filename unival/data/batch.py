"""From records and examples to the tensors of a micro-batch, which holds one medium."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unival.tasks.base import Example
from unival.vocabulary import IGNORE, PAD

MEDIUM_KEYS = {"image": "pixel_values", "video": "video_values", "audio": "audio_values"}


def normalize(values: Tensor) -> Tensor:
    """(x / 255 - 0.5) / 0.5 in float32: 0..255 becomes -1..1 (section 3)."""
    return (values.to(torch.float32) / 127.5).sub_(1.0)


def collate(
    examples: Sequence[tuple[Example, int]],
    media: Sequence[Tensor],
    medium: str,
    pad_id: int = PAD,
    lengths: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """One micro-batch.

    Args:
        examples: each with the index of its medium in `media`, so that the two examples of a row
            share one encoded medium.
        media: R tensors of one shape, as `media.Loaded` describes them; unused for text.
        medium: image, video, audio or text.
        pad_id: fills input_ids and decoder_input_ids on the right.
        lengths: T and U, so that all batches have one shape; absent: the longest rows'.

    Returns:
        input_ids, decoder_input_ids int64 [B, T], [B, U]; attention_mask bool [B, T]; labels int64
        [B, U] with -100 where there is no loss; loss_weight float32 [B]; media_index int64 [B]; and
        pixel_values [R, 3, H, W], video_values [R, 3, F, H, W] or audio_values [R, L] in float32,
        pixels normalized to -1..1 (media given as float are taken to be so already).

    Raises:
        ValueError: no examples, unequal lengths of decoder_input and target, a wrong index, media
            of unequal shapes, a row longer than `lengths`.
    """
    if not examples:
        raise ValueError("a batch needs an example")
    for number, (example, index) in enumerate(examples):
        if len(example.decoder_input) != len(example.target):
            raise ValueError(
                f"example {number}: {len(example.decoder_input)} decoder inputs, "
                f"{len(example.target)} targets"
            )
        if medium != "text" and not 0 <= index < len(media):
            raise ValueError(f"example {number}: medium {index} of {len(media)}")
    sources = [example.source for example, _ in examples]
    inputs = [example.decoder_input for example, _ in examples]
    source_length = _length(sources, None if lengths is None else lengths[0], "source")
    length = _length(inputs, None if lengths is None else lengths[1], "target")
    real = torch.tensor([len(source) for source in sources])
    batch = {
        "input_ids": _pad(sources, pad_id, source_length),
        "attention_mask": torch.arange(source_length) < real[:, None],
        "decoder_input_ids": _pad(inputs, pad_id, length),
        "labels": _pad([example.target for example, _ in examples], IGNORE, length),
        "loss_weight": torch.tensor([example.weight for example, _ in examples]).float(),
        "media_index": torch.tensor([index for _, index in examples]),
    }
    if medium != "text":
        batch[MEDIUM_KEYS[medium]] = _stack(media)
    return batch


def _length(rows: Sequence[Sequence[int]], limit: int | None, what: str) -> int:
    """What rows are padded to: the limit, or the longest row."""
    for number, row in enumerate(rows):
        if limit is not None and len(row) > limit:
            raise ValueError(f"example {number}: {len(row)} {what} tokens; the limit is {limit}")
    return max(len(row) for row in rows) if limit is None else limit


def _pad(rows: Sequence[Sequence[int]], value: int, length: int) -> Tensor:
    """int64 [rows, length], filled on the right."""
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded


def _stack(media: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in media}
    if len(shapes) != 1:
        raise ValueError(f"media of one shape are needed, got {sorted(shapes)}")
    stacked = _as_one(media)
    if stacked is None:
        stacked = torch.stack(list(media))
    return normalize(stacked) if stacked.dtype == torch.uint8 else stacked.float()


def _as_one(media: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose rows the media are, in order and without rest; None where there is none."""
    whole = media[0]._base
    if whole is None or len(whole) != len(media) or whole[0].shape != media[0].shape:
        return None
    same = all(one.data_ptr() == row.data_ptr() for one, row in zip(media, whole, strict=True))
    return whole if same and whole.is_contiguous() else None
