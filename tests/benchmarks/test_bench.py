"""The report of all benchmarks tells the truth about what ran, what failed and what is noise."""

from __future__ import annotations

import base64
import csv
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from scripts import load_script

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
NAMES = ["eager_unival", "eager_ofa", "hours", "scaling", "kernels", "decoding", "generation"]
NAMES += ["zero"]
MACHINE = {"cpu": "a processor", "cores": 2}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench")


class Cells(HTMLParser):
    """Tables of a page as lists of rows of texts; tags that were opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.text, self.inside = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.inside = True
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside:
            self.tables[-1][-1][-1] += data


def plots(page: str) -> list[bytes]:
    return [base64.b64decode(x) for x in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]


def section(bench: ModuleType, **changed: Any) -> Any:
    told = {"name": "one", "title": "One", "arguments": ["x.py"], "result": Path("x.json")}
    told |= {"reader": lambda path: bench.Found("It shows.", []), "seconds": 10}
    return bench.Section(**(told | changed))


def write(path: Path, told: Any) -> Path:
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


def eager_report(spread: float = 0.02) -> dict[str, Any]:
    rows = [
        {
            "phase": phase, "variant": variant, "p50": p50, "p20": p50, "p80": p50 * (1 + spread),
            "spread": spread, "reliable": spread <= 0.1, "faster": 8.0 / p50,
            "peak_bytes": 2**30, "memory": 1.0,
        }
        for phase in ("pass", "step")
        for variant, p50 in (("eager-fp32", 8.0), ("ours-fp32", 5.0))
    ]  # fmt: skip
    return {"rows": rows, "options": {"config": "unival_base", "batch": 4, "image": 384}}


def hours_report() -> dict[str, Any]:
    def row(task: str, model: str, seconds: float, gpu: float, paper: float | None) -> Any:
        metrics = {
            "step_seconds": {"p50": seconds},
            "samples_per_second": {"p50": 4 / seconds},
            "device_hours": {"p50": 100 * seconds},
            "peak_bytes": {"p50": 2**30},
            "seconds.loss": {"p50": 0.25 * seconds},
            "seconds.loss_backward": {"p50": 0.75 * seconds},
            "seconds.loss_both_ways": {"p50": seconds},
        }
        measured = {"metrics": metrics, "spread": 0.2, "reliable": model != "ofa_base"}
        predicted = {"H100": {"device_hours": {"likely": gpu}}}
        told = {"case": f"{task}/{model}", "measured": measured, "predicted": predicted}
        return told | {"paper": paper}

    rows = [row("coco", "ofa_base", 6.0, 3.0, 5.7), row("coco", "unival_base", 4.0, 2.4, 3.1)]
    rows += [row("vqav2", "ofa_base", 2.0, 1.0, None), row("vqav2", "unival_base", 1.0, 1.0, None)]
    options = {"device": "cpu", "batch_factor": 4, "image_factor": 2}
    return {"rows": rows, "options": options}


def test_measured_predicted_and_paper_have_columns_of_their_own(
    bench: ModuleType, tmp_path: Path
) -> None:
    found = bench.read_hours(write(tmp_path / "hours.json", hours_report()))
    ratios = found.tables[0]
    own = "measured, cpu (batch / 4, side / 2)"
    assert ratios.head[1:4] == [own, "predicted, H100", "paper, MI250X"]
    # 600 / 400; 3 / 2.4; 5.7 / 3.1. The paper says nothing of the second.
    assert ratios.body == [
        ["coco", "1.50", "1.25", "1.84", "unreliable"],
        ["vqav2", "2.00", "1.00", "", "unreliable"],
    ]
    assert found.unreliable == ["coco/ofa_base", "vqav2/ofa_base"]
    assert "batches of 1/4 and pictures of 1/2" in found.says
    # ms of parts: a quarter and three quarters of 6 s; what is both ways would count twice.
    assert found.tables[2].body == [
        ["loss", "1500.0", "1000.0", "500.0", "250.0"],
        ["loss_backward", "4500.0", "3000.0", "1500.0", "750.0"],
    ]
    assert len(found.plots) == 2


@pytest.mark.parametrize(("spread", "count"), [(0.05, 0), (0.11, 4)])
def test_a_spread_above_a_tenth_is_marked(
    bench: ModuleType, tmp_path: Path, spread: float, count: int
) -> None:
    found = bench.read_eager(write(tmp_path / "eager.json", eager_report(spread)))
    assert len(found.unreliable) == count
    done = bench.Outcome(section(bench), "done", found=found)
    page = Cells(bench.render([done], MACHINE, "bench.py", False))
    overview, rows = page.tables
    assert overview[1][5] == (str(count) if count else "")
    assert [row[-1] for row in rows[1:]] == ["unreliable" if count else ""] * 4
    assert ("Unreliable (spread above 10%" in page.text) == bool(count)
    assert "a pass takes 5.00 s in ours-fp32, 1.60 times as fast as eager-fp32" in page.text


def kernels_csv(path: Path, note: str, high: float) -> Path:
    names = ["kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "x_value"]
    names += ["y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str"]
    extra = json.dumps({"repeats": 9, "note": note})
    rows = []
    for provider, middle in (("unival", 10.0), ("eager", 30.0)):
        speeds = (middle, middle, middle * high, extra)
        rows.append(("attention", provider, "forward", "speed", "168", 1, 1, 9, extra))
        rows.append(("attention", provider, "full", "speed", "168", *speeds))
        rows.append(("attention", provider, "full", "saved_for_backward", "168", 5, 5, 5, extra))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([names, *rows])
    return path


def test_operators_without_green_tests_have_no_speed_up(bench: ModuleType, tmp_path: Path) -> None:
    found = bench.read_kernels(kernels_csv(tmp_path / "a.csv", "", 1.05))
    assert [row[5] for row in found.tables[0].body] == ["3.00", "1.00"]
    assert "attention of 168 3.00" in found.says
    assert len(found.plots) == 1 and not found.unreliable
    for note in ("tests failed", "tests skipped; unreliable: p80/p20 1.30"):
        found = bench.read_kernels(kernels_csv(tmp_path / "b.csv", note, 1.2))
        assert [row[5] for row in found.tables[0].body] == ["", ""]
        assert found.plots == [] and "No speed-up" in found.says
        assert len(found.unreliable) == 2  # (12 - 10) / 10


def test_a_failing_slope_is_shown_as_such(bench: ModuleType, tmp_path: Path) -> None:
    rows = [
        {
            "section": "attention", "variant": "ours", "value": n, "p20": 1.0, "p50": n * 1e-3,
            "p80": 1.0, "spread": 0.0, "reliable": True, "saved_bytes": n * n, "peak_bytes": n,
        }
        for n in (256, 512)
    ]  # fmt: skip
    rows.append({"section": "ranks", "variant": "ours", "value": 2, "p50": 1.0, "spread": 0.3})
    rows[-1] |= {"reliable": False, "samples_per_second": 8.0, "threads": 1, "efficiency": 0.8}
    slope = {"variant": "ours", "quantity": "saved", "slope": 2.0, "from": 256, "to": 512}
    slope |= {"limit": 1.0, "tolerance": 0.1, "verdict": "fails"}
    report = {"rows": rows, "slopes": [slope], "options": {"config": "unival_base", "image": 128}}
    found = bench.read_scaling(write(tmp_path / "scaling.json", report))
    assert found.tables[0].body == [["saved", "ours", "256 to 512", "2.000", "1 (+0.1)", "fails"]]
    assert "with the power 2.00 of the tokens (at most 1: fails)" in found.says
    assert "make 0.80 times the samples a second of one (unreliable)" in found.says
    assert found.unreliable == ["ranks 2 ours"] and len(found.plots) == 2


def test_zero_and_decoding_and_generation_are_read(bench: ModuleType, tmp_path: Path) -> None:
    result = {"precision": "fp32", "stage": 2, "ranks": 2}
    result["formula"] = dict.fromkeys(("parameters", "gradients", "optimizer"), 100 * 2**20)
    result["deviation"] = {"parameters": 0.0, "gradients": 0.2, "optimizer": -0.05}
    report = {"results": [result], "bound": 0.1, "out_of_bounds": ["gradients are <off>"]}
    found = bench.read_zero(write(tmp_path / "zero.json", report))
    assert found.tables[0].body[0][4:7] == ["120.0", "100.0", "+20.0%"]
    assert found.says == "gradients are <off>"

    lines = ["section,setting,loader,unit,samples,rounds,rate,rate_per_core,spread"]
    lines += ["images,384,unival,picture,640,3,200.0,100.0,0.05"]
    lines += ["images,384,DataLoader,picture,640,3,100.0,50.0,0.25"]
    lines += ["memory,share,unival,sample,2000,1,99.0,99.0,0.01"]
    (tmp_path / "decoding.csv").write_text("\n".join(lines), encoding="utf-8")
    found = bench.read_decoding(tmp_path / "decoding.csv")
    assert found.unreliable == ["images by DataLoader"]
    assert "unival is the fastest with 200 a second" in found.says
    assert "within 1.0% over 2000 samples" in found.says

    report = {"tokens_per_second": {"kept": 8.0, "trie": 4.0}, "speedup": 8.1, "trie_cost": 0.05}
    report["seconds"] = {"kept": [1.0, 1.0, 1.01], "trie": [1.0, 2.0, 3.0]}
    found = bench.read_generation(write(tmp_path / "generation.json", report))
    assert found.unreliable == ["trie"] and "8.10 times as fast" in found.says


def test_all_text_is_escaped(bench: ModuleType) -> None:
    bad = "<script>alert('&')</script>"
    found = bench.Found(bad, [bench.Table([bad], [[bad]])], [], [bad])
    one = section(bench, name=bad, title=bad, arguments=["x.py", bad], note=bad)
    outcomes = [bench.Outcome(one, "failed", bad, bad, found=found)]
    outcomes.append(bench.Outcome(one, "skipped", bad))
    page = bench.render(outcomes, MACHINE | {"cpu": bad}, bad, False)
    assert "<script" not in page and "&lt;script&gt;" in page
    read = Cells(page)
    assert "script" not in read.tags
    assert read.tables[-1] == [[bad], [bad]]  # the reader sees what was written


def test_a_page_needs_nothing_beside_it(bench: ModuleType, tmp_path: Path) -> None:
    found = bench.read_eager(write(tmp_path / "eager.json", eager_report()))
    page = bench.render([bench.Outcome(section(bench), "done", found=found)], MACHINE, "x", True)
    assert "TINY SIZES" in page.split("</h1>")[0]
    assert [plot[:8] for plot in plots(page)] == [b"\x89PNG\r\n\x1a\n"]
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in page


def test_skipped_and_failed_sections_give_their_reasons(bench: ModuleType) -> None:
    outcomes = [
        bench.Outcome(section(bench, name="left"), "skipped", "no such device here"),
        bench.Outcome(section(bench, name="red"), "failed", "exit status 3", "line 1\nline 2"),
        bench.Outcome(section(bench, name="loud"), "done", others_cores=1.5, load=2.0),
    ]
    page = Cells(bench.render(outcomes, MACHINE, "bench.py", False))
    overview = {row[0]: row for row in page.tables[0]}
    assert overview["left"][1::5] == ["skipped", "no such device here"]
    assert overview["red"][1::5] == ["failed", "exit status 3"]
    assert overview["loud"][-1] == "loaded machine" and overview["loud"][3] == "1.50"
    assert "Skipped: no such device here" in page.text
    assert "Failed: exit status 3. Its last lines:" in page.text and "line 1\nline 2" in page.text


def scripted(
    bench: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> Any:
    """A section whose script has this text; its result is NAME.json beside it."""
    (folder / "benchmarks").mkdir(exist_ok=True)
    (folder / "benchmarks" / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(bench, "ROOT", folder)
    monkeypatch.setattr(bench, "LISTEN", 0.01)

    def read(path: Path) -> Any:
        return bench.Found(json.loads(path.read_text())["says"], [])

    result = Path(f"{name}.json")
    return section(bench, name=name, arguments=[f"{name}.py"], result=result, reader=read)


def test_others_run_after_one_fails(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = "import pathlib; pathlib.Path('good.json').write_text('{\"says\": \"fine\"}')"
    told = {
        "red": "import sys; print('what went wrong'); sys.exit(3)",
        "silent": "print('done')",
        "broken": "import pathlib; pathlib.Path('broken.json').write_text('{')",
        "verdict": good.replace("good.json", "verdict.json") + "; raise SystemExit(1)",
        "good": good,
    }
    chosen = [scripted(bench, tmp_path, monkeypatch, *pair) for pair in told.items()]
    (tmp_path / "red.json").write_text('{"says": "of yesterday"}')
    outcomes = {one.section.name: one for one in bench.run_all(chosen, 1, tmp_path)}
    status = {name: outcome.status for name, outcome in outcomes.items()}
    assert status == dict.fromkeys(told, "failed") | {"good": "done"}
    assert outcomes["red"].reason == "exit status 3" and outcomes["red"].found is None
    assert outcomes["red"].last == "what went wrong"
    assert outcomes["silent"].reason == "it wrote no silent.json"
    assert "broken.json cannot be read: JSONDecodeError" in outcomes["broken"].reason
    # What it found is shown beside the failure.
    assert outcomes["verdict"].found.says == "fine" == outcomes["good"].found.says


def test_a_section_that_hangs_ends_at_its_limit_with_its_processes(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "print('last words', flush=True)\n"
        "time.sleep(60)\n"
    )
    chosen = [scripted(bench, tmp_path, monkeypatch, "hangs", text)]
    start = time.monotonic()
    (outcome,) = bench.run_all(chosen, 2 / 60, tmp_path)
    assert 1.5 < time.monotonic() - start < 15
    assert outcome.status == "failed" and outcome.reason == "stopped at its limit of 0:01"
    assert outcome.last == "last words"
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_limits_are_shares_of_what_is_left(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, limits = [0.0], []

    def run(one: Any, limit: float, folder: Path) -> Any:
        limits.append(limit)
        now[0] += 60.0
        return bench.Outcome(one, "done")

    monkeypatch.setattr(bench, "run_section", run)
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    chosen = [section(bench, seconds=100), section(bench, skip="no"), section(bench, seconds=300)]
    bench.run_all([*chosen, section(bench, seconds=100)], 10, tmp_path)
    # 600 s x 100 / 500; after a minute 540 x 300 / 400; after another all the 480.
    assert limits == pytest.approx([120.0, 405.0, 480.0])


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_command_is_one_that_its_script_takes(
    bench: ModuleType, device: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    chosen = bench.sections(Path("runs/bench"), device, quick)
    assert [one.name for one in chosen] == NAMES
    assert [one.name for one in chosen if one.skip] == (["eager_ofa"] if quick else [])
    assert sum(one.seconds for one in chosen) < 27 * 60
    for one in chosen:
        script, *options = one.arguments
        args = load_script(script[:-3], f"{script[:-3]}_parsed").parse(options)
        args = args[0] if isinstance(args, tuple) else args
        if hasattr(args, "device"):
            assert args.device == device
        assert one.command.startswith(f"python benchmarks/{script} ")


def test_bf16_is_measured_only_where_processors_have_it(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager_baseline = importlib.import_module("eager_baseline")
    for here in (False, True):
        monkeypatch.setattr(bench, "multiplies_bf16", lambda device, here=here: here)
        monkeypatch.setattr(eager_baseline, "multiplies_bf16", lambda device, here=here: here)
        first = bench.sections(Path("out"), "cpu", False)[0]
        assert ("ours-bf16" in eager_baseline.parse(first.arguments[1:]).variants) == here
        assert ("bf16 is left out" in first.note) == (not here)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "nothing"], "--only nothing: sections are eager_unival, eager_ofa"),
        (["--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_what_cannot_be_served_is_refused(
    bench: ModuleType, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_a_missing_matplotlib_is_said_before_anything_runs(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        bench.main([])
    assert stopped.value.code == 2 and "the report needs matplotlib" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_runs_in_tiny(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "--quick", "--out", str(tmp_path / "bench")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=590,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "bench" / "report.html").read_text(encoding="utf-8")
    status = {row[0]: row[1] for row in Cells(page).tables[0][1:]}
    assert status == dict.fromkeys(NAMES, "done") | {"eager_ofa": "skipped"}
    assert "TINY SIZES" in page and len(plots(page)) == 8
