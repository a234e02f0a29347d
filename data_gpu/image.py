"""Pictures: what is done to one, drawn before it is decoded, and doing it with Pillow.

A `Plan` is drawn from the picture's size alone. `render` follows it with Pillow, which is the
reference; `image_graph` follows the same plans in batches, on a GPU or a CPU. All resizing is
bicubic. Boxes are (x0, y0, x1, y1) in pixels of the picture they come with.
"""

from __future__ import annotations

import io
import math
import random
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from unival.data_gpu.errors import DecodeError, Media, require_content
from unival.data_gpu.limits import Limits

Box = tuple[float, float, float, float]

# Only what data sets hold: Pillow also knows formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_SCALE = 480  # the random resize draws the short side up to this
MAX_LONG_SIDE = 672
FILL = 128  # of the corners that shearing, moving and turning uncover

# RandAugment at level 7 of 10, two operations a picture, each used with probability 0.5
OPERATIONS = (
    "identity",
    "auto_contrast",
    "equalize",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)
OPERATIONS_PER_IMAGE = 2
USE_PROBABILITY = 0.5
ENHANCE = 0.7 * 1.8 + 0.1
SHEAR = 0.7 * 0.3
TRANSLATE = 7
ROTATE = 0.7 * 30
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


class Operation(NamedTuple):
    """One of OPERATIONS; `sign` is +1 or -1 for those that have a direction."""

    name: str
    sign: int


class Plan(NamedTuple):
    """Resize to width x height, take `size` x `size` from (left, top), then the operations."""

    width: int
    height: int
    left: int
    top: int
    size: int
    operations: tuple[Operation, ...] = ()


def decode_image(media: Media, limits: Limits | None = None) -> Image.Image:
    """An RGB picture, 8 bits a channel, from an encoded picture.

    Orientation tags are not applied, as in the original: boxes count the stored pixels.

    Raises:
        DecodeError: missing, truncated, no picture, or beyond `limits` (the default ones if None).
    """
    limits = limits or Limits()
    require_content(media, limits)
    try:
        source = media if isinstance(media, Path) else io.BytesIO(media)
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.pixels:
                raise DecodeError(media, f"{width} x {height} pixels; {limits.pixels} at most")
            image.load()
            return image.convert("RGB")
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(media, f"{error}; {limits.pixels} at most") from error
    except PIL_ERRORS as error:
        raise DecodeError(media, f"not a readable picture: {error}") from error


def image_to_array(image: Image.Image) -> np.ndarray:
    """uint8 [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def exact_plan(size: int) -> Plan:
    """size x size whatever the aspect: fine-tuning and evaluation (3.1)."""
    return Plan(size, size, 0, 0, size)


def center_crop_plan(width: int, height: int, size: int, rng: random.Random) -> Plan:
    """Pre-training on captions and questions of a picture of width x height: a random resize, the
    middle, RandAugment (3.1)."""
    wide, high = _random_resize(width, height, size, rng)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return Plan(wide, high, left, top, size, rand_augment(rng))


def object_crop_plan(width: int, height: int, box: Box, size: int, rng: random.Random) -> Plan:
    """Pre-training on grounding: a random resize, then size x size around the middle of the box,
    shifted to stay in the picture (3.1).

    The crop starts at a whole pixel; the original moved box and picture by the fraction, up to half
    a pixel beside the picture.
    """
    wide, high = _random_resize(width, height, size, rng)
    x0, y0, x1, y1 = _scale(box, (width, height), (wide, high))
    left = _crop_start((x0 + x1) / 2, size, wide)
    top = _crop_start((y0 + y1) / 2, size, high)
    return Plan(wide, high, left, top, size)


def move_box(box: Box, width: int, height: int, plan: Plan) -> Box:
    """A box of a width x height picture in the picture that `plan` makes, cut at its border."""
    x0, y0, x1, y1 = _scale(box, (width, height), (plan.width, plan.height))
    return (
        _within(x0 - plan.left, plan.size),
        _within(y0 - plan.top, plan.size),
        _within(x1 - plan.left, plan.size),
        _within(y1 - plan.top, plan.size),
    )


def rand_augment(rng: random.Random) -> tuple[Operation, ...]:
    """RandAugment of the pre-training (N = 2, M = 7): two operations drawn with replacement, each
    used with probability 0.5 (3.1)."""
    drawn = rng.choices(OPERATIONS, k=OPERATIONS_PER_IMAGE)
    return tuple(
        Operation(name, rng.choice((-1, 1))) for name in drawn if rng.random() < USE_PROBABILITY
    )


def _scale(box: Box, before: tuple[int, int], after: tuple[int, int]) -> Box:
    x, y = after[0] / before[0], after[1] / before[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _random_resize(width: int, height: int, size: int, rng: random.Random) -> tuple[int, int]:
    """The short side drawn from size..480; each side then capped at 672 by itself, which squeezes a
    long picture, as in the original."""
    short = rng.randint(size, max(size, MAX_SCALE))
    cap = max(size, MAX_LONG_SIDE)
    if width < height:
        wide, high = short, int(short * height / width)
    else:
        wide, high = int(short * width / height), short
    return min(wide, cap), min(high, cap)


def _within(value: float, size: int) -> float:
    return min(max(value, 0.0), float(size))


def _crop_start(center: float, size: int, length: int) -> int:
    return round(min(max(center - size / 2, 0), length - size))


def render(image: Image.Image, plan: Plan) -> Image.Image:
    """The picture that the plan makes of `image`, size x size."""
    resized = image.resize((plan.width, plan.height), Image.Resampling.BICUBIC)
    box = (plan.left, plan.top, plan.left + plan.size, plan.top + plan.size)
    return augment(resized.crop(box), plan.operations)


def augment(image: Image.Image, operations: tuple[Operation, ...]) -> Image.Image:
    """The operations one after the other; the size stays."""
    for operation in operations:
        image = _augment(image, operation)
    return image


def _augment(image: Image.Image, operation: Operation) -> Image.Image:
    name, sign = operation
    if name == "identity":
        return image
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "brightness":
        return ImageEnhance.Brightness(image).enhance(ENHANCE)
    if name == "sharpness":
        return ImageEnhance.Sharpness(image).enhance(ENHANCE)
    if name in ("translate_x", "translate_y"):
        shift = sign * TRANSLATE
        moved = Image.new("RGB", image.size, (FILL, FILL, FILL))
        moved.paste(image, (shift, 0) if name == "translate_x" else (0, shift))
        return moved
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        affine(operation, *image.size),
        resample=Image.Resampling.BILINEAR,
        fillcolor=(FILL, FILL, FILL),
    )


def affine(operation: Operation, width: int, height: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the point (x, y) of the result shows (ax + by + c, dx + ey + f)."""
    name, sign = operation
    if name == "shear_x":
        return 1, -sign * SHEAR, 0, 0, 1, 0
    if name == "shear_y":
        return 1, 0, 0, -sign * SHEAR, 1, 0
    if name == "translate_x":
        return 1, 0, -sign * TRANSLATE, 0, 1, 0
    if name == "translate_y":
        return 1, 0, 0, 0, 1, -sign * TRANSLATE
    if name == "rotate":  # counter-clockwise about the middle
        cos, sin = math.cos(math.radians(sign * ROTATE)), math.sin(math.radians(sign * ROTATE))
        x, y = width / 2, height / 2
        return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
    raise ValueError(f"{name} does not move pixels")
