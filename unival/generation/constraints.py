"""Which tokens may come next: answers from a list, image codes, or the four bins of a box.

Each constraint is a logits processor of transformers. Applied to logits, before the softmax, the
probability mass is shared among the allowed tokens; that is how the published results were made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from unival.vocabulary import BOS, EOS, FIRST_BIN, FIRST_TEXT, NUM_BINS, Vocabulary

FORBIDDEN = float("-inf")


class Trie:
    """A set of token sequences that tells which tokens may follow a prefix.

    The tree is one sorted tensor. Nodes are numbered level by level, those of a level by (parent,
    token), the root is 0. Edge e, from `parent` by `token`, is the key parent * WIDTH + token and
    leads to node e + 1, so a node's children are a range of the keys and a step is a binary search.
    """

    ROOT = 0
    OFF = -1  # the state of what has left the trie
    WIDTH = 1 << 31  # tokens lie below it

    def __init__(self, sequences: Iterable[Sequence[int]] = ()) -> None:
        """Raises ValueError for a token that is negative or does not fit 31 bits."""
        self._build([list(sequence) for sequence in sequences])

    def _build(self, sequences: list[list[int]]) -> None:
        self._sequences = sequences
        self.keys = _edge_keys(sequences)
        self.vocabulary_size = int((self.keys % self.WIDTH).max()) + 1 if len(self.keys) else 0

    @classmethod
    def of_answers(cls, answers: Iterable[str], vocabulary: Vocabulary) -> Trie:
        """The trie of <s> answer </s>, each answer with its leading space.

        Raises ValueError for an empty list, and names the answer that is empty, encodes to nothing
        or is listed twice.
        """
        return cls([BOS, *tokens, EOS] for tokens in encode_answers(answers, vocabulary))

    def insert(self, sequence: Sequence[int]) -> None:
        """Add one sequence, from <s> to </s>. Nodes are numbered anew: states from before are void.

        Each call costs as much as building the trie, which takes all sequences at once.
        """
        self._build([*self._sequences, list(sequence)])

    def to(self, device: torch.device) -> Trie:
        """The same trie on a device; itself where it is there already."""
        if self.keys.device == device:
            return self
        moved = copy.copy(self)
        moved.keys = self.keys.to(device)
        return moved

    def step(self, states: Tensor, tokens: Tensor) -> Tensor:
        """int64 [n] states and tokens to the states behind the tokens; OFF where there is none."""
        if len(self.keys) == 0:
            return torch.full_like(states, self.OFF)
        wanted = states * self.WIDTH + tokens
        edge = torch.searchsorted(self.keys, wanted)
        found = self.keys[edge.clamp(max=len(self.keys) - 1)] == wanted
        known = (tokens >= 0) & (tokens < self.vocabulary_size)  # others reach a neighbour's keys
        return torch.where(found & known, edge + 1, self.OFF)

    def paths(self, tokens: Tensor) -> Tensor:
        """int64 [n, L] to the state [n, L] behind each token of each row, from the root."""
        states = tokens.new_full((tokens.shape[0],), self.ROOT)
        found = torch.empty_like(tokens)
        for position, column in enumerate(tokens.unbind(1)):
            states = self.step(states, column)
            found[:, position] = states
        return found

    def states(self, tokens: Tensor) -> Tensor:
        """int64 [n, L] to the state [n] that each row's tokens lead to from the root."""
        if tokens.shape[1] == 0:
            return tokens.new_full((tokens.shape[0],), self.ROOT)
        return self.paths(tokens)[:, -1]

    def path(self, sequence: Sequence[int]) -> list[int]:
        """The state behind each token of a sequence, before the token that comes next.

        For a decoder input <s> answer, `allowed` of this path is the mask of each of its targets.
        """
        tokens = torch.tensor([list(sequence)], dtype=torch.long, device=self.keys.device)
        return self.paths(tokens)[0].tolist()

    def allowed(self, states: Tensor, size: int) -> Tensor:
        """int64 [n] states to bool [n, size]: which of `size` tokens may follow.

        Only </s> where a state is OFF or a sequence's end. Raises ValueError for a trie with
        tokens of `size` or above.
        """
        if self.vocabulary_size > size:
            last = self.vocabulary_size - 1
            raise ValueError(f"the trie holds token {last}; the vocabulary has {size} entries")
        first = torch.searchsorted(self.keys, states * self.WIDTH)
        count = torch.searchsorted(self.keys, (states + 1) * self.WIDTH) - first
        mask = torch.zeros(len(states), size, dtype=torch.bool, device=states.device)
        row = torch.arange(len(states), device=states.device).repeat_interleave(count)
        before = count.cumsum(0) - count  # children of the rows above
        child = first[row] + torch.arange(len(row), device=states.device) - before[row]
        mask[row, self.keys[child] % self.WIDTH] = True
        mask[:, EOS] |= count == 0
        return mask

    def next(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow, ascending; [EOS] when the prefix leaves the trie or has ended."""
        state = ([self.ROOT, *self.path(prefix)])[-1]
        ends = self.keys.new_tensor([state * self.WIDTH, (state + 1) * self.WIDTH])
        first, last = torch.searchsorted(self.keys, ends).tolist()
        return (self.keys[first:last] % self.WIDTH).tolist() or [EOS]


def _edge_keys(sequences: Sequence[Sequence[int]]) -> Tensor:
    """The keys of a trie's edges, ascending: one sort a level over all sequences."""
    bad = [t for sequence in sequences for t in sequence if not 0 <= t < Trie.WIDTH]
    if bad:
        raise ValueError(f"a trie holds tokens 0 to {Trie.WIDTH - 1}, not {bad[0]}")
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.long)
    flat = torch.tensor([t for sequence in sequences for t in sequence], dtype=torch.long)
    starts = lengths.cumsum(0) - lengths
    nodes, found, count = torch.zeros_like(lengths), [flat.new_empty(0)], 0
    for level in range(int(lengths.max()) if len(sequences) else 0):
        rows = lengths > level
        keys = nodes[rows] * Trie.WIDTH + flat[starts[rows] + level]
        unique, edge = keys.unique(return_inverse=True)
        nodes[rows] = count + edge + 1
        count += len(unique)
        found.append(unique)
    return torch.cat(found)


def encode_answers(answers: Iterable[str], vocabulary: Vocabulary) -> list[list[int]]:
    """Tokens of each answer with its leading space.

    Raises ValueError for an empty list, and names the answer that is empty, encodes to nothing or
    is listed twice.
    """
    seen: set[str] = set()
    encoded = []
    for number, answer in enumerate(answers, start=1):
        if not answer.strip():
            raise ValueError(f"the list of answers: answer {number} is empty: {answer!r}")
        if answer in seen:
            raise ValueError(f"the list of answers: answer {number}, {answer!r}, is listed twice")
        tokens = vocabulary.encode_text(f" {answer}")
        if not tokens:
            raise ValueError(
                f"the list of answers: answer {number}, {answer!r}, encodes to nothing"
            )
        seen.add(answer)
        encoded.append(tokens)
    if not encoded:
        raise ValueError("the list of answers to choose from is empty")
    return encoded


class TrieConstraint(LogitsProcessor):
    """Allow only the answers of a trie, from the end of each sentence's decoder prompt on.

    prompt_lengths  tokens of each sentence's prompt, <s> not counted
    num_beams       row = sentence * num_beams + beam

    Rows that are still inside their prompt are left alone: forcing the prompt is the search's work.
    """

    def __init__(self, trie: Trie, prompt_lengths: Sequence[int], num_beams: int) -> None:
        self.trie = trie
        self.num_beams = num_beams
        self.prompt_lengths = torch.tensor(prompt_lengths, dtype=torch.long)
        self.shortest = min(prompt_lengths, default=0)
        self.longest = max(prompt_lengths, default=0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows, length) starting with <s>, scores (rows, vocabulary)."""
        rows, length = input_ids.shape
        if rows != len(self.prompt_lengths) * self.num_beams:
            raise ValueError(
                f"{rows} rows do not match {len(self.prompt_lengths)} prompts of "
                f"{self.num_beams} beams each"
            )
        if length <= self.shortest:
            return scores
        self.trie = self.trie.to(scores.device)
        self.prompt_lengths = self.prompt_lengths.to(scores.device)
        prompt = self.prompt_lengths.repeat_interleave(self.num_beams)
        states = self.trie.states(torch.full_like(input_ids[:, :1], BOS))
        for position in range(self.shortest + 1, length):
            stepped = self.trie.step(states, input_ids[:, position])
            states = torch.where(position > prompt, stepped, states)
        allowed = self.trie.allowed(states, scores.shape[1])
        if length <= self.longest:
            allowed |= (length <= prompt)[:, None]
        return scores.masked_fill(~allowed, FORBIDDEN)


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
