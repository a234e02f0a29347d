"""The order of records: complete, repeatable, the same for every number of ranks."""

import numpy as np
import pytest

from unival.data.sampler import LoaderState, RecordStream


def test_every_epoch_visits_every_record_once_in_another_order():
    stream = RecordStream(101, seed=7, name="captions")
    epochs = [[stream.index(e * 101 + i) for i in range(101)] for e in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_position_seed_and_name_only():
    stream = RecordStream(50, 7, "a")
    forward = [stream.index(p) for p in range(120)]
    again = RecordStream(50, 7, "a")
    assert [again.index(p) for p in reversed(range(120))] == forward[::-1]
    assert [RecordStream(50, 8, "a").index(p) for p in range(50)] != forward[:50]
    assert [RecordStream(50, 7, "b").index(p) for p in range(50)] != forward[:50]


def test_the_order_is_pinned():
    """A run that resumes after an upgrade must go on in the same order."""
    stream = RecordStream(8, seed=1, name="x")
    words = np.random.Philox(key=stream._number("epoch", 0)).random_raw(8)
    assert [stream.index(p) for p in range(8)] == sorted(range(8), key=lambda i: words[i])
    assert [stream.index(p) for p in range(8)] == [4, 7, 6, 3, 5, 2, 1, 0]


def test_sources_are_counted_apart_and_a_source_used_twice_gives_other_samples():
    state = LoaderState(1)
    assert state.take("a", 2) == range(0, 2)
    assert state.take("b", 3) == range(0, 3)
    assert state.take("a", 2) == range(2, 4)
    assert state.samples == {"a": 4, "b": 3}
    assert RecordStream(23, 3, "a").epoch(46) == 2.0


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 2.0, 1.0), (1.0, 1e-3, 0.5)])
def test_shared_rows_are_never_more_than_one_away_from_their_share(weights):
    state, shares, given = LoaderState(1), dict(zip("abc", weights, strict=True)), []
    for step in range(40):
        given += state.share(7, shares)
        for name, weight in shares.items():
            due = 7 * (step + 1) * weight / sum(weights)
            assert abs(state.samples.get(name, 0) - due) <= 1 + 1e-9
    # A step of 7 rows forty times is one step of 280, and a copy goes on like the original.
    assert given == LoaderState(1).share(280, shares)
    assert state.copy().share(9, shares) == state.share(9, shares)
    for name in "abc":
        positions = [position for source, position in given if source == name]
        assert positions == list(range(len(positions)))


def test_substitutes_are_all_the_other_records_once():
    stream = RecordStream(10, 3, "a")
    for position in (0, 9, 10, 25):
        found = [stream.substitute(position, attempt) for attempt in range(9)]
        assert sorted([*found, stream.index(position)]) == list(range(10))
        assert found == [RecordStream(10, 3, "a").substitute(position, a) for a in range(9)]
    with pytest.raises(ValueError, match="no substitute"):
        stream.substitute(0, 9)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="no records"):
        RecordStream(0, 1, "a")
    with pytest.raises(ValueError, match="negative"):
        RecordStream(3, 1, "a").index(-1)
    with pytest.raises(ValueError, match="-1 rows of 'a'"):
        LoaderState(0).take("a", -1)
