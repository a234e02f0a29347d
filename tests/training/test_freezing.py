"""How frozen parts behave while the rest is trained, and the counts that a run begins with."""

from __future__ import annotations

import engine_cases as cases
import pytest
import torch

from unival.model.batchnorm import set_batchnorm_statistics
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.freezing import describe_trainable, freeze, set_modes

ALL = ["image", "video", "audio"]
AUDIO = (64, 128, 256, 512, 1024, 2048)
PROJECTION = 2048 * 768 + 768  # from each CNN's last channels to the width, and the bias
TABLE = (42 * 42 + 1) * 768  # the cells of the grid and the start slot


def base(**fields) -> UnivalForConditionalGeneration:
    with torch.device("meta"):
        return UnivalForConditionalGeneration(UnivalConfig(**fields))


def noisy() -> UnivalForConditionalGeneration:
    """The tiny model with everything that differs between training and evaluation."""
    torch.manual_seed(0)
    rates = {"dropout": 0.3, "encoder_drop_path": 0.3, "decoder_drop_path": 0.3}
    config = UnivalConfig.from_yaml(
        cases.ROOT / "configs/model/unival_tiny.yaml",
        **(cases.OVERRIDES | rates | {"audio_dropout": 0.3, "spec_augment": True}),
    )
    return UnivalForConditionalGeneration(config)


def states(model: UnivalForConditionalGeneration, medium: str) -> torch.Tensor:
    """The decoder's states of a batch of noise; another draw of dropout in every call."""
    tensors = dict(cases.noise(medium, 3, 5).tensors)
    tensors.pop("loss_weight")
    if medium == "audio":  # the batch's sounds are too short for all of the encoder's pooling
        tensors["audio_values"] = torch.randn(3, 48000, generator=torch.Generator().manual_seed(6))
    return model(**tensors, output_logits=False).decoder_last_hidden_state


def running(model: UnivalForConditionalGeneration, medium: str) -> dict[str, torch.Tensor]:
    encoder = getattr(model.encoder, f"{medium}_encoder")
    return {n: b.clone() for n, b in encoder.named_buffers() if "running" in n or "batches" in n}


@pytest.mark.parametrize("shown", [ALL, ["image"], ["video", "text"], ["audio"]])
def test_only_connections_of_the_base_model_are_counted_by_hand(shown):
    media = [medium for medium in shown if medium != "text"]
    counts = freeze(base(audio_channels=AUDIO), ["all_but_connections"], shown)
    assert counts["trained"] == PROJECTION * len(media)
    # 329,979,120 published; without the classifier, the Fourier kernels and the mel filters.
    assert sum(counts.values()) == 329_979_120 - 2_049_000 - 1_050_624 - 32_832
    rules = ["all_but_connections_and_positions"]
    counts = freeze(base(audio_channels=AUDIO), rules, shown)
    assert counts["trained"] == (PROJECTION + TABLE) * len(media)


def test_the_table_of_counts():
    model = base()
    freeze(model, ["all_but_connections"], ["image", "text"])
    lines = describe_trainable(model).splitlines()
    table = {line[:16].strip(): line[16:].split() for line in lines}
    assert table[""] == ["trained", "frozen"]
    assert table["projections"] == ["1,573,632", "1,573,632"]  # the image's, the clips'
    assert table["media positions"] == ["0", "2,711,040"]
    assert table["embeddings"] == ["0", "45,662,976"]  # 59,457 x 768
    # 250,489,072 published, less 2,049,000 of the classifier.
    assert table["total"] == ["1,573,632", "246,866,440"]
    assert lines[-1] == "0.633 % are trained"
    assert not {"audio encoder", "adapter"} & table.keys()
    parts = [table[n] for n in ("image encoder", "video encoder", "encoder", "decoder")]
    rest = sum(int(count.replace(",", "")) for _, count in parts)
    assert rest == 246_866_440 - 1_573_632 - 2_711_040 - 45_662_976


@pytest.mark.parametrize("medium", ALL)
@torch.no_grad()
def test_frozen_encoders_keep_their_statistics_unless_asked_not_to(medium):
    model = noisy()
    freeze(model, ["all_but_connections"], ALL)
    before = running(model, medium)
    assert before
    set_modes(model, frozen_in_eval=True)
    first, second = states(model, medium), states(model, medium)
    assert first.equal(second)
    assert all(found.equal(before[name]) for name, found in running(model, medium).items())
    model.eval()
    assert states(model, medium).equal(first)  # everything but linear maps is as in evaluation

    set_modes(model, frozen_in_eval=False)
    assert all(module.training for module in model.modules())
    assert not states(model, medium).equal(states(model, medium))
    assert not any(found.equal(before[name]) for name, found in running(model, medium).items())


@pytest.mark.parametrize("statistics", ["local", "sync", "frozen", "folded"])
@torch.no_grad()
def test_every_kind_of_batch_norm_rests_alike(statistics):
    model, reference = noisy(), noisy().eval()
    set_batchnorm_statistics(model, statistics)
    freeze(model, ["all_but_connections"], ALL)
    set_modes(model, frozen_in_eval=True)
    before = running(model, "image")
    found, expected = states(model, "image"), states(reference, "image")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(b.equal(before[name]) for name, b in running(model, "image").items())


def test_what_is_trained_is_in_training_mode():
    model = noisy()
    freeze(model, ["media_encoders"], ["image"])
    set_modes(model, frozen_in_eval=True)
    resting = {name for name, module in model.named_modules() if not module.training}
    # The two media that the stage does not show rest with their projections and positions.
    expected = ("encoder.image_encoder", "encoder.video_", "encoder.audio_")
    assert resting == {name for name, _ in model.named_modules() if name.startswith(expected)}
    assert model.encoder.image_proj.training
    assert model.encoder.layers[0].training
    assert not states(model, "image").equal(states(model, "image"))
    freeze(model, ["encoder"], ["image"])  # and the language model's encoder
    set_modes(model, frozen_in_eval=True)
    encoded = [model.encoder(torch.tensor([[0, 5, 2]])).last_hidden_state for _ in range(2)]
    assert encoded[0].equal(encoded[1])
    assert not states(model, "image").equal(states(model, "image"))  # the decoder's dropout


def test_modes_can_be_set_again():
    model = noisy()
    freeze(model, ["media_encoders"], ALL)
    set_modes(model, frozen_in_eval=True)
    model.eval()
    set_modes(model, frozen_in_eval=True)
    assert model.decoder.training
    assert not model.encoder.image_encoder.training
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    set_modes(model, frozen_in_eval=True)
    assert all(module.training for module in model.modules())
