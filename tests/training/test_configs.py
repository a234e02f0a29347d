"""The shipped recipes against the paper's numbers, and what launches them on several nodes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from unival.config import load_config
from unival.tasks import TASKS
from unival.training.batches import stage_media
from unival.training.checks import check_run
from unival.training.deepspeed_config import deepspeed_config, precision_of, zero_stage_of
from unival.training.engine import learning_rate
from unival.training.faults import PREEMPTED
from unival.training.options import MicroBatch, Run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs/deepspeed").glob("*.json"))
SLURM = ROOT / "configs/launch/run.slurm"

RECIPES = ("stage1", "stage2", "stage2_highres", "one_stage")
# By hand: what the paper says of its stages, or the released scripts where it is silent.
STEPS = {"stage1": 150_000, "stage2": 90_000, "stage2_highres": 11_328, "one_stage": 109_240}
SAMPLES = {
    "stage1": {"image": 3200},
    "stage2": {"image": 2048, "video": 2048},
    "stage2_highres": {"image": 2048, "video": 2048},
    "one_stage": {"image": 2048, "video": 2048},
}
IMAGE_SIZE = {"stage1": 384, "stage2": 384, "stage2_highres": 480, "one_stage": 384}
CLIP = {"stage2": (224, 8), "stage2_highres": (384, 16), "one_stage": (224, 8)}
# Rate at the peak, step of the peak, rate after the last step.
RATES = {
    "stage1": (2e-4, 4910, 1.40e-4),
    "stage2": (1e-4, 5660, 8.5e-5),
    "stage2_highres": (5e-5, 5660, 4.95e-5),
    "one_stage": (2e-4, 2731, 1.21e-4),
}
STARTS_FROM = {
    "stage1": (None, {"text", "image"}),
    "stage2": ("stage1", {"video"}),
    "stage2_highres": ("stage2", set()),
    "one_stage": (None, {"text", "image", "video"}),
}
# Kinds of the rows in a source's list.
KINDS = {
    "caption": ["caption"],
    "cc12m": ["caption"],
    "qa": ["qa"],
    "ground": ["visual_grounding"],
    "image": ["caption", "qa", "visual_grounding"],
    "video_caption": ["video_caption"],
    "video_qa": ["video_qa"],
    "video": ["video_caption", "video_qa"],
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Recipes name their files from where a run is started."""
    monkeypatch.chdir(ROOT)


def recipe(name: str) -> Run:
    return load_config(Run, ROOT / f"configs/pretrain/{name}.yaml")


def samples_of_a_row(source: str) -> int:
    counts = {sum(kind in task.kinds for task in TASKS.values()) for kind in KINDS[source]}
    assert len(counts) == 1, source
    return counts.pop()


def samples_of_a_step(micro: MicroBatch) -> float:
    """Mean over the steps, of all ranks together."""
    if micro.rows is not None:
        counts = {samples_of_a_row(mix.source) for mix in micro.mixture}
        assert len(counts) == 1
        return micro.rows * counts.pop()
    return sum(mix.rows / mix.every * samples_of_a_row(mix.source) for mix in micro.mixture)


def test_every_recipe_is_known_to_these_tests():
    assert {path.stem for path in CONFIGS} == {"demo", *RECIPES}
    assert [path.name for path in DEEPSPEED] == ["zero1_bf16.json", "zero3_offload.json"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_fit_their_ranks(path):
    run = load_config(Run, path)
    for ranks in (1, 2) if path.stem == "demo" else (8, 16, 32, 64, 128):
        check_run(run, ranks)


@pytest.mark.parametrize("name", RECIPES)
def test_rows_that_do_not_divide_are_refused(name):
    with pytest.raises(ValueError, match="do not divide into 24 ranks"):
        check_run(recipe(name), 24)


@pytest.mark.parametrize("name", RECIPES)
def test_steps_and_samples_are_the_papers(name):
    run = recipe(name)
    [stage] = run.stages
    found = {micro.medium: samples_of_a_step(micro) for micro in stage.micro_batches}
    assert found == SAMPLES[name]
    assert stage.steps == STEPS[name]
    assert stage.steps % 8 == 0  # whole rounds of `every`
    assert all(micro.weight == 1 for micro in stage.micro_batches)
    assert not any(mix.tasks for micro in stage.micro_batches for mix in micro.mixture)


def test_samples_of_the_whole_stages():
    totals = {
        name: STEPS[name] * sum(samples_of_a_step(m) for m in recipe(name).stages[0].micro_batches)
        for name in ("stage1", "stage2")
    }
    assert totals == {"stage1": 480_000_000, "stage2": 368_640_000}


def test_stage_1_balances_its_tasks():
    [micro] = recipe("stage1").stages[0].micro_batches
    rows = {mix.source: (mix.rows, mix.every) for mix in micro.mixture}
    assert rows == {"caption": (512, 1), "qa": (512, 1), "ground": (512, 1), "cc12m": (512, 8)}


@pytest.mark.parametrize("name", ["stage2", "stage2_highres"])
def test_later_stages_balance_their_tasks_without_cc12m(name):
    image, video = recipe(name).stages[0].micro_batches
    assert [mix.source for mix in image.mixture] == ["caption", "qa", "ground"]
    assert [mix.source for mix in video.mixture] == ["video_caption", "video_qa"]
    assert image.balance == video.balance == "balanced"


@pytest.mark.parametrize("name", RECIPES)
def test_optimisation_is_as_published(name):
    run = recipe(name)
    [stage] = run.stages
    peak, warmup, last = RATES[name]
    rates = [learning_rate(stage, step) for step in (warmup - 1, warmup, warmup + 1)]
    assert rates[1] == pytest.approx(peak)
    assert rates[0] < rates[1] > rates[2]
    assert learning_rate(stage, stage.steps) == pytest.approx(last, rel=0.005)
    assert (stage.clip_norm, stage.label_smoothing) == (5.0, 0.0)
    assert (stage.ema_decay, stage.freeze, stage.fine_tuning) == (None, [], False)
    assert (run.optimizer.betas, run.optimizer.eps) == ([0.9, 0.999], 1e-8)
    assert run.optimizer.weight_decay == 0.01
    assert (run.precision, run.batchnorm) == ("bf16", "local")


@pytest.mark.parametrize("name", RECIPES)
def test_media_are_as_published(name):
    run = recipe(name)
    media = stage_media(run, run.stages[0])
    assert (media.image_size, media.image_transform) == (IMAGE_SIZE[name], "pretrain")
    if name in CLIP:
        assert (media.video_size, media.video_frames) == CLIP[name]
        assert (media.video_transform, media.video_indices) == ("pretrain", "random")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_start_from_one_another(name):
    run = recipe(name)
    [stage] = run.stages
    before, parts = STARTS_FROM[name]
    assert stage.weights.keys() == parts
    assert run.text_order == "bart" and run.dict_path is not None
    if before is None:
        assert stage.init_from is None
        assert run.model.config == "configs/model/unival_base.yaml"
    else:
        made = recipe(before)
        assert stage.init_from == f"{made.output}/stages/{made.stages[0].name}/model"
        assert run.dict_path == made.dict_path
    assert run.output == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_configs_are_taken_unchanged(name, path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    run = recipe(name)
    run.deepspeed.config = str(path)
    [stage] = run.stages
    config = deepspeed_config(run, stage)
    assert "auto" not in json.dumps(config)
    assert precision_of(config) == "bf16"
    assert zero_stage_of(config) == {"zero1_bf16": 1, "zero3_offload": 3}[path.stem]
    assert config["bf16"]["check_grad_overflow"] is True
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["gradient_clipping"] == 5.0
    assert config["gradient_accumulation_steps"] == 4 * len(SAMPLES[name])
    zero = config["zero_optimization"]
    assert ("offload_optimizer" in zero) == (path.stem == "zero3_offload")
    DeepSpeedZeroConfig(**zero)  # refuses keys that it does not know


def test_the_hostfile_is_one():
    from deepspeed.launcher.runner import fetch_hostfile

    found = fetch_hostfile(str(ROOT / "configs/launch/hostfile"))
    assert found == {"node01": 8, "node02": 8}


# Stand-ins. srun: options end at the first word without a dash; every task says what it was given;
# the status is the highest. scontrol: the nodes, and requests to requeue.
SRUN = """#!/bin/bash
options=()
while [[ $1 == -* ]]; do options+=("$1"); shift; done
printf '%s\\n' "${options[@]}" > "$RECORD/srun"
highest=0
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@" &
    pid=$! status=0
    echo "$pid" > "$RECORD/started$task"
    wait "$pid" || status=$?
    ((status > highest)) && highest=$status
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$RECORD/scontrol"
case $1 in
    show) printf 'node7\\nnode8\\n' ;;
    requeue) exit "$REQUEUE_STATUS" ;;
esac
"""
PYTHON = """#!/bin/bash
echo "$$" > "$RECORD/pid$RANK"
env | grep -E '^(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)=' > "$RECORD/env$RANK"
printf '%s\\n' "$@" > "$RECORD/args$RANK"
statuses=($STATUSES)
exit "${statuses[$RANK]}"
"""


def submit(folder: Path, statuses: list[int], requeue_status: int = 0) -> Any:
    """Run the batch script as SLURM would, on two nodes of two tasks; what was asked for is left in
    the folder."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = dict(
        os.environ,
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        PYTHON=str(programs / "python"),
        RECORD=str(folder),
        STATUSES=" ".join(map(str, statuses)),
        REQUEUE_STATUS=str(requeue_status),
        SLURM_JOB_ID="123456",
        SLURM_JOB_NODELIST="node[7-8]",
        SLURM_CPUS_PER_TASK="8",
    )
    command = ["bash", str(SLURM), "some.yaml", "output=runs/a b", "stages.0.steps=3"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def requeued(folder: Path) -> list[str]:
    lines = (folder / "scontrol").read_text().splitlines()
    return [line for line in lines if line.startswith("requeue")]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([0, 0, 0, 0], 0),
        ([1, 1, 1, 1], 1),
        ([2, 2, 2, 2], 2),
        ([PREEMPTED] * 4, PREEMPTED),
        ([PREEMPTED, PREEMPTED, 137, PREEMPTED], 137),
        ([0, 0, 143, 0], 143),
    ],
)
def test_a_job_is_requeued_exactly_when_it_was_stopped_on_request(tmp_path, statuses, status):
    done = submit(tmp_path, statuses)
    assert done.returncode == status, done.stderr
    assert requeued(tmp_path) == (["requeue 123456"] if status == 75 else [])


def test_a_job_that_cannot_be_requeued_hands_its_status_on(tmp_path):
    done = submit(tmp_path, [PREEMPTED] * 4, requeue_status=1)
    assert done.returncode == PREEMPTED
    assert requeued(tmp_path) == ["requeue 123456"]
    assert "submit it again" in done.stderr


def test_tasks_become_ranks(tmp_path):
    assert submit(tmp_path, [0, 0, 0, 0]).returncode == 0
    for rank in range(4):
        given = dict(
            line.split("=", 1) for line in (tmp_path / f"env{rank}").read_text().splitlines()
        )
        assert given == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "MASTER_ADDR": "node7",
            "MASTER_PORT": "23456",
        }
        arguments = (tmp_path / f"args{rank}").read_text().splitlines()
        run = ["-m", "unival.train", "--config", "some.yaml"]
        assert arguments == [*run, "output=runs/a b", "stages.0.steps=3"]
        # The process that SLURM has started, and signals, is the one that trains.
        started = (tmp_path / f"started{rank}").read_text()
        assert (tmp_path / f"pid{rank}").read_text() == started


def test_the_job_is_asked_to_stop_in_time(tmp_path):
    directives = [
        line.split()[1] for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    # Not B:USR1, which only the shell would get.
    assert "--signal=USR1@120" in directives
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=8"} <= set(directives)
    assert "--gpus-per-node=8" in directives
    submit(tmp_path, [0, 0, 0, 0])
    options = (tmp_path / "srun").read_text().splitlines()
    # The first rank that ends with 75 must not end the others, nor a lost one be waited for.
    assert options == ["--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=8"]


def test_the_batch_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
