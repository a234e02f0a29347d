"""A small picture of every medium: the picture, a strip of frames, a spectrogram."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unival.data.media import MediaOptions
from unival.data.records import Record
from unival.data_gpu.image import decode_image
from unival.model.audio_encoder import LogMel

THUMBNAIL = 256  # pixels of a picture's longer side
STRIP_FRAMES, STRIP_SIZE = 4, 128
COLOURS = ((13, 8, 55), (126, 3, 168), (226, 97, 85), (252, 226, 90))  # quiet ... loud
DYNAMIC_RANGE = 80.0  # dB


def write_thumbnail(
    record: Record, tensor: Tensor, options: MediaOptions, folder: Path | None
) -> str:
    """Write a medium's thumbnail unless it is there; its name relative to `folder`, or empty."""
    if folder is None or record.medium == "text":
        return ""
    digest = hashlib.sha256(record.media_key.encode()).hexdigest()[:16]
    name = f"thumbnails/{record.medium}-{digest}.jpg"
    path = Path(folder) / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if record.medium == "image":
            picture = decode_image(record.media)
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
        elif record.medium == "video":
            picture = film_strip(tensor)
        else:
            picture = spectrogram(tensor, options.audio_sample_rate or 48_000)
        picture.save(path, quality=85)
    return name


def film_strip(clip: Tensor) -> Image.Image:
    """Some frames of uint8 [3, F, H, W] side by side."""
    frames = torch.linspace(0, clip.shape[1] - 1, STRIP_FRAMES).round().long().tolist()
    strip = Image.new("RGB", (STRIP_FRAMES * STRIP_SIZE, STRIP_SIZE))
    for place, frame in enumerate(frames):
        pixels = clip[:, frame].permute(1, 2, 0).contiguous().numpy()
        picture = Image.fromarray(pixels).resize((STRIP_SIZE, STRIP_SIZE))
        strip.paste(picture, (place * STRIP_SIZE, 0))
    return strip


@lru_cache(maxsize=2)
def _log_mel(sample_rate: int) -> LogMel:
    return LogMel(sample_rate, 64, sample_rate // 100)


def spectrogram(waveform: Tensor, sample_rate: int) -> Image.Image:
    """The log-mel spectrogram of float32 [L]; low frequencies at the bottom."""
    decibels = _log_mel(sample_rate)(waveform[None]).squeeze().numpy()
    level = np.clip((decibels - decibels.max()) / DYNAMIC_RANGE + 1.0, 0.0, 1.0).T[::-1]
    stops = np.linspace(0.0, 1.0, len(COLOURS))
    channels = [np.interp(level, stops, channel) for channel in zip(*COLOURS, strict=True)]
    picture = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    return picture.resize((2 * THUMBNAIL, THUMBNAIL // 2), Image.Resampling.BILINEAR)
