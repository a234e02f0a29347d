"""What each constraint allows, on small cases listed by hand."""

from __future__ import annotations

import pytest
import torch

from unival.generation.constraints import BinConstraint, RangeConstraint, Trie, TrieConstraint

# <s> 10 11 </s>, <s> 10 12 </s>, <s> 13 </s>, <s> 10 </s>
SEQUENCES = ([0, 10, 11, 2], [0, 10, 12, 2], [0, 13, 2], [0, 10, 2])


def allowed(scores: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row > float("-inf")).flatten().tolist() for row in scores]


def test_trie_lists_what_may_follow():
    trie = Trie(SEQUENCES)
    assert trie.next([]) == [0]
    assert trie.next([0]) == [10, 13]
    assert trie.next([0, 10]) == [11, 12, 2]
    assert trie.next([0, 13]) == [2]


def test_leaving_the_trie_or_reaching_its_end_allows_eos_only():
    trie = Trie(SEQUENCES)
    assert trie.next([0, 99]) == [2]
    assert trie.next([0, 13, 2]) == [2]
    assert trie.next([0, 13, 2, 1, 1]) == [2]
    assert Trie().next([0]) == [2]


def test_trie_of_answers_has_leading_spaces(vocabulary, pieces):
    trie = Trie.of_answers(["yes", "no way"], vocabulary)
    no, way = pieces(" no way")
    assert trie.next([0]) == [*pieces(" yes"), no]
    assert trie.next([0, no]) == [way]
    assert trie.next([0, no, way]) == [2]
    with pytest.raises(ValueError, match="list of answers"):
        Trie.of_answers([], vocabulary)


def test_prompts_of_different_lengths_are_passed_over_row_by_row():
    constraint = TrieConstraint(Trie(SEQUENCES), prompt_lengths=[0, 1, 3], num_beams=2)
    ids = torch.tensor([[0, 10], [0, 13], [0, 40], [0, 10], [0, 50], [0, 51]])
    scores = torch.arange(6 * 20.0).reshape(6, 20)
    constrained = constraint(ids, scores)
    assert allowed(constrained) == [
        [2, 11, 12],  # no prompt: after 10
        [2],  # after 13
        [10, 13],  # the prompt has just ended: an answer starts, whatever the prompt was
        [10, 13],
        list(range(20)),  # still inside the prompt
        list(range(20)),
    ]
    kept = constrained > float("-inf")
    assert torch.equal(constrained[kept], scores[kept])
    assert scores.min() == 0  # the input is left as it was


def test_the_last_prompt_token_is_still_free_and_the_next_one_is_not():
    constraint = TrieConstraint(Trie(SEQUENCES), prompt_lengths=[2], num_beams=1)
    scores = torch.zeros(1, 20)
    assert allowed(constraint(torch.tensor([[0, 5]]), scores)) == [list(range(20))]
    assert allowed(constraint(torch.tensor([[0, 5, 6]]), scores)) == [[10, 13]]
    assert allowed(constraint(torch.tensor([[0, 5, 6, 10]]), scores)) == [[2, 11, 12]]


def test_no_finished_row_is_left_without_a_token():
    constraint = TrieConstraint(Trie(SEQUENCES), prompt_lengths=[0], num_beams=1)
    constrained = constraint(torch.tensor([[0, 13, 2, 1]]), torch.zeros(1, 20))
    assert torch.isfinite(torch.log_softmax(constrained, -1)).any()


def test_probabilities_are_shared_among_the_allowed_tokens():
    constraint = TrieConstraint(Trie(SEQUENCES), prompt_lengths=[0], num_beams=1)
    logits = torch.zeros(1, 20)
    logits[0, 5] = 50.0  # a forbidden favourite must not take any mass
    probabilities = constraint(torch.tensor([[0]]), logits).softmax(-1)
    assert probabilities[0, 10] == probabilities[0, 13] == 0.5


def test_rows_that_do_not_match_the_prompts_are_refused():
    constraint = TrieConstraint(Trie(SEQUENCES), prompt_lengths=[0, 0], num_beams=2)
    with pytest.raises(ValueError, match="3 rows do not match 2 prompts of 2 beams"):
        constraint(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 20))


def test_range_keeps_specials_and_the_range():
    constrained = RangeConstraint(8, 11)(torch.tensor([[0]]), torch.zeros(1, 20))
    assert allowed(constrained) == [[0, 1, 2, 3, 8, 9, 10]]
    for first, last in ((3, 8), (9, 9), (9, 5)):
        with pytest.raises(ValueError, match="first < last"):
            RangeConstraint(first, last)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_four_bins_come_first(length):
    scores = torch.zeros(1, 59457)
    constrained = BinConstraint()(torch.zeros(1, length, dtype=torch.long), scores)
    assert allowed(constrained) == [list(range(58457, 59457))]


@pytest.mark.parametrize("length", [5, 6])
def test_after_four_bins_only_eos_is_left(length):
    scores = torch.zeros(2, 59457)
    constrained = BinConstraint()(torch.zeros(2, length, dtype=torch.long), scores)
    assert allowed(constrained) == [[2], [2]]
