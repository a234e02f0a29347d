"""What every task provides: examples for training, a prompt and a decoding rule for inference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from unival.data.records import Record
from unival.vocabulary import Vocabulary

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Example:
    """One training example in token ids.

    source         <s> text </s>, the encoder's text
    decoder_input  <s> [prompt] answer
    target         what decoder_input should predict, IGNORE where there is no loss; same length
    weight         multiplies the log-probabilities (answer confidence)
    """

    source: list[int]
    decoder_input: list[int]
    target: list[int]
    weight: float = 1.0


@dataclass(frozen=True)
class Decoding:
    """How a task's answer is searched for (reference values: the published evaluation scripts)."""

    beam_size: int = 5
    max_length: int = 22
    min_length: int = 1
    no_repeat_ngram_size: int = 0
    normalize_scores: bool = True
    constraint: str = "none"  # none | bins | answers
    decoder_prompt: bool = False  # repeat the question in front of the answer


@dataclass(frozen=True)
class TaskContext:
    """What a task may draw from beside its record. `answers_by_type` maps a type to its answers."""

    negative_captions: Sequence[str] = ()
    objects: Sequence[str] = ()
    answers_by_type: dict[str, list[str]] = field(default_factory=dict)
    fine_tuning: bool = False


class Task(Protocol):
    """`name` is the key in `unival.tasks.TASKS`; `kinds` the record kinds the task accepts."""

    name: str
    kinds: tuple[str, ...]
    decoding: Decoding
    metric: str  # caption | accuracy | grounding | none

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example: ...

    def prompt(self, record: Record, vocabulary: Vocabulary, box: Box | None = None) -> list[int]:
        """The encoder's text ids for inference (also for records made from a user's own words)."""
        ...

    def references(self, record: Record) -> list[str]: ...

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        """The text a person reads, from generated ids (bins are shown as `<bin_i>`)."""
        ...
