"""Behaviour of the model that no golden vector pins: caching, saving, sharing media, masks."""

from __future__ import annotations

import pytest
import torch

from unival.generation.search import SearchOptions, beam_search
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.video_encoder import Conv3d

MEDIA = {
    "pixel_values": (2, 3, 64, 64),
    "video_values": (2, 3, 4, 64, 64),
    "audio_values": (2, 48000),
}


@pytest.fixture(scope="module")
def model() -> UnivalForConditionalGeneration:
    torch.manual_seed(0)
    config = UnivalConfig(
        vocab_size=101,
        d_model=32,
        ffn_dim=64,
        encoder_layers=2,
        decoder_layers=2,
        num_heads=4,
        image_layers=(1, 1, 1, 1),
        image_channels=(8, 8, 16, 16),
        video_layers=(1, 1, 1, 1),
        video_channels=(8, 8, 16, 16),
        video_cardinality=4,
        audio_channels=(4, 4, 8, 8, 16, 16),
        hop_size=480,
    )
    found = UnivalForConditionalGeneration(config).eval()
    for parameter in found.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.3)
    return found


IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
PREVIOUS = torch.tensor([[0, 11, 12, 13], [0, 21, 22, 23]])


@pytest.mark.parametrize("name", [None, *MEDIA])
def test_cached_decoding_equals_the_full_pass(model, name):
    media = {name: torch.randn(MEDIA[name])} if name else {}
    with torch.no_grad():
        full = model(input_ids=IDS, decoder_input_ids=PREVIOUS, **media)
        encoder = model.encoder(IDS, **media)
        cache, steps = None, []
        for t in range(PREVIOUS.shape[1]):
            out = model(
                encoder_outputs=encoder,
                decoder_input_ids=PREVIOUS[:, t : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full.logits, rtol=0, atol=2e-5)


def test_cached_decoding_of_image_codes_equals_the_full_pass(model):
    codes = torch.tensor([True, False])
    with torch.no_grad():
        encoder = model.encoder(IDS)
        full = model(encoder_outputs=encoder, decoder_input_ids=PREVIOUS, code_mask=codes)
        first = model(
            encoder_outputs=encoder,
            decoder_input_ids=PREVIOUS[:, :3],
            code_mask=codes,
            use_cache=True,
        )
        last = model(
            encoder_outputs=encoder,
            decoder_input_ids=PREVIOUS[:, 3:],
            code_mask=codes,
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    torch.testing.assert_close(last.logits, full.logits[:, 3:], rtol=0, atol=2e-5)


def test_a_picture_has_more_codes_than_a_text_may_have_tokens(model):
    """1,024 codes behind <s> are 1,025 positions; text of that length is refused."""
    ids = torch.full((1, 1025), 7)
    codes = torch.tensor([True])
    with torch.no_grad():
        encoder = model.encoder(IDS[:1])
        whole = model(encoder_outputs=encoder, decoder_input_ids=ids, code_mask=codes).logits
        part = model(encoder_outputs=encoder, decoder_input_ids=ids[:, :9], code_mask=codes).logits
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[:, :9], part, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="1025 decoder tokens; the model's limit is 1024"):
        model(encoder_outputs=encoder, decoder_input_ids=ids)


@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_generate_agrees_with_our_search(model, beams):
    pixels = torch.randn(MEDIA["pixel_values"])
    theirs = model.generate(
        input_ids=IDS,
        pixel_values=pixels,
        num_beams=beams,
        do_sample=False,
        max_new_tokens=7,
        length_penalty=1.0,
        early_stopping=True,
    )
    ours = beam_search(
        model, model.encoder(IDS, pixel_values=pixels), SearchOptions(beams, max_length=6)
    )
    for row, hypotheses in zip(theirs.tolist(), ours, strict=True):
        best = hypotheses[0].tokens
        # transformers does not force </s> at the length limit, we do.
        length = len(best) - 1
        if beams == 1:
            assert row[1 : 1 + length] == best[:length]
        assert model.config.pad_token_id not in best


def test_rows_may_share_one_medium(model):
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        shared = model(
            input_ids=IDS,
            decoder_input_ids=PREVIOUS,
            pixel_values=pixels,
            media_index=torch.tensor([0, 0]),
        )
        copied = model(
            input_ids=IDS, decoder_input_ids=PREVIOUS, pixel_values=pixels.expand(2, -1, -1, -1)
        )
    torch.testing.assert_close(shared.logits, copied.logits, rtol=0, atol=1e-5)


def test_a_hidden_medium_gives_the_text_only_output(model):
    pixels = torch.randn(MEDIA["pixel_values"])
    with torch.no_grad():
        hidden = model(
            input_ids=IDS,
            decoder_input_ids=PREVIOUS,
            pixel_values=pixels,
            patch_mask=torch.tensor([False, True]),
        )
        text = model(input_ids=IDS, decoder_input_ids=PREVIOUS)
    torch.testing.assert_close(hidden.logits[0], text.logits[0], rtol=0, atol=2e-5)
    assert (hidden.logits[1] - text.logits[1]).abs().max() > 1e-2


def test_padding_does_not_change_a_row(model):
    with torch.no_grad():
        padded = model(input_ids=IDS, decoder_input_ids=PREVIOUS)
        alone = model(input_ids=IDS[1:, :3], decoder_input_ids=PREVIOUS[1:])
    torch.testing.assert_close(padded.logits[1:], alone.logits, rtol=0, atol=2e-5)


def test_saved_model_gives_the_same_bits(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = UnivalForConditionalGeneration.from_pretrained(tmp_path).eval()
    sound = torch.randn(MEDIA["audio_values"])
    with torch.no_grad():
        want = model(input_ids=IDS, decoder_input_ids=PREVIOUS, audio_values=sound).logits
        got = loaded(input_ids=IDS, decoder_input_ids=PREVIOUS, audio_values=sound).logits
    assert torch.equal(want, got)


def test_random_patches_keep_their_own_positions(model):
    """With as many patches as there are, a random order only permutes the medium's tokens."""
    pixels = torch.randn(2, 3, 96, 96)
    features, positions, _ = model.encoder.media_features("image", pixels)
    model.config.sample_patch_num = 8
    try:
        kept, ids = model.encoder.sample_patches(features, positions)
        with torch.no_grad():
            out = model(input_ids=IDS, decoder_input_ids=PREVIOUS, pixel_values=pixels)
    finally:
        model.config.sample_patch_num = None
    assert out.encoder_last_hidden_state.shape[1] == 8 + IDS.shape[1]
    for row in range(2):
        for token, position in zip(kept[row], ids[row].tolist(), strict=True):
            source = positions.tolist().index(position)
            assert torch.equal(token, features[row, source])


def test_two_media_in_one_batch_are_refused(model):
    with pytest.raises(ValueError, match="one medium a batch: got image and video"):
        model.encoder(IDS, pixel_values=torch.zeros(1), video_values=torch.zeros(1))


def test_a_medium_without_encoder_names_the_config_field():
    config = UnivalConfig(
        vocab_size=50,
        d_model=16,
        ffn_dim=16,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        image_layers=None,
        video_layers=None,
    )
    bare = UnivalForConditionalGeneration(config)
    with pytest.raises(ValueError, match="no video encoder; set video_layers"):
        bare.encoder(IDS, video_values=torch.zeros(2, 3, 4, 32, 32))


def test_unknown_model_field_names_the_nearest(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("d_modl: 64\n")
    with pytest.raises(ValueError, match=r"model.yaml: unknown model field 'd_modl'.*'d_model'"):
        UnivalConfig.from_yaml(path)


def test_mel_filters_survive_a_cast_to_bf16(model):
    filters = model.encoder.audio_encoder.logmel.filters.clone()
    cast = UnivalForConditionalGeneration(model.config).bfloat16()
    assert cast.encoder.audio_encoder.logmel.filters.dtype == torch.float32
    assert torch.equal(cast.encoder.audio_encoder.logmel.filters, filters)


@pytest.mark.parametrize(
    ("channels", "out", "kernel", "groups"),
    [(3, 64, 7, 1), (16, 16, 3, 8)],
    ids=["stem", "grouped"],
)
def test_bf16_gradients_of_clip_convolutions_are_exact_on_a_cpu(channels, out, kernel, groups):
    """torch's own abort the process (stem) or hold garbage now and then (grouped)."""
    torch.manual_seed(0)
    conv = Conv3d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False).bfloat16()
    clips = torch.randn(8, channels, 4, 24, 24).bfloat16()
    grad = torch.randn(8, out, 4, 24, 24).bfloat16()
    exact = torch.nn.grad.conv3d_weight(
        clips.double(), conv.weight.shape, grad.double(), padding=kernel // 2, groups=groups
    )
    for _ in range(5):
        conv.weight.grad = None
        conv(clips).backward(grad)
        error = (conv.weight.grad.double() - exact).norm() / exact.norm()
        assert error < 2**-8  # one rounding to bf16
