"""Prompts and targets of captioning and matching, spelled out as published."""

from __future__ import annotations

import random

import pytest

from unival.data.records import RecordError
from unival.tasks import TASKS
from unival.tasks.base import TaskContext
from unival.tasks.matching import negative_caption
from unival.vocabulary import IGNORE

TUNE = TaskContext(fine_tuning=True)


@pytest.mark.parametrize(
    ("name", "kind", "pretraining", "tuned"),
    [
        ("image_caption", "caption", "image", "image"),
        ("video_caption", "video_caption", "video", "video"),
        ("audio_caption", "audio_caption", "audio", "video"),
    ],
)
def test_caption_prompts(vocabulary, pieces, make_record, name, kind, pretraining, tuned):
    record = make_record(kind, captions=("A  Red-Hot dog, <person>!",))
    example = TASKS[name].example(record, vocabulary, random.Random(0), TaskContext())
    assert example.source == [0, *pieces(f" what does the {pretraining} describe?"), 2]
    caption = pieces(" a red hot dog, person!")
    assert example.decoder_input == [0, *caption]
    assert example.target == [*caption, 2]
    assert example.weight == 1.0

    example = TASKS[name].example(record, vocabulary, random.Random(0), TUNE)
    assert example.source == [0, *pieces(f" what does the {tuned} describe?"), 2]
    assert example.source == TASKS[name].prompt(record, vocabulary, fine_tuning=True)
    assert example.target == [*pieces(" A RedHot dog person"), 2]


def test_caption_limits_are_30_words_in_pretraining_and_20_in_fine_tuning(
    vocabulary, pieces, make_record
):
    record = make_record(captions=(" ".join(["dog"] * 100),))
    task, rng = TASKS["image_caption"], random.Random(0)
    assert task.example(record, vocabulary, rng, TaskContext()).target[:-1] == pieces(" dog") * 30
    assert task.example(record, vocabulary, rng, TUNE).target[:-1] == pieces(" dog") * 20


def test_cc12m_captions_have_no_loss_on_their_first_two_tokens(vocabulary, pieces, make_record):
    task, rng = TASKS["image_caption"], random.Random(0)
    a, red, dog = pieces(" a red dog")
    record = make_record(captions=("a red dog",), dataset="cc12m")
    example = task.example(record, vocabulary, rng, TaskContext())
    assert example.target == [IGNORE, IGNORE, dog, 2]
    assert example.decoder_input == [0, a, red, dog]
    short = make_record(captions=("dog",), dataset="cc12m")
    assert task.example(short, vocabulary, rng, TaskContext()).target == [IGNORE, 2]
    other = make_record(captions=("a red dog",), dataset="cc12m_v2")
    assert task.example(other, vocabulary, rng, TaskContext()).target == [a, red, dog, 2]


def test_caption_answers_and_references_have_no_punctuation(vocabulary, pieces, make_record):
    task = TASKS["image_caption"]
    assert task.answer([0, *pieces(" A man's hat."), 2, 1], vocabulary) == "A mans hat"
    assert task.references(make_record(captions=("A dog.", "Dogs!"))) == ["A dog", "Dogs"]


def test_a_record_without_captions_is_named(vocabulary, make_record):
    with pytest.raises(RecordError, match=r"train.tsv, row 3: field 'captions'"):
        TASKS["image_caption"].example(make_record(), vocabulary, random.Random(0), TaskContext())


@pytest.mark.parametrize(
    ("name", "kind", "medium"),
    [
        ("image_text_matching", "caption", "image"),
        ("video_text_matching", "video_caption", "video"),
    ],
)
@pytest.mark.parametrize(
    ("drawn", "caption", "word"), [(0.5, "a dog.", "yes"), (0.49, "a cat", "no")]
)
def test_matching(
    vocabulary, pieces, make_record, scripted, name, kind, medium, drawn, caption, word
):
    record = make_record(kind, captions=("A dog.",))
    context = TaskContext(negative_captions=["A-Cat"])
    example = TASKS[name].example(record, vocabulary, scripted(drawn), context)
    assert example.source == [0, *pieces(f' does the {medium} describe " {caption} "?'), 2]
    assert example.decoder_input == [0, *pieces(f" {word}")]
    assert example.target == [*pieces(f" {word}"), 2]


def test_matching_prompt_keeps_80_words(vocabulary, pieces, make_record):
    record = make_record(captions=(" ".join(["dog"] * 100),))
    source = TASKS["image_text_matching"].prompt(record, vocabulary)
    assert source == [0, *pieces(' does the image describe " ' + "dog " * 80 + '"?'), 2]


def test_negative_caption_swaps_an_object_in_two_of_five_draws(scripted):
    context = TaskContext(negative_captions=["other"], objects=["dog", "cat"])
    # all but the last object are drawn; "dog" is the right one, so the last one stands in
    assert negative_caption("a dog", ("dog",), scripted(0.61), context) == "a cat"
    assert negative_caption("a dog", ("dog",), scripted(0.6), context) == "other"
    assert negative_caption("a dog", (), scripted(), context) == "other"


def test_matching_without_other_captions_is_refused(vocabulary, make_record, scripted):
    record = make_record(captions=("A dog.",))
    with pytest.raises(ValueError, match="negative_captions is empty"):
        TASKS["image_text_matching"].example(record, vocabulary, scripted(0.1), TaskContext())


def test_about_half_of_the_pairs_are_wrong(vocabulary, make_record):
    record, rng = make_record(captions=("a dog",)), random.Random(3)
    context, task = TaskContext(negative_captions=["a cat"]), TASKS["image_text_matching"]
    positives = [
        task.example(record, vocabulary, rng, context).target[0]
        == vocabulary.encode_text(" yes")[0]
        for _ in range(400)
    ]
    assert 160 < sum(positives) < 240  # four standard deviations are 40


def test_published_search_settings():
    for name in ("image_caption", "video_caption", "audio_caption", "grounded_caption"):
        decoding = TASKS[name].decoding
        assert (decoding.beam_size, decoding.max_length) == (5, 22)
        assert decoding.no_repeat_ngram_size == 3 and not decoding.normalize_scores
        assert decoding.constraint == "none" and TASKS[name].metric == "caption"


def test_every_task_is_registered_under_its_name_and_kinds():
    assert set(TASKS) == {
        "image_caption",
        "image_text_matching",
        "vqa",
        "answer_matching",
        "grounding",
        "grounded_caption",
        "video_caption",
        "video_text_matching",
        "video_qa",
        "audio_caption",
        "visual_entailment",
        "image_generation",
    }
    assert all(task.name == name for name, task in TASKS.items())
    assert TASKS["answer_matching"].kinds == ("qa", "video_qa")
