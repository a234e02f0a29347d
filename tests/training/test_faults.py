"""What can happen to a run: requests to stop, values that are not finite, ranks that die."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_cases
import pytest
import yaml
from ranks import Ranks, free_port, on_ranks
from safetensors.torch import load_file

from unival.evaluation.report import write_report
from unival.training.checkpoint import StageFolder

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path, data: Path, steps: int = 6, **fields: object) -> Path:
    """One stage over two sources of images, with everything that a resumed run could get wrong:
    dropout, a random choice of image tokens, an average, batch norm, shared rows."""
    folder.mkdir(parents=True, exist_ok=True)
    mixture = [{"source": "qa"}, {"source": "caption"}]
    stage = {
        "name": "one",
        "steps": steps,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "micro_batches": [
            {"medium": "image", "rows": 4, "balance": "proportional", "mixture": mixture}
        ],
    }
    overrides = {
        "d_model": 32,
        "ffn_dim": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "dropout": 0.1,
        "sample_patch_num": 3,
        "video_layers": None,
        "audio_channels": None,
    }
    content = {
        "output": str(folder / "run"),
        "model": {"config": str(ROOT / "configs/model/unival_tiny.yaml"), "overrides": overrides},
        "deepspeed": {"zero_stage": 2},
        "log_every": 1,
        "tensorboard": False,
        "checkpoint_every": 2,
        "evaluate_before": False,
        "negatives": str(data / "negative_sample"),
        "sources": {
            "qa": {"path": str(data / "vision_language_qa.tsv")},
            "caption": {"path": str(data / "vision_language_caption.tsv")},
        },
        "media": {"image_size": 64},
        "stages": [stage],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content | fields))
    return path


def arguments(config: Path) -> list[str]:
    return ["--config", str(config)]


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> dict[str, object]:
    """All tensors of the last checkpoint, and the samples of every step: the last time it was
    trained on, for a run that was killed comes by some steps twice."""
    path = StageFolder(folder / "run", "one").latest()
    found = {f.name: load_file(f) for f in sorted(path.glob("*.safetensors"))}
    found["data"] = json.loads((path / "state.json").read_text())["data"]
    for file in sorted(folder.glob("samples-*.jsonl")):
        found[file.name] = dict(map(json.loads, file.read_text().splitlines()))
    return found


def assert_same_outcome(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        if part.endswith(".safetensors"):
            assert found[part].keys() == value.keys()
            for name, tensor in value.items():
                assert found[part][name].equal(tensor), f"{part}: {name}"
        else:
            assert found[part] == value, part


def noted(folder: Path, config: Path) -> Ranks:
    return Ranks(folder, 2, fault_cases.train_noted, folder, arguments(config))


def test_a_run_goes_on_after_a_request_to_stop_as_if_nothing_had_been(data, tmp_path):
    """SIGUSR1 to one rank of two: both finish the step, save, and end with the status of a run that
    can go on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = write_config(whole, data, steps=14)
    assert noted(whole, config).results() == [0, 0]
    config = write_config(stopped, data, steps=14)
    ranks = noted(stopped, config)
    while not (stopped / "run/metrics.jsonl").is_file() or len(entries(stopped)) < 3:
        assert all(process.is_alive() for process in ranks.processes)
        time.sleep(0.01)
    os.kill(ranks.processes[1].pid, signal.SIGUSR1)
    assert ranks.results() == [75, 75]
    told = "".join(output.read_text() for output in ranks.outputs)
    assert "stopped on request: stage one after step" in told
    place = StageFolder(stopped / "run", "one")
    assert place.latest() == place.at(entries(stopped)[-1]["step"])
    assert not place.finished
    assert noted(stopped, config).results() == [0, 0]
    assert_same_outcome(outcome(stopped), outcome(whole))
    steps = [entry["step"] for entry in entries(stopped)]
    assert steps == list(range(1, 15))  # none twice: it went on from the step that it stopped at


@pytest.mark.parametrize(("fault", "module"), [("nan", fault_cases.WHERE), ("grad", "encoder")])
def test_a_value_that_is_not_finite_halts_all_ranks_and_is_reported(data, tmp_path, fault, module):
    config = write_config(tmp_path, data)
    work = (fault_cases.train_with_fault, fault, 4, 1, arguments(config))
    ranks = Ranks(tmp_path, 2, *work)
    assert ranks.results() == [1, 1]
    assert "Steps that were not finite" in write_report(tmp_path / "run").read_text()
    told = "".join(output.read_text() for output in ranks.outputs)
    assert "the loss or a gradient of step 4 is not finite" in told
    assert "Traceback" not in told
    assert max(entry["step"] for entry in entries(tmp_path)) == 3
    assert StageFolder(tmp_path / "run", "one").latest().name == "step-000002"
    report = json.loads((tmp_path / "run/nonfinite/one-step000004-rank1.json").read_text())
    (found,) = report["passes"]
    assert found["medium"] == "image"
    assert [set(s) for s in found["samples"]] == [{"source", "id", "file", "row"}] * 2
    assert all(Path(s["file"]).is_file() for s in found["samples"])
    if fault == "nan":
        assert found["first_module"]["module"] == module
        assert found["first_module"]["input_finite"]
        assert found["first_module"]["largest_input"] > 0
    else:
        assert found["first_module"] is None
        assert found["first_gradient"].startswith(module)
    other = json.loads((tmp_path / "run/nonfinite/one-step000004-rank0.json").read_text())
    assert all(entry["first_module"] is None for entry in other["passes"])


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "fp32"),
        (1, "bf16"),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_a_skipped_step_changes_nothing(data, tmp_path, stage, precision):
    """Neither weights nor moments, their average, batch norm's statistics or any count of them."""
    config = write_config(
        tmp_path,
        data,
        nonfinite="skip",
        checkpoint_every=1,
        keep=9,
        precision=precision,
        deepspeed={"zero_stage": stage},
    )
    work = (fault_cases.train_with_fault, "nan", 4, 1, arguments(config))
    assert on_ranks(tmp_path, 2, *work) == [0, 0]
    steps = entries(tmp_path)
    assert [entry["refused"] for entry in steps] == [0, 0, 0, 1, 1, 1]
    assert steps[3]["loss"] is None
    assert all(entry["loss"] is not None for entry in steps if entry["step"] != 4)
    place = StageFolder(tmp_path / "run", "one")
    for file in (path.name for path in place.at(3).glob("r*.safetensors")):
        before, after, later = (load_file(place.at(s) / file) for s in (3, 4, 5))
        for name, tensor in before.items():
            assert after[name].equal(tensor), name
        assert any(not later[name].equal(tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_a_rollback_takes_the_weights_of_the_checkpoint_and_later_samples(data, tmp_path):
    config = write_config(tmp_path, data, nonfinite="rollback")
    work = (fault_cases.train_with_fault, "nan", 5, 0, arguments(config))
    # The fault is tied to the number of the step, so the run meets it again, up to the limit.
    assert Ranks(tmp_path, 2, *work).results() == [1, 1]
    told = (tmp_path / "rank0.log").read_text()
    assert "nonfinite_limit=8" in told
    steps = [entry["step"] for entry in entries(tmp_path)]
    assert steps == [1, 2, 3, 4]  # every attempt began after step 4 and ended in step 5
    assert [path.name for path in (tmp_path / "run/nonfinite").iterdir()] == [
        "one-step000005-rank0.json"
    ]

    config = write_config(tmp_path / "once", data, nonfinite="rollback", checkpoint_every=3)
    ranks = Ranks(tmp_path / "once", 2, fault_cases.train_with_one_fault, 5, 0, arguments(config))
    assert ranks.results() == [0, 0]
    found = entries(tmp_path / "once")
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 4, 5, 6]
    assert found[-1]["rollbacks"] == 1
    state = StageFolder(tmp_path / "once/run", "one").latest() / "state.json"
    # 6 steps count, of 4 rows; the 2 that were taken back consumed theirs all the same.
    assert sum(json.loads(state.read_text())["data"]["samples"].values()) == 4 * (6 + 2)


def launched(script: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks under the deepspeed launcher."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("TRITON_INTERPRET", None)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return subprocess.run(
        [launcher, "--num_gpus", "2", "--master_port", str(free_port()), *script],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["raise", pytest.param("die", marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_job_with_its_traceback_first(data, tmp_path, kind):
    config = write_config(tmp_path, data)
    began = time.monotonic()
    script = [fault_cases.__file__, kind, "3", "1", *arguments(config)]
    done = launched(script, tmp_path)
    assert done.returncode != 0
    ended = time.time()
    last = (tmp_path / "run/metrics.jsonl").stat().st_mtime
    assert ended - last < 60
    assert time.monotonic() - began < 120
    failures = sorted((tmp_path / "run/failures").glob("*.txt"))
    if kind == "raise":
        first = done.stderr.index("Traceback")
        assert "ArithmeticError: the sum of a test" in done.stderr[first:]
        assert "ArithmeticError" in done.stderr[first : first + 6000].split("another rank")[0]
        assert [path.name for path in failures] == ["rank1.txt"]
        assert "ArithmeticError: the sum of a test" in failures[0].read_text()
    else:
        assert failures == []


def kill_until_finished(folder: Path, config: Path, kills: int, chance: random.Random, longest):
    """Start the run until it ends by itself; returns how often it was killed on the way."""
    for done in range(kills + 1):
        ranks = noted(folder, config)
        if done < kills:
            deadline = time.monotonic() + chance.uniform(0, longest)
            while time.monotonic() < deadline and not all(end.poll(0) for end in ranks.ends):
                time.sleep(0.005)
        if done == kills or all(end.poll(0) for end in ranks.ends):
            assert ranks.results() == [0, 0]
            break
        victims = chance.choice([[0], [1], [0, 1]])
        for rank in victims:
            os.kill(ranks.processes[rank].pid, signal.SIGKILL)
        assert all(status in (None, 1) for status in ranks.end(patience=5))
    return done


def kill_often(data: Path, tmp_path: Path, kills: int, steps: int) -> None:
    whole = tmp_path / "whole"
    config = write_config(whole, data, steps=steps)
    noted(whole, config).results()  # the first one also warms the caches
    expected = outcome(whole)
    began = time.monotonic()
    config = write_config(tmp_path / "again", data, steps=steps)
    assert noted(tmp_path / "again", config).results() == [0, 0]
    longest = time.monotonic() - began
    assert_same_outcome(outcome(tmp_path / "again"), expected)
    chance, left, runs = random.Random(20_230_730), kills, 0
    while left > 0:
        folder = tmp_path / f"killed{runs}"
        config = write_config(folder, data, steps=steps)
        left -= kill_until_finished(folder, config, left, chance, longest)
        assert_same_outcome(outcome(folder), expected)
        runs += 1


@pytest.mark.timeout(400)
def test_a_run_that_is_killed_five_times_ends_as_one_that_is_not(data, tmp_path):
    kill_often(data, tmp_path, kills=5, steps=6)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_that_is_killed_fifty_times_ends_as_one_that_is_not(data, tmp_path):
    kill_often(data, tmp_path, kills=50, steps=12)
