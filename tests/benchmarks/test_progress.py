"""A long measurement says how far it is."""

import pytest
from scripts import load_script


def test_a_line_tells_parts_and_what_they_would_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_script("progress")
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = module.Progress(4)
    for seconds, name in ((30.0, "one"), (150.0, "two"), (60.0, "three"), (9.0, "four")):
        now[0] += seconds
        progress.line(name)
    told = capsys.readouterr()
    # At 30 s each, three parts; at 90 s each, two; at 80 s each, one.
    assert told.err.splitlines() == [
        "[1 of 4] one; about 1:30 to go",
        "[2 of 4] two; about 3:00 to go",
        "[3 of 4] three; about 1:20 to go",
        "[4 of 4] four; about 0:00 to go",
    ]
    assert told.out == ""
