"""CIDEr-D: how much captions agree with human ones, in n-grams weighted by how rare they are.

Vedantam, Zitnick and Parikh, CIDEr: Consensus-based Image Description Evaluation, section 5.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unival.data.pickles import MAX_BYTES, load_plain
from unival.evaluation.vqa import check_keys, first_few

MAX_N = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for a difference of lengths
SCALE = 10.0

NGram = tuple[str, ...]
Norms = list[float]  # Euclidean, of the weights of each n


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many media's references an n-gram of words occurs.

    Args:
        documents: number of media counted.
        counts: by n-gram of 1 to 4 words, each between 1 and `documents`.

    Raises:
        ValueError: a count or an n-gram is not that.
    """

    documents: int
    counts: Mapping[NGram, int]

    def __post_init__(self) -> None:
        if isinstance(self.documents, bool) or not isinstance(self.documents, int):
            raise ValueError(f"the number of documents is {self.documents!r}, not an integer")
        if self.documents < 1:
            raise ValueError(f"the number of documents is {self.documents}, less than 1")
        for words, count in self.counts.items():
            if not isinstance(words, tuple) or not 1 <= len(words) <= MAX_N:
                raise ValueError(f"{words!r} is not an n-gram of 1 to {MAX_N} words")
            if not all(isinstance(word, str) and word.split() == [word] for word in words):
                raise ValueError(f"{words!r}: a word is a text without spaces")
            if type(count) is not int or not 1 <= count <= self.documents:
                raise ValueError(f"{words!r}: count {count!r} is not 1 to {self.documents}")

    @classmethod
    def from_references(cls, references: Iterable[Sequence[str]]) -> DocumentFrequencies:
        """From the captions of each medium, as words between spaces."""
        counts: Counter[NGram] = Counter()
        documents = 0
        for captions in references:
            _refuse_single(captions)
            documents += 1
            counts.update({words for caption in captions for words in _ngrams(caption)})
        return cls(documents, counts)

    @classmethod
    def load(cls, path: Path) -> DocumentFrequencies:
        """Read what `save` wrote; raises ValueError, naming the file, if it is not that."""
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: more than {MAX_BYTES} bytes")
        try:
            content = json.loads(path.read_bytes())
            counts = {tuple(key.split(" ")): value for key, value in content["counts"].items()}
            return cls(content["documents"], counts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not document frequencies: {error!r}") from error

    @classmethod
    def from_pickle(cls, path: Path) -> DocumentFrequencies:
        """Read a pickle of the original, {document_frequency, ref_len}, running nothing of it.

        Raises:
            ValueError: the file holds something else.
        """
        content = load_plain(path)
        try:
            documents = _integer(content["ref_len"])
            counts = {k: _integer(v) for k, v in content["document_frequency"].items()}
            return cls(documents, counts)
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not document frequencies: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write JSON: `documents`, and `counts` with the words of an n-gram joined by spaces."""
        counts = {" ".join(words): count for words, count in self.counts.items()}
        text = json.dumps({"documents": self.documents, "counts": counts})
        path.write_text(text + "\n", encoding="utf-8")

    def weight(self, words: NGram) -> float:
        """log(documents / count), the count being 1 where no reference has the n-gram."""
        return math.log(self.documents / self.counts.get(words, 1))


def cider_d_scores(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies,
) -> np.ndarray:
    """CIDEr-D of several captions for each medium, 0 to 10.

    A caption's score is the mean over n = 1..4 and over the references of
    exp(-d^2 / (2 sigma^2)) * sum_w min(h_w, r_w) r_w / (|h| |r|), times 10, where h and r hold the
    weighted counts of the n-grams of the caption and of a reference. d is the difference of their
    lengths; the original counts bigrams, which are one fewer than the words in both. Words are what
    stands between spaces; case and punctuation are the caller's.

    Args:
        hypotheses: S captions for each of B media; one without words scores 0.
        references: at least one caption for each of the same media.

    Returns:
        float64 [B, S].

    Raises:
        ValueError: the lengths differ, or a reference has no words.
    """
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} media with captions, {len(references)} with references"
        )
    counts = {len(captions) for captions in hypotheses}
    if len(counts) > 1:
        raise ValueError(f"each medium needs as many captions: there are {sorted(counts)}")
    scores = np.zeros((len(hypotheses), *(counts or {0})))
    for row, (captions, texts) in enumerate(zip(hypotheses, references, strict=True)):
        _refuse_single(captions)
        try:
            against = _References(texts, frequencies)
        except ValueError as error:
            raise ValueError(f"medium {row}: {error}") from error
        scores[row] = [against.score(caption) for caption in captions]
    return scores


def cider_d(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> float:
    """Mean CIDEr-D of one caption for each medium, keyed by its id; the original's score while
    training.

    `frequencies` are counted from the references where none are given.

    Raises:
        ValueError: nothing to evaluate, the ids differ, or a reference has no words.
    """
    check_keys(predictions, references)
    empty = [
        key for key, texts in references.items() if not texts or not all(map(str.split, texts))
    ]
    if empty:
        raise ValueError(f"{len(empty)} ids have a reference without words: {first_few(empty)}")
    frequencies = frequencies or DocumentFrequencies.from_references(references.values())
    captions = [[predictions[key]] for key in references]
    return float(cider_d_scores(captions, list(references.values()), frequencies).mean())


class _References:
    """The captions of one medium, by n-gram: which of them have it and with what weight."""

    def __init__(self, captions: Sequence[str], frequencies: DocumentFrequencies) -> None:
        _refuse_single(captions)
        self.frequencies = frequencies
        self.norms: list[Norms] = []
        self.lengths: list[int] = []
        self.having: dict[NGram, list[tuple[int, float]]] = defaultdict(list)
        for number, caption in enumerate(captions):
            weights, norms, length = _vector(caption, frequencies)
            if not weights:
                raise ValueError(f"reference {number} has no words")
            self.norms.append(norms)
            self.lengths.append(length)
            for words, weight in weights.items():
                self.having[words].append((number, weight))
        if not self.norms:
            raise ValueError("there are no references")

    def score(self, caption: str) -> float:
        weights, norms, length = _vector(caption, self.frequencies)
        products = [[0.0] * MAX_N for _ in self.norms]
        for words, weight in weights.items():
            for number, other in self.having.get(words, ()):
                products[number][len(words) - 1] += min(weight, other) * other
        total = 0.0
        for row, others, other_length in zip(products, self.norms, self.lengths, strict=True):
            # A product above 0 has norms above 0.
            cosines = sum(p / (a * b) for p, a, b in zip(row, norms, others, strict=True) if p)
            total += cosines * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        return SCALE * total / (MAX_N * len(self.norms))


def _vector(
    caption: str, frequencies: DocumentFrequencies
) -> tuple[dict[NGram, float], Norms, int]:
    """The weighted counts of a caption's n-grams, their norms, and its number of words."""
    weights = {}
    squares = [0.0] * MAX_N
    for words, count in Counter(_ngrams(caption)).items():
        weights[words] = weight = count * frequencies.weight(words)
        squares[len(words) - 1] += weight * weight
    return weights, [math.sqrt(square) for square in squares], len(caption.split())


def _ngrams(caption: str) -> Iterator[NGram]:
    words = caption.split()
    for size in range(1, MAX_N + 1):
        yield from zip(*(words[start:] for start in range(size)), strict=False)


def _refuse_single(captions: Sequence[str]) -> None:
    if isinstance(captions, str):
        raise ValueError(f"captions must be a list of texts, not one text: {captions[:40]!r}")


def _integer(value: object) -> int:
    """A count, which the original keeps as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)
