"""Accuracy of answers and boxes on cases counted by hand."""

from __future__ import annotations

import pytest

from unival.data.records import Answer
from unival.evaluation.grounding import grounding_accuracy
from unival.evaluation.vqa import accuracy

SQUARE = (0.0, 0.0, 10.0, 10.0)


def test_the_confidence_of_the_equal_string_counts():
    truth = {
        "1": [Answer("blue", 0.9), Answer("navy", 0.3)],
        "2": [Answer("two", 1.0)],
        "3": [Answer("yes", 1.0)],
    }
    assert accuracy({"1": "navy", "2": "two", "3": "no"}, truth) == pytest.approx(1.3 / 3)


@pytest.mark.parametrize("said", ["Two", " two", "two.", "the two", ""])
def test_nothing_is_normalised(said):
    assert accuracy({"1": said}, {"1": [Answer("two")]}) == 0.0


def test_ids_must_agree():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        accuracy({}, {})
    with pytest.raises(ValueError, match="same ids; 2 are only in one"):
        accuracy({"1": "a"}, {"2": [Answer("a")]})


def test_boxes_count_from_the_threshold_on():
    predictions = {
        "same": SQUARE,  # 1 (but for the 1e-6)
        "half": (0.0, 0.0, 10.0, 5.0),  # 0.5 / (1 + 1e-8): just under one half
        "third": (5.0, 0.0, 15.0, 10.0),
        "none": None,
        "touching": (10.0, 0.0, 20.0, 10.0),
        "far": (50.0, 50.0, 60.0, 60.0),  # the product of two negative overlaps is no overlap
        "turned": (10.0, 10.0, 0.0, 0.0),
        "line": (0.0, 5.0, 10.0, 5.0),
        "point at the corner": (0.0, 0.0, 0.0, 0.0),
        "most": (0.0, 0.0, 10.0, 9.0),
    }
    truth = dict.fromkeys(predictions, SQUARE)
    scores = grounding_accuracy(predictions, truth, thresholds=(0.3, 0.4, 0.5))
    assert scores == {"Acc@0.3": 0.4, "Acc@0.4": 0.3, "Acc@0.5": 0.2}


def test_default_threshold_and_bad_ones():
    assert grounding_accuracy({"a": SQUARE}, {"a": SQUARE}) == {"Acc@0.5": 1.0}
    with pytest.raises(ValueError, match="thresholds"):
        grounding_accuracy({"a": SQUARE}, {"a": SQUARE}, thresholds=(0.0,))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        grounding_accuracy({}, {})
