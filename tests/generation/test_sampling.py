"""Samples against the exact probabilities of a model of twelve symbols."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from unival.generation.constraints import RangeConstraint, Trie, TrieConstraint
from unival.generation.sampling import sample

TOKENS = [0, *range(2, 12)]  # padding is never drawn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def next_probabilities(exact, sentence, past, top_k, temperature, may_end):
    """Exact probability of each token behind `past`: top-k of what remains, renormalised."""
    probabilities = (exact(sentence, [0, *past]) / temperature)[-1].softmax(-1)
    probabilities[1] = 0.0
    if not may_end:
        probabilities[2] = 0.0
    if top_k is not None:
        smallest = probabilities.topk(top_k).values[-1]
        probabilities[probabilities < smallest] = 0.0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (3, 1.0), (None, 0.5), (4, 2.0)])
@torch.inference_mode()
def test_outputs_come_as_often_as_they_are_likely(small, sources, exact, top_k, temperature):
    drawn = 4000
    found = sample(
        small,
        small.encoder(sources),
        samples=drawn,
        max_length=2,
        top_k=top_k,
        temperature=temperature,
        generator=seeded(),
    )
    assert found.tokens.shape == (2, drawn, 3)
    for sentence in range(2):
        first = next_probabilities(exact, sentence, [], top_k, temperature, may_end=False)
        expected = {}
        for a in TOKENS:
            if first[a] == 0.0:
                continue
            second = next_probabilities(exact, sentence, [a], top_k, temperature, may_end=True)
            expected[a, 2, 1] = float(first[a] * second[2])
            for b in TOKENS:
                if b != 2:
                    expected[a, b, 2] = float(first[a] * second[b])
        assert sum(expected.values()) == pytest.approx(1.0)
        counts = Counter(map(tuple, found.tokens[sentence].tolist()))
        possible = {tokens for tokens, p in expected.items() if p > 0}
        assert set(counts) <= possible
        distance = sum(abs(counts[t] / drawn - p) for t, p in expected.items()) / 2
        # About sqrt(outcomes / (2 pi drawn)) = 0.066 for 110 even ones; a wrong temperature or an
        # unrenormalised cut is above 0.1.
        assert distance < 0.07
        statistic = sum(
            (counts[t] - drawn * p) ** 2 / (drawn * p) for t, p in expected.items() if drawn * p > 5
        )
        cells = sum(drawn * p > 5 for p in expected.values())
        assert statistic < cells + 4 * (2 * cells) ** 0.5  # four deviations of chi-square


@torch.inference_mode()
def test_log_probabilities_are_those_before_the_cut(small, sources, exact):
    found = sample(
        small,
        small.encoder(sources),
        samples=20,
        max_length=5,
        top_k=4,
        temperature=1.5,
        generator=seeded(),
    )
    for sentence, n in itertools.product(range(2), range(20)):
        tokens = found.tokens[sentence, n].tolist()
        length = tokens.index(2) + 1
        log_probs = (exact(sentence, [0, *tokens[: length - 1]]) / 1.5).log_softmax(-1)
        expected = [float(log_probs[t, token]) for t, token in enumerate(tokens[:length])]
        each = found.log_probs[sentence, n].tolist()
        assert each[:length] == pytest.approx(expected, abs=5e-5)
        assert each[length:] == [0.0] * (len(tokens) - length)


@torch.inference_mode()
def test_eos_ends_a_row_and_padding_follows(small, sources):
    found = sample(
        small, small.encoder(sources), samples=200, max_length=9, min_length=2, generator=seeded()
    )
    lengths = set()
    for row in found.tokens.flatten(0, 1).tolist():
        length = row.index(2)
        assert 2 <= length <= 9
        assert 1 not in row[:length]
        assert row[length + 1 :] == [1] * (len(row) - length - 1)
        lengths.add(length)
    assert {2, 3} <= lengths  # they end where they like, not all at one place
    assert found.tokens.shape[2] == max(lengths) + 1


@torch.inference_mode()
def test_the_same_seed_draws_the_same(small, sources):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 5)  # the global generator takes no part
        return sample(
            small,
            small.encoder(sources),
            samples=8,
            max_length=6,
            min_length=6,
            generator=seeded(seed),
        ).tokens

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@torch.inference_mode()
def test_top_one_is_the_likeliest_token(small, sources, exact):
    found = sample(small, small.encoder(sources), samples=3, max_length=4, top_k=1)
    for sentence in range(2):
        tokens: list[int] = []
        while 2 not in tokens:
            logits = exact(sentence, [0, *tokens])[-1]
            logits[[1, 2] if not tokens else [1]] = -torch.inf
            tokens.append(2 if len(tokens) == 4 else int(logits.argmax()))
        for row in found.tokens[sentence].tolist():
            assert row[: len(tokens)] == tokens


@torch.inference_mode()
def test_image_codes(small, sources, exact):
    """Exactly `max_length` codes; the softmax that scores them knows the specials, too."""
    found = sample(
        small,
        small.encoder(sources),
        samples=6,
        max_length=16,
        min_length=16,
        top_k=256,  # more than there are symbols
        constraints=[RangeConstraint(8, 11)],
        code_mask=torch.tensor([True, True]),
        generator=seeded(),
    )
    assert found.tokens.shape == (2, 6, 17)
    assert set(found.tokens[..., :16].unique().tolist()) == {8, 9, 10}
    assert (found.tokens[..., 16] == 2).all()
    for sentence, n in itertools.product(range(2), range(6)):
        tokens = found.tokens[sentence, n].tolist()
        kept = [0, 1, 2, 3, 8, 9, 10]
        log_probs = exact(sentence, [0, *tokens[:-1]], codes=True)[:, kept].log_softmax(-1)
        expected = [float(log_probs[t, kept.index(token)]) for t, token in enumerate(tokens)]
        assert found.log_probs[sentence, n].tolist() == pytest.approx(expected, abs=1e-4)


@torch.inference_mode()
def test_prompts_of_different_lengths_come_first_and_count_nothing(small, sources):
    prefix = torch.tensor([[10, 11, 10], [11, 1, 1]])
    for constraints in ([], [TrieConstraint(Trie([[0, 4, 5, 2], [0, 6, 2]]), [3, 1], 50)]):
        found = sample(
            small,
            small.encoder(sources),
            samples=50,
            max_length=5,
            constraints=constraints,
            prefix=prefix,
            generator=seeded(),
        )
        assert (found.tokens[0, :, :3] == prefix[0]).all()
        assert (found.tokens[1, :, 0] == 11).all()
        assert (found.log_probs[0, :, :3] == 0).all() and (found.log_probs[1, :, 0] == 0).all()
        assert (found.log_probs[0, :, 3] < 0).all()
        if constraints:
            for sentence, length in enumerate((3, 1)):
                rows = found.tokens[sentence, :, length : length + 3].tolist()
                assert {tuple(t for t in row if t != 1) for row in rows} == {(4, 5, 2), (6, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is at least 1, got 0"),
        ({"min_length": 0}, "1 <= min <= max, got 0 and 3"),
        ({"min_length": 4}, "1 <= min <= max, got 4 and 3"),
        ({"top_k": 0}, "top_k is at least 1, got 0"),
        ({"temperature": 0.0}, "temperature is a finite number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature is a finite number above 0, got nan"),
        (
            {"constraints": [TrieConstraint(Trie([[0, 4, 5, 6, 7, 2]]), [0, 0], 2)]},
            "sentence 0: no token may come next",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(small, sources, options, message):
    with pytest.raises(ValueError, match=message):
        sample(small, small.encoder(sources), **{"samples": 2, "max_length": 3} | options)
