"""Pictures: decoding, geometry that moves a box along, and RandAugment. All resizing is bicubic.

Boxes are (x0, y0, x1, y1) in pixels of the picture they come with.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from unival.data_gpu.errors import DecodeError, Media, require_content

Box = tuple[float, float, float, float]

# Only what data sets hold: Pillow also knows formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a header may claim far more than a file can hold
MAX_SCALE = 480  # the random resize draws the short side up to this
MAX_LONG_SIDE = 672
FILL = (128, 128, 128)  # of the corners that shearing, moving and turning uncover

# RandAugment at level 7 of 10, two operations a picture, each used with probability 0.5
OPERATIONS_PER_IMAGE = 2
USE_PROBABILITY = 0.5
ENHANCE = 0.7 * 1.8 + 0.1
SHEAR = 0.7 * 0.3
TRANSLATE = 7
ROTATE = 0.7 * 30
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


def decode_image(media: Media) -> Image.Image:
    """An RGB picture, 8 bits a channel, from an encoded picture.

    Orientation tags are not applied, as in the original: boxes count the stored pixels.

    Raises:
        DecodeError: missing, truncated, no picture, or larger than MAX_PIXELS.
    """
    require_content(media)
    try:
        source = media if isinstance(media, Path) else io.BytesIO(media)
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DecodeError(media, f"{width} x {height} pixels; {MAX_PIXELS} at most")
            image.load()
            return image.convert("RGB")
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(media, f"{error}; {MAX_PIXELS} at most") from error
    except PIL_ERRORS as error:
        raise DecodeError(media, f"not a readable picture: {error}") from error


def image_to_tensor(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _scale(box: Box, before: Image.Image, after: Image.Image) -> Box:
    x, y = after.width / before.width, after.height / before.height
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def resize_exact(
    image: Image.Image, size: int, box: Box | None = None
) -> tuple[Image.Image, Box | None]:
    """size x size whatever the aspect: fine-tuning and evaluation (3.1)."""
    resized = _resize(image, size, size)
    return resized, None if box is None else _scale(box, image, resized)


def _random_resize(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """The short side drawn from size..480; each side then capped at 672 by itself, which squeezes a
    long picture, as in the original."""
    short = rng.randint(size, max(size, MAX_SCALE))
    cap = max(size, MAX_LONG_SIDE)
    if image.width < image.height:
        width, height = short, int(short * image.height / image.width)
    else:
        width, height = int(short * image.width / image.height), short
    return _resize(image, min(width, cap), min(height, cap))


def random_resize_center_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Pre-training on captions and questions: a random resize, then the middle (3.1)."""
    resized = _random_resize(image, size, rng)
    left = round((resized.width - size) / 2)
    top = round((resized.height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def random_resize_object_crop(
    image: Image.Image, box: Box, size: int, rng: random.Random
) -> tuple[Image.Image, Box]:
    """Pre-training on grounding: a random resize, then size x size around the middle of the box,
    shifted to stay in the picture; the box is moved along and cut at the crop's border (3.1).

    The crop starts at a whole pixel and the box moves by that; the original moved it by the
    fraction, up to half a pixel beside the picture.
    """
    resized = _random_resize(image, size, rng)
    x0, y0, x1, y1 = _scale(box, image, resized)
    left = _crop_start((x0 + x1) / 2, size, resized.width)
    top = _crop_start((y0 + y1) / 2, size, resized.height)
    cropped = resized.crop((left, top, left + size, top + size))
    return cropped, (
        _within(x0 - left, size),
        _within(y0 - top, size),
        _within(x1 - left, size),
        _within(y1 - top, size),
    )


def _within(value: float, size: int) -> float:
    return min(max(value, 0.0), float(size))


def _crop_start(center: float, size: int, length: int) -> int:
    return round(min(max(center - size / 2, 0), length - size))


def rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """RandAugment of the pre-training (N = 2, M = 7): two operations drawn with replacement, each
    used with probability 0.5 (3.1). The size stays."""
    for operation in rng.choices(OPERATIONS, k=OPERATIONS_PER_IMAGE):
        if rng.random() < USE_PROBABILITY:
            image = operation(image, rng.choice((-1, 1)))
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """`matrix` leads from a pixel of the result to its pixel in `image`."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BILINEAR,
        fillcolor=FILL,
    )


def identity(image: Image.Image, sign: int) -> Image.Image:
    return image


def auto_contrast(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.equalize(image)


def brightness(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(ENHANCE)


def sharpness(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(ENHANCE)


def shear_x(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, (1, -sign * SHEAR, 0, 0, 1, 0))


def shear_y(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, (1, 0, 0, -sign * SHEAR, 1, 0))


def translate_x(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, (1, 0, -sign * TRANSLATE, 0, 1, 0))


def translate_y(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, -sign * TRANSLATE))


def rotate(image: Image.Image, sign: int) -> Image.Image:
    return image.rotate(sign * ROTATE, resample=Image.Resampling.BILINEAR, fillcolor=FILL)


OPERATIONS: tuple[Callable[[Image.Image, int], Image.Image], ...] = (
    identity,
    auto_contrast,
    equalize,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    rotate,
)
