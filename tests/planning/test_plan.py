"""Plans of the shipped configs and of hostile ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from unival.config import load_config
from unival.planning.ceilings import find_ceilings
from unival.planning.plan import Options, Plan, plan
from unival.planning.render import text
from unival.training.adapters import Adapter
from unival.training.options import DeepSpeedOptions, MicroBatch, Mixture, Run, Source, Stage

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(**changed: object) -> Run:
    """Two sources of pictures, one in every fourth step, on the tiny model."""
    run = Run(
        output="runs/none",
        sources={"a": Source("a.tsv"), "b": Source("b.tsv")},
        stages=[
            Stage(
                "one",
                steps=1800,
                accumulate=2,
                micro_batches=[
                    MicroBatch(
                        "image",
                        [
                            Mixture("a", rows=16, tasks=["image_caption"]),
                            Mixture("b", rows=8, every=4),
                        ],
                    )
                ],
            )
        ],
        precision="bf16",
    )
    run.model.config = "configs/model/unival_tiny.yaml"
    run.media.image_size = 64
    return replace(run, **changed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stage1() -> Plan:
    run = load_config(Run, ROOT / "configs/pretrain/stage1.yaml")
    run.model.config = str(ROOT / run.model.config)
    return plan(run, "4xA6000", options=Options(price=2.0))


def test_can_four_a6000_pretrain(stage1: Plan) -> None:
    """The question of OFA's issue 422, with arithmetic by hand as a bound."""
    stage = stage1.stages[0]
    assert stage1.fits and stage.fits
    # 2 x (512 + 512 + 512 + 512 / 8) examples, of 1,600 pictures.
    assert stage.examples == 3200
    # Forward: ResNet-101 of 384 pixels is about 46 GFLOP, the rest about 25 for each of two
    # examples; three times that with the backward pass. A6000: 154.8 TFLOP/s at 20 to 75 %.
    work = 3 * 1600 * (46e9 + 2 * 25e9)
    assert work / (4 * 154.8e12 * 0.75) < stage.step.seconds < work / (4 * 154.8e12 * 0.2)
    assert stage.step.low < stage.step.seconds < stage.step.high
    assert stage.hours is not None and stage.gpu_hours is not None and stage.cost is not None
    assert stage.hours.seconds == pytest.approx(stage.step.seconds * 150_000 / 3600)
    assert stage.cost.seconds == pytest.approx(2.0 * 4 * stage.hours.seconds)
    assert stage.samples_per_second.seconds == pytest.approx(3200 / stage.step.seconds)
    # bf16 at stage 1: 2 bytes, 4 bytes, 12 / 4 bytes.
    trained = stage.parameters["trained"]
    memory = stage.memory[1]
    assert memory.parameters == 2 * trained
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 3 * trained
    assert stage.memory[0].refused and not stage.memory[1].refused
    assert sum(stage.parts.values()) == pytest.approx(stage.step.seconds)


def test_cores_that_keep_up(stage1: Plan) -> None:
    stage = stage1.stages[0]
    micro = stage.micro_batches[0]
    # 1,600 pictures a step, 200 a second and core.
    assert micro.cores == pytest.approx(1600 / stage.step.seconds / 200)
    assert stage.cores_configured == 4 * (4 + 4)


def test_text_and_json_say_predicted_and_the_assumptions(stage1: Plan) -> None:
    page = text(stage1)
    for line in page.splitlines():
        if "hours" in line and "a step" not in line:
            assert "predicted" in line, line
    for told in ("4 x A6000", "fits", "ZeRO stage 1", "<- this run", "datasheet", "band", "cores"):
        assert told in page
    told = json.loads(json.dumps(stage1.to_dict()))
    assert told["stages"][0]["memory"][1]["total"] == stage1.stages[0].memory[1].total
    assert told["fits"] is True


def test_rows_of_every_fourth_step_count_a_quarter() -> None:
    found = plan(small(), "2xA100").stages[0]
    # 16 rows with one task, 8 / 4 rows with two; memory for all 24: 24 / (2 ranks x 2 passes).
    assert found.examples == 16 + 2 * 2
    assert found.micro_batches[0].media == 6
    assert found.micro_batches[0].per_second == pytest.approx(18 / found.step.seconds)


def test_the_largest_micro_batch_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    device = replace(find_ceilings("A100"), memory=int(2.2 * GIB))
    device.save(path)
    run = small()
    most = plan(run, "1xA100", path).stages[0].micro_batches[0].largest
    assert most > 12
    run.stages[0].accumulate = 1
    rows = [Mixture("a", rows=most, tasks=["image_caption"])]
    run.stages[0].micro_batches = [MicroBatch("image", rows)]
    memory = plan(run, "1xA100", path).stages[0].memory[1]
    limit = round(device.memory / 1e9, 2) * 1e9
    # Rows of the first plan had 1.1 examples on average, rounded to 1.
    assert memory.total == pytest.approx(limit, rel=0.01)
    assert memory.total + memory.activations / most > limit


def test_what_does_not_fit_says_by_how_much_and_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    device = replace(find_ceilings("A100"), memory=int(2.03 * GIB))
    device.save(path)
    run = small(precision="fp32", deepspeed=DeepSpeedOptions(zero_stage=0))
    run.media.image_size = 128
    found = plan(run, "2xA100", path)
    stage = found.stages[0]
    assert not found.fits
    memory = round(device.memory / 1e9, 2) * 1e9
    assert stage.over == pytest.approx(stage.memory[0].total - memory)
    told = "\n".join(stage.knobs)
    for knob in ("zero_stage=1", "zero_stage=3", "accumulate=4", "recompute", "precision=bf16"):
        assert knob in told
    assert "media.image_size=64" in told
    assert "DOES NOT FIT" in text(found) and "does not fit by" in text(found)


def test_epochs_want_rows(tmp_path: Path) -> None:
    run = small()
    run.stages[0].steps, run.stages[0].epochs = 0, 2.0
    run.stages[0].micro_batches[0].mixture.pop()
    found = plan(run, "1xA100")
    assert found.stages[0].hours is None and "unknown" in text(found)
    # 2 epochs of 800 rows, 16 a step.
    found = plan(run, "1xA100", options=Options(rows={"a": 800}))
    assert found.stages[0].steps == 100
    with pytest.raises(ValueError, match="rows of 'c'"):
        plan(run, "1xA100", options=Options(rows={"c": 8}))
    with pytest.raises(ValueError, match="give the rows of source 'a'"):
        plan(run, "1xA100", options=Options(rows={"b": 8}))


def test_stages_of_other_passes_are_refused() -> None:
    run = small()
    run.stages[0].adapter = Adapter("lora")
    with pytest.raises(ValueError, match=r"'one' has adapter.*cannot be planned"):
        plan(run, "1xA100")


def test_fp16_is_planned_where_there_is_no_gpu() -> None:
    assert plan(small(precision="fp16"), "1xA100").precision == "fp16"


@pytest.mark.parametrize(
    ("gpus", "said"),
    [("4xV100", "unknown GPU 'V100'.*known:"), ("3xA100", "do not divide"), ("x", "unknown GPU")],
)
def test_bad_gpus_are_refused(gpus: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(small(), gpus)


@pytest.mark.parametrize(
    "options",
    [
        {"text": 0},
        {"price": -1.0},
        {"price": math.nan},
        {"decoded": {"image": 0.0}},
        {"decoded": {"smell": 1.0}},
        {"rows": {"a": 0}},
    ],
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="wanted"):
        Options(**options)
