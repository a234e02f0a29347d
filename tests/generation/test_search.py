"""The beam search against counting everything a model of twelve symbols can say."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from unival.generation.constraints import Trie, TrieConstraint
from unival.generation.search import SearchOptions, ban_repeated_ngrams, beam_search

FREE = [0, 2, 3, *range(4, 12)]  # everything but padding may be generated


class Only:
    """A constraint that allows some tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.hidden = torch.ones(12, dtype=torch.bool)
        self.hidden[tokens] = False

    def __call__(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(self.hidden, -math.inf)


def every_output(exact, sentence, tokens, longest, temperature):
    """Log-probabilities of every output of one to `longest` of the tokens before </s>."""
    found = {}
    for length in range(1, longest + 1):
        for past in itertools.product([t for t in tokens if t != 2], repeat=length):
            logits = exact(sentence, [0, *past])[:, tokens] / temperature
            # Padding is forbidden behind the softmax, which knows it; a constraint acts before.
            if tokens == FREE:
                logits = torch.cat([logits, exact(sentence, [0, *past])[:, 1:2] / temperature], 1)
            log_probs = logits.log_softmax(-1)
            whole = (*past, 2)
            found[whole] = [float(log_probs[n, tokens.index(t)]) for n, t in enumerate(whole)]
    return found


@pytest.mark.parametrize(
    ("tokens", "longest", "normalize", "penalty", "temperature"),
    [
        (FREE, 1, True, 1.0, 1.0),
        ([2, 4, 9], 2, True, 1.0, 1.0),
        ([2, 4, 9], 2, False, 1.0, 1.0),
        ([2, 4, 9], 2, True, 2.5, 1.0),
        ([2, 4, 9], 2, True, 1.0, 0.5),
        (FREE, 1, False, 1.0, 3.0),
    ],
)
@torch.inference_mode()
def test_with_enough_beams_every_output_is_found(
    small, sources, exact, tokens, longest, normalize, penalty, temperature
):
    options = SearchOptions(
        beam_size=11,  # of 10 and of 2 + 4 outputs
        max_length=longest,
        normalize_scores=normalize,
        length_penalty=penalty,
        temperature=temperature,
    )
    constraints = [] if tokens == FREE else [Only(tokens)]
    found = beam_search(small, small.encoder(sources), options, constraints)
    for sentence, hypotheses in enumerate(found):
        expected = every_output(exact, sentence, tokens, longest, temperature)
        scores = {
            whole: sum(each) / (len(whole) ** penalty if normalize else 1.0)
            for whole, each in expected.items()
        }
        assert [tuple(h.tokens) for h in hypotheses] == sorted(scores, key=lambda w: -scores[w])
        for hypothesis in hypotheses:
            whole = tuple(hypothesis.tokens)
            assert hypothesis.score == pytest.approx(scores[whole], abs=2e-5)
            assert hypothesis.positional_scores == pytest.approx(expected[whole], abs=2e-5)


@torch.inference_mode()
def test_more_beams_than_symbols_are_refused(small, sources):
    with pytest.raises(ValueError, match="beam_size 12: the vocabulary has 12 entries"):
        beam_search(small, small.encoder(sources), SearchOptions(beam_size=12))


@torch.inference_mode()
def test_beams_that_change_places_keep_their_own_past(small, sources, exact):
    """Every hypothesis of a narrow search has the log-probabilities of its own tokens."""
    found = beam_search(small, small.encoder(sources), SearchOptions(beam_size=3, max_length=7))
    for sentence, hypotheses in enumerate(found):
        assert len(hypotheses) == 3
        for hypothesis in hypotheses:
            log_probs = exact(sentence, [0, *hypothesis.tokens[:-1]]).log_softmax(-1)
            each = [float(log_probs[n, t]) for n, t in enumerate(hypothesis.tokens)]
            assert hypothesis.positional_scores == pytest.approx(each, abs=5e-5)


@torch.inference_mode()
def test_constrained_search_behind_prompts_of_different_lengths(small, sources, exact):
    answers = [[4], [4, 5], [6, 7], [8, 4, 4], [9]]
    trie = Trie([[0, *ids, 2] for ids in answers])
    prompts = [[10, 11, 10], [11]]
    prefix = torch.tensor([[10, 11, 10], [11, 1, 1]])
    options = SearchOptions(beam_size=8, max_length=6, normalize_scores=False)
    constraints = [TrieConstraint(trie, [3, 1], 8)]
    found = beam_search(small, small.encoder(sources), options, constraints, prefix)
    for sentence, (prompt, hypotheses) in enumerate(zip(prompts, found, strict=True)):
        free = exact(sentence, [0, *prompt])[: len(prompt)].log_softmax(-1)
        forced = sum(float(free[n, t]) for n, t in enumerate(prompt))
        expected = {}
        for ids in answers:
            total, logits = forced, exact(sentence, [0, *prompt, *ids])
            for n, token in enumerate([*ids, 2]):
                follow = sorted({s[n] for s in ([*a, 2] for a in answers) if s[:n] == ids[:n]})
                row = logits[len(prompt) + n][follow].log_softmax(0)
                total += float(row[follow.index(token)])
            expected[(*prompt, *ids, 2)] = total
        assert {tuple(h.tokens) for h in hypotheses} == set(expected)
        for hypothesis in hypotheses:
            assert hypothesis.score == pytest.approx(expected[tuple(hypothesis.tokens)], abs=5e-5)


@torch.inference_mode()
def test_specials_wait_for_the_end_where_codes_are_written(small, sources):
    options = SearchOptions(beam_size=2, max_length=5)
    codes = torch.tensor([True, True])
    found = beam_search(small, small.encoder(sources), options, code_mask=codes)
    for hypothesis in itertools.chain(*found):
        assert len(hypothesis.tokens) == 6 and hypothesis.tokens[-1] == 2
        assert min(hypothesis.tokens[:-1]) >= 4


@torch.inference_mode()
def test_an_output_that_cannot_end_is_an_error(small, sources):
    trie = TrieConstraint(Trie([[0, 4, 5, 6, 7, 2]]), [0, 0], 2)
    options = SearchOptions(beam_size=2, max_length=2)
    with pytest.raises(ValueError, match="sentence 0: no output can end within 2"):
        beam_search(small, small.encoder(sources), options, [trie])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_no_ngram_comes_twice(size, length):
    rng = random.Random(10 * size + length)
    rows = [[rng.randrange(3) for _ in range(length)] for _ in range(50)]
    log_probs = torch.full((50, 4), -1.0)
    ban_repeated_ngrams(log_probs, torch.tensor(rows), size)
    for row, found in zip(rows, log_probs.tolist(), strict=True):
        seen = {tuple(row[n : n + size]) for n in range(length - size + 1)}
        for token in range(4):
            last = (*row[max(0, length - size + 1) :], token) if size > 1 else (token,)
            assert found[token] == (-math.inf if last in seen else -1.0)
