"""The order of records: complete, repeatable, the same for every number of ranks."""

import numpy as np
import pytest

from unival.data.sampler import RecordStream, positions


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
    stream = RecordStream(17, 3, "a")
    for step in range(6):  # 72 records: over four epochs
        whole = [stream.index(p) for p in positions(step, 12, 0, 1)]
        parts = [
            stream.index(p) for rank in range(world) for p in positions(step, rows, rank, world)
        ]
        assert parts == whole


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
    for step, rows, rank, world in ((-1, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2, 2)):
        with pytest.raises(ValueError, match="rank"):
            positions(step, rows, rank, world)
