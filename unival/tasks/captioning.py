"""Describe a medium. Image, video and audio captioning differ only in the word of the prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unival.data.records import Record
from unival.tasks.base import Box, Decoding, Example, TaskContext, assemble, require
from unival.text import CAPTION_WORDS, TARGET_WORDS, first_words, pre_caption, strip_punctuation
from unival.vocabulary import IGNORE, Vocabulary

SEARCH = Decoding(beam_size=5, max_length=22, no_repeat_ngram_size=3, normalize_scores=False)
UNTRUSTED_START = "cc12m"  # its captions often start with a name or a place the image cannot tell


@dataclass(frozen=True)
class Captioning:
    """` what does the image describe?` -> ` {caption}`.

    In pretraining the caption is cleaned and cut after 30 words; in fine-tuning it loses its
    punctuation, keeps its case and is cut after 20 words.
    """

    name: str
    kinds: tuple[str, ...]
    medium: str
    fine_tuned_medium: str
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
        caption = rng.choice(require(record, "captions"))
        if context.fine_tuning:
            text = first_words(strip_punctuation(caption), CAPTION_WORDS)
        else:
            text = pre_caption(caption, TARGET_WORDS)
        source = self.prompt(record, vocabulary, fine_tuning=context.fine_tuning)
        example = assemble(source, vocabulary.encode_text(f" {text}"))
        if record.dataset == UNTRUSTED_START and not context.fine_tuning:
            return _without_first_tokens(example)
        return example

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        medium = self.fine_tuned_medium if fine_tuning else self.medium
        return vocabulary.source(f" what does the {medium} describe?")

    def references(self, record: Record) -> list[str]:
        return [strip_punctuation(caption) for caption in record.captions]

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        return strip_punctuation(vocabulary.decode(ids))


def _without_first_tokens(example: Example, count: int = 2) -> Example:
    """Take the first caption tokens out of the loss, never the closing </s>."""
    count = min(count, len(example.target) - 1)
    return replace(example, target=[IGNORE] * count + example.target[count:])
