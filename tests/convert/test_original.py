"""Original checkpoints: names, safety of opening, refusals."""

from __future__ import annotations

import argparse
import os
import subprocess

import pytest
import torch

from unival.convert.original import (
    CheckpointError,
    convert_state_dict,
    infer_config,
    load_original,
    read_original,
    to_original,
    to_ours,
)
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = UnivalConfig(
        vocab_size=60,
        d_model=16,
        ffn_dim=32,
        encoder_layers=2,
        decoder_layers=1,
        num_heads=2,
        image_layers=(1, 1, 1),
        image_channels=(8, 8, 16),
        video_layers=None,
        audio_channels=(4, 4, 8, 8, 8, 8),
        scale_resids=True,
    )
    model = UnivalForConditionalGeneration(config)
    names = to_original(model.state_dict())
    found = {names[n]: t for n, t in model.state_dict().items() if n in names}
    found["decoder.embed_tokens.weight"] = found["encoder.embed_tokens.weight"]
    return found


def test_names_of_the_original_are_the_published_ones(state):
    for name in (
        "encoder.embed_images.layer1.0.downsample.0.weight",
        "encoder.embed_audios.logmel_extractor.melW",
        "encoder.layers.1.self_attn.c_attn",
        "encoder.layers.0.attn_ln.bias",
        "encoder.layers.0.w_resid",
        "decoder.layers.0.encoder_attn.c_attn",
        "decoder.layers.0.cross_attn_ln.weight",
        "decoder.layers.0.ffn_layernorm.weight",
        "decoder.cross_pos_k_linear.weight",
        "decoder.image_rel_pos_table_list.0.weight",
        "encoder.layernorm_embedding.weight",
    ):
        assert name in state


def test_config_follows_from_the_shapes(state):
    config = infer_config(state)
    assert (config.d_model, config.ffn_dim, config.num_heads) == (16, 32, 2)
    assert (config.encoder_layers, config.decoder_layers) == (2, 1)
    assert (config.image_layers, config.image_channels) == ([1, 1, 1], [8, 8, 16])
    assert config.audio_channels == [4, 4, 8, 8, 8, 8]
    assert config.video_layers is None
    assert config.scale_resids


def test_loading_keeps_every_value(state):
    model = load_original(state)
    for name, tensor in convert_state_dict(state).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_half_precision_checkpoints_become_float32(state):
    half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    assert load_original(half).encoder.embed_tokens.weight.dtype == torch.float32


def test_a_missing_entry_is_named(state):
    lacking = {n: t for n, t in state.items() if n != "decoder.layers.0.fc1.bias"}
    with pytest.raises(CheckpointError, match=r"lacks 1 entries.*decoder.layers.0.ffn.fc1.bias"):
        load_original(lacking)


def test_a_foreign_entry_is_named(state):
    with pytest.raises(CheckpointError, match=r"bert\.pooler"):
        load_original(state | {"bert.pooler.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"is no entry of"):
        to_ours("model.layers.0.mlp.weight")


def test_another_architecture_is_refused():
    with pytest.raises(CheckpointError, match="no UnIVAL or OFA checkpoint"):
        infer_config({"vision.patch_embed.weight": torch.zeros(1)})


def test_another_shape_is_refused(state):
    config = infer_config(state, ffn_dim=64)
    with pytest.raises(CheckpointError, match=r"\[32, 16\] in the checkpoint, \[64, 16\]"):
        load_original(state, config)


def test_a_checkpoint_with_options_opens(state, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": state, "args": argparse.Namespace(arch="unival_base")}, path)
    assert read_original(path).keys() == state.keys()


class Malicious:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return (subprocess.call, (["touch", self.marker],))


def test_a_checkpoint_that_would_run_code_is_refused_unrun(tmp_path):
    path, marker = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({"model": Malicious(str(marker))}, path)
    with pytest.raises(CheckpointError, match="refused"):
        read_original(path)
    assert not os.path.exists(marker)


def test_damaged_and_missing_files_are_named(tmp_path):
    path = tmp_path / "broken.pt"
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(CheckpointError, match=r"broken\.pt"):
        read_original(path)
    with pytest.raises(CheckpointError, match=r"no such file"):
        read_original(tmp_path / "absent.pt")
