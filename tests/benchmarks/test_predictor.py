"""The predictor against passes that were measured: predictor_cpu.json beside this file.

Made by benchmarks/predictor_check.py --ceilings configs/ceilings/cpu_reference.yaml --json on one
core of an AMD EPYC (AVX2) with the compiled passes, on shapes that neither the calibration, a run
some hours before, nor the predictor was made with.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from unival.kernels.convolution import op
from unival.kernels.cpu import native
from unival.planning.ceilings import read_ceilings

ROOT = Path(__file__).parents[2]
BOUND = 0.15


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load_script("predictor_check")


@pytest.fixture(scope="module")
def compared(check: ModuleType) -> list[dict]:
    """Predicted anew, measured then."""
    stored = json.loads((Path(__file__).parent / "predictor_cpu.json").read_text(encoding="utf-8"))
    ceilings = read_ceilings(ROOT / "configs" / "ceilings" / "cpu_reference.yaml")
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        # What is counted is what that processor ran, whatever this one does.
        patch.setattr(op, "PRODUCTS_ARE_FASTER", True)
        patch.setattr(native, "AVAILABLE", True)
        for row in stored["rows"]:
            work = check.works((tuple(row["shape"]),))[0]
            predicted = {
                name: check.predict(check.config_of(name), work, ceilings) for name in check.MODELS
            }
            rows.append({**row, "predicted": predicted})
    return check.compare(rows)


def test_ratios_of_ofa_to_unival_lie_within_the_bound(compared: list[dict]) -> None:
    off = {tuple(row["shape"]): row["off"]["ratio"] for row in compared}
    assert len(off) >= 6 and all(abs(value) <= BOUND for value in off.values()), off
    # A predictor that says 1 for all would be off: the ratio grows with the picture.
    assert max(row["ratio"]["measured"] for row in compared) > 1 + 2 * BOUND


def test_shares_of_modules_lie_within_the_bound(compared: list[dict]) -> None:
    judged = [
        (tuple(row["shape"]), name, off)
        for row in compared
        for name, off in row["off"].items()
        if name != "ratio" and name not in row["small"]
    ]
    assert len(judged) >= 40
    assert not [one for one in judged if abs(one[2]) > BOUND]
