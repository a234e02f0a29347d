"""What is done to the frames of a clip: sizes, crops and RandAugment, all frames alike.

Frames are uint8 [H, W, 3]. What is random is drawn once for a clip. RandAugment is torchvision's
default (two operations, magnitude 9 of 31 bins, nearest pixels, black fill) as it is on tensors,
which is what the original used; only the colour statistics (contrast, auto_contrast, equalize) are
those of each frame, as they are there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from unival.data_gpu.resize import resize

AREA = (0.5, 1.0)
RATIO = (3 / 4, 4 / 3)

OPERATIONS_PER_CLIP = 2
STRENGTH = 9 / 30  # bin 9 of 0..30
SHEAR = STRENGTH * 0.3
TRANSLATE = STRENGTH * 150 / 331  # of the side
ROTATE = STRENGTH * 30  # degrees
ENHANCE = float(np.float32(9) * np.float32(0.9 / 30))  # as torchvision's float32 table has it
POSTERIZE_BITS = 7  # 8 - round(9 / 7.5)
SOLARIZE = 255 - STRENGTH * 255
SIGNED = (
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
)
OPERATIONS = ("identity", *SIGNED, "posterize", "solarize", "auto_contrast", "equalize")
GREY = np.array([0.2989, 0.587, 0.114], dtype=np.float32)
LEVELS = np.arange(256, dtype=np.float32)


class Operation(NamedTuple):
    """One of OPERATIONS; `sign` is +1 or -1, and +1 for those that have no direction."""

    name: str
    sign: int


def center_crop_pad(frame: np.ndarray, size: int) -> np.ndarray:
    """What torchvision's CenterCrop does: black borders where the frame is small (the extra pixel
    goes right and below), the middle where it is large."""
    height, width = frame.shape[:2]
    pad_y, pad_x = max(size - height, 0), max(size - width, 0)
    sides = ((pad_y // 2, pad_y - pad_y // 2), (pad_x // 2, pad_x - pad_x // 2), (0, 0))
    padded = np.pad(frame, sides)
    top = round((padded.shape[0] - size) / 2)
    left = round((padded.shape[1] - size) / 2)
    return padded[top : top + size, left : left + size]


def random_resized_crop(
    frames: Sequence[np.ndarray], size: int, rng: random.Random
) -> list[np.ndarray]:
    """Half to all of the area, resized to size x size; half of the clips are flipped (3.2)."""
    height, width = frames[0].shape[:2]
    left, top, crop_width, crop_height = random_crop(width, height, rng)
    flip = rng.random() < 0.5
    rows, columns = slice(top, top + crop_height), slice(left, left + crop_width)
    resized = resize(np.stack([frame[rows, columns] for frame in frames]), size, size)
    return list(resized[:, :, ::-1] if flip else resized)


def random_crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(left, top, width, height) by torchvision's rule: an area and a log-uniform ratio, ten tries,
    then the largest middle part with an allowed ratio."""
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            return left, top, crop_width, crop_height
    crop_width = min(width, max(round(height * RATIO[1]), 1))
    crop_height = min(height, max(round(width / RATIO[0]), 1))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def draw_operations(rng: random.Random) -> list[Operation]:
    """Two operations, drawn with replacement; half of the signed ones go the other way."""
    drawn = []
    for name in rng.choices(OPERATIONS, k=OPERATIONS_PER_CLIP):
        negative = name in SIGNED and rng.random() < 0.5
        drawn.append(Operation(name, -1 if negative else 1))
    return drawn


def rand_augment(frames: Sequence[np.ndarray], rng: random.Random) -> list[np.ndarray]:
    """torchvision's RandAugment with its defaults; the size stays."""
    augmented = list(frames)
    for operation in draw_operations(rng):
        augmented = apply_operation(augmented, operation)
    return augmented


def apply_operation(frames: Sequence[np.ndarray], operation: Operation) -> list[np.ndarray]:
    """The frames, all of one size, after one operation."""
    name, sign = operation
    if name == "identity":
        return list(frames)
    if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        sources, black = _sources(operation, *frames[0].shape[:2])
        return [_gather(frame, sources, black) for frame in frames]
    factor = 1 + sign * ENHANCE
    if name == "color":
        return [_blend(frame, _grey(frame)[..., None], factor) for frame in frames]
    if name == "sharpness":
        return [_blend(frame, _smooth(frame), factor) for frame in frames]
    return [_look_up(frame, _tables(name, frame, factor)) for frame in frames]


def _sources(operation: Operation, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of the result, the number of the pixel that it shows (int64 [H, W]) and
    whether that lies outside (bool [H, W])."""
    name, sign = operation
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    if name == "shear_x":  # about the corner: rows move more the lower they are
        x = x + sign * SHEAR * (y + 0.5)
    elif name == "shear_y":
        y = y + sign * SHEAR * (x + 0.5)
    elif name == "translate_x":  # the shift is a whole number of pixels
        x = x - int(sign * TRANSLATE * width)
    elif name == "translate_y":
        y = y - int(sign * TRANSLATE * height)
    else:  # counter-clockwise about the middle
        angle = math.radians(sign * ROTATE)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = x - (width - 1) / 2, y - (height - 1) / 2
        x, y = cos * x - sin * y, sin * x + cos * y
        x, y = x + (width - 1) / 2, y + (height - 1) / 2
    column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    return np.where(outside, 0, row * width + column), outside


def _gather(frame: np.ndarray, sources: np.ndarray, outside: np.ndarray) -> np.ndarray:
    moved = frame.reshape(-1, 3)[sources]
    moved[outside] = 0
    return moved


def _blend(frame: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """factor * frame + (1 - factor) * other, cut to 0..255 and to whole numbers."""
    mixed = np.float32(factor) * frame + np.float32(1 - factor) * other
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _grey(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W], cut, not rounded."""
    red, green, blue = (GREY[i] * frame[..., i] for i in range(3))
    return (red + green + blue).astype(np.uint8)


def _smooth(frame: np.ndarray) -> np.ndarray:
    """Each pixel with its neighbours, weights 5 and 1; the border stays as it is."""
    return np.asarray(Image.fromarray(frame).filter(ImageFilter.SMOOTH))


def _look_up(frame: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Each value replaced by that of its channel's table, uint8 [3, 256]."""
    return np.asarray(Image.fromarray(frame).point(tables.reshape(-1).tolist()))


def _tables(name: str, frame: np.ndarray, factor: float) -> np.ndarray:
    """uint8 [3, 256]: what the operation makes of each value of each channel."""
    if name in ("auto_contrast", "equalize"):
        counts = np.array(Image.fromarray(frame).histogram()).reshape(3, 256)
        make = _stretch if name == "auto_contrast" else _equalize
        return np.stack([make(count) for count in counts])
    if name == "brightness":
        table = _blend(LEVELS, np.zeros(1), factor)
    elif name == "contrast":
        mean = _grey(frame).mean(dtype=np.float64, keepdims=True).astype(np.float32)
        table = _blend(LEVELS, mean[0], factor)
    elif name == "posterize":
        table = (np.arange(256) & -(1 << (8 - POSTERIZE_BITS))).astype(np.uint8)
    else:  # solarize
        table = np.where(LEVELS >= SOLARIZE, 255 - LEVELS, LEVELS).astype(np.uint8)
    return np.broadcast_to(table, (3, 256))


def _stretch(counts: np.ndarray) -> np.ndarray:
    """From the darkest and the brightest value to 0..255; one value alone stays."""
    used = np.flatnonzero(counts).astype(np.float32)
    if used[0] == used[-1]:
        return np.arange(256).astype(np.uint8)
    scale = np.float32(255) / (used[-1] - used[0])
    return np.clip((LEVELS - used[0]) * scale, 0, 255).astype(np.uint8)


def _equalize(counts: np.ndarray) -> np.ndarray:
    """The cumulated histogram; the count of the brightest value does not enter the step."""
    step = counts[np.flatnonzero(counts)[:-1]].sum() // 255
    if step == 0:
        return np.arange(256).astype(np.uint8)
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.clip((below + step // 2) // step, 0, 255).astype(np.uint8)
