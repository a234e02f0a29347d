"""Clips: frames of a film, cropped, augmented and brought to size."""

from __future__ import annotations

import random

import numpy as np

from unival.data_gpu.errors import Media, MediaInfo
from unival.data_gpu.limits import Limits
from unival.data_gpu.resize import resize
from unival.data_gpu.video_augment import (
    center_crop_pad,
    rand_augment,
    random_resized_crop,
)
from unival.data_gpu.video_backends import INDICES, frame_indices, read_frames, verify_film
from unival.data_gpu.video_scan import open_container, scan_film, video_stream

__all__ = [
    "INDICES",
    "MODES",
    "decode_clip",
    "frame_indices",
    "open_container",
    "probe_video",
    "verify_video",
]

RANDOM_MODES = ("random_resized_crop", "pretrain", "fine_tuning")
MODES = ("exact", "center_crop_pad", *RANDOM_MODES)


def decode_clip(
    media: Media,
    num_frames: int,
    size: int,
    *,
    indices: str = "uniform",
    mode: str = "exact",
    rng: random.Random | None = None,
    backend: str = "pyav",
    limits: Limits | None = None,
) -> np.ndarray:
    """Frames of a film.

    Args:
        media: the encoded film.
        num_frames: frames wanted (F); a shorter film repeats its last one.
        size: pixels of a side.
        indices: `random`, the original's rule in training and evaluation; `uniform`, the middle of
            each interval, which repeats (see `frame_indices`).
        mode: `exact` resizes the whole frame; `center_crop_pad` cuts or pads with black and never
            resizes (the original's evaluation); `random_resized_crop` takes half to all of the
            area and flips half of the clips; `pretrain` does RandAugment after that, `fine_tuning`
            before it (3.2). All frames of a clip are treated alike.
        rng: for what is random, and for nothing else.
        backend: what decodes, see `read_frames`.
        limits: what the film may cost; the default ones if None.

    Returns:
        uint8 [3, F, size, size], upright by the film's display matrix. Pixels that are not square
        stay as they are stored.

    Raises:
        DecodeError: missing, truncated, damaged, no film, beyond the limits.
        BackendError: the backend cannot run on this machine.
    """
    if indices not in INDICES or mode not in MODES:
        raise ValueError(f"indices {indices!r}, mode {mode!r}; known: {INDICES}, {MODES}")
    if rng is None:
        if indices == "random" or mode in RANDOM_MODES:
            raise ValueError("random frames and crops need rng")
        rng = random.Random(0)  # never drawn from

    def choose(length: int) -> list[int]:
        return frame_indices(num_frames, length, indices, rng)

    frames = read_frames(media, choose, backend, limits or Limits())
    return np.ascontiguousarray(np.stack(_shape(frames, size, mode, rng)).transpose(3, 0, 1, 2))


def _shape(frames: list[np.ndarray], size: int, mode: str, rng: random.Random) -> list[np.ndarray]:
    """The frames at size x size."""
    if mode == "exact":
        return list(resize(np.stack(frames), size, size))
    if mode == "center_crop_pad":
        return [center_crop_pad(frame, size) for frame in frames]
    if mode == "fine_tuning":
        frames = rand_augment(frames, rng)
    frames = random_resized_crop(frames, size, rng)
    return rand_augment(frames, rng) if mode == "pretrain" else frames


def probe_video(media: Media, limits: Limits) -> MediaInfo:
    """What the headers say: milliseconds. `frames` is 0 where they do not count them (Matroska).

    Raises:
        DecodeError: no film, or a header beyond the limits.
    """
    with open_container(media, limits) as container:
        return video_stream(container, media, limits)[1]


def verify_video(media: Media, limits: Limits) -> MediaInfo:
    """Decode every frame; `frames` and `seconds` are counted.

    Raises:
        DecodeError: missing, truncated, damaged, no film, beyond the limits. A decoder does not
            see all damage: a flipped bit often gives another valid film.
    """
    return verify_film(media, scan_film(media, limits), limits)
