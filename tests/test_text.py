"""Cleaning of questions and captions, cases worked out by hand."""

from __future__ import annotations

import pytest

from unival.text import first_words, pre_caption, pre_question, question_mark, strip_punctuation


@pytest.mark.parametrize(
    ("question", "cleaned"),
    [
        ("What is THIS?", "what is this?"),
        ("..,!?*#:;~what?!", "what?!"),
        ("black-and/white", "black and white"),
        ("two  \t\n spaces", "two spaces"),
        ("  a - b  \n", "a b"),
        ("one\ttab", "one\ttab"),  # a single tab is not a run of blanks
        (" .dot after a blank stays", ".dot after a blank stays"),
        ("ends with a line\n", "ends with a line"),
        ("", ""),
        ("!!!", ""),
    ],
)
def test_pre_question(question, cleaned):
    assert pre_question(question, 80) == cleaned


def test_pre_caption_names_the_anonymised_person_and_keeps_other_punctuation():
    assert pre_caption("<PERSON>'s dog, (brown).", 30) == "person's dog, (brown)."
    assert pre_question("<person>", 30) == "<person>"


@pytest.mark.parametrize("clean", [pre_question, pre_caption])
def test_the_limit_counts_words(clean):
    text = " ".join(f"w{i}" for i in range(100))
    assert clean(text, 30).split() == [f"w{i}" for i in range(30)]
    assert clean(text) == text


def test_strip_punctuation_deletes_ascii_marks_only():
    assert strip_punctuation(" A well-known man's “hat”. ") == "A wellknown mans “hat”"
    assert strip_punctuation("!?#") == ""


def test_first_words_and_question_mark():
    assert first_words("a  b\tc\nd", 3) == "a b c"
    assert first_words("", 3) == ""
    assert question_mark("why") == "why?"
    assert question_mark("why?") == "why?"
