"""The benchmark of memory under ZeRO: live tensors of real ranks against the published formula."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_what_is_out_of_bounds_is_told() -> None:
    """The whole vocabulary's embedding, cut by the border: DeepSpeed keeps its gradient whole."""
    done = run("--set", "--ranks", "2", "--precision", "fp32", "--stages", "2")
    assert done.returncode == 1, done.stderr
    assert "fp32, stage 2, ranks 2: gradients are +100.0% from the formula's" in done.stdout


def test_what_the_engine_refuses_is_not_measured() -> None:
    done = run("--precision", "bf16", "--stages", "0")
    assert done.returncode == 2
    assert "bf16 at stage 0" in done.stderr
