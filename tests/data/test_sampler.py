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


@pytest.mark.parametrize(("world", "rows"), [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)])
def test_a_step_consumes_the_same_records_for_every_world_size(world, rows):
    states = [LoaderState(3) for _ in range(world)]
    for step in range(6):
        taken = [p for rank in range(world) for p in states[rank].take("a", rows, rank, world)]
        assert taken == list(range(12 * step, 12 * step + 12))
    assert all(state.samples == {"a": 72} for state in states)


def test_the_order_goes_on_where_the_number_of_ranks_changes_in_the_middle_of_an_epoch():
    stream, state, seen = RecordStream(23, 3, "a"), LoaderState(3), []
    for world, steps in ((1, 3), (2, 2), (4, 3), (1, 5)):
        for _ in range(steps):
            ranks = [state.copy() for _ in range(world)]  # each resumes from what was saved
            seen += [p for rank in range(world) for p in ranks[rank].take("a", 3, rank, world)]
            assert all(rank == ranks[0] for rank in ranks)
            state = ranks[0]
    assert seen == list(range(3 * (3 + 4 + 12 + 5)))
    assert sorted(stream.index(p) for p in seen[:23]) == list(range(23))
    assert stream.epoch(46) == 2.0


def test_sources_are_counted_apart_and_a_source_used_twice_gives_other_samples():
    state = LoaderState(1)
    assert state.take("a", 2, 0, 1) == range(0, 2)
    assert state.take("b", 3, 0, 1) == range(0, 3)
    assert state.take("a", 2, 0, 1) == range(2, 4)
    assert state.samples == {"a": 4, "b": 3}


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
    for rows, rank, world in ((0, 0, 1), (1, 2, 2), (1, -1, 2)):
        with pytest.raises(ValueError, match="rank"):
            LoaderState(0).take("a", rows, rank, world)
