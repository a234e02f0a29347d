"""Accuracy of visual grounding: the share of boxes that overlap the reference enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unival.evaluation.vqa import check_keys
from unival.generation.boxes import Box, iou


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

    None (the model did not generate a box) is wrong. Raises ValueError when there is nothing to
    evaluate, the ids differ, or a threshold is not in (0, 1].
    """
    check_keys(predictions, references)
    wrong = [threshold for threshold in thresholds if not 0 < threshold <= 1]
    if wrong or not thresholds:
        raise ValueError(f"thresholds lie in (0, 1], got {list(thresholds)}")
    return {
        f"Acc@{threshold:g}": sum(
            is_hit(predictions[key], box, threshold) for key, box in references.items()
        )
        / len(references)
        for threshold in thresholds
    }
