"""Parity with values recorded from the original code, where they lie beside the checkout."""

from __future__ import annotations

import json
from typing import Any

import golden_adapter
import numpy as np
import pytest

GOLDEN = golden_adapter.GOLDEN
MANIFEST = GOLDEN / "public" / "manifest.json"


def manifest() -> dict[str, Any]:
    if not MANIFEST.exists():
        return {"cases": [], "configs": {}}
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


RECORDED = manifest()
CASES = [pytest.param(case, id=f"{case['model']}/{case['id']}") for case in RECORDED["cases"]]
ABSENT = pytest.param(
    None,
    id="absent",
    marks=pytest.mark.skip(reason="no recorded values of the original code at ../shared/golden"),
)


@pytest.mark.parametrize("case", CASES or [ABSENT])
def test_golden(case):
    import check  # the comparison that comes with the recorded values

    config = RECORDED["configs"].get(f"{case['model']}/{case['config']}")
    result = golden_adapter.run(case, config, check.load_inputs(case))
    if result is None:
        pytest.skip("a switch that no published run turns on")
    with np.load(GOLDEN / case["file"]) as stored:
        compared = check.compare(case, stored, result)
    assert compared, "nothing was compared"
    failed = [
        f"{name}: error {error}, tolerance {tolerance}"
        for name, error, tolerance, passed in compared
        if not passed
    ]
    assert not failed, "\n".join(failed)
