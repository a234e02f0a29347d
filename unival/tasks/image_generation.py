"""Text to image: the model writes the codes of a picture, which a VQGAN makes pixels of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unival.data.records import Record
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, require
from unival.text import first_words
from unival.vocabulary import EOS, FIRST_CODE, NUM_CODES, Vocabulary

SOURCE_WORDS = 64
SEARCH = Decoding(max_length=1024, min_length=1024, top_k=256, constraint="codes")


@dataclass(frozen=True)
class ImageGeneration:
    """` what is the complete image? caption: {caption}` -> codes of 32 x 32 patches, row by row."""

    name: str = "image_generation"
    kinds: tuple[str, ...] = ("image_generation",)
    decoding: Decoding = SEARCH
    metric: str = "codes"
    candidates: tuple[str, ...] = ()

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example:
        codes = vocabulary.code_ids(require(record, "codes"))
        return assemble(self.prompt(record, vocabulary), codes)

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        caption = first_words(require(record, "captions")[0], SOURCE_WORDS)
        return vocabulary.source(f" what is the complete image? caption: {caption}")

    def references(self, record: Record) -> list[str]:
        return [" ".join(map(str, record.codes))]

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        codes = [number - FIRST_CODE for number in ids if number != EOS]
        return " ".join(str(code) for code in codes if 0 <= code < NUM_CODES)
