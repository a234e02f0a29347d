"""What every task provides: examples for training, a prompt and a decoding rule for inference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from unival.data.records import Record, RecordError
from unival.vocabulary import BOS, EOS, IGNORE, Vocabulary

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
    """How a task's answer is searched for (reference values: the published evaluation scripts).

    Lengths count the tokens before </s>. With `constraint="answers"` the answer is one of the
    task's `candidates` or, where the task has none, of the data set's answer list; without such a
    list the search is free. `decoder_prompt` holds after fine-tuning only: see `decoder_prompt()`.
    """

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

    @cached_property
    def type_of_answer(self) -> dict[str, str]:
        """The type of each answer; answers of type `other` count as untyped."""
        typed = ((kind, texts) for kind, texts in self.answers_by_type.items() if kind != "other")
        return {text: kind for kind, texts in typed for text in texts}


class Task(Protocol):
    """`name` is the key in `unival.tasks.TASKS`; `kinds` the record kinds the task accepts."""

    @property
    def name(self) -> str: ...

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def decoding(self) -> Decoding: ...

    @property
    def metric(self) -> str:
        """caption, accuracy or grounding."""
        ...

    @property
    def candidates(self) -> tuple[str, ...]:
        """The only possible answers; empty where the task is open."""
        ...

    def example(
        self,
        record: Record,
        vocabulary: Vocabulary,
        rng: random.Random,
        context: TaskContext,
        box: Box | None = None,
    ) -> Example:
        """One training example; `box` is the record's box in pixels of the resized picture."""
        ...

    def prompt(
        self,
        record: Record,
        vocabulary: Vocabulary,
        box: Box | None = None,
        fine_tuning: bool = False,
    ) -> list[int]:
        """The encoder's text ids for inference (also for records made from a user's own words)."""
        ...

    def references(self, record: Record) -> list[str]:
        """The right answers as text, in the form that `answer` gives."""
        ...

    def answer(self, ids: Sequence[int], vocabulary: Vocabulary) -> str:
        """The text a person reads, from generated ids (bins are shown as `<bin_i>`)."""
        ...


def require(record: Record, name: str) -> Any:
    """A field of the record; raises RecordError, naming file, row and field, when it is empty."""
    value = getattr(record, name)
    if not value or (isinstance(value, str) and not value.strip()):
        raise RecordError(record.origin, name, f"is empty, but {record.kind!r} needs it")
    return value


def assemble(
    source: list[int], answer: list[int], weight: float = 1.0, prompted: bool = False
) -> Example:
    """Put source and answer ids together; `source` is <s> text </s>, `answer` has neither.

    With `prompted` the decoder reads the source without its </s> before the answer, and there is
    no loss on that part.
    """
    if not prompted:
        return Example(source, [BOS, *answer], [*answer, EOS], weight)
    silent = [IGNORE] * (len(source) - 2)
    return Example(source, [*source[:-1], *answer], [*silent, *answer, EOS], weight)


def decoder_prompt(task: Task, source: list[int], fine_tuning: bool) -> list[int]:
    """What the decoder starts from at inference: <s>, or <s> and the question."""
    return source[:-1] if fine_tuning and task.decoding.decoder_prompt else [BOS]


def draw_other(rng: random.Random, items: Sequence[str], taken: str) -> str:
    """A random item that differs from `taken`: the last one stands in when `taken` was drawn."""
    drawn = items[rng.randrange(max(len(items) - 1, 1))]
    return items[-1] if drawn == taken else drawn
