"""Generated bins to pixels and the overlap of boxes, worked out by hand."""

from __future__ import annotations

import pytest

from unival.generation.boxes import ids_to_box, iou

FIRST = 58457


def test_bins_become_pixels_of_the_original_picture():
    # at 512 pixels bin 999 is the far edge: a 640 x 480 picture is covered exactly
    ids = [FIRST, FIRST, FIRST + 999, FIRST + 999]
    assert ids_to_box(ids, 640, 480, 512) == pytest.approx((0, 0, 640, 480))
    # at 384 pixels bin 999 is 512/384 = 4/3 of the picture
    assert ids_to_box(ids, 300, 600, 384) == pytest.approx((0, 0, 400, 800))


def test_specials_around_the_bins_are_passed_over():
    bins = [FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 4]
    assert ids_to_box([0, *bins, 2, 1, 1], 512, 512, 512) == ids_to_box(bins, 512, 512, 512)


@pytest.mark.parametrize(
    "ids",
    [[], [FIRST] * 3, [FIRST] * 5, [FIRST, 266, FIRST, FIRST], [FIRST - 1] * 4, [FIRST + 1000] * 4],
)
def test_anything_but_four_bins_is_no_box(ids):
    assert ids_to_box(ids, 10, 10, 512) is None


def test_a_picture_without_size_is_refused():
    with pytest.raises(ValueError, match="sizes are positive"):
        ids_to_box([FIRST] * 4, 0, 10, 512)


def test_iou():
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == pytest.approx(100 / (100 + 1e-6), abs=1e-12)
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0
    assert iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0.0  # two negative sides do not make an overlap
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
