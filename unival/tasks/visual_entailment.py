"""Visual entailment (SNLI-VE): does the image imply the hypothesis?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unival.data.records import Record, RecordError
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, require
from unival.tasks.matching import matching_prompt
from unival.vocabulary import Vocabulary

WORD_OF_LABEL = {"contradiction": "no", "entailment": "yes", "neutral": "maybe"}

SEARCH = Decoding(
    max_length=4,
    normalize_scores=False,
    constraint="answers",
    scoring="all_candidates",
    decoder_prompt=True,
)


@dataclass(frozen=True)
class VisualEntailment:
    """` does the image describe " {hypothesis} "?` -> ` yes`, ` no` or ` maybe`.

    In fine-tuning the decoder reads the question again before the answer.
    """

    name: str = "visual_entailment"
    kinds: tuple[str, ...] = ("visual_entailment",)
    decoding: Decoding = SEARCH
    metric: str = "accuracy"
    candidates: tuple[str, ...] = ("no", "yes", "maybe")

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example:
        source = self.prompt(record, vocabulary)
        answer = vocabulary.encode_text(f" {label_word(record)}")
        return assemble(source, answer, prompted=context.fine_tuning)

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        return vocabulary.source(matching_prompt("image", require(record, "captions")[0]))

    def references(self, record: Record) -> list[str]:
        return [label_word(record)]

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        return vocabulary.decode(ids).strip()


def label_word(record: Record) -> str:
    """The word for the record's label; raises RecordError for an unknown label."""
    if record.label not in WORD_OF_LABEL:
        raise RecordError(
            record.origin, "label", f"{record.label!r} is not one of {', '.join(WORD_OF_LABEL)}"
        )
    return WORD_OF_LABEL[record.label]
