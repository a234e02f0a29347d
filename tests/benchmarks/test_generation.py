"""The benchmark of beam search runs tiny, and writes what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ["--config", "unival_tiny", "--image", "64", "--answers", "40", "--repeats", "2"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/generation.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_rates_follow_from_the_seconds(tmp_path: Path) -> None:
    options = ["--batch", "2", "--beams", "3", "--steps", "4", "--out", str(tmp_path)]
    done = run(*TINY, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "generation.json").read_text())
    assert set(report["seconds"]) == {"kept", "recomputed", "trie"}
    median = {}
    for name, seconds in report["seconds"].items():
        assert len(seconds) == 2 and min(seconds) > 0
        median[name] = sum(seconds) / 2  # of two
        # 2 pictures, 4 steps
        assert report["tokens_per_second"][name] == pytest.approx(8 / median[name])
    assert report["speedup"] == pytest.approx(median["recomputed"] / median["kept"])
    assert report["trie_cost"] == pytest.approx(median["trie"] / median["kept"] - 1)
    assert report["same_captions"] == 2  # forgetting changes the time, not the result
    assert report["encoder_tokens"] == 12  # 2 x 2 patches of 64 pixels, 8 words
    assert report["encoder_seconds"] > 0
    machine = {"cpu", "cores", "threads", "load_1min", "torch", "transformers", "python", "date"}
    assert machine <= report["machine"].keys()
    markdown = (tmp_path / "generation.md").read_text()
    assert markdown in done.stdout
    assert report["command"] in markdown
    for name in median:
        assert f"| {name} | {median[name]:.3f} |" in markdown


@pytest.mark.parametrize(
    ("option", "value", "least"), [("steps", 1, 2), ("repeats", 0, 1), ("answers", 0, 1)]
)
def test_an_option_below_its_least_is_refused(option: str, value: int, least: int) -> None:
    done = run(f"--{option}", str(value))
    assert done.returncode == 2
    assert f"--{option} must be at least {least}" in done.stderr
    assert done.stdout == ""
