"""From records and examples to the tensors of a micro-batch, which holds one medium."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unival.data.records import Record, RecordError
from unival.data_gpu import audio, image, video
from unival.data_gpu.errors import DecodeError
from unival.tasks.base import Box, Example
from unival.vocabulary import IGNORE, PAD

IMAGE_TRANSFORMS = ("exact", "pretrain")
VIDEO_TRANSFORMS = ("exact", "center_crop_pad", "random_resized_crop")
MEDIUM_KEYS = {"image": "pixel_values", "video": "video_values", "audio": "audio_values"}
BOX_TOLERANCE = 1.0  # boxes are written with rounded widths: a pixel too far is no error


@dataclass(frozen=True)
class MediaOptions:
    """How media become tensors. Sizes in pixels of a side, rates in Hz.

    image_transform  exact: resized to image_size, whatever the aspect (fine-tuning, evaluation)
                     pretrain: random resize and crop; RandAugment where there is no box
    video_transform  a mode of `decode_clip`; random_resized_crop for pre-training
    video_indices    uniform, or random as the original everywhere
    audio_sample_rate  None keeps a file's own rate, as the released code
    audio_random     a random piece of a longer sound instead of its beginning
    """

    image_size: int = 384
    video_size: int = 224
    video_frames: int = 8
    audio_samples: int = 480_000
    audio_sample_rate: int | None = 48_000
    image_transform: str = "exact"
    video_transform: str = "exact"
    video_indices: str = "uniform"
    audio_random: bool = False

    def __post_init__(self) -> None:
        for field, known in (
            ("image_transform", IMAGE_TRANSFORMS),
            ("video_transform", VIDEO_TRANSFORMS),
            ("video_indices", video.INDICES),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r}; known: {', '.join(known)}")


def load_media(
    record: Record, options: MediaOptions, rng: random.Random
) -> tuple[Tensor, Box | None]:
    """The record's medium as a tensor, and its box in pixels of that tensor.

    Returns:
        image uint8 [3, H, W]; video uint8 [3, F, H, W]; audio float32 [L]; text uint8 [0].

    Raises:
        RecordError: the medium cannot be decoded (field media), or the box lies outside the
            picture (field box).
    """
    try:
        if record.medium == "image":
            return _load_image(record, options, rng)
        if record.medium == "video":
            clip = video.decode_clip(
                record.media,
                options.video_frames,
                options.video_size,
                indices=options.video_indices,
                mode=options.video_transform,
                rng=rng,
            )
            return clip, None
        if record.medium == "audio":
            piece = rng if options.audio_random else None
            rate = options.audio_sample_rate
            return audio.decode_waveform(record.media, options.audio_samples, rate, piece), None
    except DecodeError as error:
        raise RecordError(record.origin, "media", str(error)) from error
    return torch.empty(0, dtype=torch.uint8), None


def _load_image(
    record: Record, options: MediaOptions, rng: random.Random
) -> tuple[Tensor, Box | None]:
    picture = image.decode_image(record.media)
    box = _box_inside(record, picture.width, picture.height)
    size = options.image_size
    if options.image_transform == "exact":
        picture, box = image.resize_exact(picture, size, box)
    elif box is not None:
        picture, box = image.random_resize_object_crop(picture, box, size, rng)
    else:
        picture = image.random_resize_center_crop(picture, size, rng)
        picture = image.rand_augment(picture, rng)
    return image.image_to_tensor(picture), box


def _box_inside(record: Record, width: int, height: int) -> Box | None:
    if record.box is None:
        return None
    x0, y0, x1, y1 = record.box
    limits = (width + BOX_TOLERANCE, height + BOX_TOLERANCE)
    if x0 >= width or y0 >= height or x1 > limits[0] or y1 > limits[1]:
        problem = f"{record.box} lies outside the picture of {width} x {height} pixels"
        raise RecordError(record.origin, "box", problem)
    return x0, y0, min(x1, float(width)), min(y1, float(height))


def normalize(values: Tensor) -> Tensor:
    """(x / 255 - 0.5) / 0.5 in float32: 0..255 becomes -1..1 (section 3)."""
    return (values.to(torch.float32) / 127.5).sub_(1.0)


def collate(
    examples: Sequence[tuple[Example, int]],
    media: Sequence[Tensor],
    medium: str,
    pad_id: int = PAD,
) -> dict[str, Tensor]:
    """One micro-batch.

    Args:
        examples: each with the index of its medium in `media`, so that the two examples of a row
            share one encoded medium.
        media: R tensors of one shape, as `load_media` gives them; unused for text.
        medium: image, video, audio or text.
        pad_id: fills input_ids and decoder_input_ids on the right.

    Returns:
        input_ids, decoder_input_ids int64 [B, T], [B, U]; attention_mask bool [B, T]; labels int64
        [B, U] with -100 where there is no loss; loss_weight float32 [B]; media_index int64 [B]; and
        pixel_values [R, 3, H, W], video_values [R, 3, F, H, W] or audio_values [R, L] in float32,
        pixels normalized to -1..1 (media given as float are taken to be so already).

    Raises:
        ValueError: no examples, unequal lengths of decoder_input and target, a wrong index, media
            of unequal shapes.
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
    lengths = torch.tensor([len(source) for source in sources])
    input_ids = _pad(sources, pad_id)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
        "decoder_input_ids": _pad([example.decoder_input for example, _ in examples], pad_id),
        "labels": _pad([example.target for example, _ in examples], IGNORE),
        "loss_weight": torch.tensor([example.weight for example, _ in examples]).float(),
        "media_index": torch.tensor([index for _, index in examples]),
    }
    if medium != "text":
        batch[MEDIUM_KEYS[medium]] = _stack(media)
    return batch


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [rows, longest], filled on the right."""
    padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded


def _stack(media: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in media}
    if len(shapes) != 1:
        raise ValueError(f"media of one shape are needed, got {sorted(shapes)}")
    stacked = torch.stack(list(media))
    return normalize(stacked) if stacked.dtype == torch.uint8 else stacked.float()
