"""Opening a saved model, with a sentence where the folder holds something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration


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
