"""A user's ds_config is used as it is; what DeepSpeed trains wrongly under is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import pytest
from ranks import on_ranks

from unival.training.deepspeed_config import deepspeed_config, precision_of
from unival.training.options import DeepSpeedOptions

# As users of DeepSpeed have it lying about, with an optimizer, a schedule and "auto".
PLAIN = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-3, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 4,
                   "warmup_type": "linear"},
    },
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False},
    "bf16": {"enabled": "auto"},
    "wall_clock_breakdown": False,
}  # fmt: skip


SAFE = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}


def with_file(tmp_path: Path, content: object, **fields):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    run = cases.small_run(tmp_path / "run", **fields)
    return replace(run, deepspeed=DeepSpeedOptions(config=str(path), zero_stage=1))


def test_a_file_decides_what_it_mentions_and_the_stage_its_batches(tmp_path):
    run = with_file(tmp_path, PLAIN)
    made = deepspeed_config(run, run.stages[0])
    for key in ("gradient_clipping", "optimizer", "scheduler", "zero_optimization"):
        assert made[key] == PLAIN[key]
    assert made["wall_clock_breakdown"] is False
    # Two micro-batches of one pass each; DeepSpeed multiplies the whole from these two.
    assert made["train_micro_batch_size_per_gpu"] == 1
    assert made["gradient_accumulation_steps"] == 2
    assert "train_batch_size" not in made
    assert precision_of(made) == "fp32"


@pytest.mark.parametrize(
    ("precision", "bf16", "expected"),
    [
        ("bf16", {"enabled": "auto"}, SAFE),
        ("fp32", {"enabled": True}, {"enabled": True}),
        ("bf16", {"enabled": False}, {"enabled": False}),
        ("bf16", None, SAFE),
    ],
)
def test_auto_and_what_is_not_mentioned_come_from_the_run(tmp_path, precision, bf16, expected):
    content = {key: value for key, value in PLAIN.items() if key != "bf16"}
    if bf16 is not None:
        content["bf16"] = bf16
    run = with_file(tmp_path, content, precision=precision)
    made = deepspeed_config(run, run.stages[0])
    assert made["bf16"] == expected
    if bf16 is None or bf16["enabled"] == "auto":
        assert made["data_types"] == {"grad_accum_dtype": "fp32"}


def test_auto_of_an_optimizer_is_the_runs_and_of_a_scheduler_is_refused(tmp_path):
    params = {"lr": "auto", "betas": "auto", "eps": 1e-6, "weight_decay": "auto"}
    run = with_file(tmp_path, {"optimizer": {"type": "Adam", "params": params}})
    made = deepspeed_config(run, run.stages[0])["optimizer"]
    wanted = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01}
    assert made == {"type": "Adam", "params": wanted}
    run = with_file(tmp_path, {"scheduler": {"type": "WarmupLR", "params": {"x": "auto"}}})
    with pytest.raises(ValueError, match=r"ds\.json: the scheduler has values 'auto'"):
        deepspeed_config(run, run.stages[0])


def test_a_plain_file_trains_by_its_own_optimizer_and_schedule(tmp_path):
    run = with_file(tmp_path, PLAIN)
    ((results, rates),) = on_ranks(tmp_path, 1, cases.train_and_rates, run, 4)
    losses = [result.loss for result in results]
    # DeepSpeed's warm-up takes a step before and after the first at a rate of 0.
    assert rates == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3])
    assert losses[0] == losses[1] == losses[2] > losses[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "bf16 with ZeRO stage 0"),
        ({"fp16": {"enabled": True}}, "fp16 wants a GPU"),
        ({"activation_checkpointing": {}}, "reentrant checkpointing.*recompute=true"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm"),
        ({"zero_optimization": {}, "bf16": {"enabled": True}}, "bf16 with ZeRO stage 0"),
    ],
)
def test_traps_are_refused_with_a_sentence(tmp_path, change, words):
    run = with_file(tmp_path, PLAIN | {"bf16": {"enabled": False}} | change)
    with pytest.raises(ValueError, match=words):
        deepspeed_config(run, run.stages[0])


def test_traps_of_the_run_itself_are_refused(tmp_path):
    for options, fields, words in (
        (DeepSpeedOptions(zero_stage=0), {"precision": "bf16"}, "bf16 with ZeRO stage 0"),
        (DeepSpeedOptions(zero_stage=0, offload_optimizer=True), {}, "offload_optimizer wants"),
    ):
        run = replace(cases.small_run(tmp_path, **fields), deepspeed=options)
        with pytest.raises(ValueError, match=words):
            deepspeed_config(run, run.stages[0])


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"zero"', ""])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text):
    run = with_file(tmp_path, {})
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=r"ds\.json: (cannot be read|a ds_config is a mapping)"):
        deepspeed_config(run, run.stages[0])
