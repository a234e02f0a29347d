"""Caption scores against values worked out by hand."""

from __future__ import annotations

import logging
import math

import pytest

from unival.evaluation import caption
from unival.evaluation.caption import caption_scores, tokenize

pytest.importorskip("pycocoevalcap")

TRUTH = {"a": ["a man rides a horse"], "b": ["two dogs play outside today"]}


def test_equal_captions_reach_the_maximum():
    scores = caption_scores({key: texts[0] for key, texts in TRUTH.items()}, TRUTH)
    # every n-gram occurs in one of two media: cosine 1 for each n, mean 1, times 10
    assert scores["CIDEr"] == pytest.approx(10.0)
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1.0] * 4)
    assert scores["ROUGE-L"] == pytest.approx(1.0)
    assert set(scores) == {"CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}


def test_case_and_punctuation_do_not_count():
    scores = caption_scores(
        {"a": "A man, rides a horse.", "b": "Two dogs play outside today!"}, TRUTH
    )
    assert scores["CIDEr"] == pytest.approx(10.0)


def test_half_a_caption():
    # 2 of 4 words, same order: BLEU-1 = brevity exp(1 - 4/2) * 1; ROUGE-L: P = 1, R = 1/2
    truth = {"a": ["one two three four"], "b": ["five six seven eight"]}
    scores = caption_scores({"a": "one two", "b": "five six"}, truth)
    assert scores["BLEU-1"] == pytest.approx(math.exp(-1), rel=1e-6)
    beta = 1.2**2
    assert scores["ROUGE-L"] == pytest.approx((1 + beta) * 0.5 / (0.5 + beta))
    # n = 1: cosine 2 / sqrt(2*4); n = 2: 1 / sqrt(1*3); n = 3, 4: 0; lengths differ by 2 bigrams
    cosines = (2 / math.sqrt(8) + 1 / math.sqrt(3)) / 4
    assert scores["CIDEr"] == pytest.approx(10 * cosines * math.exp(-4 / 72))


def test_words_that_all_media_share_are_worth_nothing():
    truth = {"a": ["the dog"], "b": ["the dog"]}
    assert caption_scores({"a": "the dog", "b": "the dog"}, truth)["CIDEr"] == 0.0


def test_an_empty_prediction_scores_zero_and_nothing_is_printed(capfd):
    scores = caption_scores({"a": "", "b": "?!"}, TRUTH)
    assert all(value < 1e-9 for value in scores.values())
    assert capfd.readouterr().out == ""


def test_tokenize_splits_contractions_and_keeps_numbers_and_hyphens():
    assert tokenize("A well-known Man's dog isn't (2) 3.5 m, 1,000!") == (
        "a well-known man 's dog is n't 2 3.5 m 1,000"
    )
    assert tokenize("don\u2019t") == "do n't"


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "nothing to evaluate"),
        ({"a": "x"}, TRUTH, "'b'"),
        ({"a": "x", "b": "y", "c": "z"}, TRUTH, "'c'"),
        ({"a": "x"}, {"a": []}, "no reference caption"),
        ({"a": "x"}, {"a": ["..."]}, "no reference caption"),
        ({"a": "x"}, {"a": "x y"}, "must be a list"),
    ],
)
def test_bad_input_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references)


def test_java_metrics_are_left_out_with_a_reason(monkeypatch, caplog):
    monkeypatch.setattr(caption.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        scores = caption_scores({"a": "x", "b": "y"}, TRUTH, java_metrics=True)
    assert "METEOR" not in scores and "`java` was not found" in caplog.text
