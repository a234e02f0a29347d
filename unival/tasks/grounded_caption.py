"""Grounded captioning: describe a region, the second example of a grounding row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unival.data.records import Record
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, require
from unival.tasks.captioning import SEARCH
from unival.tasks.grounding import region_ids
from unival.text import TARGET_WORDS, pre_caption, strip_punctuation
from unival.vocabulary import BOS, EOS, Vocabulary

PROMPT = "  what does the region describe? region:"  # two leading spaces, as in the original


@dataclass(frozen=True)
class GroundedCaption:
    """`  what does the region describe? region:` and four bins -> ` {caption}`."""

    name: str = "grounded_caption"
    kinds: tuple[str, ...] = ("visual_grounding",)
    decoding: Decoding = SEARCH
    metric: str = "caption"
    candidates: tuple[str, ...] = ()

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example:
        caption = pre_caption(require(record, "captions")[0], TARGET_WORDS)
        source = self.prompt(record, vocabulary, box)
        return assemble(source, vocabulary.encode_text(f" {caption}"))

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        return [BOS, *vocabulary.encode_text(PROMPT), *region_ids(box, vocabulary), EOS]

    def references(self, record: Record) -> list[str]:
        return [strip_punctuation(caption) for caption in record.captions]

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        return strip_punctuation(vocabulary.decode(ids))
