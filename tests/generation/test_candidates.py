"""Scores of all candidates against whole passes in float64, one sentence and answer at a time."""

from __future__ import annotations

import pytest
import torch

from unival.generation.candidates import AnswerList, CandidateScores, score_candidates
from unival.generation.constraints import Trie, TrieConstraint
from unival.generation.search import SearchOptions, beam_search

ANSWERS = [[4], [8, 4, 4, 9], [4, 5], [6, 7], [9], [4, 5, 6]]
PROMPTS = {
    "from <s>": [[0], [0]],
    "same length": [[0, 10, 11], [0, 11, 11]],
    "shorter first": [[0, 10], [0, 11, 10, 5]],
    "shorter last": [[0, 10, 4, 4, 4], [0]],
}


def choices(answers: list[list[int]]) -> AnswerList:
    names = tuple(" ".join(map(str, ids)) for ids in answers)
    return AnswerList(names, tuple(answers), Trie([[0, *ids, 2] for ids in answers]))


def padded(prompts: list[list[int]]) -> torch.Tensor:
    width = max(map(len, prompts))
    return torch.tensor([ids + [1] * (width - len(ids)) for ids in prompts])


def direct(exact, sentence, prompt, answers, ids, temperature):
    """Log-probabilities of an answer and </s>, each among what some answer continues with."""
    logits = exact(sentence, [*prompt, *ids])[len(prompt) - 1 :] / temperature
    found = []
    for n, token in enumerate([*ids, 2]):
        follow = sorted({s[n] for s in ([*a, 2] for a in answers) if s[:n] == ids[:n]})
        found.append(float(logits[n][follow].log_softmax(0)[follow.index(token)]))
    return found


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("rows", [1, 4, 5, 64])  # 1, 2, 2 and all 6 candidates at once
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@torch.inference_mode()
def test_scores_are_those_of_whole_passes(small, sources, exact, prompts, rows, temperature):
    found = score_candidates(
        small, small.encoder(sources), choices(ANSWERS), padded(prompts), temperature, rows
    )
    assert found.token_log_probs.shape == (2, 6, 5)
    for sentence, prompt in enumerate(prompts):
        totals = []
        for candidate, ids in enumerate(ANSWERS):
            expected = direct(exact, sentence, prompt, ANSWERS, ids, temperature)
            each = found.token_log_probs[sentence, candidate].tolist()
            assert each == pytest.approx(expected + [0.0] * (5 - len(expected)), abs=2e-5)
            totals.append(sum(expected))
        assert found.totals[sentence].tolist() == pytest.approx(totals, abs=5e-5)
        assert found.ranking[sentence].tolist() == sorted(range(6), key=lambda n: -totals[n])


@torch.inference_mode()
def test_probabilities_of_a_complete_list_add_up_to_one(small, sources):
    scores = score_candidates(
        small, small.encoder(sources), choices(ANSWERS), padded([[0, 10], [0]])
    )
    assert scores.totals.exp().sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@torch.inference_mode()
def test_the_best_is_that_of_a_search_with_a_beam_for_every_candidate(small, sources):
    encoder, answers = small.encoder(sources), choices(ANSWERS)
    best = score_candidates(small, encoder, answers, padded([[0], [0]])).best(answers)
    options = SearchOptions(beam_size=6, max_length=4, normalize_scores=False)
    found = beam_search(small, encoder, options, [TrieConstraint(answers.trie, [0, 0], 6)])
    for ours, theirs in zip(best, found, strict=True):
        assert ours.tokens == theirs[0].tokens
        assert ours.score == pytest.approx(theirs[0].score, abs=2e-5)
        assert ours.positional_scores == pytest.approx(theirs[0].positional_scores, abs=2e-5)


@torch.inference_mode()
def test_the_encoder_is_projected_once_a_sentence(small, sources, monkeypatch):
    rows = []
    for layer in small.decoder.layers:
        project = layer.cross_attn.project_keys

        def count(x, project=project):
            rows.append(x.shape[0])
            return project(x)

        monkeypatch.setattr(layer.cross_attn, "project_keys", count)
    score_candidates(small, small.encoder(sources), choices(ANSWERS), padded([[0], [0]]), rows=2)
    assert rows == [2, 2]  # two layers, two sentences; not one row a candidate


def test_equal_candidates_keep_their_order():
    scores = CandidateScores(torch.tensor([[[-3.0], [-1.0], [-1.0], [-2.0]]]))
    assert scores.ranking.tolist() == [[1, 2, 3, 0]]


def test_answers_are_encoded_with_a_space(vocabulary, pieces):
    found = AnswerList.of(["yes", "ball of yarn"], vocabulary)
    assert list(found.tokens) == [pieces(" yes"), pieces(" ball of yarn")]
    assert found.longest == 3
    assert found.trie.next([0]) == sorted([pieces(" yes")[0], pieces(" ball")[0]])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "list of answers to choose from is empty"),
        (["yes", "  "], "answer 2 is empty"),
        (["a cat", "dog", "a cat"], "answer 3, 'a cat', is listed twice"),
    ],
)
def test_bad_lists_are_refused(vocabulary, answers, message):
    with pytest.raises(ValueError, match=message):
        AnswerList.of(answers, vocabulary)


def test_an_answer_that_is_too_long_is_named(vocabulary):
    found = AnswerList.of(["yes", "ball of yarn"], vocabulary)
    found.check(3)
    with pytest.raises(ValueError, match="answer 'ball of yarn' has 3 tokens; max_length is 2"):
        found.check(2)
