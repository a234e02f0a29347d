"""The processor gives what evaluation gives the model, and survives saving."""

import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor

from unival.auto import register
from unival.data.batch import normalize
from unival.data.media import MediaOptions, load_media
from unival.data.records import Origin, Record
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.processing import UnivalProcessor

SAMPLES = Path(__file__).parents[1] / "samples"
CAT = SAMPLES / "images" / "cat.jpg"
CLIP = SAMPLES / "video" / sorted(p.name for p in (SAMPLES / "video").iterdir())[0]
SOUND = SAMPLES / "audio" / "opensfx_03.ogg"
MEDIA = {"image_size": 64, "video_size": 32, "video_frames": 4, "audio_samples": 9_600}


@pytest.fixture(scope="module")
def processor(vocabulary):
    return UnivalProcessor(vocabulary.tokenizer, MEDIA)


@pytest.mark.parametrize(
    ("kind", "file", "argument", "name"),
    [
        ("caption", CAT, "images", "pixel_values"),
        ("video_caption", CLIP, "videos", "video_values"),
        ("audio_caption", SOUND, "audio", "audio_values"),
    ],
)
def test_media_as_in_evaluation(processor, kind, file, argument, name):
    record = Record("1", kind, file, Origin("a.tsv", 0))
    expected, _ = load_media(record, MediaOptions(**MEDIA), random.Random(0))
    expected = normalize(expected) if expected.dtype == torch.uint8 else expected
    for value in (file, str(file), file.read_bytes()):
        batch = processor(text="what is it?", **{argument: value})
        assert set(batch) == {"input_ids", "attention_mask", name}
        assert torch.equal(batch[name], expected[None])


def test_decoded_media_give_what_files_give(processor):
    from_file = processor(text="a", images=CAT)["pixel_values"]
    picture = Image.open(CAT).convert("RGB")
    assert torch.equal(processor(text="a", images=picture)["pixel_values"], from_file)
    assert torch.equal(processor(text="a", images=np.array(picture))["pixel_values"], from_file)
    with av.open(str(CLIP)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    from_film = processor(text="a", videos=CLIP)["video_values"]
    assert torch.equal(processor(text="a", videos=frames)["video_values"], from_film)
    wave = torch.linspace(-0.5, 0.5, 4_000)
    padded = processor(text="a", audio=wave)["audio_values"][0]
    assert torch.equal(padded[:4_000], padded[4_000:8_000])  # repeated whole, then zeros
    assert padded[8_000:].abs().sum() == 0
    assert torch.allclose(padded[:4_000], wave, atol=1 / 32767)


def test_text_is_padded_on_the_right_and_starts_with_a_space(processor, vocabulary):
    batch = processor(text=["what?", " what is the kitten holding?"])
    short, long = vocabulary.source(" what?"), vocabulary.source(" what is the kitten holding?")
    padded = [*short, *[1] * (len(long) - len(short))]
    assert batch["input_ids"].tolist() == [padded, long]
    assert batch["attention_mask"].sum(1).tolist() == [len(short), len(long)]
    assert vocabulary.encode_text("<s>") != [0]
    assert 0 not in processor(text="<s>")["input_ids"][0, 1:].tolist()


def test_one_picture_for_several_texts_is_encoded_once(processor):
    batch = processor(text=["what?", "who?", "why?"], images=CAT)
    assert batch["pixel_values"].shape[0] == 1
    assert batch["media_index"].tolist() == [0, 0, 0]
    assert "media_index" not in processor(text=["what?", "who?"], images=[CAT, CAT])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": CAT, "audio": SOUND}, "one medium a batch: got image and audio"),
        ({"images": [CAT, CAT]}, "1 texts with 2 media"),
        ({"images": []}, "1 texts with 0 media"),
        ({"images": np.zeros((4, 4), np.uint8)}, r"\[H, W, 3\], got uint8 \[4, 4\]"),
        ({"videos": np.zeros((4, 4, 3), np.uint8)}, r"\[F, H, W, 3\], got uint8 \[4, 4, 3\]"),
        ({"audio": np.zeros((2, 9), np.float32)}, r"waveform \[L\], got float32 \[2, 9\]"),
        ({"audio": np.array([0.0, np.nan], np.float32)}, "not finite"),
        ({"images": "no.jpg"}, "no.jpg: no such file"),
        ({"return_tensors": "np"}, "only 'pt'"),
    ],
)
def test_refusals(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(text="a", **arguments)


def test_unknown_media_option(vocabulary):
    with pytest.raises(TypeError, match="image_sise"):
        UnivalProcessor(vocabulary.tokenizer, {"image_sise": 3})


def test_auto_classes_load_model_and_processor_and_generate(processor, tmp_path):
    register()
    register()
    torch.manual_seed(0)
    config = UnivalConfig(
        d_model=32,
        ffn_dim=64,
        encoder_layers=1,
        decoder_layers=1,
        num_heads=2,
        image_layers=(1, 1, 1, 1),
        image_channels=(8, 16, 32, 32),
        video_layers=None,
    )
    model = UnivalForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UnivalConfig)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, UnivalProcessor)
    assert loaded.options == processor.options
    assert UnivalProcessor.from_pretrained(tmp_path).options == processor.options
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, UnivalForConditionalGeneration)
    first = processor(text=["what is <s> it?", "why?"], images=[CAT, CAT])
    second = loaded(text=["what is <s> it?", "why?"], images=[CAT, CAT])
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = model.generate(**first, max_new_tokens=4, do_sample=False, num_beams=2)
    assert torch.equal(
        again.generate(**second, max_new_tokens=4, do_sample=False, num_beams=2), ids
    )
    assert len(loaded.batch_decode(ids)) == 2
