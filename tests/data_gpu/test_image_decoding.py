"""Pictures: hostile inputs, and geometry against numbers worked out by hand."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
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
    pixels = image.image_to_array(image.decode_image(encoded(picture)))
    assert pixels.shape == (3, 2, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, 1, 2].tolist() == [10, 20, 30]
    assert pixels.sum() == 60
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


def test_the_exact_plan_scales_each_axis():
    plan = image.exact_plan(50)
    assert image.render(Image.new("RGB", (200, 100)), plan).size == (50, 50)
    assert image.move_box((20, 10, 100, 90), 200, 100, plan) == (5, 5, 25, 45)


def block(width, height, box):
    """Black with a white rectangle."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def test_center_crop_takes_the_middle_of_the_resized_picture():
    # 100 x 50 -> short side 400: 800 x 400, the width capped to 672; middle 384 of 672 x 400.
    # The white columns 50..100 become 336..672, thus 336 - 144 = 192..384 in the crop.
    plan = image.center_crop_plan(100, 50, 384, Scripted(400))._replace(operations=())
    pixels = np.asarray(image.render(block(100, 50, (50, 0, 100, 50)), plan))
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
    plan = image.object_crop_plan(400, 200, box, 384, Scripted(480))
    assert plan.operations == ()
    cropped = image.render(block(400, 200, box), plan)
    moved = image.move_box(box, 400, 200, plan)
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
    plan = image.center_crop_plan(*shape, size, rng)
    assert image.render(picture, plan).size == (size, size)
    plan = image.object_crop_plan(*shape, (0, 0, 5, 5), size, rng)
    assert image.render(picture, plan).size == (size, size)
    box = image.move_box((0, 0, 5, 5), *shape, plan)
    assert 0 <= plan.left <= plan.width - size
    assert 0 <= plan.top <= plan.height - size
    assert 0 <= box[0] < box[2] <= size
    assert 0 <= box[1] < box[3] <= size


def test_the_short_side_is_drawn_from_the_size_to_480():
    rng = random.Random(0)
    plans = [image.center_crop_plan(10, 10, 470, rng) for _ in range(300)]
    assert {plan.width for plan in plans} == set(range(470, 481))
    assert all(plan.width == plan.height for plan in plans)


def once(picture, name, sign=1):
    return image.augment(picture, (image.Operation(name, sign),))


def test_operations_against_numbers_by_hand():
    picture = Image.new("RGB", (40, 30), (100, 50, 200))
    assert once(picture, "brightness").getpixel((0, 0)) == (136, 68, 255)  # 1.36 times
    assert once(picture, "identity") is picture
    dot = block(40, 30, (20, 15, 21, 16))
    assert once(dot, "translate_x").getpixel((27, 15)) == (255, 255, 255)
    assert once(dot, "translate_x", -1).getpixel((13, 15)) == (255, 255, 255)
    assert once(dot, "translate_x").getpixel((6, 15)) == (128, 128, 128)
    assert once(dot, "translate_x", -1).getpixel((33, 15)) == (128, 128, 128)
    assert once(dot, "translate_y").getpixel((20, 22)) == (255, 255, 255)
    ramp = Image.fromarray(np.tile(np.arange(50, 90, dtype=np.uint8), (30, 1))).convert("RGB")
    stretched = np.asarray(once(ramp, "auto_contrast"))
    assert (stretched.min(), stretched.max()) == (0, 255)
    # Shearing moves row y by 0.21 y: the column 4 arrives at 4 + 0.21 * 24.5 = 9.1 in row 24.
    line = block(40, 30, (4, 0, 5, 30))
    sheared = np.asarray(once(line, "shear_x"))[24, 6:, 0]  # the grey border ends before 6
    assert sheared.argmax() + 6 in (9, 10)
    quarter = np.asarray(once(block(41, 41, (20, 0, 21, 41)), "rotate"))[:, :, 0]
    # 21 degrees counter-clockwise: 18 above the middle the line is 18 tan(21) = 6.9 to the left.
    assert abs(int(quarter[2, :21].argmax()) - 13) <= 1


def test_an_affine_rotation_is_pillows_own():
    picture = image.decode_image(CAT)
    for sign in (1, -1):
        turned = picture.rotate(
            sign * 21, resample=Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
        )
        assert once(picture, "rotate", sign).tobytes() == turned.tobytes()


def test_rand_augment_draws_every_operation_alike():
    rng = random.Random(0)
    used = [operation for _ in range(4000) for operation in image.rand_augment(rng)]
    # 4000 pictures, two operations each used half of the time: 4000 uses, 400 of each.
    assert 3800 < len(used) < 4200
    counts = [sum(operation.name == name for operation in used) for name in image.OPERATIONS]
    assert len(counts) == 10
    assert min(counts) > 320
    assert max(counts) < 480
    assert 0.46 < sum(operation.sign == 1 for operation in used) / len(used) < 0.54


def test_a_plan_depends_on_size_and_rng_only():
    first = [image.center_crop_plan(64, 48, 32, random.Random(s)) for s in range(8)]
    assert [image.center_crop_plan(64, 48, 32, random.Random(s)) for s in range(8)] == first
    assert len(set(first)) > 2
