"""Every parameter accounted for against the totals published for the original models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
AUDIO = (64, 128, 256, 512, 1024, 2048)
CLASSIFIER = {"embed_images.fc.weight": 1000 * 2048, "embed_images.fc.bias": 1000}
FOURIER = {
    "embed_audios.spectrogram_extractor.stft.conv_real.weight": 513 * 1024,
    "embed_audios.spectrogram_extractor.stft.conv_imag.weight": 513 * 1024,
}
MEL = {"embed_audios.logmel_extractor.melW": 513 * 64}  # a buffer here


def build(config: UnivalConfig) -> UnivalForConditionalGeneration:
    with torch.device("meta"):
        return UnivalForConditionalGeneration(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("fields", "published", "absent"),
    [
        ({"image_layers": (3, 4, 23), "video_layers": None}, 182_238_536, {}),
        ({"video_layers": None}, 200_038_704, CLASSIFIER),
        ({}, 250_489_072, CLASSIFIER),
        ({"audio_channels": AUDIO}, 329_979_120, CLASSIFIER | FOURIER | MEL),
    ],
    ids=["ofa", "image", "image+video", "image+video+audio"],
)
def test_totals(fields, published, absent):
    """`absent`: parameters of the original that are none here, by their original names."""
    assert count(build(UnivalConfig(**fields))) + sum(absent.values()) == published


def test_absent_parameters():
    assert sum(CLASSIFIER.values()) == 2_049_000
    assert sum(FOURIER.values()) == 1_050_624
    assert sum(MEL.values()) == 32_832
    model = build(UnivalConfig(audio_channels=AUDIO))
    assert not [name for name, _ in model.encoder.image_encoder.named_parameters() if "fc" in name]
    own = {name for name, _ in model.encoder.audio_encoder.named_parameters()}
    assert not [name for name in own if not name.startswith(("bn0.", "conv_block"))]
    assert dict(model.encoder.audio_encoder.named_buffers())["logmel.filters"].numel() == 32_832


def test_totals_of_modules():
    model = build(UnivalConfig(audio_channels=AUDIO))
    encoder, decoder = model.encoder, model.decoder
    found = {
        "embed_tokens": count(encoder.embed_tokens),
        "image_encoder": count(encoder.image_encoder) + sum(CLASSIFIER.values()),
        "video_encoder": count(encoder.video_encoder),
        "audio_encoder": count(encoder.audio_encoder) + sum((FOURIER | MEL).values()),
        "proj": [count(getattr(encoder, f"{m}_proj")) for m in ("image", "video", "audio")],
        "positions": [
            count(getattr(encoder, f"{m}_positions")) for m in ("image", "video", "audio")
        ],
        "text_positions": [count(encoder.text_positions), count(decoder.text_positions)],
        "text_tables": [count(encoder.relative.text), count(decoder.relative.text)],
        "image_tables": [count(encoder.relative.image), count(decoder.relative.image)],
        "encoder_layers": count(encoder.layers),
        "decoder_layers": count(decoder.layers),
    }
    assert found == {
        "embed_tokens": 45_662_976,
        "image_encoder": 44_549_160,
        "video_encoder": 47_521_216,
        "audio_encoder": 76_560_896,
        "proj": [1_573_632] * 3,
        "positions": [1_355_520] * 3,
        "text_positions": [787_968] * 2,
        "text_tables": [36_792] * 2,
        "image_tables": [496_224] * 2,
        "encoder_layers": 42_573_384,
        "decoder_layers": 56_766_096,
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ofa_base", {"image_layers": (3, 4, 23), "video_layers": None}),
        ("unival_base", {}),
    ],
)
def test_released_configs_have_the_released_size(name, fields):
    config = UnivalConfig.from_yaml(CONFIGS / f"{name}.yaml", audio_channels=None)
    assert count(build(config)) == count(build(UnivalConfig(**fields)))


def test_tiny_is_tiny():
    assert count(build(UnivalConfig.from_yaml(CONFIGS / "unival_tiny.yaml"))) < 8_000_000
