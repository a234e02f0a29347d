"""The benchmark of decoding runs and writes what it says; its long sections are marked slow."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(out: Path, *arguments: str) -> tuple[str, list[dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, "benchmarks/decoding.py", "--out", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    with (out / "decoding.csv").open(encoding="utf-8") as file:
        return done.stdout, list(csv.DictReader(file))


def test_memory_of_a_short_run_is_reported(tmp_path: Path) -> None:
    said, (row,) = run(tmp_path, "--only", "memory", "--samples", "1000")
    assert "MiB over 1000 samples" in said
    assert row["section"] == "memory"
    assert float(row["rate"]) > 10
    assert row["cpu"] and row["torch"] and row["date"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_stays_flat_over_20000_samples(tmp_path: Path) -> None:
    _, (row,) = run(tmp_path, "--only", "memory")
    assert float(row["spread"]) < 0.05


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pictures_and_clips_are_as_much_faster_as_promised(tmp_path: Path) -> None:
    """Ratios of one run: the load of the machine meets both sides."""
    _, rows = run(tmp_path, "--only", "images", "clips")
    rates = {(row["setting"], row["loader"]): float(row["rate"]) for row in rows}
    images = {name: rate for (setting, name), rate in rates.items() if "workers" in setting}
    assert images["unival (DALI)"] > 1.5 * images["DataLoader PIL+torchvision"]
    for setting in ("8 frames of 15 s", "16 frames of 15 s"):
        everything = rates[setting, "everything (PyAV)"]
        assert rates[setting, "PyAV, seeking"] > 3 * everything
        assert rates[setting, "PyAV, JPEG frames"] > 10 * everything
    assert (tmp_path / "decoding.png").stat().st_size > 10_000
