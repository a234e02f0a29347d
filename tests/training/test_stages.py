"""What a stage begins with: whose weights, which encoders, what is frozen, which media."""

from __future__ import annotations

from dataclasses import replace

import engine_cases as cases
import pytest
import torch

from unival.model.configuration import UnivalConfig
from unival.model.loading import ModelError
from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.batches import stage_media
from unival.training.freezing import freeze
from unival.training.trainer import make_model

ALL = ["image", "video", "audio"]


def tiny(**overrides) -> UnivalForConditionalGeneration:
    path = cases.ROOT / "configs/model/unival_tiny.yaml"
    return UnivalForConditionalGeneration(
        UnivalConfig.from_yaml(path, **(cases.OVERRIDES | overrides))
    )


def frozen_after(rules, shown=ALL) -> dict[str, bool]:
    model = tiny()
    freeze(model, rules, shown)
    return {name: not p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("rule", "frozen", "trained"),
    [
        ("embeddings", ["encoder.embed_tokens.weight"], ["encoder.layers.0.ffn.fc1.weight"]),
        ("image_encoder", ["encoder.image_encoder.conv1.weight"], ["encoder.image_proj.weight"]),
        ("video_encoder", ["encoder.video_encoder.conv1.weight"], ["encoder.video_proj.weight"]),
        (
            "media_encoders",
            ["encoder.audio_encoder.conv_block1.conv1.weight", "encoder.image_encoder.bn1.weight"],
            ["encoder.audio_proj.weight", "encoder.image_positions.weight"],
        ),
        (
            "encoder",
            ["encoder.layers.0.ffn.fc1.weight", "encoder.embed_tokens.weight"],
            ["encoder.image_proj.weight", "decoder.layers.0.ffn.fc1.weight"],
        ),
        (
            "decoder",
            ["decoder.layers.0.ffn.fc1.weight", "encoder.embed_tokens.weight"],
            ["encoder.layers.0.ffn.fc1.weight"],
        ),
    ],
)
def test_a_rule_freezes_what_its_name_says(rule, frozen, trained):
    found = frozen_after([rule])
    assert all(found[name] for name in frozen)
    assert not any(found[name] for name in trained)


def test_only_connections_are_exactly_the_three_projections():
    trained = {name for name, frozen in frozen_after(["all_but_connections"]).items() if not frozen}
    assert trained == {f"encoder.{m}_proj.{n}" for m in ALL for n in ("weight", "bias")}
    found = frozen_after(["all_but_connections_and_positions"])
    more = {name for name, frozen in found.items() if not frozen} - trained
    assert more
    assert all(name.partition(".")[2].startswith(f"{m}_positions") for name in more
               for m in ALL if name.startswith(f"encoder.{m}"))  # fmt: skip


def test_media_that_a_stage_does_not_show_are_not_trained():
    found = frozen_after([], shown=["image", "text"])
    for name, frozen in found.items():
        assert frozen == name.startswith(("encoder.video_", "encoder.audio_")), name


def test_nothing_to_train_and_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="leave nothing to train"):
        freeze(tiny(), ["encoder", "decoder", "media_encoders", "all_but_connections"], [])
    with pytest.raises(ValueError, match="unknown rule 'all'; known: embeddings"):
        freeze(tiny(), ["all"], ALL)


def test_a_stage_begins_with_the_saved_model_and_gains_the_encoders_it_lacks(tmp_path):
    torch.manual_seed(3)
    saved = tiny(audio_channels=None, sample_patch_num=3)
    saved.save_pretrained(tmp_path / "saved")
    run = cases.small_run(tmp_path, {"init_from": str(tmp_path / "saved")})
    run.model.overrides["sample_patch_num"] = 5
    model = make_model(run, run.stages[0], None)
    state, own = model.state_dict(), saved.state_dict()
    for name, tensor in own.items():
        assert state[name].equal(tensor), name
    new = state.keys() - own.keys()
    assert new
    assert all(name.startswith("encoder.audio_") for name in new)
    assert model.config.audio_channels == [8, 16, 32, 64, 128, 128]
    assert model.config.sample_patch_num == 5
    again = make_model(run, run.stages[0], None).state_dict()
    assert all(state[name].equal(again[name]) for name in new)  # fresh weights from the seed


def test_a_saved_model_of_another_size_is_refused_with_the_entry(tmp_path):
    tiny().save_pretrained(tmp_path / "saved")
    run = cases.small_run(tmp_path, {"init_from": str(tmp_path / "saved")})
    run.model.overrides["ffn_dim"] = 96
    with pytest.raises(ModelError, match=r"fc1\.\w+' is \[64.*under the other config \[96"):
        make_model(run, run.stages[0], None)


def test_media_of_a_stage_are_the_runs_but_for_what_it_names(tmp_path):
    run = cases.small_run(tmp_path, {"media": {"image_size": 480, "video_frames": 16}})
    media = stage_media(run, run.stages[0])
    assert media == replace(run.media, image_size=480, video_frames=16)
    for wrong, words in (
        ({"image_sise": 3}, "unknown media.image_sise; did you mean 'image_size'"),
        ({"image_size": "big"}, "media.image_size: Value 'big'"),
        ({"image_transform": "squash"}, "image_transform='squash'; known"),
    ):
        run.stages[0].media = wrong
        with pytest.raises(ValueError, match=words):
            stage_media(run, run.stages[0])
