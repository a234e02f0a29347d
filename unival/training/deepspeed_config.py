"""The ds_config of a stage: a user's JSON as it is, or one made from the run's options."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from unival.training.options import Run, Stage

log = logging.getLogger(__name__)

STEP_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
)
# Elements that are reduced at once. DeepSpeed's own 500 M double a rank's memory.
BUCKET = 50_000_000
# fairseq's fp16: first scale 2**7, doubled after 128 good updates.
FP16 = {"enabled": True, "initial_scale_power": 7, "loss_scale_window": 128, "hysteresis": 1}


def deepspeed_config(run: Run, stage: Stage) -> dict[str, Any]:
    """The ds_config of a stage.

    A JSON of the user decides what it mentions; only the sizes of batches are always the stage's,
    and values "auto" are filled in.

    Raises:
        ValueError: the JSON cannot be read, or the combination is one of those under which
            DeepSpeed trains wrongly (README, ZeRO and precision).
    """
    config = _generated(run, stage)
    if run.deepspeed.config is not None:
        path = Path(run.deepspeed.config)
        given = _read(path)
        for key in STEP_KEYS:
            if given.get(key, "auto") not in ("auto", config[key]):
                log.warning("%s: %s is ignored: the stage's rows decide", path, key)
            given[key] = config[key]
        if "auto" in json.dumps(given.get("scheduler", {})):
            raise ValueError(
                f"{path}: the scheduler has values 'auto'; write them out, or leave the scheduler "
                "out: then the stage's own is used"
            )
        config = _filled(given, config, _optimizer(run, stage))
        for key in ("gradient_clipping", "bf16", "fp16"):
            if key not in given and config.get(key):
                log.info("%s is silent about %s: %s", path, key, config[key])
    del config["train_batch_size"]  # DeepSpeed multiplies it from the other two
    _refuse_traps(config)
    return config


def precision_of(config: dict[str, Any]) -> str:
    """fp32, bf16 or fp16."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled"):
            return name
    return "fp32"


def zero_stage_of(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _generated(run: Run, stage: Stage) -> dict[str, Any]:
    options = run.deepspeed
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if options.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": 10 * BUCKET,
            "sub_group_size": BUCKET,  # updated at once, from a copy of its gradients
        }
    if options.offload_optimizer:
        if options.zero_stage == 0:
            raise ValueError("deepspeed.offload_optimizer wants deepspeed.zero_stage of at least 1")
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(stage.micro_batches) * stage.accumulate,
        # A step ends with `step()`. DeepSpeed's own counting takes the last pass for the one in
        # which every weight gets its gradient; ours are of different media (CPU offload).
        "managed_gradient_accumulation": False,
        "gradient_clipping": stage.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if run.precision == "bf16":
        # The passes of a step are summed in float32; a gradient that is not finite stops the step.
        # They are added as they come, so that none is kept in bf16 beside.
        config["bf16"] = {
            "enabled": True,
            "check_grad_overflow": True,
            "immediate_grad_update": True,
        }
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif run.precision == "fp16":
        config["fp16"] = dict(FP16)
    config["train_batch_size"] = "auto"
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a ds_config JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a ds_config is a mapping of keys to values")
    return given


def _optimizer(run: Run, stage: Stage) -> dict[str, Any]:
    """What "auto" stands for in a ds_config's optimizer."""
    options = run.optimizer
    return {
        "type": "AdamW",
        "params": {
            "lr": stage.learning_rate,
            "betas": list(options.betas),
            "eps": options.eps,
            "weight_decay": options.weight_decay,
        },
    }


def _filled(
    given: dict[str, Any], generated: dict[str, Any], optimizer: dict[str, Any]
) -> dict[str, Any]:
    """The user's values; "auto" and what the file does not mention from the run's options."""
    silent = {key: value for key, value in generated.items() if key not in given}
    halves = [given[key].get("enabled", "auto") for key in ("fp16", "bf16") if key in given]
    if any(enabled != "auto" for enabled in halves):  # the file has decided on the precision
        for key in ("fp16", "bf16", "data_types"):
            silent.pop(key, None)
    for key in ("fp16", "bf16"):
        if key in given and key in generated and given[key].get("enabled") in ("auto", True):
            given[key] = generated[key] | given[key]
    own = generated | {"optimizer": optimizer}
    filled = silent | {key: _without_auto(given[key], own.get(key)) for key in given}
    return {key: value for key, value in filled.items() if value is not None}


def _without_auto(value: Any, own: Any) -> Any:
    if value == "auto":
        return own
    if isinstance(value, dict):
        below = own if isinstance(own, dict) else {}
        pairs = {name: _without_auto(v, below.get(name)) for name, v in value.items()}
        return {name: v for name, v in pairs.items() if v is not None}
    return value


def _refuse_traps(config: dict[str, Any]) -> None:
    precision, stage = precision_of(config), zero_stage_of(config)
    if precision != "fp32" and stage == 0:
        raise ValueError(
            f"{precision} with ZeRO stage 0: DeepSpeed spends an Adam step at the start, so the "
            "first updates are too small (bf16), or unscales gradients wrongly (fp16); take "
            "deepspeed.zero_stage of at least 1, also on one process"
        )
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision=fp16 wants a GPU; on a CPU take bf16 or fp32")
    if "activation_checkpointing" in config:
        raise ValueError(
            "activation_checkpointing of the ds_config is DeepSpeed's reentrant checkpointing, "
            "under which blocks whose input needs no gradient get none; remove it and set "
            "recompute=true"
        )
    if config.get("torch_autocast", {}).get("enabled"):
        raise ValueError("torch_autocast of the ds_config is not supported; take bf16 or fp16")
    if stage == 1 and config["zero_optimization"].get("overlap_comm"):
        raise ValueError("overlap_comm of the ds_config does nothing at ZeRO stage 1: remove it")
    if config.get("zero_optimization", {}).get("offload_param"):
        raise ValueError("offload_param of the ds_config is not supported; offload_optimizer is")
