"""Long commands: order, bounded work, processes that end, files that are whole or absent."""

import json
import multiprocessing
import os
import time
from concurrent.futures import Future

import pytest

from unival.data.tools import running
from unival.data.tools.running import Processes, Results, claim, in_order, progress
from unival.files import finished_file


def test_results_come_in_order_with_a_bounded_number_begun():
    futures = {}

    def started():
        for number in range(10):
            futures[number] = Future()
            if number == 3:  # the fourth is waited for last, however late it is
                for early in (2, 1, 3, 0):
                    futures[early].set_result(10 * early)
            elif number > 3:
                futures[number].set_result(10 * number)
            yield number, futures[number]

    results = in_order(started(), 4)
    assert next(results)[0] == 0
    assert len(futures) == 4
    assert next(results)[1].result() == 10
    assert len(futures) == 5
    assert [number for number, _ in results] == list(range(2, 10))


def test_progress_says_how_long_it_will_take_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 12.0, 13.0, 40.0])
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    assert list(progress("abcd", 8, "check")) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "check: 2 of 8, about 36 s left",  # 6 s each
        "check: 4 of 8, about 40 s left",
    ]


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with pytest.raises(KeyboardInterrupt), finished_file(path) as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with finished_file(path) as part:
        part.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_process_that_dies_hangs_or_eats_memory_costs_one_call():
    with Processes(1, seconds=2.0, memory=1 << 28) as processes:
        calls = [
            processes.submit(os.getpid),
            processes.submit(os._exit, 3),
            processes.submit(time.sleep, 60),
            processes.submit(bytearray, 1 << 30),
            processes.submit(divmod, 7, 2),
        ]
        with pytest.raises(ValueError, match="its process ended"):
            calls[1].result()
        with pytest.raises(ValueError, match="not finished within 2 seconds"):
            calls[2].result()
        with pytest.raises(MemoryError):
            calls[3].result()
        assert calls[4].result() == (3, 1)


def test_an_interruption_ends_the_processes_at_once():
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Processes(1, 60.0, 1 << 28) as processes:
        ready = processes.submit(os.getpid)
        pid = ready.result()
        processes.submit(time.sleep, 60)
        while not processes._running:
            time.sleep(0.01)
        raise KeyboardInterrupt
    while any(child.pid == pid for child in multiprocessing.active_children()):
        assert time.monotonic() - begin < 30
        time.sleep(0.01)  # it is killed and not yet waited for


def test_results_of_changed_files_and_half_lines_are_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    names = ["same", "changed", "gone", "media", "table"]
    paths = {name: tmp_path / name for name in names}
    for path in paths.values():
        path.write_text("x")
    with Results(log) as results:
        results.add(paths["same"], None, "image", None)
        results.add(paths["changed"], None, "image", "bad")
        results.add(paths["gone"], None, "image", None)
        results.add(paths["table"], 1, "video", None, paths["same"])
        results.add(paths["table"], 2, "video", None, paths["media"])
        results.add(paths["table"], 3, "image", "no picture")
    with open(log, "ab") as file:
        file.write(b'{"path": "cut o')
    paths["changed"].write_text("xy")
    paths["media"].write_text("xy")
    paths["gone"].unlink()
    table = str(paths["table"])
    with Results(log) as results:
        assert results.known == {
            (str(paths["same"]), None): None,
            (table, 1): None,
            (table, 3): "no picture",
        }
    assert [json.loads(line)["row"] for line in log.read_text().splitlines()] == [None, 1, 3]


@pytest.mark.parametrize(
    "text", ["a caption\n", "no newline", '{"caption": "of the user"}\n', "[1]\n"]
)
def test_a_file_of_something_else_is_not_taken_for_results(tmp_path, text):
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.jsonl: not a file of results"):
        Results(tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == text


def test_other_options_are_refused(tmp_path):
    claim(tmp_path / "o.json", {"size": 8, "pair": (1, 2)})
    claim(tmp_path / "o.json", {"size": 8, "pair": (1, 2)})
    with pytest.raises(ValueError, match=r"other inputs or options .*o\.json"):
        claim(tmp_path / "o.json", {"size": 9, "pair": (1, 2)})
