"""Visual grounding: find the region that a text describes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unival.data.records import Record
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, require
from unival.text import SOURCE_WORDS, pre_caption
from unival.vocabulary import Vocabulary, box_to_bins

# The published scripts search freely; constraint="bins" is the option that forbids other tokens.
SEARCH = Decoding(beam_size=5, max_length=4, min_length=4, no_repeat_ngram_size=3)


@dataclass(frozen=True)
class Grounding:
    """` which region does the text " {text} " describe?` -> four bins x0 y0 x1 y1."""

    name: str = "grounding"
    kinds: tuple[str, ...] = ("visual_grounding",)
    decoding: Decoding = SEARCH
    metric: str = "grounding"
    candidates: tuple[str, ...] = ()

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example:
        bins = region_ids(box, vocabulary)
        return assemble(self.prompt(record, vocabulary), bins)

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        text = pre_caption(require(record, "captions")[0], SOURCE_WORDS)
        return vocabulary.source(f' which region does the text " {text} " describe?')

    def references(self, record: Record) -> list[str]:
        """Empty: the reference is `record.box`, compared by the overlap of boxes."""
        return []

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        """Bins separated by spaces, for example `<bin_0> <bin_12> <bin_500> <bin_999>`."""
        return vocabulary.decode(ids).replace("><bin_", "> <bin_").strip()


def region_ids(box: Box | None, vocabulary: Vocabulary) -> list[int]:
    """The four bin ids of a box in pixels of the resized picture; raises ValueError for None."""
    if box is None:
        raise ValueError("a region is needed: pass box=, in pixels of the resized picture")
    return vocabulary.bin_ids(box_to_bins(box))
