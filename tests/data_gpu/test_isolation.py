"""Decoding processes: what they return, and what a hang, a crash or a bomb costs."""

import gc
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from unival.data_gpu import isolation
from unival.data_gpu.audio import decode_waveform
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.image import decode_image
from unival.data_gpu.isolation import DecodeWorkers
from unival.data_gpu.limits import Limits
from unival.data_gpu.video import decode_clip

SAMPLES = Path(__file__).parents[2] / "samples"
CLIP = SAMPLES / "video" / "bbb_00.mp4"
SOUND = SAMPLES / "audio" / "sp_ambi_choir.ogg"
CAT = SAMPLES / "images" / "cat.jpg"
OPTIONS = {"indices": "random", "mode": "random_resized_crop", "backend": "pyav"}


@pytest.fixture(scope="module")
def workers():
    with DecodeWorkers(2, Limits()) as running:
        yield running


def children():
    return psutil.Process().children(recursive=True)


def test_results_are_those_of_this_process(workers):
    rng = random.Random("a")
    expected = decode_clip(CLIP, 4, 32, indices="random", mode="random_resized_crop", rng=rng)
    for media in (CLIP, CLIP.read_bytes()):
        clip = workers.clip(media, 4, 32, seed="a", **OPTIONS).result()
        assert clip.dtype == np.uint8
        assert np.array_equal(clip, expected)
    wave = workers.waveform(SOUND, 4_800, 16_000, seed="b").result()
    assert wave.dtype == np.float32
    assert np.array_equal(wave, decode_waveform(SOUND, 4_800, 16_000, random.Random("b")))
    middle = workers.waveform(SOUND, 4_800, 16_000, seed=None).result()
    assert np.array_equal(middle, decode_waveform(SOUND, 4_800, 16_000))
    pixels = workers.picture(CAT).result()
    assert np.array_equal(pixels, np.asarray(decode_image(CAT)))
    assert pixels.flags.writeable  # torch takes it without a copy


def test_verifying_says_what_a_medium_is(workers):
    found = workers.verify(CLIP, "video").result()
    assert (found.kind, found.width > 0, found.frames > 8) == ("video", True, True)
    assert workers.verify(CAT, "image").result().format == "JPEG"
    assert workers.verify(SOUND, "audio").result().channels in (1, 2)


def test_a_bad_medium_is_its_own_error_and_the_process_lives(workers):
    before = {child.pid for child in children()}
    with pytest.raises(DecodeError, match=r"none\.mp4: no such file"):
        workers.clip(Path("none.mp4"), 4, 32, seed="a", **OPTIONS).result()
    with pytest.raises(DecodeError, match="7 bytes"):
        workers.waveform(b"garbage", 100, None, seed=None).result()
    assert {child.pid for child in children()} == before


def test_a_hang_is_ended_at_the_deadline_and_the_next_medium_is_decoded(tmp_path):
    with DecodeWorkers(1, Limits(decode_seconds=1.0)) as running:
        assert running.picture(CAT).result().ndim == 3
        (worker,) = running._processes
        os.kill(worker.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(DecodeError, match=r"cat\.jpg: not decoded within 1 seconds"):
            running.picture(CAT).result()
        assert time.monotonic() - began < 5
        assert running.picture(CAT).result().ndim == 3


def test_a_crash_is_one_samples_error(tmp_path):
    with DecodeWorkers(1, Limits()) as running:
        running.picture(CAT).result()
        (worker,) = running._processes
        worker.process.kill()
        with pytest.raises(DecodeError, match="its decoder ended by signal 9"):
            running.picture(CAT).result()
        assert running.picture(CAT).result().ndim == 3


def test_memory_is_capped(tmp_path):
    # 144 million pixels of one colour are some kilobytes of PNG and 576 MB as RGB in Pillow.
    limits = Limits(pixels=10**9, decode_bytes=300 << 20)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "large.png")
    with DecodeWorkers(1, limits) as running:
        with pytest.raises(DecodeError, match=r"large\.png: needs more than 314572800 bytes"):
            running.picture(tmp_path / "large.png").result()
        assert running.picture(CAT).result().ndim == 3


def test_many_requests_share_few_processes_and_none_is_mixed_up():
    with DecodeWorkers(2, Limits()) as running:
        sizes = [16 + 2 * (n % 7) for n in range(40)]
        options = OPTIONS | {"indices": "uniform", "mode": "exact"}
        futures = [running.clip(CLIP, 2, size, seed=None, **options) for size in sizes]
        assert [future.result().shape[-1] for future in futures] == sizes
        assert len([c for c in children() if "unival.data_gpu.worker" in c.cmdline()]) >= 2


def test_processes_end_with_their_owner():
    running = DecodeWorkers(1, Limits())
    running.picture(CAT).result()
    process = running._processes[0].process
    running.close()
    assert process.poll() is not None
    del running
    gc.collect()


def test_a_process_that_cannot_start_is_an_error_of_the_program(monkeypatch):
    monkeypatch.setattr(isolation.sys, "executable", "/bin/false")
    with DecodeWorkers(1, Limits()) as running, pytest.raises(RuntimeError, match="did not start"):
        running.picture(CAT).result()
