"""Many media at once: the same as one at a time, whatever is beside them."""

import io
import logging
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unival.data.batch import normalize
from unival.data.media import Loaded, Loading, MediaLoader, MediaOptions, load_media
from unival.data.records import Origin, Record, RecordError
from unival.data_gpu.video_backends import BACKENDS, BackendError
from unival.model.audio_encoder import LogMel

SAMPLES = Path(__file__).parents[2] / "samples"
IMAGES = sorted((SAMPLES / "images").glob("*.jpg"))[:6]
CLIPS = sorted((SAMPLES / "video").glob("*.mp4"))[:3]
SOUNDS = sorted((SAMPLES / "audio").glob("*.ogg"))[:3]
KINDS = {"image": "caption", "video": "video_caption", "audio": "audio_caption"}
SIZES = {"image_size": 48, "video_size": 32, "video_frames": 3, "audio_samples": 4_800}
RANDOM = MediaOptions(
    **SIZES,
    image_transform="pretrain",
    video_transform="pretrain",
    video_indices="random",
    audio_random=True,
)
LOADING = Loading(workers=2, video_backend="pyav")


def record(medium, media, row=0, box=None):
    kind = "visual_grounding" if box else KINDS.get(medium, "image_generation")
    return Record(str(row), kind, media, Origin("table.tsv", row), captions=("x",), box=box)


RECORDS = [
    *(record("image", path.read_bytes(), n) for n, path in enumerate(IMAGES[:3])),
    *(record("image", path, n) for n, path in enumerate(IMAGES[3:], 3)),
    *(record("video", path, n) for n, path in enumerate(CLIPS, 6)),
    *(record("audio", path, n) for n, path in enumerate(SOUNDS, 9)),
    record("text", b"", 12),
    record("image", IMAGES[0], 13, box=(10.0, 20.0, 200.0, 300.0)),
]
SEEDS = [f"seed/{n}" for n in range(len(RECORDS))]


@pytest.fixture(scope="module")
def loader():
    with MediaLoader(RANDOM, LOADING) as running:
        yield running


def as_float(tensor):
    return normalize(tensor) if tensor.dtype == torch.uint8 else tensor


def assert_same(one, other):
    assert torch.equal(one.tensor, other.tensor)
    assert one.box == other.box


def test_many_at_once_are_what_each_is_alone_in_this_process(loader):
    for given, seed, found in zip(RECORDS, SEEDS, loader.load(RECORDS, SEEDS), strict=True):
        alone = load_media(given, RANDOM, random.Random(seed))
        assert found.box == alone.box
        assert found.tensor.shape == alone.tensor.shape
        if given.medium in ("image",):
            # One level of resizing may become some after RandAugment's contrast operations.
            far = (found.tensor - as_float(alone.tensor)).abs() * 127.5
            assert far.mean() < 0.3
        else:
            assert torch.equal(found.tensor, alone.tensor)


def test_a_result_does_not_depend_on_its_neighbours_or_on_failures_before(loader):
    first = loader.load(RECORDS, SEEDS)
    mixed = [record("image", b"no picture", 99), *reversed(RECORDS), record("video", b"x", 98)]
    second = loader.load(mixed, ["a", *reversed(SEEDS), "b"])
    assert isinstance(second[0], RecordError)
    assert isinstance(second[-1], RecordError)
    for one, other in zip(first, reversed(second[1:-1]), strict=True):
        assert_same(one, other)
    with MediaLoader(RANDOM, Loading(workers=1, threads=1, video_backend="pyav")) as other_loader:
        for one, other in zip(first, other_loader.load(RECORDS, SEEDS), strict=True):
            assert_same(one, other)


def test_another_seed_gives_other_draws(loader):
    rows = [RECORDS[0], RECORDS[6]]
    first, second = loader.load(rows, ["a", "a"]), loader.load(rows, ["b", "b"])
    for one, other in zip(first, second, strict=True):
        assert not torch.equal(one.tensor, other.tensor)


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_pictures_that_dali_does_not_read_as_pillow_does_go_through_pillow(loader):
    photo = Image.open(IMAGES[0]).convert("RGB").resize((64, 64))
    forms = {
        "gif": encoded(photo, "GIF"),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "palette": encoded(photo.quantize(16), "PNG"),
        "alpha": encoded(photo.convert("RGBA"), "PNG"),
        "grey16": encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), "PNG"),
        "tiff": encoded(photo, "TIFF"),
    }
    rows = [record("image", data, n) for n, data in enumerate(forms.values())]
    options = MediaOptions(**SIZES)
    with MediaLoader(options, LOADING) as exact:
        for name, given, found in zip(forms, rows, exact.load(rows, [""] * 6), strict=True):
            assert isinstance(found, Loaded), (name, found)
            alone = as_float(load_media(given, options, random.Random(0)).tensor)
            assert (found.tensor - alone).abs().max() * 127.5 <= 2, name


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (record("image", Path("none.jpg"), 7), r"table.tsv, row 7.*'media'.*none\.jpg: no such"),
        (record("image", b"<html></html>", 7), r"row 7.*'media'.*HTML"),
        (record("video", Path("none.mp4"), 7), r"row 7.*'media'.*none\.mp4: no such file"),
        (record("audio", b"", 7), r"row 7.*'media'.*empty"),
        (record("image", IMAGES[0], 7, box=(0.0, 0.0, 9000.0, 5.0)), r"row 7.*'box'.*outside"),
    ],
)
def test_what_cannot_be_loaded_says_file_row_and_field(loader, given, reason):
    (found,) = loader.load([given], ["a"])
    assert isinstance(found, RecordError)
    with pytest.raises(RecordError, match=reason):
        raise found


def test_the_backend_of_films_is_chosen_once_and_outside_of_this_process(monkeypatch, caplog):
    bad = record("video", b"no film", 97)
    with caplog.at_level(logging.INFO), MediaLoader(RANDOM, Loading()) as timed:
        found = timed.load([bad, *RECORDS[6:9]], ["x", *SEEDS[6:9]])
        timed.load(RECORDS[6:9], SEEDS[6:9])
    (line,) = [message for message in caplog.messages if "video backend" in message]
    assert "pyav" in line
    assert "no film" in line or "7 bytes" in line
    times = {name: float(ms) for name, ms in re.findall(r"(\w+) ([\d.]+) ms a clip", line)}
    assert "pyav" in times
    # What a backend imports is not timed: it would be a hundred milliseconds a clip and more.
    assert max(times.values()) < 8 * times["pyav"]
    assert timed._video_backend in BACKENDS
    for given, seed, loaded in zip(RECORDS[6:9], SEEDS[6:9], found[1:], strict=True):
        # torchcodec, where it was chosen, gives PyAV's pixels.
        assert torch.equal(loaded.tensor, load_media(given, RANDOM, random.Random(seed)).tensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_backend_that_cannot_run_here_ends_the_loading(loader):
    with (
        MediaLoader(RANDOM, Loading(video_backend="nvdec")) as without_gpu,
        pytest.raises(BackendError, match="nvdec cannot run here"),
    ):
        without_gpu.load(RECORDS[6:7], SEEDS[6:7])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_is_loaded():
    with pytest.raises(ValueError, match="finds no GPU"):
        MediaLoader(RANDOM, Loading(device="gpu"))


def test_spectrograms_made_beside_the_step_are_those_that_the_model_makes():
    sizes = MediaOptions(**SIZES | {"audio_samples": 48_000})
    rows = [*RECORDS[9:12], record("audio", b"no sound", 98)]
    with MediaLoader(sizes, LOADING) as waves, MediaLoader(
        replace(sizes, audio_hop_size=200), LOADING
    ) as spectrograms:  # fmt: skip
        heard, seen = waves.load(rows, [""] * 4), spectrograms.load(rows, [""] * 4)
    assert isinstance(seen[3], RecordError)
    expected = LogMel(48_000, 64, 200)(torch.stack([loaded.tensor for loaded in heard[:3]]))
    found = torch.stack([loaded.tensor for loaded in seen[:3]])
    assert found.shape == (3, 241, 64)
    # Both are float32; where there is next to no power, decibels magnify the rounding.
    loud = expected > -70
    assert loud.float().mean() > 0.3
    assert (found - expected)[loud].abs().max() < 0.02
    with pytest.raises(ValueError, match="audio_sample_rate"):
        MediaOptions(audio_sample_rate=None, audio_hop_size=200)


def test_the_cache_gives_the_same_tensors_and_only_where_nothing_is_drawn(monkeypatch):
    rows = RECORDS[:2]
    with MediaLoader(MediaOptions(**SIZES), Loading(cache_mb=8)) as cached:
        first = cached.load(rows, ["a", "b"])
        monkeypatch.setattr(cached, "_load_images", lambda records, seeds: records)
        # Nothing is left to load, and what would be comes back as it is.
        for one, other in zip(first, cached.load(rows, ["c", "d"]), strict=True):
            assert_same(one, other)
    with MediaLoader(RANDOM, Loading(cache_mb=8)) as drawn:
        assert not torch.equal(
            drawn.load(rows, ["a", "b"])[0].tensor, drawn.load(rows, ["c", "d"])[0].tensor
        )


def test_the_cache_holds_no_more_than_its_size():
    options = MediaOptions(**SIZES | {"image_size": 256})  # 786,432 bytes each
    with MediaLoader(options, Loading(cache_mb=2)) as cached:
        cached.load(RECORDS[:6], [""] * 6)
        assert len(cached._cache._kept) == 2
        assert cached._cache.size == 2 * 786_432


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "known: auto, gpu, cpu"),
        ({"video_backend": "vhs"}, "known: auto, pyav"),
        ({"workers": 0}, "workers=0; at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Loading(**options)
