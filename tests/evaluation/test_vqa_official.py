"""The official VQA accuracy: each rule of the normalisation, and the ten answers, by hand."""

from __future__ import annotations

import itertools
import logging

import pytest

from unival.evaluation.vqa import Accuracy, agreement, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  red \n", "red"),
        ("hot\tdog", "hot dog"),
        ("", ""),
        # a mark inside becomes a space
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("x-ray", "x ray"),
        ('"stop"', "stop"),
        ("red,white", "red white"),
        ("a_b@c", "b c"),
        # beside a space it is dropped, and so are its likes elsewhere in the answer
        ("black / white", "black white"),
        ("yes, it is", "yes it is"),
        ("well-known -ish", "wellknown ish"),
        # a comma between digits: all marks are dropped
        ("1,000", "1000"),
        ("1,000,000 people", "1000000 people"),
        ("1,000-2,000", "10002000"),
        ("1, 2", "1 2"),
        # full stops: kept before a digit only
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("3.5 m.", "3.5 m"),
        # not in the list of marks
        ("10:30", "10:30"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("b&w", "b&w"),
        ("dog's", "dog's"),
        # number words and articles, as whole words
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("twenty one", "twenty 1"),
        ("eleven", "eleven"),
        ("one-way", "1 way"),
        ("the", ""),
        ("A dog and an owl", "dog and owl"),
        ("theater", "theater"),
        # contractions
        ("dont know", "don't know"),
        ("don't", "don't"),
        ("wont", "won't"),
        ("cant", "can't"),
        ("Im", "im"),
        ("its", "its"),
        ("well", "well"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("somebody'dve", "somebody'd've"),
        ("whatre", "what're"),
        ("hows", "how's"),
        ("theyll", "they'll"),
    ],
)
def test_normalised(answer, expected):
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(
    ("count", "equal"), [(count, equal) for count in range(2, 11) for equal in range(count + 1)]
)
def test_the_rule_by_leaving_out_each_human(count, equal):
    answers = ["x"] * equal + ["y"] * (count - equal)
    # every subset of all answers but one, written out
    subsets = list(itertools.combinations(answers, count - 1))
    expected = sum(min(sum(a == "x" for a in s) / 3, 1) for s in subsets) / len(subsets)
    assert agreement("x", answers) == pytest.approx(expected, abs=1e-15)


def test_values_of_ten_answers():
    def score(equal):
        return agreement("x", ["x"] * equal + ["y"] * (10 - equal))

    # 1 equal: nine subsets with one of three, one with none: 9/10 * 1/3
    assert score(0) == 0.0
    assert score(1) == pytest.approx(0.3)
    assert score(2) == pytest.approx(0.6)  # 8/10 * 2/3 + 2/10 * 1/3
    assert score(3) == pytest.approx(0.9)  # 7/10 * 1 + 3/10 * 2/3
    assert score(4) == score(10) == 1.0


def test_both_sides_are_normalised_and_groups_are_means():
    truth = {
        "1": ["yes"] * 10,
        "2": ["Two"] * 3 + ["3"] * 7,
        "3": ["unanswerable"] * 2 + ["a dog"] * 8,
        "4": ["dont know"] * 10,
    }
    said = {"1": "Yes.", "2": "2", "3": "unanswerable", "4": "no"}
    kinds = {"1": "yes/no", "2": "number", "3": "other", "4": "other"}
    scores = vqa_accuracy(said, truth, {"answer_type": kinds})
    # 1, 0.9 (3 equal), 0.6 (2 equal), 0
    assert scores.overall.count == 4
    assert scores.overall.value == pytest.approx(2.5 / 4)
    found = scores.groups["answer_type"]
    assert found["yes/no"] == Accuracy(1.0, 1)
    assert found["number"].value == pytest.approx(0.9)
    assert found["other"].count == 2 and found["other"].value == pytest.approx(0.3)


def test_outside_of_the_list_is_counted_not_dropped(caplog):
    truth = {"1": ["cat"] * 10, "2": ["dog"] * 10}
    with caplog.at_level(logging.WARNING):
        scores = vqa_accuracy({"1": "cat", "2": "kitten"}, truth, choices=["cat", "dog"])
    assert scores.overall == Accuracy(1.0, 2)
    assert scores.outside_list == {"2": "kitten"} and "'kitten' (2)" in caplog.text


def test_an_empty_answer_of_one_human_is_kept():
    truth = {"1": [""] * 2 + ["cat"] * 8}
    assert vqa_accuracy({"1": ""}, truth).overall.value == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("said", "truth", "groups", "message"),
    [
        ({}, {}, None, "nothing to evaluate"),
        ({"1": "x"}, {"1": ["x"] * 3, "2": ["y"] * 3}, None, r"1 without a prediction \('2'\)"),
        ({"1": "x", "2": "y"}, {"1": ["x"] * 3}, None, r"1 predicted but .* \('2'\)"),
        ({"1": "x"}, {"1": []}, None, "no answer to compare with: '1'"),
        ({"1": "x"}, {"1": ["", " "]}, None, "no answer to compare with: '1'"),
        ({"1": "x"}, {"1": ["x"]}, None, "1 ids have one answer; the rule needs two: '1'"),
        ({"1": "x"}, {"1": "xxx"}, None, "must be a list, not one text: '1'"),
        ({"1": "x"}, {"1": ["x"] * 3}, {"answer_type": {}}, "1 ids have no answer_type: '1'"),
    ],
)
def test_bad_input_is_refused(said, truth, groups, message):
    with pytest.raises(ValueError, match=message):
        vqa_accuracy(said, truth, groups)
