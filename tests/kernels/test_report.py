"""What the compiler makes of shipped kernels, and the formulas of the resource report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unival.kernels.shipped import Call, attention_calls, loss_calls, norm_calls
from unival.kernels.triton_tools.resources import CHIPS, occupancy
from unival.kernels.work import flops, touched, traffic

A100_CACHE = CHIPS[80].l2


def report(out: Path, *arguments: str) -> list[dict]:
    """Rows of the report, made in a process whose kernels are compiled, not interpreted."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "unival.kernels.report", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 rows do not fit" in done.stdout
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "predicted us" in text and "Memory traffic" in text
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_attention_fits_and_uses_tensor_cores(tmp_path: Path) -> None:
    rows = report(
        tmp_path, "--dtype", "bf16", "--arch", "sm_80", "sm_90", "--only", "attention encoder 316"
    )
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        f"attention_{name}_kernel" for name in ("forward", "rowdot", "keys", "queries", "bias")
    }
    for row in rows:
        assert row["fits"] and row["spills"] == 0 and row["registers"] <= 255
        if row["kernel"] != "attention_rowdot_kernel":
            assert row["hgmma" if row["arch"] == 90 else "hmma"] > 0, row["kernel"]


def test_norms_load_and_store_128_bits(tmp_path: Path) -> None:
    rows = report(
        tmp_path, "--dtype", "bf16", "fp32", "--arch", "sm_90", "--only", "gelu_layer_norm 21504"
    )
    assert {row["shape"] for row in rows} == {
        f"21504 rows of {width}" for width in (768, 1024, 3072, 4096)
    }
    for row in rows:
        assert row["loads"] == row["loads_128"] > 0, row
        assert row["stores"] == row["stores_128"] > 0, row


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_shipped_kernel_fits_every_chip(tmp_path: Path) -> None:
    rows = report(tmp_path)
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    for row in rows:
        if row["op"].endswith("layer_norm"):  # with dropout there is the load of the seed
            assert row["loads"] == row["loads_128"], row


def test_interpreted_kernels_are_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    from unival.kernels import report as module

    if not module.INTERPRETED:
        pytest.skip("kernels are compiled in this process")
    assert module.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def ratios(found: list[Call]) -> dict[str, float]:
    pairs = {f"{c.op}, {c.shape}": traffic(c, A100_CACHE) for c in found if c.backward}
    return {name: moved / least for name, (moved, least) in pairs.items()}


def test_memory_traffic_is_near_the_least() -> None:
    """Within 1.3 of reading each input and writing each output once, on an A100's cache."""
    assert max(ratios(list(norm_calls("bf16"))).values()) < 1.05
    attention = ratios(list(attention_calls("bf16")))
    short = [r for name, r in attention.items() if "144+24, batch" in name or "316+24" in name]
    assert len(short) == 4 and max(short) < 1.3
    loss = ratios(list(loss_calls("bf16")))
    assert loss["linear_cross_entropy, 4096 tokens, smoothing"] < 1.3
    assert loss["linear_cross_entropy, 64 tokens, smoothing"] < 1.3
    # The bonus of every class needs probabilities, hence a second walk over the embedding.
    assert 1.3 < loss["linear_cross_entropy, 4096 tokens, captions"] < 1.5


def test_traffic_counts_what_leaves_the_cache() -> None:
    """With no cache every launch reads everything; with a large one each tensor counts once."""
    call = next(iter(attention_calls("bf16")))
    everything = sum(
        size for launch in (*call.forward, *call.backward) for _, _, size in touched(launch)
    )
    assert traffic(call, 0)[0] == everything
    moved, least = traffic(call, 1 << 40)
    assert moved < 1.25 * least < everything / 1.5  # scratch counts in the first only


def test_operations_by_hand() -> None:
    """8 samples of 340 tokens, 12 heads of 64: products of 2 x 8 x 12 x 340 x 340 x 64."""
    call = next(c for c in attention_calls("bf16") if c.shape == "encoder 316+24, batch 8")
    product = 2 * 8 * 12 * 340 * 340 * 64
    assert sum(map(flops, call.forward)) == 3 * product
    by_kernel: dict[str, int] = {}
    for launch in call.backward:
        name = launch.kernel.__name__
        by_kernel[name] = by_kernel.get(name, 0) + flops(launch)
    assert by_kernel["attention_rowdot_kernel"] == 0
    assert by_kernel["attention_keys_kernel"] == 5 * product
    assert by_kernel["attention_queries_kernel"] == 4 * product
    # Twice (queries, keys): content scores and dp; and two products for every group.
    assert 4 * product < by_kernel["attention_bias_kernel"] <= 8 * product
    smoothing = next(iter(loss_calls("bf16")))
    logits = 2 * 4096 * 59_457 * 768
    assert sum(map(flops, smoothing.forward)) == logits
    # Slopes and hidden's gradient; the embedding's is the library's product, no launch of ours.
    assert sum(map(flops, smoothing.backward)) == 2 * logits


def test_occupancy_by_hand() -> None:
    """Registers: 65,536 / (128 x 4 warps x 32) = 4 blocks; shared memory: 167,936 / 50,176 = 3."""
    assert occupancy(128, 0, 4, 80) == 4 * 4 / 64
    assert occupancy(128, 49_152, 4, 80) == 3 * 4 / 64
    assert occupancy(32, 0, 1, 90) == 32 / 64  # 32 blocks are the most
