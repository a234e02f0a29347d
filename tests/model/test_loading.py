"""Folders that hold no model, another one, or a damaged one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from unival.model.configuration import UnivalConfig
from unival.model.loading import ModelError, load_model
from unival.model.modeling import UnivalForConditionalGeneration


@pytest.fixture
def saved(tmp_path):
    config = UnivalConfig(
        vocab_size=40,
        d_model=16,
        ffn_dim=16,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        image_layers=None,
        video_layers=None,
    )
    UnivalForConditionalGeneration(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_loads(saved):
    assert load_model(saved).encoder.embed_tokens.weight.shape == (40, 16)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no saved model \(config.json\)"):
        load_model(tmp_path)


def test_another_architecture_is_named(saved):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "bart"}))
    with pytest.raises(ModelError, match=r"type 'bart'; wanted 'unival'"):
        load_model(saved)


def test_truncated_weights_are_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged weights"):
        load_model(saved)


def test_missing_weights_are_not_made_up(saved):
    path = saved / "model.safetensors"
    weights = load_file(path)
    del weights["decoder.norm.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys.*decoder\.norm\.bias"):
        load_model(saved)


def test_foreign_weights_are_refused(saved):
    path = saved / "model.safetensors"
    save_file(load_file(path) | {"pooler.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 unexpected keys.*pooler\.weight"):
        load_model(saved)
