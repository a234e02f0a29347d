"""From a record to tensors, and from examples to a padded batch."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unival.data.batch import collate, normalize
from unival.data.media import MediaOptions, load_media, plan_image
from unival.data.records import Origin, Record, RecordError
from unival.tasks.base import Example

SAMPLES = Path(__file__).parents[2] / "samples"
ORIGIN = Origin("table.tsv", 12)


def picture(width=40, height=20):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 51)).save(buffer, "PNG")
    return buffer.getvalue()


def record(kind="caption", media=None, box=None):
    media = picture() if media is None else media
    return Record(id="1", kind=kind, media=media, origin=ORIGIN, captions=("x",), box=box)


def test_an_image_is_resized_and_its_box_with_it():
    options = MediaOptions(image_size=10)
    tensor, box = load_media(
        record("visual_grounding", box=(4, 2, 40, 20)), options, random.Random(0)
    )
    assert tensor.shape == (3, 10, 10)
    assert tensor[:, 5, 5].tolist() == [255, 0, 51]
    assert box == (1, 1, 10, 10)
    assert load_media(record(), options, random.Random(0))[1] is None


def test_a_box_may_pass_the_border_by_a_rounding_and_is_cut():
    options = MediaOptions(image_size=10)
    given = record("visual_grounding", box=(0, 0, 40.6, 20.01))
    assert load_media(given, options, random.Random(0))[1] == (0, 0, 10, 10)


@pytest.mark.parametrize("box", [(0, 0, 42, 10), (0, 0, 10, 22), (40, 0, 41, 10), (0, 20, 9, 21)])
def test_a_box_outside_the_picture_is_refused_with_the_pictures_size(box):
    with pytest.raises(RecordError, match=r"table\.tsv, row 12.*'box'.*40 x 20") as caught:
        load_media(record("visual_grounding", box=box), MediaOptions(), random.Random(0))
    assert caught.value.field == "box"


@pytest.mark.parametrize("kind", ["caption", "video_caption", "audio_caption"])
def test_a_medium_that_cannot_be_decoded_is_refused_with_file_and_row(kind):
    with pytest.raises(RecordError, match=r"table\.tsv, row 12.*'media'"):
        load_media(record(kind, b"garbage"), MediaOptions(), random.Random(0))


def test_pretraining_crops_around_a_box_and_augments_without_one():
    options = MediaOptions(image_size=48, image_transform="pretrain")
    boxed = record("visual_grounding", picture(400, 100), (0, 0, 4, 4))
    for seed in range(20):
        plan, box = plan_image(boxed, 400, 100, options, random.Random(seed))
        assert box[0] == box[1] == plan.left == plan.top == 0
        assert not plan.operations
    plans = [plan_image(record(), 40, 20, options, random.Random(seed))[0] for seed in range(20)]
    assert any(plan.operations for plan in plans)
    tensor, _ = load_media(boxed, options, random.Random(0))
    assert tensor.shape == (3, 48, 48)


def test_films_sounds_and_texts():
    options = MediaOptions(video_size=16, video_frames=3, audio_samples=500)
    rng = random.Random(0)
    film = record("video_caption", SAMPLES / "video" / "bbb_00.mp4")
    assert load_media(film, options, rng)[0].shape == (3, 3, 16, 16)
    sound = record("audio_caption", SAMPLES / "audio" / "sp_ambi_choir.ogg")
    tensor, box = load_media(sound, options, rng)
    assert (tensor.shape, tensor.dtype, box) == ((500,), torch.float32, None)
    tensor, box = load_media(record("image_generation", b""), options, rng)
    assert (tensor.numel(), box) == (0, None)


def test_unknown_transforms_are_refused():
    for field in ("image_transform", "video_transform", "video_indices"):
        with pytest.raises(ValueError, match=f"{field}='magic'"):
            MediaOptions(**{field: "magic"})


def test_normalize_maps_bytes_to_minus_one_to_one_and_leaves_its_input():
    given = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert normalize(given).tolist() == pytest.approx([-1, (51 / 255 - 0.5) / 0.5, 1])
    floats = torch.tensor([0.0, 51.0, 255.0])
    assert normalize(floats).tolist() == pytest.approx([-1, -0.6, 1])
    assert floats.tolist() == [0, 51, 255]


LONG = Example([0, 5, 6, 2], [0, 7], [7, 2], 0.3)
SHORT = Example([0, 2], [0, 8, 9], [-100, 9, 2])


def test_collate_pads_on_the_right_and_shares_media():
    media = [torch.zeros(3, 2, 2, dtype=torch.uint8), torch.full((3, 2, 2), 255).byte()]
    batch = collate([(LONG, 1), (SHORT, 1), (LONG, 0)], media, "image")
    assert batch["input_ids"].tolist() == [[0, 5, 6, 2], [0, 2, 1, 1], [0, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 1], [0, 8, 9], [0, 7, 1]]
    assert batch["labels"].tolist() == [[7, 2, -100], [-100, 9, 2], [7, 2, -100]]
    assert batch["loss_weight"].tolist() == pytest.approx([0.3, 1.0, 0.3])
    assert batch["media_index"].tolist() == [1, 1, 0]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [-1, 1]
    types = {name: tensor.dtype for name, tensor in batch.items()}
    assert types == {
        "input_ids": torch.int64,
        "attention_mask": torch.bool,
        "decoder_input_ids": torch.int64,
        "labels": torch.int64,
        "loss_weight": torch.float32,
        "media_index": torch.int64,
        "pixel_values": torch.float32,
    }


def test_collate_pads_to_given_lengths():
    examples, media = [(LONG, 0), (SHORT, 0)], [torch.zeros(2)]
    batch = collate(examples, media, "audio", pad_id=4, lengths=(6, 3))
    assert batch["input_ids"].tolist() == [[0, 5, 6, 2, 4, 4], [0, 2, 4, 4, 4, 4]]
    assert batch["attention_mask"].tolist() == [[True] * 4 + [False] * 2, [True] * 2 + [False] * 4]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 4], [0, 8, 9]]
    assert batch["labels"].tolist() == [[7, 2, -100], [-100, 9, 2]]
    longest = collate(examples, media, "audio", lengths=(4, 3))
    for name, expected in collate(examples, media, "audio").items():
        assert torch.equal(longest[name], expected)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((3, 3), "example 1: 4 source tokens; the limit is 3"),
        ((4, 2), "example 0: 3 target tokens; the limit is 2"),
    ],
)
def test_collate_refuses_rows_beyond_given_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        collate([(SHORT, 0), (LONG, 0)], [torch.zeros(2)], "audio", lengths=lengths)


def test_collate_names_the_medium():
    clip = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    assert collate([(LONG, 0)], [clip], "video")["video_values"].shape == (1, 3, 2, 4, 4)
    sound = torch.tensor([0.5, -0.5])
    batch = collate([(LONG, 0)], [sound], "audio")
    assert batch["audio_values"].tolist() == [[0.5, -0.5]]
    assert not {"pixel_values", "video_values", "audio_values"} & set(
        collate([(LONG, 0)], [torch.empty(0)], "text")
    )


@pytest.mark.parametrize(
    ("examples", "media", "message"),
    [
        ([], [], "needs an example"),
        ([(LONG, 1)], [torch.zeros(2)], "medium 1 of 1"),
        ([(LONG, -1)], [torch.zeros(2)], "medium -1 of 1"),
        ([(Example([0], [0, 1], [2]), 0)], [torch.zeros(2)], "2 decoder inputs, 1 targets"),
        ([(LONG, 0)], [torch.zeros(2), torch.zeros(3)], "one shape"),
    ],
)
def test_collate_refuses_what_does_not_fit(examples, media, message):
    with pytest.raises(ValueError, match=message):
        collate(examples, media, "audio")


def test_the_same_rng_gives_the_same_pixels():
    options = MediaOptions(image_size=32, image_transform="pretrain")
    cat = record(media=SAMPLES / "images" / "cat.jpg")
    first, again, other = (
        load_media(cat, options, random.Random(seed))[0].numpy() for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rows_of_one_tensor_are_not_copied_and_others_are():
    rows = torch.arange(24.0).reshape(4, 3, 2, 1).clone()  # no view itself
    examples = [(Example([1], [0], [2]), index) for index in range(4)]

    def pixels(media):
        return collate(examples[: len(media)], media, "image")["pixel_values"]

    assert pixels(list(rows)).data_ptr() == rows.data_ptr()
    for order in ([1, 0, 2, 3], [0, 1], [0, 0, 2, 3]):
        chosen = [list(rows)[index] for index in order]
        found = pixels(chosen)
        assert torch.equal(found, rows[order])
        assert found.data_ptr() != rows.data_ptr()
