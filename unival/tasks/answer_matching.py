"""Is this the answer to the question? The second example of a question in pretraining."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unival.data.records import Answer, Record
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, draw_other, require
from unival.tasks.matching import SEARCH, YES_NO
from unival.text import SOURCE_WORDS, pre_question
from unival.vocabulary import Vocabulary


@dataclass(frozen=True)
class AnswerMatching:
    """` what is the answer to question " {q} ". is " {a} "?` -> ` yes` or ` no`."""

    name: str = "answer_matching"
    kinds: tuple[str, ...] = ("qa", "video_qa")
    decoding: Decoding = SEARCH
    metric: str = "accuracy"
    candidates: tuple[str, ...] = YES_NO

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example:
        require(record, "answers")
        best = record.best_answer
        positive = rng.random() >= 0.5
        shown = best.text if positive else negative_answer(best, rng, context)
        source = vocabulary.source(answer_prompt(record, shown))
        word = vocabulary.encode_text(" yes" if positive else " no")
        return assemble(source, word, best.confidence)

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        require(record, "answers")
        return vocabulary.source(answer_prompt(record, record.best_answer.text))

    def references(self, record: Record) -> list[str]:
        return ["yes"]

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        return vocabulary.decode(ids).strip()


def answer_prompt(record: Record, answer: str) -> str:
    """The question as text, about an answer that may be wrong."""
    question = pre_question(require(record, "question"), SOURCE_WORDS)
    return f' what is the answer to question " {question} ". is " {answer} "?'


def negative_answer(answer: Answer, rng: random.Random, context: TaskContext) -> str:
    """A wrong answer, of the same type when the right one is certain enough.

    With u uniform in [0, 1): if the confidence exceeds u + 0.1 and the answer has a known type,
    a count is moved by one (for u > 0.5; "0" may become "-1", as in the original) or another
    answer of that type is drawn; otherwise an answer of type `other` is drawn. Raises ValueError
    when the context has no such answers.
    """
    u = rng.random()
    kind = context.type_of_answer.get(answer.text, "other")
    if answer.confidence <= u + 0.1:
        kind = "other"
    if kind == "how many" and answer.text.isdecimal() and u > 0.5:
        return str(int(answer.text) + rng.choice((-1, 1)))
    if not context.answers_by_type.get(kind):
        raise ValueError(f"answer matching needs answers of type {kind!r} in TaskContext")
    return draw_other(rng, context.answers_by_type[kind], answer.text)
