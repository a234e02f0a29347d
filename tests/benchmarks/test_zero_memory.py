"""The benchmark of memory under ZeRO: live tensors of real ranks against the published formula."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

ROOT = Path(__file__).parents[2]
# Wide and shallow: at two ranks no parameter is large beside a rank's part, nor the small together.
SMALL = [
    "vocab_size=1000",
    "d_model=512",
    "ffn_dim=512",
    "encoder_layers=2",
    "decoder_layers=2",
    "num_heads=8",
    "num_text_positions=66",
    "max_text_positions=64",
    "token_bucket_size=16",
    "image_bucket_size=8",
]
PARAMETERS = 11_442_960


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/zero_memory.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_live_tensors_follow_the_formula(tmp_path: Path) -> None:
    grid = ["--ranks", "2", "--precision", "fp32"]
    done = run(*grid, "--set", *SMALL, "--out", str(tmp_path / "found"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "found.json").read_text())
    # float32: 4 bytes each of parameter, gradient, two moments, and of a master from stage 1.
    one = 4 * PARAMETERS
    expected = {
        0: (one, one, 2 * one),
        1: (one, one, 3 * one / 2),
        2: (one, one / 2, 3 * one / 2),
        3: (one / 2, one / 2, 3 * one / 2),
    }
    assert [result["stage"] for result in report["results"]] == [0, 1, 2, 3]
    for result in report["results"]:
        assert result["parameters"] == PARAMETERS
        assert len(result["peak"]) == 2
        for rank in result["peak"]:
            found = rank["parameters"], rank["gradients"], rank["optimizer"]
            assert found == pytest.approx(expected[result["stage"]], rel=0.10), result["stage"]
    assert done.stdout.strip() == (tmp_path / "found.md").read_text().strip()
    for told in ("torch 2.", "deepspeed 0.", " cores", report["command"]):
        assert told in done.stdout


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("zero_memory")


def test_what_is_out_of_bounds_is_told(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(case: Any, args: Any) -> dict[str, Any]:
        expected = {"parameters": 2**22, "gradients": 2**21, "optimizer": 2**23}
        return {
            "precision": case.precision,
            "stage": case.stage,
            "ranks": case.ranks,
            "parameters": 2**20,
            "small_parameters": 0,
            "formula": expected,
            "deviation": {"parameters": 0.09, "gradients": 0.11, "optimizer": -0.12},
            "peak": [expected],
        }

    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "DS_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # restored after main has set them
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["", "--stages", "2", "--ranks", "2", "--precision", "fp32"])
    monkeypatch.chdir(ROOT)
    assert benchmark.main() == 1
    told = capsys.readouterr().out
    assert (
        "stage 2, ranks 2: bytes of gradients are +11.0% from the formula's 2.0 MiB a rank" in told
    )
    assert (
        "stage 2, ranks 2: bytes of optimizer are -12.0% from the formula's 8.0 MiB a rank" in told
    )
    assert "bytes of parameters" not in told


def test_what_the_engine_refuses_is_not_measured(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse(["--precision", "bf16", "--stages", "0"])
    assert "bf16 at stage 0" in capsys.readouterr().err
