"""Virtual tokens act as words do, by our own soft prompt and by that of the peft library."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from unival.generation.search import SearchOptions, beam_search
from unival.model.configuration import UnivalConfig
from unival.model.loading import ModelError, fold_adapter, load_model
from unival.model.modeling import UnivalForConditionalGeneration

# The prompt whose vectors are these tokens' must be the same as these tokens before the text.
WORDS = [31, 17, 64]
IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
PREVIOUS = torch.tensor([[0, 11, 12, 13], [0, 21, 22, 23]])
FIELDS = {
    "vocab_size": 101,
    "d_model": 16,
    "ffn_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_heads": 2,
    "max_text_positions": 40,
    "num_text_positions": 42,
    "token_bucket_size": 8,
    "image_layers": (1, 1, 1, 1),
    "image_channels": (8, 8, 16, 16),
    "video_layers": None,
}


def plain() -> UnivalForConditionalGeneration:
    torch.manual_seed(0)
    model = UnivalForConditionalGeneration(UnivalConfig(**FIELDS)).eval()
    for parameter in model.parameters():  # so that positions and biases count
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.3)
    return model


def prompted(words=WORDS) -> UnivalForConditionalGeneration:
    model = plain()
    model.encoder.set_soft_prompt(model.encoder.embed_tokens.weight[words])
    return model


def with_words(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor([WORDS] * len(ids)), ids], dim=1)


MEDIA = [
    {},
    {"pixel_values": torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))},
    {
        "pixel_values": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)),
        "media_index": torch.tensor([0, 0]),
        "patch_mask": torch.tensor([True, False]),
    },
]


@pytest.mark.parametrize("media", MEDIA, ids=["text", "image", "shared"])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_a_prompt_of_words_is_these_words_before_the_text(media, masked):
    """Positions, biases and masks count the virtual tokens: nothing else gives the same states."""
    mask = {"attention_mask": (IDS != 1).long()} if masked else {}
    found = prompted()(IDS, decoder_input_ids=PREVIOUS, **mask, **media)
    expected = plain()(with_words(IDS), decoder_input_ids=PREVIOUS, **media)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert found.encoder_padding_mask.equal(expected.encoder_padding_mask)
    torch.testing.assert_close(
        found.encoder_last_hidden_state, expected.encoder_last_hidden_state, rtol=1e-5, atol=1e-5
    )
    without = plain()(IDS, decoder_input_ids=PREVIOUS, **media).logits
    assert float((without - expected.logits).abs().max()) > 1e-2  # the words do count


def test_beam_search_and_generate_see_the_prompt_of_a_batch():
    batch = {"input_ids": IDS, "attention_mask": IDS != 1, **MEDIA[1]}
    longer = {"input_ids": with_words(IDS), **MEDIA[1]}
    model, reference = prompted(), plain()
    options = SearchOptions(beam_size=3, max_length=6)
    found, expected = (
        beam_search(m, m.encoder(**inputs), options)
        for m, inputs in ((model, batch), (reference, longer))
    )
    assert [[h.tokens for h in row] for row in found] == [
        [h.tokens for h in row] for row in expected
    ]
    own, other = (
        m.generate(**inputs, max_new_tokens=5, do_sample=False)
        for m, inputs in ((model, batch), (reference, longer))
    )
    assert own.equal(other)
    assert not own.equal(reference.generate(**batch, max_new_tokens=5, do_sample=False))


def test_the_gradient_of_the_prompt_is_that_of_its_words():
    """The words are not in the text, so that their rows of the embedding have no other gradient."""
    model, reference = prompted(), plain()
    weight = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3))
    (model.encoder(IDS).last_hidden_state * weight).sum().backward()
    (reference.encoder(with_words(IDS)).last_hidden_state * weight).sum().backward()
    expected = reference.encoder.embed_tokens.weight.grad[WORDS]
    assert float(expected.abs().amax(1).min()) > 0.1
    torch.testing.assert_close(
        model.encoder.soft_prompt.weight.grad, expected, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_embeddings_instead_of_ids_give_the_same():
    model = plain()
    embedded = model.encoder.embed_tokens(IDS)
    expected = model(IDS, decoder_input_ids=PREVIOUS).logits
    masked = {"inputs_embeds": embedded, "attention_mask": IDS != 1}
    assert model(**masked, decoder_input_ids=PREVIOUS).logits.equal(expected)
    # Without a mask nothing is padding, as with ids and a mask of ones.
    seen = model(inputs_embeds=embedded, decoder_input_ids=PREVIOUS).logits
    ones = model(IDS, torch.ones_like(IDS), decoder_input_ids=PREVIOUS).logits
    assert seen.equal(ones)
    assert not torch.allclose(seen, expected, atol=1e-3)
    for inputs in ({}, {"input_ids": IDS, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs, decoder_input_ids=PREVIOUS)


def test_a_saved_model_keeps_its_prompt(tmp_path):
    model = prompted()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    assert loaded.config.num_virtual_tokens == 3
    expected = plain().encoder.embed_tokens.weight[WORDS]
    assert loaded.encoder.soft_prompt.weight.equal(expected)
    inputs = {"input_ids": IDS, "decoder_input_ids": PREVIOUS}
    assert loaded(**inputs).logits.equal(model(**inputs).logits)


def test_a_text_that_is_too_long_with_its_prompt_and_an_unfitting_prompt_are_refused():
    model = prompted()
    assert model.encoder(torch.full((1, 37), 5)).last_hidden_state.shape == (1, 40, 16)
    with pytest.raises(ValueError, match=r"38 tokens a row after 3 virtual ones.*limit is 40"):
        model.encoder(torch.full((1, 38), 5))
    for shape in ((0, 16), (40, 16), (3, 8), (16,)):
        with pytest.raises(
            ValueError, match=r"soft prompt of .*wanted \[n, 16\] with n from 1 to 39"
        ):
            model.encoder.set_soft_prompt(torch.zeros(shape))
    for count in (-1, 40):
        with pytest.raises(ValueError, match=rf"num_virtual_tokens {count} is not in 0..39"):
            UnivalConfig(**FIELDS, num_virtual_tokens=count)


@pytest.fixture
def tuned():
    """peft's own prompt tuning around our class, with vectors of size that counts."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    torch.manual_seed(5)
    return peft.get_peft_model(plain(), config).eval()


@pytest.mark.parametrize("media", MEDIA, ids=["text", "image", "shared"])
@torch.no_grad()
def test_prompt_tuning_of_peft_works_and_its_adapter_folds(tuned, tmp_path, media):
    tuned.save_pretrained(tmp_path)
    model = plain()
    fold_adapter(model, tmp_path)
    inputs = {"input_ids": IDS, "attention_mask": IDS != 1, **media}
    expected = tuned(**inputs, decoder_input_ids=PREVIOUS)
    found = model(**inputs, decoder_input_ids=PREVIOUS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert model.config.num_virtual_tokens == 4  # of 8 vectors: peft has as many for a decoder
    searched = tuned.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert searched.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_training_by_peft_reaches_the_prompt_alone(tuned):
    tuned.train()
    tuned(input_ids=IDS, attention_mask=IDS != 1, labels=PREVIOUS).loss.backward()
    touched = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert touched == {"prompt_encoder.default.embedding.weight"}
    gradient = tuned.prompt_encoder["default"].embedding.weight.grad
    assert (gradient[:4].abs().amax(1) > 0).all()
    assert not gradient[4:].any()


def _edit(path, **fields):
    path = path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adapter_that_cannot_be_folded_is_refused_and_changes_nothing(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    model = plain()

    def refused(words):
        with pytest.raises(ModelError, match=words):
            fold_adapter(model, tmp_path)

    told, kept = config.read_text(), weights.read_bytes()
    for fields, words in (
        ({"peft_type": "IA3"}, "type 'IA3'; known: LORA, PROMPT_TUNING"),
        ({"peft_type": None}, "type None"),
        ({"num_virtual_tokens": 9}, r"of 9 virtual tokens are \[8, 16\]"),
        ({"num_virtual_tokens": -1}, "of -1 virtual tokens"),
        ({"num_virtual_tokens": "4"}, "of '4' virtual tokens"),
    ):
        _edit(tmp_path, **fields)
        refused(words)
        config.write_text(told)
    for shape, words in (((8, 24), r"\[4, 24\]; wanted \[n, 16\]"), ((), r"tokens are \[\]")):
        save_file({"prompt_embeddings": torch.zeros(shape)}, weights)
        refused(words)
    save_file({"other": torch.zeros(4, 16)}, weights)
    refused("virtual tokens are None")
    weights.write_bytes(kept[:40])
    refused("adapter_model.safetensors: damaged weights")
    weights.rename(tmp_path / "adapter_model.bin")  # a pickle is not looked at
    refused(r"no saved adapter \(adapter_model.safetensors\)")
    (tmp_path / "adapter_model.bin").rename(weights)
    for text in ("{", "[1]"):
        config.write_text(text)
        refused("adapter_config.json: not an adapter's config")
    config.unlink()
    refused(r"no saved adapter \(adapter_config.json\)")
    before = plain().state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert model.encoder.soft_prompt is None


def test_a_second_prompt_is_refused(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    model = prompted()
    with pytest.raises(ModelError, match="one already"):
        fold_adapter(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (8, 16)
