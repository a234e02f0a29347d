"""Does this caption belong to this medium? Half of the training captions are wrong ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unival.data.records import Record
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, draw_other, require
from unival.text import SOURCE_WORDS, pre_caption
from unival.vocabulary import Vocabulary

YES_NO = ("no", "yes")
SEARCH = Decoding(beam_size=2, max_length=4, normalize_scores=False, constraint="answers")


@dataclass(frozen=True)
class Matching:
    """` does the image describe " {caption} "?` -> ` yes` or ` no`."""

    name: str
    kinds: tuple[str, ...]
    medium: str
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
        caption = rng.choice(require(record, "captions"))
        positive = rng.random() >= 0.5
        if not positive:
            caption = negative_caption(caption, record.objects, rng, context)
        source = vocabulary.source(matching_prompt(self.medium, caption))
        return assemble(source, vocabulary.encode_text(" yes" if positive else " no"))

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        return vocabulary.source(matching_prompt(self.medium, require(record, "captions")[0]))

    def references(self, record: Record) -> list[str]:
        return ["yes"]

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        return vocabulary.decode(ids).strip()


def matching_prompt(medium: str, caption: str) -> str:
    """The question as text; visual entailment asks the same one about its hypothesis."""
    return f' does the {medium} describe " {pre_caption(caption, SOURCE_WORDS)} "?'


def negative_caption(
    caption: str, objects: Sequence[str], rng: random.Random, context: TaskContext
) -> str:
    """A wrong caption: one object swapped (40 % where objects are known), else another caption.

    As in the original, another caption is drawn without looking whether it is the same one.
    Raises ValueError when the list to draw from is empty.
    """
    if objects and context.objects and rng.random() > 0.6:
        known = rng.choice(objects)
        return caption.replace(known, draw_other(rng, context.objects, known))
    if not context.negative_captions:
        raise ValueError("matching needs other captions: TaskContext.negative_captions is empty")
    return rng.choice(context.negative_captions)
