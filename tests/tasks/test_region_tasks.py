"""Grounding and grounded captioning: bins from boxes, prompts to the letter."""

from __future__ import annotations

import random

import pytest

from unival.tasks import TASKS
from unival.tasks.base import TaskContext

# bins by hand: 0, 128/512*999 = 249.75 -> 250, 256/512*999 = 499.5 -> 500, 384/512*999 = 749.25
BOX = (0.0, 128.0, 256.0, 384.0)
BIN_IDS = [58457, 58707, 58957, 59206]


@pytest.fixture
def record(make_record):
    return make_record("visual_grounding", captions=("The MAN, left/right",), box=(1, 2, 3, 4))


def test_grounding(vocabulary, pieces, record):
    example = TASKS["grounding"].example(record, vocabulary, random.Random(0), TaskContext(), BOX)
    text = ' which region does the text " the man, left right " describe?'
    assert example.source == [0, *pieces(text), 2]
    assert example.decoder_input == [0, *BIN_IDS]
    assert example.target == [*BIN_IDS, 2]


def test_grounded_caption_prompt_starts_with_two_spaces(vocabulary, pieces, record):
    task = TASKS["grounded_caption"]
    example = task.example(record, vocabulary, random.Random(0), TaskContext(), BOX)
    prompt = pieces("  what does the region describe? region:")
    assert example.source == [0, *prompt, *BIN_IDS, 2]
    assert example.target == [*pieces(" the man, left right"), 2]
    assert example.weight == 1.0


@pytest.mark.parametrize("name", ["grounding", "grounded_caption"])
def test_a_missing_box_is_refused(vocabulary, record, name):
    with pytest.raises(ValueError, match="pixels of the resized picture"):
        TASKS[name].example(record, vocabulary, random.Random(0), TaskContext())


def test_answers_show_bins(vocabulary, pieces):
    shown = TASKS["grounding"].answer([*BIN_IDS, 2, 1], vocabulary)
    assert shown == "<bin_0> <bin_250> <bin_500> <bin_749>"
    assert TASKS["grounding"].answer(pieces(" a red dog"), vocabulary) == "a red dog"


def test_published_search_settings():
    decoding = TASKS["grounding"].decoding
    assert (decoding.min_length, decoding.max_length) == (4, 4)
    assert decoding.normalize_scores and decoding.no_repeat_ngram_size == 3
    assert decoding.constraint == "none"
