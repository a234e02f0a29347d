"""Runs in one picture: what is read from their logs, what is drawn, and the numbers beside it."""

import json
import math
import struct
import sys
from xml.etree import ElementTree

import pytest

from unival.training.compare import choose, compare, figure, names, read_run, summarize, table
from unival.training.logs import RunLog


def entry(step, **fields):
    return {
        "stage": "images",
        "step": step,
        "global_step": step,
        "lr": 1e-4,
        "loss": 8.0 / step,
        "grad_norm": 1.0,
        "samples_per_second": 10.0 * step,
        "tasks": {"vqa": 4.0 / step},
        "mfu": None,
        "bad_samples": {"web": 0},
    } | fields


@pytest.fixture
def run(tmp_path):
    def make(name, *entries, tail=""):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
        return folder

    return make


def curves(*folders):
    return {name: read_run(folder) for name, folder in zip(names(folders), folders, strict=True)}


def lines(axes):
    """{run: (steps, values)}, gaps as None."""
    return {
        line.get_label(): (
            [int(x) for x in line.get_xdata()],
            [None if math.isnan(y) else y for y in line.get_ydata()],
        )
        for line in axes.get_lines()
    }


def panels(drawn):
    return {axes.get_title(): axes for axes in drawn.axes}


def test_every_panel_has_a_line_for_every_run_with_its_values(run):
    a = run("a", entry(1), entry(2), entry(4))
    b = run("b", entry(2, loss=3.0, grad_norm=0.5), entry(8, lr=2e-4))
    found = curves(a, b)
    drawn = panels(figure(found, choose(found, None)))
    assert list(drawn) == ["loss", "tasks/vqa", "lr", "grad_norm", "samples_per_second"]
    assert lines(drawn["loss"]) == {"a": ([1, 2, 4], [8.0, 4.0, 2.0]), "b": ([2, 8], [3.0, 1.0])}
    assert lines(drawn["tasks/vqa"])["a"] == ([1, 2, 4], [4.0, 2.0, 1.0])
    assert lines(drawn["lr"])["b"] == ([2, 8], [1e-4, 2e-4])
    assert lines(drawn["grad_norm"])["b"] == ([2, 8], [0.5, 1.0])
    assert lines(drawn["samples_per_second"])["b"] == ([2, 8], [20.0, 80.0])


def test_a_run_has_one_colour_in_all_panels_and_runs_differ(run):
    found = curves(*(run(f"r{number}", entry(1), entry(2)) for number in range(12)))
    drawn = figure(found, ["loss", "lr"])
    looks = [[(n.get_color(), n.get_linestyle()) for n in axes.get_lines()] for axes in drawn.axes]
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == 12


def test_the_legend_names_every_run_whatever_characters_it_has(run):
    found = curves(run("_hidden", entry(1)), run("cost $x^2$", entry(1)), run("plain", entry(1)))
    drawn = figure(found, ["loss"])
    texts = drawn.legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["_hidden", "cost $x^2$", "plain"]
    assert not any(text.get_parse_math() for text in texts)


def test_losses_of_tasks_are_drawn_where_two_runs_share_them(run):
    a = run("a", entry(1, tasks={"vqa": 1.0, "grounding": 2.0}))
    b = run("b", entry(1, tasks={"vqa": 1.0, "caption": 2.0}))
    c = run("c", entry(1, tasks={"caption": 3.0}))

    def tasks(*folders):
        return [n for n in choose(curves(*folders), None) if n.startswith("tasks/")]

    assert tasks(a, b) == ["tasks/vqa"]
    assert tasks(a, b, c) == ["tasks/caption", "tasks/vqa"]
    assert tasks(a) == ["tasks/grounding", "tasks/vqa"]
    drawn = figure(curves(a, b, c), ["tasks/vqa"])
    assert lines(drawn.axes[0]) == {"a": ([1], [1.0]), "b": ([1], [1.0]), "c": ([], [])}


def test_only_the_named_metric_is_drawn(run, tmp_path):
    a, b = run("a", entry(1), entry(2)), run("b", entry(3))
    out = compare([a, b], tmp_path / "one.svg", metric="bad_samples/web")
    numbers = json.loads((tmp_path / "one.json").read_text())
    assert out == tmp_path / "one.svg"
    assert [list(r["metrics"]) for r in numbers["runs"].values()] == [["bad_samples/web"]] * 2
    found = curves(a, b)
    assert list(panels(figure(found, choose(found, "grad_norm")))) == ["grad_norm"]


@pytest.mark.parametrize("metric", ["los", "mfu", "global_step", "stage"])
def test_a_metric_without_values_is_an_error_that_names_those_there_are(run, tmp_path, metric):
    folders = [run("a", entry(1)), run("b", entry(1))]
    with pytest.raises(ValueError, match=f"no run has a value of '{metric}'") as caught:
        compare(folders, tmp_path / "out.png", metric=metric)
    listed = str(caught.value).split("are ", 1)[1].split(", ")
    known = ["bad_samples/web", "grad_norm", "loss", "lr", "samples_per_second", "tasks/vqa"]
    assert listed == known
    assert not (tmp_path / "out.png").exists()


def test_of_a_step_logged_twice_the_last_line_counts(run):
    first = [entry(1), entry(2, loss=9.0), entry(3, loss=9.0)]
    again = [entry(2, loss=5.0), entry(3, loss=4.0), entry(4, loss=3.0)]
    points = read_run(run("a", *first, *again)).curves["loss"]
    assert points == [(1, 8.0), (2, 5.0), (3, 4.0), (4, 3.0)]


def test_a_half_written_last_line_is_left_out(run):
    folder = run("a", entry(1), entry(2), tail='{"stage": "images", "step": 3, "lo')
    assert read_run(folder).curves["loss"] == [(1, 8.0), (2, 4.0)]


def test_a_damaged_line_in_the_middle_is_named_by_file_and_line(run, tmp_path):
    folder = run("a", entry(1), tail='{"stage": "im\n' + json.dumps(entry(3)) + "\n")
    with pytest.raises(ValueError, match=r"a/metrics\.jsonl, line 2: not JSON"):
        compare([run("b", entry(1)), folder], tmp_path / "out.png")


def test_a_line_without_the_step_is_named_by_file_and_line(run):
    folder = run("a", entry(1), {"note": "x"}, entry(3))
    with pytest.raises(ValueError, match=r"a/metrics\.jsonl, line 2: lacks stage, step"):
        read_run(folder)


def test_a_log_that_is_none_is_an_error_that_names_it(run):
    text = run("text", entry(1, global_step="one"))
    with pytest.raises(ValueError, match=r"text/metrics\.jsonl: global_step 'one' is not"):
        read_run(text)
    mixed = run("mixed", entry(1), entry(2, global_step="x"))
    with pytest.raises(ValueError, match=r"mixed/metrics\.jsonl is not the log of a run"):
        read_run(mixed)
    (text / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n\xff")
    with pytest.raises(ValueError, match=r"text/metrics\.jsonl is not the log of a run"):
        read_run(text)


def test_values_that_are_not_finite_are_gaps(run):
    logged = [entry(1, loss=3.0), entry(2, loss=None), entry(3, loss=2.0), entry(4, loss=None)]
    found = curves(run("a", *logged))
    (line,) = figure(found, ["loss"]).axes[0].get_lines()
    x, y = line.get_xdata(), line.get_ydata()
    assert list(x) == [1, 2, 3, 4]
    assert [y[0], y[2]] == [3.0, 2.0] and math.isnan(y[1]) and math.isnan(y[3])
    # Both values stand alone: no segment shows them, so they have a mark.
    assert line.get_marker() == "o" and list(line.get_markevery()) == [0, 2]
    numbers = summarize(found, ["loss"])["runs"]["a"]["metrics"]["loss"]
    assert numbers == {"last": None, "best": 2.0, "best_step": 3, "mean_last_tenth": None}


def test_a_run_whose_loss_was_never_finite_keeps_its_place(run, tmp_path):
    folders = [run("good", entry(1)), run("bad", entry(1, loss=None), entry(2, loss=None))]
    compare(folders, tmp_path / "out.png")
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    nothing = {"last": None, "best": None, "best_step": None, "mean_last_tenth": None}
    assert runs["bad"]["metrics"]["loss"] == nothing
    assert runs["good"]["metrics"]["loss"]["best"] == 8.0


def test_what_a_run_log_writes_is_read_back(tmp_path, capsys):
    rates = {"samples_per_second": 3.0, "tokens_per_second": 9.0, "tflops": 0.5, "data_wait": 0.1}
    rest = {"loss_scale": 1, "refused": 0, "memory_gib": 1.0, "parts": {"forward": 0.5}}
    log = RunLog(tmp_path, 20, tensorboard=False)
    log.write(entry(10, loss=2.5) | rates | rest)
    log.write(entry(20, loss=float("inf"), tasks={"vqa": float("nan")}) | rates | rest)
    log.close()
    found = read_run(tmp_path)
    assert found.last_step == 20
    assert found.curves["parts/forward"] == [(10, 0.5), (20, 0.5)]
    assert found.curves["loss"][0] == (10, 2.5) and math.isnan(found.curves["loss"][1][1])
    assert math.isnan(found.curves["tasks/vqa"][1][1])


def test_the_numbers_are_last_best_and_the_mean_of_the_last_tenth(run, tmp_path):
    # 25 entries: the last tenth is 3 of them (2.5 rounded up), 23 to 25.
    losses = [10.0] * 25
    losses[6], losses[15] = 1.0, 1.0  # the lowest, at steps 7 and 16: the first counts
    losses[22:] = [4.0, 6.0, 2.0]
    rates = [5.0] * 25
    rates[11] = 50.0
    a = run(
        "a",
        *(
            entry(i, loss=x, samples_per_second=r, lr=i * 1.0, grad_norm=2.0)
            for i, (x, r) in enumerate(zip(losses, rates, strict=True), start=1)
        ),
    )
    b = run("b", entry(10, loss=7.0))
    compare([a, b], tmp_path / "new" / "out.png")
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert found["runs"]["a"]["folder"] == str(a) and found["runs"]["a"]["last_step"] == 25
    numbers = found["runs"]["a"]["metrics"]
    assert numbers["loss"] == {"last": 2.0, "best": 1.0, "best_step": 7, "mean_last_tenth": 4.0}
    assert numbers["samples_per_second"] == {
        "last": 5.0,
        "best": 50.0,
        "best_step": 12,
        "mean_last_tenth": 5.0,
    }
    # No learning rate is better than another.
    rate = {"last": 25.0, "best": None, "best_step": None, "mean_last_tenth": 24.0}
    assert numbers["lr"] == rate
    assert found["runs"]["b"]["metrics"]["loss"] == {
        "last": 7.0,
        "best": 7.0,
        "best_step": 10,
        "mean_last_tenth": 7.0,
    }


def test_a_tenth_is_of_the_entries_that_have_the_metric(run):
    # vqa is trained in steps 1 to 10 only: its last tenth is step 10, not one of 11 to 20.
    early = [entry(i, tasks={"vqa": float(i)}) for i in range(1, 11)]
    late = [entry(i, tasks={"caption": 1.0}) for i in range(11, 21)]
    found = summarize(curves(run("a", *early, *late)), ["tasks/vqa"])
    numbers = found["runs"]["a"]["metrics"]["tasks/vqa"]
    assert numbers == {"last": 10.0, "best": 1.0, "best_step": 1, "mean_last_tenth": 10.0}


def test_the_pictures_are_what_their_names_say(run, tmp_path):
    folders = [run("a", entry(1), entry(2)), run("cost $x", entry(3))]
    png = compare(folders, tmp_path / "out.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 800 and height >= 600
    svg = compare(folders, str(tmp_path / "out.svg"))
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert left == ["out.json", "out.png", "out.svg"]


def test_folders_of_one_name_are_told_apart_by_their_parents(tmp_path, monkeypatch):
    assert names(["/x/a", "/x/b"]) == ["a", "b"]
    assert names(["/x/one/run", "/x/two/run", "/x/other"]) == ["one/run", "two/run", "other"]
    assert names(["/x/p/q/run", "/y/p/q/run"]) == ["x/p/q/run", "y/p/q/run"]
    assert names(["/run", "/x/run"]) == ["/run", "x/run"]
    monkeypatch.chdir(tmp_path)
    assert names([".", "../other"]) == [tmp_path.name, "other"]


@pytest.mark.parametrize("again", ["a", "./a", "b/../a", "a/"])
def test_a_folder_named_twice_is_an_error(run, tmp_path, monkeypatch, again):
    run("a", entry(1))
    run("b", entry(1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a is named twice"):
        compare(["a", again], "out.png")


def test_what_is_not_a_run_is_an_error(run, tmp_path):
    good, out = run("good", entry(1)), tmp_path / "out.png"
    (tmp_path / "bare").mkdir()
    for folder, words in [
        (tmp_path / "none", "none is not a folder"),
        (good / "metrics.jsonl", "metrics.jsonl is not a folder"),
        (tmp_path / "bare", "bare holds no metrics.jsonl: it is not the folder of a run"),
        (run("empty"), "empty/metrics.jsonl: the run has logged nothing yet"),
        (run("begun", tail='{"stage'), "begun/metrics.jsonl: the run has logged nothing yet"),
    ]:
        with pytest.raises(ValueError, match=words):
            compare([good, folder], out)
    with pytest.raises(ValueError, match="no run to compare"):
        compare([], out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["out", "out.pdf", "out.json"])
def test_other_kinds_of_files_are_refused(run, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: a picture is written as .png or .svg"):
        compare([run("a", entry(1))], tmp_path / name)


def test_without_matplotlib_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'unival\[demo\]'"):
        compare([run("a", entry(1))], tmp_path / "out.png")


def test_the_table_has_a_line_for_each_run_under_each_metric(run):
    a = run("a", entry(1, loss=2.0), entry(1234567, loss=0.5))
    b = run("longer name", entry(3, loss=None))
    found = table(json.loads(json.dumps(summarize(curves(a, b), ["loss", "lr"]))))
    rows = found.splitlines()
    assert [row.rsplit(maxsplit=4) for row in (rows[1], rows[2], rows[5], rows[6])] == [
        ["a", "0.5", "0.5", "1234567", "0.5"],
        ["longer name", "-", "-", "-", "-"],
        ["a", "0.0001", "-", "-", "0.0001"],
        ["longer name", "0.0001", "-", "-", "0.0001"],
    ]
    assert rows[0].split() == ["loss", "last", "best", "at", "step", "last", "10", "%"]
    assert rows[3] == "" and rows[4].startswith("lr ")
    assert len({len(row) for row in rows if row}) == 1  # columns are aligned
