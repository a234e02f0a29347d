"""Accuracy of visual grounding: the share of boxes that overlap the reference enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from unival.evaluation.vqa import check_keys, first_few
from unival.generation.boxes import Box, iou

SMALL_AREA, LARGE_AREA = 30_000.0, 100_000.0  # square pixels of the original picture
SIZES = ("small", "medium", "large")


def is_hit(predicted: Box | None, reference: Box, threshold: float) -> bool:
    """Intersection over union of at least `threshold`.

    The original also asks for an overlap of positive width and height. That follows here: `iou`
    is 0 without one and a threshold is positive.
    """
    return predicted is not None and iou(predicted, reference) >= threshold


def grounding_accuracy(
    predictions: Mapping[str, Box | None],
    references: Mapping[str, Box],
    thresholds: Sequence[float] = (0.5,),
) -> dict[str, float]:
    """`{"Acc@0.5": fraction, ...}`; boxes (x0, y0, x1, y1) in pixels of the original picture.

    None (the model did not generate a box) and an empty box are wrong.

    Raises:
        ValueError: nothing to evaluate, the ids differ, a threshold is not in (0, 1], a reference
            is empty, or a box has not four finite numbers.
    """
    _check(predictions, references, thresholds)
    return {
        f"Acc@{threshold:g}": sum(
            is_hit(predictions[key], box, threshold) for key, box in references.items()
        )
        / len(references)
        for threshold in thresholds
    }


def size_contributions(
    predictions: Mapping[str, Box | None], references: Mapping[str, Box], threshold: float = 0.5
) -> dict[str, float]:
    """What small, medium and large references contribute to the accuracy, as the original says it.

    Hits among the references of a size, divided by the number of all references. So the three add
    up to the accuracy; they are not the accuracies of the sizes. Arguments and errors as in
    `grounding_accuracy`.
    """
    _check(predictions, references, (threshold,))
    hits = dict.fromkeys(SIZES, 0)
    for key, box in references.items():
        hits[size_of(box)] += is_hit(predictions[key], box, threshold)
    return {size: count / len(references) for size, count in hits.items()}


def size_of(box: Box) -> str:
    """`small` below 30,000 square pixels, `large` above 100,000, `medium` between and at both."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    if area < SMALL_AREA:
        return "small"
    return "large" if area > LARGE_AREA else "medium"


def _check(
    predictions: Mapping[str, Box | None],
    references: Mapping[str, Box],
    thresholds: Sequence[float],
) -> None:
    check_keys(predictions, references)
    wrong = [threshold for threshold in thresholds if not 0 < threshold <= 1]
    if wrong or not thresholds:
        raise ValueError(f"thresholds lie in (0, 1], got {list(thresholds)}")
    found = {key: box for key, box in predictions.items() if box is not None}
    for name, boxes in (("predicted", found), ("reference", references)):
        bad = [key for key, box in boxes.items() if box is None or not _is_finite(box)]
        if bad:
            raise ValueError(
                f"{len(bad)} {name} boxes have not four finite numbers: {first_few(bad)}"
            )
    empty = [key for key, box in references.items() if box[2] <= box[0] or box[3] <= box[1]]
    if empty:
        raise ValueError(f"{len(empty)} reference boxes have no area: {first_few(empty)}")


def _is_finite(box: Sequence[float]) -> bool:
    return len(box) == 4 and all(math.isfinite(value) for value in box)
