"""Cleaning of questions and captions. Limits are in words, never in tokens."""

from __future__ import annotations

import re
import string

LEADING_MARKS = ",.!?*#:;~"
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
SPACES = re.compile(r"\s{2,}")

SOURCE_WORDS = 80  # questions, and captions inside a prompt
TARGET_WORDS = 30  # captions to predict in pretraining
CAPTION_WORDS = 20  # captions to predict in fine-tuning


def pre_question(question: str, max_words: int | None = None) -> str:
    """Lower-case, drop leading marks, turn - and / into spaces, cut after `max_words` words."""
    cleaned = question.lower().lstrip(LEADING_MARKS).replace("-", " ").replace("/", " ")
    return _tidy(cleaned, max_words)


def pre_caption(caption: str, max_words: int | None = None) -> str:
    """The same as pre_question, and `<person>` (an anonymised name) becomes `person`."""
    cleaned = caption.lower().lstrip(LEADING_MARKS).replace("-", " ").replace("/", " ")
    return _tidy(cleaned.replace("<person>", "person"), max_words)


def _tidy(text: str, max_words: int | None) -> str:
    # Words are separated by a plain space only: a lone tab or line break inside a word is kept,
    # as in the text that the published weights were trained on.
    text = SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def strip_punctuation(text: str) -> str:
    """Delete ASCII punctuation (marks are removed, not replaced by a space) and outer blanks."""
    return text.translate(NO_PUNCTUATION).strip()


def first_words(text: str, count: int) -> str:
    """The first `count` words, separated by any whitespace, joined by single spaces."""
    return " ".join(text.split()[:count])


def question_mark(question: str) -> str:
    """Append `?` where it is missing."""
    return question if question.endswith("?") else question + "?"
