"""What each constraint allows: small cases listed by hand, and random sets searched one by one."""

from __future__ import annotations

import random

import pytest
import torch

from unival.generation.constraints import BinConstraint, RangeConstraint, Trie, TrieConstraint

# <s> 10 11 </s>, <s> 10 12 </s>, <s> 13 </s>, <s> 10 </s>
SEQUENCES = ([0, 10, 11, 2], [0, 10, 12, 2], [0, 13, 2], [0, 10, 2])
VOCABULARY = 20


def allowed(scores: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row > float("-inf")).flatten().tolist() for row in scores]


def followers(sequences: list[list[int]], prefix: list[int]) -> list[int]:
    """What may follow a prefix, by looking at every sequence."""
    n = len(prefix)
    found = {s[n] for s in sequences if len(s) > n and s[:n] == prefix}
    return sorted(found) or [2]


def random_sequences(rng: random.Random, count: int, tokens: int, longest: int) -> list[list[int]]:
    return [
        [0, *(rng.randrange(4, 4 + tokens) for _ in range(rng.randint(0, longest))), 2]
        for _ in range(count)
    ]


def test_trie_lists_what_may_follow():
    trie = Trie(SEQUENCES)
    assert trie.next([]) == [0]
    assert trie.next([0]) == [10, 13]
    assert trie.next([0, 10]) == [2, 11, 12]
    assert trie.next([0, 13]) == [2]


def test_leaving_the_trie_or_reaching_its_end_allows_eos_only():
    trie = Trie(SEQUENCES)
    assert trie.next([0, 99]) == [2]
    assert trie.next([0, 13, 2]) == [2]
    assert trie.next([0, 13, 2, 1, 1]) == [2]
    assert Trie().next([0]) == Trie().next([]) == [2]


@pytest.mark.parametrize("seed", range(8))
def test_every_prefix_of_random_sets(seed):
    rng = random.Random(seed)
    tokens = rng.choice([1, 3, 12])  # few tokens: long shared prefixes; many: wide nodes
    sequences = random_sequences(rng, rng.choice([1, 5, 60]), tokens, 5)
    trie = Trie(sequences)
    prefixes = [s[:end] for s in sequences for end in range(len(s) + 1)]
    prefixes += [[*p[:-1], rng.randrange(VOCABULARY)] for p in prefixes if p]  # most have left
    states = torch.tensor([([0, *trie.path(p)])[-1] for p in prefixes])
    mask = trie.allowed(states, VOCABULARY)
    for prefix, row in zip(prefixes, mask, strict=True):
        expected = followers(sequences, prefix)
        assert trie.next(prefix) == expected
        assert row.nonzero().flatten().tolist() == expected


def test_states_of_many_rows_are_those_of_each_alone():
    rng = random.Random(1)
    sequences = random_sequences(rng, 40, 4, 4)
    trie = Trie(sequences)
    tokens = torch.tensor([[0, *(rng.randrange(2, 8) for _ in range(3))] for _ in range(200)])
    states = trie.states(tokens)
    mask = trie.allowed(states, VOCABULARY)
    for row, ids in enumerate(tokens.tolist()):
        assert states[row] == trie.path(ids)[-1]
        assert mask[row].nonzero().flatten().tolist() == followers(sequences, ids)
    known = {tuple(s[:4]) for s in sequences}
    assert [s == Trie.OFF for s in states.tolist()] == [
        tuple(ids) not in known for ids in tokens.tolist()
    ]
    assert trie.states(tokens[:, :0]).tolist() == [Trie.ROOT] * 200


def test_different_prefixes_have_different_states():
    sequences = random_sequences(random.Random(2), 50, 5, 4)
    trie = Trie(sequences)
    prefixes = {tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)}
    states = [trie.path(prefix)[-1] for prefix in prefixes]
    assert len(set(states)) == len(prefixes)
    assert sorted(states) == list(range(1, len(prefixes) + 1))  # the root is 0


def test_path_of_a_decoder_input_masks_its_targets():
    trie = Trie(SEQUENCES)
    mask = trie.allowed(torch.tensor(trie.path([0, 10, 12])), VOCABULARY)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[10, 13], [2, 11, 12], [2]]
    assert trie.path([]) == []
    assert trie.path([0, 99, 10])[1:] == [Trie.OFF, Trie.OFF]


def test_tokens_outside_the_trie_do_not_reach_a_neighbours_children():
    """The keys (1, -1) and (0, WIDTH - 1) are the same number, and so are (0, WIDTH) and (1, 0)."""
    last = Trie.WIDTH - 1
    trie = Trie([[last], [0, 0]])
    assert trie.path([0, -1]) == [1, Trie.OFF]
    assert trie.path([Trie.WIDTH]) == [Trie.OFF]
    assert trie.path([last]) == [2]
    for token in (-1, Trie.WIDTH):
        with pytest.raises(ValueError, match=f"tokens 0 to {last}, not {token}"):
            Trie([[0, token]])


def test_inserting_one_by_one_gives_the_same_trie():
    whole, grown = Trie(SEQUENCES), Trie()
    for sequence in SEQUENCES:
        grown.insert(sequence)
    assert torch.equal(grown.keys, whole.keys)
    assert grown.next([0, 10]) == [2, 11, 12]


def test_a_trie_with_tokens_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="trie holds token 13; the vocabulary has 13 entries"):
        Trie(SEQUENCES).allowed(torch.tensor([0]), 13)


def test_trie_of_answers_has_leading_spaces(vocabulary, pieces):
    trie = Trie.of_answers(["yes", "no way"], vocabulary)
    no, way = pieces(" no way")
    assert trie.next([0]) == sorted([*pieces(" yes"), no])
    assert trie.next([0, no]) == [way]
    assert trie.next([0, no, way]) == [2]


class Mute:
    """A vocabulary that knows no words."""

    def encode_text(self, text: str) -> list[int]:
        return []


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "list of answers to choose from is empty"),
        (["yes", ""], "answer 2 is empty: ''"),
        (["yes", " \t"], "answer 2 is empty: ' "),
        (["yes", "no", "yes"], "answer 3, 'yes', is listed twice"),
    ],
)
def test_bad_answers_are_named(vocabulary, answers, message):
    with pytest.raises(ValueError, match=message):
        Trie.of_answers(answers, vocabulary)


def test_an_answer_that_encodes_to_nothing_is_named():
    with pytest.raises(ValueError, match="answer 1, 'yes', encodes to nothing"):
        Trie.of_answers(["yes"], Mute())


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


@pytest.mark.parametrize("length", range(1, 9))
def test_random_rows_with_random_prompts(length):
    rng = random.Random(length)
    sequences = random_sequences(rng, 30, 4, 4)
    prompts, beams = [0, 5, 2, 2, 1], 3
    constraint = TrieConstraint(Trie(sequences), prompts, beams)
    rows, expected = [], []
    for prompt in [p for p in prompts for _ in range(beams)]:
        answer = rng.choice(sequences)[1 : max(1, length - prompt)]
        ids = [0, *(rng.randrange(4, 8) for _ in range(prompt)), *answer, *[1] * length][:length]
        rows.append(ids)
        inside = length <= prompt
        expected.append(
            list(range(VOCABULARY)) if inside else followers(sequences, [0, *ids[prompt + 1 :]])
        )
    found = constraint(torch.tensor(rows), torch.zeros(len(rows), VOCABULARY))
    assert allowed(found) == expected


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
