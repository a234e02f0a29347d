"""The comparison of the benchmark: what is off by how much, and what is judged."""

from __future__ import annotations

from types import ModuleType

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("predictor_check")


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
