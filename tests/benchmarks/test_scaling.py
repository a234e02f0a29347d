"""The benchmark of scaling: slopes, verdicts, inputs of clips, counted memory, and a tiny run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
CPU = torch.device("cpu")
SIZES = (256, 512, 1024, 2048, 4096)


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    module = load_script("scaling")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def rows(
    time: float = 2.0, saved: float = 1.0, peak: float = 1.0, reliable: bool = True
) -> list[dict[str, Any]]:
    """Attention whose quantities grow with exactly these powers of the tokens."""
    return [
        {
            "section": "attention", "variant": "ours", "value": n, "p50": 1e-7 * n**time,
            "saved_bytes": 3e3 * n**saved, "peak_bytes": 4e3 * n**peak, "reliable": reliable,
        }
        for n in (64, 128, *SIZES)
    ]  # fmt: skip


def verdicts(bench: ModuleType, **powers: Any) -> dict[str, tuple[float, str]]:
    found = bench.judge(rows(**powers))
    assert all((slope["from"], slope["to"]) == (256, 4096) for slope in found)
    return {slope["quantity"]: (slope["slope"], slope["verdict"]) for slope in found}


def test_slopes_of_exact_powers_are_found_and_hold(bench: ModuleType) -> None:
    found = verdicts(bench)
    for quantity, slope in {"time": 2.0, "saved": 1.0, "peak": 1.0}.items():
        assert found[quantity] == (pytest.approx(slope, abs=1e-9), "holds")


@pytest.mark.parametrize("quantity", ["saved", "peak"])
def test_quadratic_memory_fails_and_nothing_else_does(bench: ModuleType, quantity: str) -> None:
    found = verdicts(bench, **{quantity: 2.0})
    assert found.pop(quantity) == (pytest.approx(2.0), "fails")
    assert {verdict for _, verdict in found.values()} == {"holds"}


@pytest.mark.parametrize(("power", "verdict"), [(2.09, "holds"), (2.11, "fails"), (3.0, "fails")])
def test_the_tolerance_of_time_is_a_tenth(bench: ModuleType, power: float, verdict: str) -> None:
    assert verdicts(bench, time=power)["time"][1] == verdict


def test_unreliable_times_give_no_verdict_but_memory_does(bench: ModuleType) -> None:
    found = verdicts(bench, time=3.0, peak=2.0, reliable=False)
    assert {name: verdict for name, (_, verdict) in found.items()} == {
        "time": "unreliable",
        "saved": "holds",
        "peak": "fails",
    }


def test_the_fit_is_least_squares_in_logarithms(bench: ModuleType) -> None:
    # x = 1, 2, 4, y = 1, 8, 16: logarithms to base 2 are (0, 0), (1, 3), (2, 4); means 1 and 7/3.
    # Slope: ((-1)(-7/3) + 0 + (1)(5/3)) / (1 + 0 + 1) = 4 / 2.
    assert bench.fit([(1, 1), (2, 8), (4, 16)]) == pytest.approx(2.0)
    # One value that is off is seen: y = 1, 2, 16 has ((-1)(-5/3) + (1)(7/3)) / 2 = 2 as well, where
    # the last two alone would say 3.
    assert bench.fit([(1, 1), (2, 2), (4, 16)]) == pytest.approx(2.0)


def test_one_size_has_no_slope(bench: ModuleType) -> None:
    assert bench.judge(rows()[:3]) == []  # 64, 128, 256


def test_local_slopes_are_of_the_same_variant(bench: ModuleType) -> None:
    found = bench.with_slopes(
        [
            {"variant": "ours", "value": 64, "p50": 1.0},
            {"variant": "eager", "value": 64, "p50": 10.0},
            {"variant": "ours", "value": 256, "p50": 8.0},
            {"variant": "eager", "value": 256, "p50": 40.0},
        ]
    )
    assert "slope" not in found[0] and "slope" not in found[1]
    # 64 to 256 is 2 ** 2: 8 = 4 ** 1.5, 4 = 4 ** 1.
    assert [row["slope"] for row in found[2:]] == pytest.approx([1.5, 1.0])
    assert [row["ratio"] for row in found[2:]] == pytest.approx([8.0, 4.0])


@pytest.mark.parametrize("tokens", [64, 256])
def test_inputs_have_the_tokens_and_compute_the_reference(bench: ModuleType, tokens: int) -> None:
    case = bench.attention_case(tokens, CPU, torch.float32)
    assert case.tensors["query"].shape == (1, 12, tokens, 64)
    for peer in bench.PEERS:
        assert bench.check(peer, case) < 1e-4


def test_a_clips_frames_share_the_cells_and_compute_the_reference(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PICTURE", 24)  # 64 tokens: 16 of text, two frames of 4 x 6
    case = bench.attention_case(64, CPU, torch.float32)
    assert (case.shape["rows"], case.shape["columns"], case.shape["text"]) == (4, 6, 16)
    assert case.tensors["key"].shape == (1, 12, 64, 64)
    query, key = case.fixed["codes"]
    assert torch.equal(query[:, :24], query[:, 24:48]) and torch.equal(key[:, :24], key[:, 24:48])
    assert query.shape == key.shape == (1, 64) and len(query[0, 48:].unique()) == 16
    # The last quarter of the text is padding, and nothing else.
    assert case.fixed["padding"].nonzero()[:, 1].tolist() == [60, 61, 62, 63]
    for peer in bench.PEERS:
        assert bench.check(peer, case) < 1e-4


def test_all_sizes_have_their_tokens(bench: ModuleType) -> None:
    for tokens in bench.TOKENS:
        case = bench.attention_case(tokens, CPU, torch.bfloat16)
        assert case.fixed["padding"].shape == (1, tokens)
        assert case.slopes[0].shape == (1, 12, tokens, 64)


def test_the_peak_is_the_most_at_one_time(bench: ModuleType) -> None:
    def call() -> None:
        a = torch.empty(1000, dtype=torch.float64)  # 8,000 bytes
        b = torch.empty(250, dtype=torch.float32)  # and 1,000: 9,000
        del a
        c = torch.empty(500, dtype=torch.float64)  # 1,000 and 4,000
        del b, c

    assert bench.allocated_peak(call) == 9000


def test_our_memory_is_less_than_eagers_scores(bench: ModuleType) -> None:
    case, script = bench.attention_case(256, CPU, torch.float32), bench.kernels_script()
    ours, eager = (bench.attention_memory(peer, case, script) for peer in bench.PEERS)
    scores = 12 * 256 * 256 * 4  # of a layer
    assert eager["saved_bytes"] >= scores > ours["saved_bytes"] > 0
    assert eager["peak_bytes"] >= eager["saved_bytes"]
    assert ours["peak_bytes"] >= ours["saved_bytes"]


def test_short_passes_are_repeated_within_a_measurement(bench: ModuleType) -> None:
    calls: list[int] = []
    one = bench.warmed(lambda: calls.append(0), {"value": 1})
    before = len(calls)
    assert one.passes > 1000  # of a list's append, in 0.05 s
    found = bench.take_turns([one], 3)
    assert len(calls) - before == 3 * one.passes
    assert found[0]["value"] == 1 and 0 < found[0]["p50"] < 1e-4


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/scaling.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_tiny_run_writes_its_rows(tmp_path: Path) -> None:
    sizes = ["--config", "unival_tiny", "--image", "64", "--batches", "1", "2", "--texts", "8"]
    sizes += ["--tokens", "256", "64", "512", "--ranks", "--repeats", "1"]
    done = run(*sizes, "--out", str(tmp_path / "new" / "found"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new" / "found.json").read_text())
    names = [(row["section"], row["variant"], row["value"]) for row in report["rows"]]
    tokens = [("attention", variant, n) for n in (64, 256, 512) for variant in ("ours", "eager")]
    assert names == [*tokens, ("batch", "ours", 1), ("batch", "ours", 2), ("text", "ours", 8)]
    assert all(row["p50"] > 0 and not row["reliable"] for row in report["rows"])  # one measurement
    found = {(slope["variant"], slope["quantity"]): slope for slope in report["slopes"]}
    assert found["ours", "time"]["verdict"] == "unreliable"
    assert found["ours", "saved"]["verdict"] == "holds"
    assert found["eager", "saved"]["slope"] > 1.5 and "verdict" not in found["eager", "saved"]
    text = (tmp_path / "new" / "found.md").read_text()
    assert text.strip() in done.stdout and "at most 1 (+0.1) | holds" in text
    with (tmp_path / "new" / "found.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["value"] for line in lines] == [str(value) for _, _, value in names]
    assert {"load_before", "load_after", "others_cores"} <= report["machine"].keys()


@pytest.mark.slow
def test_ranks_share_the_cores(tmp_path: Path) -> None:
    sizes = ["--config", "unival_tiny", "--image", "64", "--tokens", "--batches", "--texts"]
    done = run(*sizes, "--rows", "1", "--repeats", "2", "--out", str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (one["value"], two["value"]) == (1, 2)
    assert two["threads"] == max(1, one["threads"] // 2)
    assert one["efficiency"] == 1.0
    assert two["efficiency"] == pytest.approx(2 * one["p50"] / two["p50"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "100"], "--tokens: wanted some of 64 128"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--batches", "0"], "--batches: at least 1 each"),
        (["--texts", "5000"], "--texts: unival_base has positions for fewer tokens"),
    ],
)
def test_what_cannot_be_served_is_refused(
    bench: ModuleType, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.parse(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
