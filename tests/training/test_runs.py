"""Runs as a user starts them: ranks exchanged for rows, a killed run resumed, bad samples
replaced."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from ranks import Ranks, free_port, on_ranks
from safetensors.torch import load_file

from unival.train import main

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path, data: Path, rows: int, **fields: object) -> Path:
    """A run of two short stages: images, then images and clips."""
    image = {"medium": "image", "mixture": [{"source": "qa", "rows": rows}]}
    video = {"medium": "video", "mixture": [{"source": "video_qa", "rows": rows}], "weight": 0.5}
    schedule = {"learning_rate": 1e-3, "warmup_ratio": 0.5, "schedule_steps": 12}
    content = {
        "output": str(folder / "run"),
        "model": {"config": str(ROOT / "configs/model/unival_tiny.yaml")},
        "batchnorm": "sync",
        "log_every": 1,
        "tensorboard": False,
        "checkpoint_every": 2,
        "evaluate_before": False,
        "negatives": str(data / "negative_sample"),
        "sources": {
            "qa": {"path": str(data / "vision_language_qa.tsv")},
            "video_qa": {
                "path": str(data / "video_qa.tsv"),
                "media_root": str(ROOT / "samples"),
            },
        },
        "media": {"image_size": 64, "video_size": 32, "video_frames": 2, "audio_samples": 48000},
        "stages": [
            {"name": "one", "steps": 3, "micro_batches": [image], **schedule},
            {"name": "two", "steps": 6, "micro_batches": [image, video], **schedule},
        ],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content | fields))
    return path


def environment() -> dict[str, str]:
    found = dict(os.environ, OMP_NUM_THREADS="1")
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"
    found.pop("TRITON_INTERPRET", None)
    return found


def launched(config: Path, ranks: int) -> list[str]:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    port = ["--master_port", str(free_port())]
    return [*launcher, *port, "--module", "unival.train", "--config", str(config)]


def trained(folder: Path, ranks: int, config: Path, *overrides: str) -> str:
    """Train on forked ranks; returns what the first one printed."""
    assert on_ranks(folder, ranks, main, ["--config", str(config), *overrides]) == [0] * ranks
    return (folder / "rank0.log").read_text()


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280
    )


def curve(folder: Path) -> dict[int, dict]:
    """The last entry of every global step."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {entry["global_step"]: entry for entry in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    trained(folder, 1, write_config(folder, data, rows=4))
    return folder


def test_the_run_learns_and_leaves_a_model_for_each_stage(whole):
    entries = curve(whole)
    assert sorted(entries) == list(range(1, 10))
    assert entries[1]["loss"] == pytest.approx(math.log(59457), abs=0.6)
    assert entries[3]["loss"] < entries[1]["loss"]
    assert set(entries[9]["tasks"]) == {"vqa", "answer_matching", "video_qa"}
    for stage in ("one", "two"):
        assert (whole / "run" / "stages" / stage / "model" / "model.safetensors").is_file()
    # Linear warm-up over half of the horizon of 12 steps, then linear decay.
    assert [entries[s]["lr"] for s in (1, 3)] == pytest.approx([1e-3 / 6, 1e-3 / 2])


@pytest.mark.slow  # step by step against plain PyTorch in test_engine.py
def test_two_processes_equal_one(whole, data, tmp_path):
    done = run(launched(write_config(tmp_path, data, rows=4), ranks=2))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = curve(whole), curve(tmp_path)
    assert sorted(one) == sorted(two)
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=2e-4), step
        assert two[step]["samples_per_second"] > 0


def kill_at(config: Path, ranks: int, folder: Path, step: int) -> None:
    """Start a run and kill all of its ranks when it has logged a step."""
    started = Ranks(folder, ranks, main, ["--config", str(config)])
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.is_file() or max(curve(folder), default=0) < step:
        assert time.monotonic() < deadline
        assert not any(end.poll(0) for end in started.ends), "it ended before it could be killed"
        time.sleep(0.01)
    started.kill()


@pytest.mark.slow
def test_a_run_killed_in_stage_two_resumes_at_the_right_sample(whole, data, tmp_path):
    config = write_config(tmp_path, data, rows=4)
    kill_at(config, 1, tmp_path, step=8)
    assert "resumed two after step" in trained(tmp_path, 1, config)
    resumed, uninterrupted = curve(tmp_path), curve(whole)
    for step in uninterrupted:
        assert resumed[step]["loss"] == pytest.approx(uninterrupted[step]["loss"], rel=1e-6), step


def unival(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "unival.cli", *map(str, arguments)])


@pytest.mark.slow
def test_a_run_of_two_ranks_is_resumed_by_its_folder_on_one(whole, data, tmp_path):
    kill_at(write_config(tmp_path, data, rows=4), 2, tmp_path, step=8)
    done = unival("resume", tmp_path / "run", "--num-gpus", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed two after step" in done.stderr
    one, resumed = curve(whole), curve(tmp_path)
    for step in one:
        assert resumed[step]["loss"] == pytest.approx(one[step]["loss"], rel=2e-4), step
    again = unival("resume", tmp_path / "run")
    assert again.returncode == 2
    assert "all 2 stages have finished" in again.stderr
    nowhere = unival("resume", tmp_path)
    assert nowhere.returncode == 2
    assert "no run: it has no config.yaml" in nowhere.stderr
    picture = tmp_path / "both.png"
    done = unival("runs", "compare", whole / "run", tmp_path / "run", "--out", picture)
    assert done.returncode == 0, done.stderr[-3000:]
    assert picture.stat().st_size > 10_000
    assert "samples_per_second" in done.stdout


@pytest.mark.slow
def test_a_run_of_two_ranks_is_resumed_on_as_many_and_on_four(whole, data, tmp_path):
    kill_at(write_config(tmp_path, data, rows=4, checkpoint_every=1), 2, tmp_path, step=6)
    for folder, options in (("same", ()), ("four", ("--num-gpus", 4))):
        shutil.copytree(tmp_path / "run", tmp_path / folder / "run")
        done = unival("resume", tmp_path / folder / "run", *options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "resumed two after step" in done.stderr
        one, resumed = curve(whole), curve(tmp_path / folder)
        for step in one:
            assert resumed[step]["loss"] == pytest.approx(one[step]["loss"], rel=2e-4), step


@pytest.mark.slow
def test_bf16_follows_float32(whole, data, tmp_path):
    told = trained(tmp_path, 1, write_config(tmp_path, data, rows=4), "precision=bf16")
    exact, half = curve(whole), curve(tmp_path)
    for step in exact:
        assert half[step]["loss"] == pytest.approx(exact[step]["loss"], rel=0.05), step
        assert math.isfinite(half[step]["grad_norm"])
    assert "not finite" not in told


@pytest.mark.slow
def test_checkpoints_are_measured_on_the_way_and_the_best_is_kept(data, tmp_path):
    """What is measured is the average of the weights; the last checkpoint and the best remain."""
    stage = {"ema_decay": 0.5, "evaluate": ["vqa"], "evaluate_every": 2, "best": "vqa/accuracy"}
    config = write_config(tmp_path, data, rows=4, keep=1, evaluate_batch=64)
    content = yaml.safe_load(config.read_text())
    content["stages"] = [content["stages"][0] | stage | {"steps": 5}]
    rows = (data / "vision_language_qa.tsv").read_bytes().splitlines(keepends=True)[:8]
    (tmp_path / "few.tsv").write_bytes(b"".join(rows))
    content["sources"] = {"qa": {"path": str(tmp_path / "few.tsv")}}
    config.write_text(yaml.safe_dump(content))
    trained(tmp_path, 2, config)
    checkpoints = tmp_path / "run/stages/one/checkpoints"
    kept = {path.name for path in checkpoints.glob("step-*")}
    scores = {}
    for name in kept:
        found = checkpoints / name / "evaluation/evaluation.json"
        if found.is_file():
            scores[name] = json.loads(found.read_text())["metrics"]["vqa"]["accuracy"]
    assert "step-000005" in kept  # the last; a measured one beside it is the best
    # The last, and the best of those measured on the way; the last is measured too.
    assert "step-000005" in kept and set(scores) == kept and len(kept) == 2
    best = max(sorted(scores), key=scores.__getitem__)  # of equal ones the earlier
    after = json.loads((tmp_path / "run/evaluation_after/evaluation.json").read_text())
    assert set(after["metrics"]) == {"vqa"}
    model, mean = (tmp_path / "run/stages/one" / n for n in ("model", "model_ema"))
    plain, averaged = (load_file(folder / "model.safetensors") for folder in (model, mean))
    assert plain.keys() == averaged.keys()
    chosen = load_file(checkpoints / best / "model/model.safetensors")
    assert all(torch.equal(value, chosen[name]) for name, value in plain.items())
    assert not plain["encoder.image_proj.weight"].equal(averaged["encoder.image_proj.weight"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "options",
    [
        ["deepspeed.zero_stage=1"],
        ["deepspeed.zero_stage=3"],
        ["deepspeed.zero_stage=1", "compile=cuda_graphs", "text_lengths=[64, 48]"],
    ],
)
def test_fp16_follows_float32_on_a_gpu(data, tmp_path, options):
    found = {}
    for precision in ("fp32", "fp16"):
        folder = tmp_path / precision
        folder.mkdir()
        command = launched(write_config(folder, data, rows=4), ranks=1)
        done = run([*command, f"precision={precision}", *options])
        assert done.returncode == 0, done.stderr[-3000:]
        found[precision] = curve(folder)
    for step, exact in found["fp32"].items():
        half = found["fp16"][step]
        assert half["loss"] == pytest.approx(exact["loss"], rel=0.02), step
        assert half["loss_scale"] >= 1


def test_another_config_in_the_same_folder_is_refused(whole, data):
    config = write_config(whole, data, rows=3)
    assert on_ranks(whole, 1, main, ["--config", str(config)]) == [2]
    assert "begun with another 'stages'" in (whole / "rank0.log").read_text()


def test_ranks_that_do_not_divide_the_rows_are_refused_before_anything_is_written(data, tmp_path):
    config = write_config(tmp_path, data, rows=3)
    assert on_ranks(tmp_path, 2, main, ["--config", str(config)]) == [2, 2]
    words = "stage 'one': 3 rows of medium 'image' do not divide into 2 ranks x 1 passes"
    assert words in (tmp_path / "rank0.log").read_text()
    assert not (tmp_path / "run").exists()


def test_a_stage_without_data_is_refused(data, tmp_path):
    (tmp_path / "empty.tsv").write_text("")
    config = write_config(tmp_path, data, rows=2)
    empty = f"sources.video_qa.path={tmp_path / 'empty.tsv'}"
    assert on_ranks(tmp_path, 1, main, ["--config", str(config), empty]) == [2]
    told = (tmp_path / "rank0.log").read_text()
    assert re.search(r"source 'video_qa': .*empty.tsv has no rows", told)
    assert not (tmp_path / "run").exists()


def test_another_list_or_model_in_the_same_folder_is_refused(whole, data, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.copytree(data, tmp_path / "data")
    config = write_config(tmp_path, tmp_path / "data", rows=4)
    (tmp_path / "run/config.yaml").unlink()  # the paths are others; what counts are the lists
    lines = (tmp_path / "data/video_qa.tsv").read_bytes().splitlines(keepends=True)
    (tmp_path / "data/video_qa.tsv").write_bytes(b"".join(lines[:-1]))
    assert on_ranks(tmp_path, 1, main, ["--config", str(config)]) == [2]
    told = (tmp_path / "rank0.log").read_text()
    assert "was begun with another list in source 'video_qa'" in told
    other = ["--config", str(write_config(whole, data, rows=4)), "model.overrides.ffn_dim=96"]
    assert on_ranks(tmp_path, 1, main, other) == [2]
    assert "was begun with another 'model'" in (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.stepz=3", "did you mean 'stages.0.steps'|did you mean 'steps'"),
        ("stages.0.evaluate=[vqaa]", "unknown task 'vqaa'"),
        ("precision=fp8", "known: fp32, bf16"),
        ("loading.device=tpu", "device='tpu'; known: auto, gpu, cpu"),
        ("loading.limits.pixelz=3", "did you mean 'loading.limits.pixels'|did you mean 'pixels'"),
        ("media.video_transform=squash", "video_transform='squash'; known: exact"),
        ("stages.1.micro_batches.0.medium=film", "stage 'two': medium 'film'; known: audio"),
        ("stages.1.micro_batches.0.mixture.0.every=8", "needs a mixture with rows in every step"),
        ("stages.1.micro_batches.0.mixture.0.every=0", "source 'qa' has rows=2 and every=0"),
        ("stages.1.micro_batches.0.mixture.0.rows=-2", "source 'qa' has rows=-2 and every=1"),
        ("stages.1.micro_batches=[{medium: image, rows: 0, mixture: []}]", "one and a mixture"),
        ("stages.0.freeze=[encoders]", "known: embeddings, image_encoder"),
        ("stages.0.media.image_sise=32", "did you mean 'image_size'"),
        ("stages.0.media.image_size=big", "stage 'one': media.image_size: Value 'big'"),
        ("stages.0.accumulate=3", "stage 'one': 2 rows of .*do not divide into 3 passes|2 rows do"),
        ("stages.0.weights.voice=a.pt", "weights of the part.*known: text, image"),
        ("stages.0.weights.image=a.pt", "stage 'one': weights.image: no file a.pt"),
        ("stages.0.init_from=nowhere", "nowhere: no saved model"),
        ("sources.qa.path=nowhere.tsv", "nowhere.tsv"),
        ("stages=[]", "stages is empty"),
        ("precision=fp16", "fp16 wants a GPU|zero_stage of at least 1"),
        ("deepspeed.zero_stage=4", "known: 0, 1, 2, 3"),
        ("deepspeed.config=nowhere.json", "nowhere.json: cannot be read as a ds_config"),
    ],
)
def test_mistakes_end_with_a_sentence(data, tmp_path, override, message):
    config = write_config(tmp_path, data, rows=2)
    assert on_ranks(tmp_path, 1, main, ["--config", str(config), override]) == [2]
    told = (tmp_path / "rank0.log").read_text()
    assert re.search(message, told), told[-2000:]
    assert "Traceback" not in told
