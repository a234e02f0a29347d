"""Accuracy of answers and boxes on cases counted by hand."""

from __future__ import annotations

import logging
import math

import pytest

from unival.data.records import Answer
from unival.evaluation.grounding import grounding_accuracy, size_contributions, size_of
from unival.evaluation.vqa import (
    Accuracy,
    accuracy,
    check_keys,
    entailment_accuracy,
    exact_match,
    outside_list,
)

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
    assert exact_match({"1": said}, {"1": "two"}).overall == Accuracy(0, 1)


def test_ids_must_agree_and_unknown_and_missing_ones_are_told_apart():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        check_keys({}, {})
    with pytest.raises(ValueError, match=r"ids; 1 without a prediction \('b'\)$"):
        check_keys({"a": 1}, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"ids; 1 predicted but without a reference \('b'\)$"):
        check_keys({"a": 1, "b": 1}, {"a": 1})
    predictions = dict.fromkeys(["x", "z", "y", "w"])
    with pytest.raises(ValueError) as caught:
        check_keys(predictions, {"b": 1, "a": 1})
    assert str(caught.value).endswith(
        "2 without a prediction ('a', 'b') and "
        "4 predicted but without a reference ('w', 'x', 'y', ...)"
    )


@pytest.mark.parametrize("answers", [[], [Answer("")], [Answer(" "), Answer("\t")]])
def test_a_sample_without_a_right_answer_is_refused(answers):
    truth = {"good": [Answer("x")], "bad": answers}
    with pytest.raises(ValueError, match="1 ids have no answer to compare with: 'bad'"):
        accuracy({"good": "x", "bad": ""}, truth)


def test_exact_match_counts_and_names_what_is_outside_of_the_list(caplog):
    said = {"1": "dog", "2": "cat", "3": "unicorn", "4": "dog"}
    truth = {"1": "dog", "2": "dog", "3": "horse", "4": "dog"}
    with caplog.at_level(logging.WARNING):
        scores = exact_match(said, truth, choices=["dog", "cat", "horse"])
    assert scores.overall == Accuracy(2, 4) and scores.overall.value == 0.5
    assert scores.outside_list == {"3": "unicorn"}
    assert "1 answers are outside of the list to choose from: 'unicorn' (3)" in caplog.text
    assert exact_match(said, truth).outside_list == {}
    assert outside_list({"1": "Dog"}, {"dog"}) == {"1": "Dog"}


def test_an_empty_right_answer_is_refused():
    with pytest.raises(ValueError, match="no answer to compare with: '2'"):
        exact_match({"1": "a", "2": ""}, {"1": "a", "2": ""})


def test_entailment_takes_labels_and_words_and_counts_each_label():
    truth = {"1": "entailment", "2": "entailment", "3": "neutral", "4": "contradiction"}
    said = {"1": "yes", "2": "maybe", "3": "neutral", "4": "no"}
    scores = entailment_accuracy(said, truth)
    assert scores.overall == Accuracy(3, 4)
    assert scores.groups == {
        "label": {
            "entailment": Accuracy(1, 2),
            "neutral": Accuracy(1, 1),
            "contradiction": Accuracy(1, 1),
        }
    }


@pytest.mark.parametrize("wrong", ["Entailment", "", "-", "true"])
def test_entailment_refuses_what_is_no_label_on_either_side(wrong):
    with pytest.raises(ValueError, match=r"1 labels are none of .*\(7\)"):
        entailment_accuracy({"7": wrong}, {"7": "neutral"})
    with pytest.raises(ValueError, match=r"1 labels are none of .*\(7\)"):
        entailment_accuracy({"7": "neutral"}, {"7": wrong})


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
    for wrong in [(0.0,), (1.5,), (math.nan,), ()]:
        with pytest.raises(ValueError, match="thresholds"):
            grounding_accuracy({"a": SQUARE}, {"a": SQUARE}, thresholds=wrong)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        grounding_accuracy({}, {})


def test_sizes_contribute_to_the_total():
    truth = {
        "small, hit": (0.0, 0.0, 100.0, 100.0),  # 10,000
        "small, missed": (0.0, 0.0, 299.0, 100.0),  # 29,900
        "medium, hit": (0.0, 0.0, 300.0, 100.0),  # 30,000
        "medium, hit too": (0.0, 0.0, 1000.0, 100.0),  # 100,000
        "large, hit": (0.0, 0.0, 1001.0, 100.0),
    }
    said = truth | {"small, missed": None}
    assert [size_of(box) for box in truth.values()] == [*["small"] * 2, *["medium"] * 2, "large"]
    parts = size_contributions(said, truth)
    assert parts == {"small": 1 / 5, "medium": 2 / 5, "large": 1 / 5}
    assert sum(parts.values()) == pytest.approx(grounding_accuracy(said, truth)["Acc@0.5"])


def test_the_size_is_that_of_the_reference():
    truth = {"a": (0.0, 0.0, 290.0, 100.0), "b": (0.0, 0.0, 310.0, 100.0)}  # small, medium
    # 290 / 310 overlap
    parts = size_contributions({"a": truth["b"], "b": None}, truth)
    assert parts == {"small": 0.5, "medium": 0.0, "large": 0.0}


@pytest.mark.parametrize("score", [grounding_accuracy, size_contributions])
@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5.0, 0.0, 5.0, 10.0), "2 reference boxes have no area: 'b', 'c'"),
        ((0.0, 9.0, 10.0, 3.0), "2 reference boxes have no area"),
        ((0.0, 0.0, math.nan, 10.0), "2 reference boxes have not four finite numbers: 'b', 'c'"),
        ((0.0, 0.0, math.inf, 10.0), "2 reference boxes have not four finite"),
        ((0.0, 0.0, 10.0), "2 reference boxes have not four finite"),
        (None, "2 reference boxes have not four finite"),
    ],
)
def test_bad_references_are_named(score, box, message):
    truth = {"a": SQUARE, "b": box, "c": box}
    with pytest.raises(ValueError, match=message):
        score(dict.fromkeys(truth), truth)


def test_a_predicted_box_with_nan_is_named():
    with pytest.raises(ValueError, match="1 predicted boxes have not four finite numbers: 'b'"):
        grounding_accuracy(
            {"a": SQUARE, "b": (0.0, 0.0, math.nan, 1.0)}, {"a": SQUARE, "b": SQUARE}
        )
