"""Bad samples: written once, counted always, refused in numbers."""

import json

import pytest

from unival.data_gpu.quarantine import FLOOR, Quarantine, TooManyBadSamples


def add(quarantine, source="web", row=3):
    quarantine.add(source, id="x7", file="a.tsv", row=row, field="media", reason="truncated")


def test_a_bad_sample_is_a_json_line_with_its_place_and_reason(tmp_path):
    path = tmp_path / "run" / "bad.jsonl"
    quarantine = Quarantine(path, 0.5)
    add(quarantine)
    add(quarantine)  # the next epoch
    add(quarantine, row=4)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "id": "x7",
        "source": "web",
        "file": "a.tsv",
        "row": 3,
        "field": "media",
        "reason": "truncated",
    }
    assert second["row"] == 4
    assert quarantine.bad["web"] == 3


def test_a_share_above_the_cap_stops_with_source_share_and_last_sample():
    quarantine = Quarantine(None, 0.1)
    for _ in range(899):
        quarantine.count("web")
    for row in range(99):
        add(quarantine, row=row)
    quarantine.count("web")
    add(quarantine, row=99)  # 100 of 1000
    with pytest.raises(
        TooManyBadSamples, match=r"'web': 101 of 1001.*max_bad_share=0.1.*a.tsv, row 7.*truncated"
    ):
        add(quarantine, row=7)


def test_sources_have_shares_of_their_own():
    quarantine = Quarantine(None, 0.01)
    for _ in range(10_000):
        quarantine.count("clean")
    add(quarantine, "small")
    add(quarantine, "small")
    with pytest.raises(TooManyBadSamples, match="'small'"):  # 3 of 200 is more than 1 %
        add(quarantine, "small")


def test_a_few_early_bad_samples_are_no_share():
    quarantine = Quarantine(None, 0.05)
    for _ in range(int(0.05 * FLOOR)):
        add(quarantine)
    with pytest.raises(TooManyBadSamples):
        add(quarantine)


def test_no_bad_sample_at_all_can_be_asked_for():
    with pytest.raises(TooManyBadSamples):
        add(Quarantine(None, 0.0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Quarantine(None, 1.5)


def test_a_run_that_goes_on_lists_no_sample_twice_and_mends_a_cut_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    add(Quarantine(path, 1.0), row=1)
    with path.open("a") as lines:
        lines.write('{"id": "x7", "fi')  # killed while it wrote
    resumed = Quarantine(path, 1.0)
    add(resumed, row=1)
    add(resumed, row=2)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [1, 2]
