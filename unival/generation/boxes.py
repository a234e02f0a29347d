"""From generated bins to a box in the original picture, and how well two boxes overlap."""

from __future__ import annotations

from collections.abc import Sequence

from unival.vocabulary import BOS, EOS, FIRST_BIN, NUM_BINS, PAD, bins_to_box

Box = tuple[float, float, float, float]


def ids_to_box(ids: Sequence[int], width: int, height: int, image_size: int) -> Box | None:
    """(x0, y0, x1, y1) in pixels of a width x height picture that the model saw resized.

    image_size is the side of the square the picture was resized to. Leading <s> and closing </s>
    and <pad> are passed over. None unless exactly four bins remain. The box may reach outside the
    picture: bins cover 512 pixels whatever the image size.
    """
    if min(width, height, image_size) <= 0:
        raise ValueError(f"sizes are positive, got {width} x {height} and {image_size}")
    bins = [int(i) - FIRST_BIN for i in ids if int(i) not in (BOS, PAD, EOS)]
    if len(bins) != 4 or not all(0 <= number < NUM_BINS for number in bins):
        return None
    return bins_to_box(bins, image_size / width, image_size / height)


def iou(box_a: Box, box_b: Box) -> float:
    """Intersection over union: inter / (A + B - inter + 1e-6), as in the original evaluation."""
    wide = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    high = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    inter = max(wide, 0.0) * max(high, 0.0)
    area_a = (box_a[2] - box_a[0]) * (box_a[3] - box_a[1])
    area_b = (box_b[2] - box_b[0]) * (box_b[3] - box_b[1])
    return inter / (area_a + area_b - inter + 1e-6)
