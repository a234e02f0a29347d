"""torch's resizing against Pillow's."""

import numpy as np
import pytest
from PIL import Image

from unival.data_gpu.resize import resize


@pytest.mark.parametrize(
    ("before", "after"),
    [((97, 61), (32, 32)), ((40, 30), (97, 61)), ((64, 64), (64, 20)), ((1, 1), (5, 3))],
)
def test_pixels_are_pillows_up_to_one_level(before, after):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, before[1], before[0], 3), dtype=np.uint8)
    found = resize(images, *after)
    assert found.shape == (3, after[1], after[0], 3)
    for image, resized in zip(images, found, strict=True):
        expected = Image.fromarray(image).resize(after, Image.Resampling.BICUBIC)
        far = np.abs(resized.astype(int) - np.asarray(expected))
        assert far.max() <= 1
        assert far.mean() < 0.05


def test_turned_and_mirrored_views_are_read_as_they_look():
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    turned = np.rot90(images, axes=(1, 2))[:, :, ::-1]
    assert np.array_equal(resize(turned, 12, 9), resize(np.ascontiguousarray(turned), 12, 9))


def test_nothing_is_done_where_the_size_is_right():
    images = np.zeros((2, 8, 6, 3), dtype=np.uint8)
    assert resize(images, 6, 8) is images
