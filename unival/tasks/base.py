"""What every task provides: examples for training, a prompt and a decoding rule for inference."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from unival.data.records import Record, RecordError
from unival.vocabulary import BOS, EOS, IGNORE, Vocabulary

Box = tuple[float, float, float, float]

CONSTRAINTS = ("none", "bins", "codes", "answers")
SCORINGS = ("beam", "all_candidates")


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
    list the beam search is free. `decoder_prompt` holds after fine-tuning only: see
    `decoder_prompt()`.

    `scoring="all_candidates"` compares the log-probabilities of all answers of the list instead of
    searching. Of the other fields only `max_length`, `temperature` and `decoder_prompt` matter to
    it, and scores are never divided by the length.

    Raises ValueError, naming the field, for a value that no search can follow.
    """

    beam_size: int = 5
    max_length: int = 22
    min_length: int = 1
    no_repeat_ngram_size: int = 0
    normalize_scores: bool = True
    length_penalty: float = 1.0  # normalized scores are divided by length ** length_penalty
    temperature: float = 1.0  # logits are divided by it
    top_k: int | None = None  # draw one output among this many likeliest tokens, without a search
    constraint: str = "none"  # none | bins | codes | answers
    scoring: str = "beam"  # beam | all_candidates
    decoder_prompt: bool = False  # repeat the question in front of the answer

    def __post_init__(self) -> None:
        if self.beam_size < 1:
            raise ValueError(f"beam_size is at least 1, got {self.beam_size}")
        if self.min_length < 1:
            raise ValueError(f"min_length is at least 1, got {self.min_length}")
        if self.max_length < self.min_length:
            raise ValueError(
                f"max_length is at least min_length {self.min_length}, got {self.max_length}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size is at least 0, got {self.no_repeat_ngram_size}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is a finite number, got {self.length_penalty}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature is a finite number above 0, got {self.temperature}")
        for name, known in (("constraint", CONSTRAINTS), ("scoring", SCORINGS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
        if self.scoring == "all_candidates" and self.constraint != "answers":
            raise ValueError(
                f"scoring 'all_candidates' needs constraint 'answers', got {self.constraint!r}"
            )
        if self.scoring == "all_candidates" and self.normalize_scores:
            raise ValueError("scoring 'all_candidates' sums: normalize_scores must be False")


@dataclass(frozen=True)
class TaskContext:
    """What a task may draw from beside its record.

    answers_by_type  maps a type to its answers
    allowed_answers  the only answers that a target may be; None where all may
    """

    negative_captions: Sequence[str] = ()
    objects: Sequence[str] = ()
    answers_by_type: dict[str, list[str]] = field(default_factory=dict)
    fine_tuning: bool = False
    allowed_answers: frozenset[str] | None = None

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


def with_decoding(task: Task, decoding: Decoding) -> Task:
    """The task with another way to search for its answer."""
    return replace(task, decoding=decoding)  # type: ignore[type-var]  # every task is a dataclass


def draw_other(rng: random.Random, items: Sequence[str], taken: str) -> str:
    """A random item that differs from `taken`: the last one stands in when `taken` was drawn."""
    drawn = items[rng.randrange(max(len(items) - 1, 1))]
    return items[-1] if drawn == taken else drawn
