"""Prompts, targets and weights of questions, entailment and answer matching."""

from __future__ import annotations

import random

import pytest

from unival.data.records import Answer, RecordError
from unival.tasks import TASKS
from unival.tasks.answer_matching import negative_answer
from unival.tasks.base import TaskContext, decoder_prompt
from unival.vocabulary import IGNORE

TUNE = TaskContext(fine_tuning=True)
ANSWERS = (Answer("red", 0.3), Answer("Dark Blue", 0.6), Answer("blue", 0.1))
TYPES = {"color": ["blue", "green"], "how many": ["1", "2"], "other": ["red", "dog", "tree"]}


@pytest.mark.parametrize(("name", "kind"), [("vqa", "qa"), ("video_qa", "video_qa")])
def test_questions_in_pretraining(vocabulary, pieces, make_record, name, kind):
    record = make_record(kind, question="What Color-is it", answers=ANSWERS)
    example = TASKS[name].example(record, vocabulary, random.Random(0), TaskContext())
    assert example.source == [0, *pieces(" what color is it"), 2]  # no question mark
    assert example.decoder_input == [0, *pieces(" Dark Blue")]
    assert example.target == [*pieces(" Dark Blue"), 2]
    assert example.weight == 0.6


def test_fine_tuned_questions_are_repeated_in_the_decoder(vocabulary, pieces, make_record):
    record = make_record("qa", question="What is it", answers=(Answer("dog"),))
    example = TASKS["vqa"].example(record, vocabulary, random.Random(0), TUNE)
    what, is_, it, mark = question = pieces(" what is it?")
    dog = pieces(" dog")
    assert example.source == [0, *question, 2]
    assert example.decoder_input == [0, what, is_, it, mark, *dog]
    assert example.target == [IGNORE, IGNORE, IGNORE, IGNORE, *dog, 2]
    assert len(example.target) == len(example.decoder_input)
    prompt = decoder_prompt(TASKS["vqa"], example.source, fine_tuning=True)
    assert prompt == [0, *question]
    assert decoder_prompt(TASKS["vqa"], example.source, fine_tuning=False) == [0]


def test_question_mark_is_not_doubled(vocabulary, pieces, make_record):
    record = make_record("qa", question="Why?", answers=(Answer("x"),))
    assert TASKS["vqa"].prompt(record, vocabulary, fine_tuning=True) == [0, *pieces(" why?"), 2]


def test_what_a_question_misses_is_named(vocabulary, make_record):
    for fields, field in (({"question": "why"}, "answers"), ({"answers": ANSWERS}, "question")):
        record = make_record("qa", **fields)
        with pytest.raises(RecordError, match=f"field '{field}'"):
            TASKS["vqa"].example(record, vocabulary, random.Random(0), TUNE)


@pytest.mark.parametrize(("u", "shown", "word"), [(0.7, "Dark Blue", "yes"), (0.2, "red", "no")])
def test_answer_matching(vocabulary, pieces, make_record, scripted, u, shown, word):
    record = make_record("video_qa", question="What? Colour", answers=ANSWERS)
    context = TaskContext(answers_by_type=TYPES)
    example = TASKS["answer_matching"].example(record, vocabulary, scripted(u, u), context)
    text = f' what is the answer to question " what? colour ". is " {shown} "?'
    assert example.source == [0, *pieces(text), 2]
    assert example.target == [*pieces(f" {word}"), 2]
    assert example.weight == 0.6


@pytest.mark.parametrize(
    ("text", "confidence", "u", "wrong"),
    [
        ("blue", 1.0, 0.3, "green"),  # same type; "blue" was drawn, so the last one stands in
        ("blue", 0.4, 0.3, "red"),  # 0.4 does not exceed 0.3 + 0.1: type other
        ("2", 1.0, 0.6, "3"),  # a count moves by one
        ("0", 1.0, 0.6, "red"),  # not in any list, hence untyped
        ("1", 1.0, 0.4, "2"),  # u too small to count: same type, last one stands in
        ("red", 1.0, 0.0, "tree"),  # type other, "red" was drawn
        ("unheard of", 1.0, 0.0, "red"),
    ],
)
def test_negative_answers(scripted, text, confidence, u, wrong):
    context = TaskContext(answers_by_type=TYPES)
    assert negative_answer(Answer(text, confidence), scripted(u), context) == wrong


def test_answer_matching_without_answers_is_refused(scripted):
    with pytest.raises(ValueError, match="answers of type 'other'"):
        negative_answer(Answer("a"), scripted(0.1), TaskContext())


@pytest.mark.parametrize(
    ("label", "word"), [("entailment", "yes"), ("contradiction", "no"), ("neutral", "maybe")]
)
def test_visual_entailment(vocabulary, pieces, make_record, label, word):
    task = TASKS["visual_entailment"]
    record = make_record("visual_entailment", captions=("Two Dogs play.",), label=label)
    question = pieces(' does the image describe " two dogs play. "?')
    example = task.example(record, vocabulary, random.Random(0), TUNE)
    assert example.source == [0, *question, 2]
    assert example.decoder_input == [0, *question, *pieces(f" {word}")]
    assert example.target == [IGNORE] * len(question) + [*pieces(f" {word}"), 2]
    assert task.references(record) == [word]
    assert task.answer([*pieces(f" {word}"), 2], vocabulary) == word


def test_an_unknown_label_is_named(make_record):
    record = make_record("visual_entailment", captions=("x",), label="entails")
    with pytest.raises(RecordError, match="'entails' is not one of contradiction"):
        TASKS["visual_entailment"].references(record)


def test_published_search_settings():
    for name in ("vqa", "video_qa"):
        decoding = TASKS[name].decoding
        assert decoding.beam_size == 5 and not decoding.normalize_scores
        assert decoding.constraint == "answers" and decoding.decoder_prompt
    assert TASKS["visual_entailment"].candidates == ("no", "yes", "maybe")
