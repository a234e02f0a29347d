"""The comparison of the benchmark: what is off by how much, and what is judged."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "predictor_check.py"
    spec = importlib.util.spec_from_file_location("predictor_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["predictor_check"] = module
    spec.loader.exec_module(module)
    return module


def found(image: float, decoder: float, loss: float) -> dict[str, object]:
    parts = {"image_encoder": image, "lm_decoder": decoder, "loss": loss}
    return {"seconds": image + decoder + loss, "parts": parts}


def test_ratios_and_shares_are_compared_and_small_parts_are_not_judged(
    benchmark: ModuleType,
) -> None:
    row = {
        "shape": (128, 8, 12),
        "load": 0.0,
        "measured": {"unival_base": found(6, 3.6, 0.4), "ofa_base": found(15, 4, 1)},
        "predicted": {"unival_base": found(5, 4.2, 0.8), "ofa_base": found(15, 4, 1)},
    }
    compared = benchmark.compare([row])
    off = compared[0]["off"]
    assert off["ratio"] == pytest.approx(0.0)  # 20 / 10 twice
    # UnIVAL: 0.5 for 0.6, 0.42 for 0.36, 0.08 for 0.04, which is less than 5 % of a pass.
    assert off["unival_base image_encoder"] == pytest.approx(0.5 / 0.6 - 1)
    assert off["unival_base lm_decoder"] == pytest.approx(0.42 / 0.36 - 1)
    assert off["unival_base loss"] == pytest.approx(1.0)
    wrong = benchmark.misses(compared)
    assert [line.split(": ")[1].split(" ")[:2] for line in wrong] == [
        ["unival_base", "image_encoder"],
        ["unival_base", "lm_decoder"],
    ]
    page = benchmark.table(compared)
    assert "measured 2.000, predicted 2.000 (+0.0%)" in page and "(small)" in page


def test_the_shapes_are_at_least_six_and_none_of_the_calibration(benchmark: ModuleType) -> None:
    assert len(set(benchmark.SHAPES)) == len(benchmark.SHAPES) >= 6
    assert all(128 <= side <= 384 and side % 32 == 0 for side, _, _ in benchmark.SHAPES)
