"""Pictures: hostile inputs, and geometry against numbers worked out by hand."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unival.data_gpu import image
from unival.data_gpu.errors import DecodeError

SAMPLES = Path(__file__).parents[2] / "samples"
CAT = SAMPLES / "images" / "cat.jpg"


class Scripted(random.Random):
    """Draws the given short side."""

    def __init__(self, short):
        super().__init__(0)
        self.short = short

    def randint(self, low, high):
        assert low <= self.short <= high
        return self.short


def encoded(picture, form="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds one byte of pixels."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_bytes_and_paths_decode_alike_and_keep_the_pixels():
    picture = Image.new("RGB", (3, 2))
    picture.putpixel((2, 1), (10, 20, 30))
    tensor = image.image_to_tensor(image.decode_image(encoded(picture)))
    assert tensor.shape == (3, 2, 3)
    assert tensor.dtype == torch.uint8
    assert tensor[:, 1, 2].tolist() == [10, 20, 30]
    assert tensor.sum() == 60
    assert image.decode_image(CAT).tobytes() == image.decode_image(CAT.read_bytes()).tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_colour_modes_become_rgb(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert image.decode_image(encoded(Image.new(mode, (4, 3)), form)).mode == "RGB"


def test_orientation_tags_are_left_alone_since_boxes_count_stored_pixels():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # turn by a quarter
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    assert image.decode_image(buffer.getvalue()).size == (8, 4)


def test_a_truncated_jpeg_is_an_error():
    data = CAT.read_bytes()
    with pytest.raises(DecodeError, match="truncated"):
        image.decode_image(data[: len(data) // 2])
    with pytest.raises(DecodeError):
        image.decode_image(data[:100])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_001, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_claims_a_huge_picture_is_refused_before_any_pixel(size):
    with pytest.raises(DecodeError, match="at most"):
        image.decode_image(png_header(*size))


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(DecodeError):
        image.decode_image(data)


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    with pytest.raises(DecodeError, match="no such file"):
        image.decode_image(tmp_path / "none.jpg")
    with pytest.raises(DecodeError, match="not a regular file"):
        image.decode_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")  # to open it would wait for ever
    with pytest.raises(DecodeError, match="not a regular file"):
        image.decode_image(tmp_path / "pipe.jpg")


def test_resize_exact_scales_each_axis():
    resized, box = image.resize_exact(Image.new("RGB", (200, 100)), 50, (20, 10, 100, 90))
    assert resized.size == (50, 50)
    assert box == (5, 5, 25, 45)
    assert image.resize_exact(Image.new("RGB", (200, 100)), 50)[1] is None


def block(width, height, box):
    """Black with a white rectangle."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def test_center_crop_takes_the_middle_of_the_resized_picture():
    # 100 x 50 -> short side 400: 800 x 400, the width capped to 672; middle 384 of 672 x 400.
    # The white columns 50..100 become 336..672, thus 336 - 144 = 192..384 in the crop.
    cropped = image.random_resize_center_crop(block(100, 50, (50, 0, 100, 50)), 384, Scripted(400))
    pixels = np.asarray(cropped)
    assert pixels.shape == (384, 384, 3)
    assert (pixels[:, :180] == 0).all()
    assert (pixels[:, 204:] == 255).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # 400 x 200 -> 480 high: 960 x 480, width capped: 672 x 480. x * 1.68, y * 2.4.
        # Middle (336, 240): crop from (336 - 192, 240 - 192) = (144, 48).
        ((150, 75, 250, 125), (252 - 144, 180 - 48, 420 - 144, 300 - 48)),
        # Middle (16.8, 24): the crop stays at (0, 0).
        ((0, 0, 20, 20), (0, 0, 33.6, 48)),
        # Middle (663.6, 468): the crop stays at (672 - 384, 480 - 384) = (288, 96).
        ((390, 190, 400, 200), (655.2 - 288, 456 - 96, 384, 384)),
        # Wider than the crop: cut on both sides.
        ((0, 0, 400, 200), (0, 0, 384, 384)),
    ],
)
def test_object_crop_moves_and_cuts_the_box(box, expected):
    picture = block(400, 200, box)
    cropped, moved = image.random_resize_object_crop(picture, box, 384, Scripted(480))
    assert moved == pytest.approx(expected)
    x0, y0, x1, y1 = (round(value) for value in moved)
    pixels = np.asarray(cropped)
    inside = pixels[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4]
    assert inside.size
    assert (inside > 250).all()
    assert (pixels[:, : max(x0 - 4, 0)] < 5).all()
    assert (pixels[:, x1 + 4 :] < 5).all()
    assert (pixels[: max(y0 - 4, 0)] < 5).all()
    assert (pixels[y1 + 4 :] < 5).all()


@pytest.mark.parametrize("size", [16, 480, 700])
@pytest.mark.parametrize("shape", [(5, 900), (900, 5), (64, 64)])
def test_crops_have_their_size_whatever_the_aspect(size, shape):
    rng = random.Random(0)
    picture = Image.new("RGB", shape)
    assert image.random_resize_center_crop(picture, size, rng).size == (size, size)
    cropped, box = image.random_resize_object_crop(picture, (0, 0, 5, 5), size, rng)
    assert cropped.size == (size, size)
    assert 0 <= box[0] < box[2] <= size
    assert 0 <= box[1] < box[3] <= size


def test_the_short_side_is_drawn_from_the_size_to_480():
    rng = random.Random(0)
    sides = set()
    for _ in range(300):
        resized = image._random_resize(Image.new("L", (10, 10)), 470, rng)
        sides.add(resized.size[0])
    assert sides == set(range(470, 481))


def test_operations_against_numbers_by_hand():
    picture = Image.new("RGB", (40, 30), (100, 50, 200))
    assert image.brightness(picture, 1).getpixel((0, 0)) == (136, 68, 255)  # 1.36 times
    assert image.identity(picture, 1) is picture
    dot = block(40, 30, (20, 15, 21, 16))
    assert image.translate_x(dot, 1).getpixel((27, 15)) == (255, 255, 255)
    assert image.translate_x(dot, -1).getpixel((13, 15)) == (255, 255, 255)
    assert image.translate_x(dot, 1).getpixel((6, 15)) == (128, 128, 128)
    assert image.translate_y(dot, 1).getpixel((20, 22)) == (255, 255, 255)
    ramp = Image.fromarray(np.tile(np.arange(50, 90, dtype=np.uint8), (30, 1))).convert("RGB")
    stretched = np.asarray(image.auto_contrast(ramp, 1))
    assert (stretched.min(), stretched.max()) == (0, 255)
    # Shearing moves row y by 0.21 y: the column 4 arrives at 4 + 0.21 * 24.5 = 9.1 in row 24.
    line = block(40, 30, (4, 0, 5, 30))
    sheared = np.asarray(image.shear_x(line, 1))[24, 6:, 0]  # the grey border ends before 6
    assert sheared.argmax() + 6 in (9, 10)
    quarter = np.asarray(image.rotate(block(41, 41, (20, 0, 21, 41)), 1))[:, :, 0]
    # 21 degrees counter-clockwise: 18 above the middle the line is 18 tan(21) = 6.9 to the left.
    assert abs(int(quarter[2, :21].argmax()) - 13) <= 1


def test_rand_augment_is_repeatable_keeps_the_size_and_uses_every_operation(monkeypatch):
    used = []
    fakes = [
        lambda picture, sign, name=name: used.append((name, sign)) or picture for name in range(10)
    ]
    monkeypatch.setattr(image, "OPERATIONS", tuple(fakes))
    rng = random.Random(0)
    picture = Image.new("RGB", (8, 8))
    for _ in range(4000):
        image.rand_augment(picture, rng)
    # 4000 pictures, two operations each used half of the time: 4000 uses, 400 of each.
    assert 3800 < len(used) < 4200
    counts = [sum(name == n for n, _ in used) for name in range(10)]
    assert min(counts) > 320
    assert max(counts) < 480
    assert 0.46 < sum(sign == 1 for _, sign in used) / len(used) < 0.54


def test_rand_augment_depends_on_rng_only():
    picture = image.decode_image(CAT)
    first = [image.rand_augment(picture, random.Random(s)).tobytes() for s in range(8)]
    assert [image.rand_augment(picture, random.Random(s)).tobytes() for s in range(8)] == first
    assert len(set(first)) > 2
    assert image.rand_augment(picture, random.Random(3)).size == picture.size
