"""The benchmark of a training step, and the formulas it counts operations with."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unival.model import flops
from unival.model.configuration import UnivalConfig
from unival.model.image_encoder import ImageEncoder
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.video_encoder import VideoEncoder

ROOT = Path(__file__).parents[2]
SIZES = {"image": (96, 64), "video": (8, 64, 96), "audio": (48000,), "text": ()}
TINY = ["--config", "unival_tiny", "--batch", "2", "--image", "64", "--steps", "1"]
NO_GPU = "torch finds no GPU on this machine (torch.cuda.is_available() is False)"


def config_of(name: str, **changed: object) -> UnivalConfig:
    return UnivalConfig.from_yaml(ROOT / "configs" / "model" / f"{name}.yaml", **changed)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/train_step.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def check_report(report: dict, parts: set[str]) -> None:
    assert set(report["parts"]) == parts
    seconds = [part["seconds"] for part in report["parts"].values()]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(report["step_seconds"], rel=0.2)
    forward = {"image_encoder", "lm_encoder", "lm_decoder", "loss"}
    counted = {name: part["flops"] for name, part in report["parts"].items() if "flops" in part}
    assert set(counted) == forward | {"backward"}
    assert min(counted.values()) > 0
    assert sum(counted.values()) == report["flops"]
    assert report["matmul_peak"]["flops_per_second"] > 0
    assert report["peak_memory"]["bytes"] > 0
    assert report["cores_busy"] > 0
    assert report["decode_seconds"] > 0
    assert {"cpu", "cores", "torch", "device", "date"} <= report["machine"].keys()


PARTS = {
    "data_wait",
    "transfer",
    "image_encoder",
    "lm_encoder",
    "lm_decoder",
    "loss",
    "backward",
    "optimizer",
}


def test_parts_are_positive_and_sum_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run(*TINY, "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    check_report(report, PARTS)
    assert report["machine"]["device"] == "cpu"
    assert report["command"] in done.stdout
    for name in PARTS:
        assert f"\n{name} " in done.stdout


def test_a_trace_has_the_parts_with_operators_inside(tmp_path: Path) -> None:
    path, report = tmp_path / "new" / "trace.json.gz", tmp_path / "report.json"
    done = run(*TINY, "--trace", str(path), "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout and "ui.perfetto.dev" in done.stdout
    with gzip.open(path, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    # Once each: steps before are not in it.
    ranges = [e for e in events if e["name"] in PARTS and e["cat"] == "user_annotation"]
    assert sorted(e["name"] for e in ranges) == sorted(PARTS)
    span = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in ranges}
    wanted = {
        "image_encoder": "convolution",
        "lm_encoder": "linear",
        "lm_decoder": "linear",
        "backward": "convolution_backward",
        "optimizer": "_fused_adamw_",
    }
    for part, operator in wanted.items():
        begin, end = span[part]
        found = [e for e in events if e["name"] == f"aten::{operator}"]
        assert any(begin <= e["ts"] and e["ts"] + e["dur"] <= end for e in found), part
        if operator not in ("linear", "convolution"):
            assert all(begin <= e["ts"] < end for e in found), part
    outer, inner = span["lm_encoder"], span["image_encoder"]
    assert outer[0] <= inner[0] and inner[1] <= outer[1]
    check_report(json.loads(report.read_text()), PARTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run(*TINY, "--device", "cuda", "--dtype", "bf16", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    check_report(report, PARTS)
    assert report["machine"]["device"] == torch.cuda.get_device_name()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_refused() -> None:
    done = run(*TINY, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cuda: torch" in done.stderr and "finds no usable GPU" in done.stderr
    assert done.stdout == ""


def test_a_medium_without_encoder_is_refused() -> None:
    done = run("--config", "unival_base", "--medium", "audio")
    assert done.returncode == 2
    assert "unival_base has no audio encoder; --set audio_channels" in done.stderr


@pytest.mark.parametrize("medium", list(SIZES))
@pytest.mark.parametrize("sample_patch_num", [None, 2])
def test_formulas_equal_torchs_count(medium: str, sample_patch_num: int | None) -> None:
    config = config_of("unival_tiny", sample_patch_num=sample_patch_num)
    model = UnivalForConditionalGeneration(config).eval()
    batch, text, target, size = 3, 7, 5, SIZES[medium]
    shape = (batch, *size) if medium == "audio" else (batch, 3, *size)
    name = {"image": "pixel_values", "video": "video_values", "audio": "audio_values"}.get(medium)
    values = {} if name is None else {name: torch.randn(shape)}
    ids = torch.randint(4, 1000, (batch, text))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, decoder_input_ids=ids[:, :target], **values)
    expected = flops.forward(config, medium, size, batch, text, target)
    assert sum(expected.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)
    counts = counter.get_flop_counts()
    inner = expected.get(f"{medium}_encoder", 0)
    prefix = model.__class__.__name__
    whole = {part: sum(counts[f"{prefix}.{part}"].values()) for part in ("encoder", "decoder")}
    assert expected["lm_encoder"] + inner == pytest.approx(whole["encoder"], rel=0.02)
    assert expected["lm_decoder"] == pytest.approx(whole["decoder"], rel=0.02)
    if medium != "text":
        encoder = sum(counts[f"{prefix}.encoder.{medium}_encoder"].values())
        assert inner == pytest.approx(encoder, rel=0.02)


@pytest.mark.parametrize("name", ["unival_base", "ofa_base", "unival_large"])
def test_formulas_of_the_full_encoders(name: str) -> None:
    config = config_of(name)
    found, tokens, _ = flops.image_encoder(config, (384, 384))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder = ImageEncoder(config.image_layers, config.image_channels).eval()
        features = encoder(torch.empty(1, 3, 384, 384))
    assert tokens == features[0, 0].numel()
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
    if config.video_layers is None:
        return
    found, tokens, _ = flops.video_encoder(config, (8, 224, 224))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        layers = config.video_layers
        video = VideoEncoder(layers, config.video_channels, config.video_cardinality).eval()
        features = video(torch.empty(1, 3, 8, 224, 224))
    assert tokens == features[0, 0].numel()
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
