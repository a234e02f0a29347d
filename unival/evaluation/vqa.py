"""Accuracy of answers: visual and video questions, entailment, matching."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from unival.data.records import Answer
from unival.tasks.visual_entailment import WORD_OF_LABEL

logger = logging.getLogger(__name__)

SHOWN = 3  # ids in a message
AGREEING = 3  # humans for a fully right answer

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
ARTICLES = frozenset(["a", "an", "the"])
NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
# Contractions by their ending. Those that read as another word without the apostrophe (we'll,
# she'd, its) are not among them.
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "'d've": "he it she somebody someone something there they we who you",
    "n't've": "could had might should would",
}
CONTRACTED = [f"{stem}{ending}" for ending, stems in ENDINGS.items() for stem in stems.split()]
CONTRACTED += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
# Every spelling that lacks one apostrophe.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED
    for place, letter in enumerate(word)
    if letter == "'"
}


def first_few(keys: Collection[object]) -> str:
    """Some ids for a message, in order."""
    shown = ", ".join(repr(key) for key in sorted(keys, key=str)[:SHOWN])
    return shown if len(keys) <= SHOWN else f"{shown}, ..."


def check_keys(predictions: Mapping[str, object], references: Mapping[str, object]) -> None:
    """Raise ValueError unless both hold the same ids, and at least one."""
    if not references:
        raise ValueError("nothing to evaluate: there are no references")
    unknown = predictions.keys() - references.keys()
    missing = references.keys() - predictions.keys()
    problems = []
    if missing:
        problems.append(f"{len(missing)} without a prediction ({first_few(missing)})")
    if unknown:
        problems.append(f"{len(unknown)} predicted but without a reference ({first_few(unknown)})")
    if problems:
        raise ValueError(
            f"predictions and references must have the same ids; {' and '.join(problems)}"
        )


@dataclass(frozen=True)
class Accuracy:
    """`right` of `count` samples; a sample may be right in part."""

    right: float
    count: int

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self.right / self.count


@dataclass(frozen=True)
class AnswerScores:
    """Accuracy of all samples, and of groups of them.

    Args:
        groups: for each grouping, such as `answer_type`, the accuracy by name of the group.
        outside_list: by id, predictions that are not in the list of answers to choose from.
    """

    overall: Accuracy
    groups: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    outside_list: dict[str, str] = field(default_factory=dict)


def accuracy(predictions: Mapping[str, str], references: Mapping[str, Sequence[Answer]]) -> float:
    """Mean over the samples of the confidence of the answer that equals the prediction, 0 if none.

    The strings must be exactly equal; nothing is normalised (case, articles, punctuation), as in
    the published evaluation. Returns a fraction between 0 and 1. Raises ValueError when there is
    nothing to evaluate, the ids differ or a sample has no answer with a text.
    """
    check_keys(predictions, references)
    _check_answers({key: [answer.text for answer in r] for key, r in references.items()})
    scores = (
        {answer.text: answer.confidence for answer in answers}.get(predictions[key], 0.0)
        for key, answers in references.items()
    )
    return sum(scores) / len(references)


def vqa_accuracy(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    groups: Mapping[str, Mapping[str, str]] | None = None,
    choices: Collection[str] = (),
) -> AnswerScores:
    """The official accuracy of VQAv2, OK-VQA and VizWiz: how many humans gave the same answer.

    With each human left out in turn, min(equal answers of the others / 3, 1); then the mean. The
    data sets have ten answers to a question. The rule is the same for fewer, with which four equal
    ones are needed to reach 1. Answers are compared as `normalize_answer` gives them. (The official
    program leaves a question alone on which all humans agree; there only predictions with
    capitals, articles and the like would score differently.) The answers of OK-VQA were stemmed by
    their publisher and are compared as they are. `unanswerable` of VizWiz is an answer like others.

    Args:
        predictions: by id of the question.
        references: the answers of the humans, at least two a question.
        groups: for each grouping, such as `answer_type`, the name of every question's group.
        choices: the list that the model chose from; what lies outside is counted and warned about.

    Raises:
        ValueError: nothing to evaluate, the ids differ, or a question has too few answers.
    """
    check_keys(predictions, references)
    _check_answers(references)
    alone = [key for key, answers in references.items() if len(answers) < 2]
    if alone:
        raise ValueError(
            f"{len(alone)} ids have one answer; the rule needs two: {first_few(alone)}"
        )
    right = {
        key: agreement(normalize_answer(predictions[key]), [normalize_answer(a) for a in answers])
        for key, answers in references.items()
    }
    return _answer_scores(right, groups or {}, outside_list(predictions, choices))


def exact_match(
    predictions: Mapping[str, str],
    references: Mapping[str, str],
    groups: Mapping[str, Mapping[str, str]] | None = None,
    choices: Collection[str] = (),
) -> AnswerScores:
    """How many answers equal the right one, as in video question answering; nothing is normalised.

    Arguments and errors as in `vqa_accuracy`, with one right answer a question.
    """
    check_keys(predictions, references)
    _check_answers({key: [answer] for key, answer in references.items()})
    right = {key: float(predictions[key] == answer) for key, answer in references.items()}
    return _answer_scores(right, groups or {}, outside_list(predictions, choices))


def entailment_accuracy(
    predictions: Mapping[str, str], references: Mapping[str, str]
) -> AnswerScores:
    """How many labels of SNLI-VE are right, in all and by the true `label`.

    A label may be the publisher's (`entailment`) or the word that the model says for it (`yes`).

    Raises:
        ValueError: nothing to evaluate, the ids differ, or a label is none.
    """
    check_keys(predictions, references)
    label_of_word = {word: label for label, word in WORD_OF_LABEL.items()}
    for texts in (predictions, references):
        wrong = outside_list(texts, (*WORD_OF_LABEL, *label_of_word))
        if wrong:
            raise ValueError(
                f"{len(wrong)} labels are none of {', '.join(WORD_OF_LABEL)} or "
                f"{', '.join(label_of_word)}: {_shown(wrong)}"
            )
    said, truth = (
        {key: label_of_word.get(text, text) for key, text in texts.items()}
        for texts in (predictions, references)
    )
    return exact_match(said, truth, {"label": truth})


def outside_list(answers: Mapping[str, str], choices: Collection[str]) -> dict[str, str]:
    """Those answers, by id, that are not among the choices; none where there are no choices."""
    allowed = set(choices)
    return {key: text for key, text in answers.items() if allowed and text not in allowed}


def normalize_answer(answer: str) -> str:
    """An answer as the official evaluation of VQAv2 compares it, in lower case.

    - A punctuation mark becomes a space. It is dropped where the answer has it beside a space, and
      so are all marks where a comma stands between digits: `1,000` is `1000`, `x-ray` is `x ray`.
    - A full stop is dropped unless a digit follows: `3.5` stays.
    - `none`, `zero` ... `ten` become digits; `a`, `an` and `the` are dropped.
    - Contractions get a missing apostrophe: `dont` is `don't`.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_comma = COMMA_IN_NUMBER.search(text) is not None
    marks = {
        mark: "" if has_comma or f"{mark} " in text or f" {mark}" in text else " "
        for mark in PUNCTUATION
    }
    text = FULL_STOP.sub("", text.translate(str.maketrans(marks)))
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the answers of min(others that equal the prediction / 3, 1)."""
    equal = answers.count(prediction)
    with_one_less = min(max(equal - 1, 0) / AGREEING, 1.0)
    with_all = min(equal / AGREEING, 1.0)
    return (equal * with_one_less + (len(answers) - equal) * with_all) / len(answers)


def _check_answers(references: Mapping[str, Sequence[str]]) -> None:
    single = [key for key, answers in references.items() if isinstance(answers, str)]
    if single:
        raise ValueError(f"answers must be a list, not one text: {first_few(single)}")
    empty = [key for key, answers in references.items() if not any(a.strip() for a in answers)]
    if empty:
        raise ValueError(f"{len(empty)} ids have no answer to compare with: {first_few(empty)}")


def _answer_scores(
    right: Mapping[str, float],
    groups: Mapping[str, Mapping[str, str]],
    outside: dict[str, str],
) -> AnswerScores:
    if outside:
        logger.warning(
            "%d answers are outside of the list to choose from: %s", len(outside), _shown(outside)
        )
    by_group = {}
    for name, group_of in groups.items():
        lacking = right.keys() - group_of.keys()
        if lacking:
            raise ValueError(f"{len(lacking)} ids have no {name}: {first_few(lacking)}")
        names = sorted({group_of[key] for key in right})
        by_group[name] = {
            group: _accuracy(value for key, value in right.items() if group_of[key] == group)
            for group in names
        }
    return AnswerScores(_accuracy(right.values()), by_group, outside)


def _accuracy(values: Iterable[float]) -> Accuracy:
    found = list(values)
    return Accuracy(sum(found), len(found))


def _shown(texts: Mapping[str, str]) -> str:
    return ", ".join(f"{text[:40]!r} ({key})" for key, text in list(texts.items())[:SHOWN])
