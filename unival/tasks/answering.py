"""Answer a question about a medium. Image and video questions differ only in the medium."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unival.data.records import Answer, Record, RecordError
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, require
from unival.text import SOURCE_WORDS, pre_question, question_mark
from unival.vocabulary import Vocabulary

SEARCH = Decoding(
    beam_size=5,
    max_length=200,
    normalize_scores=False,
    constraint="answers",
    decoder_prompt=True,
)


@dataclass(frozen=True)
class Answering:
    """` {question}` -> ` {answer}`, the answer with the highest confidence, weighted by it.

    In fine-tuning the question ends with `?` and the decoder reads it again before the answer.
    """

    name: str
    kinds: tuple[str, ...]
    decoding: Decoding = SEARCH
    metric: str = "accuracy"
    candidates: tuple[str, ...] = ()

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example:
        best = self._best_answer(record, context)
        source = self.prompt(record, vocabulary, fine_tuning=context.fine_tuning)
        answer = vocabulary.encode_text(f" {best.text}")
        return assemble(source, answer, best.confidence, prompted=context.fine_tuning)

    def _best_answer(self, record: Record, context: TaskContext) -> Answer:
        """The allowed answer with the highest confidence; RecordError where none is allowed."""
        allowed = context.allowed_answers
        answers = require(record, "answers")
        if allowed is not None:
            answers = [answer for answer in answers if answer.text in allowed]
        if not answers:
            raise RecordError(
                record.origin,
                "answers",
                f"{record.best_answer.text!r} is outside the list of {len(allowed or ())} answers",
            )
        return max(answers, key=lambda answer: answer.confidence)

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        question = pre_question(require(record, "question"), SOURCE_WORDS)
        return vocabulary.source(f" {question_mark(question) if fine_tuning else question}")

    def references(self, record: Record) -> list[str]:
        return [answer.text for answer in record.answers]

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        return vocabulary.decode(ids).strip()
