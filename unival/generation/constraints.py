"""Which tokens may come next: answers from a list, image codes, or the four bins of a box.

Each constraint is a logits processor of transformers. Applied to logits, before the softmax, the
probability mass is shared among the allowed tokens; that is how the published results were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from unival.vocabulary import BOS, EOS, FIRST_BIN, FIRST_TEXT, NUM_BINS, Vocabulary

FORBIDDEN = float("-inf")


class Trie:
    """A set of token sequences that tells which tokens may follow a prefix."""

    def __init__(self, sequences: Iterable[Sequence[int]] = ()) -> None:
        self.root: dict[int, dict] = {}
        for sequence in sequences:
            self.insert(sequence)

    @classmethod
    def of_answers(cls, answers: Iterable[str], vocabulary: Vocabulary) -> Trie:
        """The trie of <s> answer </s>, each answer with its leading space."""
        trie = cls([BOS, *vocabulary.encode_text(f" {answer}"), EOS] for answer in answers)
        if not trie.root:
            raise ValueError("the list of answers to choose from is empty")
        return trie

    def insert(self, sequence: Sequence[int]) -> None:
        """Add one sequence, from <s> to </s>."""
        node = self.root
        for token in sequence:
            node = node.setdefault(token, {})

    def next(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow; [EOS] when the prefix leaves the trie or has reached its end."""
        node = self.root
        for token in prefix:
            if token not in node:
                return [EOS]
            node = node[token]
        return list(node) or [EOS]


class TrieConstraint(LogitsProcessor):
    """Allow only the answers of a trie, from the end of each sentence's decoder prompt on.

    prompt_lengths  tokens of each sentence's prompt, <s> not counted
    num_beams       row = sentence * num_beams + beam

    Rows that are still inside their prompt are left alone: forcing the prompt is the search's work.
    """

    def __init__(self, trie: Trie, prompt_lengths: Sequence[int], num_beams: int) -> None:
        self.trie = trie
        self.prompt_lengths = list(prompt_lengths)
        self.num_beams = num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows, length) starting with <s>, scores (rows, vocabulary)."""
        rows, length = input_ids.shape
        if rows != len(self.prompt_lengths) * self.num_beams:
            raise ValueError(
                f"{rows} rows do not match {len(self.prompt_lengths)} prompts of "
                f"{self.num_beams} beams each"
            )
        allowed_rows, allowed_tokens, free_rows = [], [], []
        for row, ids in enumerate(input_ids.tolist()):
            prompt = self.prompt_lengths[row // self.num_beams]
            if length <= prompt:
                free_rows.append(row)
                continue
            tokens = self.trie.next([BOS, *ids[prompt + 1 :]])
            allowed_rows += [row] * len(tokens)
            allowed_tokens += tokens
        constrained = torch.full_like(scores, FORBIDDEN)
        constrained[free_rows] = scores[free_rows]
        constrained[allowed_rows, allowed_tokens] = scores[allowed_rows, allowed_tokens]
        return constrained


class RangeConstraint(LogitsProcessor):
    """Allow ids first ... last - 1 and the special ids 0 ... 3 (image codes: 50265 to 58457)."""

    def __init__(self, first: int, last: int) -> None:
        if not FIRST_TEXT <= first < last:
            raise ValueError(f"a range needs {FIRST_TEXT} <= first < last, got {first}, {last}")
        self.first = first
        self.last = last

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows, length), scores (rows, vocabulary)."""
        constrained = scores.clone()
        constrained[:, FIRST_TEXT : self.first] = FORBIDDEN
        constrained[:, self.last :] = FORBIDDEN
        return constrained


class BinConstraint(LogitsProcessor):
    """Allow exactly four bins, then </s>. The original searches boxes without any constraint."""

    coordinates = 4

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows, length) starting with <s>, scores (rows, vocabulary)."""
        generated = input_ids.shape[1] - 1
        first, count = (FIRST_BIN, NUM_BINS) if generated < self.coordinates else (EOS, 1)
        constrained = torch.full_like(scores, FORBIDDEN)
        constrained[:, first : first + count] = scores[:, first : first + count]
        return constrained
