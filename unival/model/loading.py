"""Opening a saved model or adapter, with a sentence where the folder holds something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration

# Fields of an adapter_config.json that do not say what the weights are multiplied with, or whose
# effect on a merge is seen to below. Any other that is set asks for arithmetic that is not here.
_LORA_FIELDS = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern",
    "layers_to_transform", "megatron_core", "qalora_group_size", "r", "lora_alpha", "use_rslora",
    "bias", "init_lora_weights",
}  # fmt: skip
_LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


class ModelError(ValueError):
    """A folder without a usable model; the message names it and what is wrong."""


def load_model(folder: str | Path) -> UnivalForConditionalGeneration:
    """The model that `save_pretrained` wrote into a folder, in float32.

    Stricter than `from_pretrained`, which fills missing weights with random ones and loads another
    architecture's config with a warning.

    Raises:
        ModelError: no model there, another architecture, damaged or incomplete weights.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no saved model (config.json) in this folder")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path}: not a model config: {error}") from error
    if kind != UnivalConfig.model_type:
        raise ModelError(f"{path}: a model of type {kind!r}; wanted {UnivalConfig.model_type!r}")
    try:
        loaded: Any = UnivalForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        model, found = loaded
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: damaged weights: {str(error).splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[problem])):
            what = problem.replace("_", " ")
            raise ModelError(f"{folder}: {len(names)} {what} in the weights, first {names[0]!r}")
    return model


def with_config(
    model: UnivalForConditionalGeneration, config: UnivalConfig
) -> UnivalForConditionalGeneration:
    """The weights of a model under another config, which may have more media encoders.

    Raises:
        ModelError: the config is of other weights than these and those of new encoders.
    """
    other = UnivalForConditionalGeneration(config)
    own, wanted = model.state_dict(), other.state_dict()
    for name, tensor in own.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            there = list(wanted[name].shape) if name in wanted else "not there"
            raise ModelError(f"{name!r} is {list(tensor.shape)}; under the other config {there}")
    for name in wanted.keys() - own.keys():
        if not re.match(r"encoder\.(image|video|audio)_", name):
            raise ModelError(f"{name!r} is needed under the other config; the weights lack it")
    other.load_state_dict(own, strict=False)
    return other


@torch.no_grad()
def fold_adapter(model: UnivalForConditionalGeneration, folder: str | Path) -> None:
    """Make an adapter that `peft` has saved a part of a model, which stays a plain one.

    LoRA's products are added to the weights of its linear maps; a soft prompt becomes the model's
    own. Nothing is changed where an error is raised.

    Args:
        model: what the adapter was trained on.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: no adapter there, a kind or option of `peft` that this cannot fold, damaged
            weights, or weights for another model.
    """
    folder = Path(folder)
    config, weights = _read_adapter(folder)
    kind = config.get("peft_type")
    if kind == "LORA":
        changes = _lora_changes(model, folder, config, weights)
        for name, change in changes.items():
            weight = model.get_parameter(name)
            weight.copy_(weight.float() + change.to(weight.device))
    elif kind == "PROMPT_TUNING":
        if model.config.num_virtual_tokens:
            raise ModelError(f"{folder}: a soft prompt for a model that has one already")
        count, vectors = config.get("num_virtual_tokens"), weights.get("prompt_embeddings")
        shape = None if vectors is None else list(vectors.shape)
        if not isinstance(count, int) or vectors is None or not shape or not 0 < count <= shape[0]:
            raise ModelError(f"{folder}: prompt_embeddings of {count!r} virtual tokens are {shape}")
        try:
            # For encoder-decoders peft also has vectors for the decoder, which it does not use.
            model.encoder.set_soft_prompt(vectors[:count])
        except ValueError as error:
            raise ModelError(f"{folder}: {error}") from error
    else:
        raise ModelError(f"{folder}: an adapter of type {kind!r}; known: LORA, PROMPT_TUNING")


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for wanted in (path, file):
        if not wanted.is_file():
            raise ModelError(f"{folder}: no saved adapter ({wanted.name}) in this folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not an adapter's config: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not an adapter's config: wanted a mapping")
    try:
        return config, load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged weights: {error}") from error


def _lora_changes(
    model: UnivalForConditionalGeneration,
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
) -> dict[str, Tensor]:
    """By the name of a weight, what LoRA adds to it: alpha / r * B A, in float32."""
    rank, scale = _lora_rank_and_scale(folder, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise ModelError(f"{folder}: {key!r} is no factor of LoRA, which is all that is folded")
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    if not pairs:
        raise ModelError(f"{folder}: no weights in the adapter")
    changes, modules = {}, dict(model.named_modules())
    for name, factors in pairs.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ModelError(f"{folder}: LoRA of {name!r}, which is no linear map of this model")
        out, width = module.weight.shape
        found = {factor: list(tensor.shape) for factor, tensor in sorted(factors.items())}
        if found != (wanted := {"A": [rank, width], "B": [out, rank]}):
            raise ModelError(f"{folder}: LoRA of {name!r} is {found}; wanted {wanted}")
        changes[f"{name}.weight"] = scale * (factors["B"] @ factors["A"])
    return changes


def _lora_rank_and_scale(folder: Path, config: dict[str, Any]) -> tuple[int, float]:
    """The factor of B A; refuses what makes more of LoRA than W + factor * B A."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ModelError(f"{folder}: LoRA of r={rank!r}, lora_alpha={alpha!r}: wanted numbers")
    other = {name: value for name, value in config.items() if name not in _LORA_FIELDS and value}
    if config.get("bias", "none") != "none":
        other["bias"] = config["bias"]
    # The other named beginnings change the weights that LoRA is added to.
    if isinstance(begun := config.get("init_lora_weights", True), str) and begun != "gaussian":
        other["init_lora_weights"] = begun
    if other:
        name, value = min(other.items())
        raise ModelError(f"{folder}: LoRA with {name}={value!r} cannot be folded")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
