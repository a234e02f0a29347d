"""Backends: the same frames by each, what happens where one is missing, which one is chosen."""

import functools
import io
import logging
import random
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from unival.data_gpu import video_backends
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.limits import Limits
from unival.data_gpu.video import decode_clip
from unival.data_gpu.video_backends import (
    BACKENDS,
    BackendError,
    choose_backend,
    nvdec_graph,
    read_frames,
    require_backend,
)

LIMITS = Limits()
SAMPLES = sorted((Path(__file__).parents[2] / "samples" / "video").glob("*.mp4"))
STEP = 10


@functools.cache
def film(codec, form="mp4", frames=20, rotation=0):
    """Frame i is grey STEP * i, its upper left quarter red."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.bit_rate = 96, 64, 4_000_000
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {"g": "6"}
        stream.set_display_rotation(rotation)
        for index in range(frames):
            pixels = np.full((64, 96, 3), STEP * index, dtype=np.uint8)
            pixels[:32, :48] = (200, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def read(media, numbers, backend):
    return read_frames(media, lambda length: list(numbers), backend, LIMITS)


@pytest.fixture
def torchcodec():
    try:
        require_backend("torchcodec")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("codec", "form"),
    [
        ("libx264", "mp4"),
        ("libx264", "matroska"),
        ("libx264", "mpegts"),  # read by PyAV: torchcodec's first frames are others
        ("libx264", "avi"),  # the same
        ("libx265", "mp4"),
        ("libvpx-vp9", "webm"),
        ("libsvtav1", "mp4"),
        ("mpeg4", "mp4"),
        ("mjpeg", "avi"),
    ],
)
def test_torchcodec_gives_exactly_the_frames_of_pyav(codec, form, torchcodec):
    data = film(codec, form)
    numbers = (3, 0, 19, 12, 12)
    ours, theirs = read(data, numbers, "pyav"), read(data, numbers, "torchcodec")
    assert np.array_equal(ours, theirs)
    assert [round(frame[40:].mean() / STEP) for frame in theirs] == list(numbers)


def test_torchcodec_gives_the_clips_of_pyav_from_paths_and_turned_films(torchcodec):
    for media in (*SAMPLES[:3], film("libx264", rotation=90), film("libx264", rotation=-90)):
        clips = [
            decode_clip(media, 6, 64, indices="random", rng=random.Random(7), backend=backend)
            for backend in ("pyav", "torchcodec")
        ]
        assert np.array_equal(*clips)


def test_a_film_that_torchcodec_fails_on_is_read_by_pyav(torchcodec, monkeypatch, caplog):
    def fail(media, wanted, limits):
        raise RuntimeError("no more frames")

    monkeypatch.setattr(video_backends, "_read_torchcodec", fail)
    with caplog.at_level(logging.INFO):
        frames = read(film("libx264"), (4,), "torchcodec")
    assert np.array_equal(frames, read(film("libx264"), (4,), "pyav"))
    assert "no more frames" in caplog.text


def test_a_playlist_is_refused_before_torchcodec_sees_it(torchcodec, tmp_path):
    (tmp_path / "secret.ts").write_bytes(film("libx264", "mpegts"))
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path / 'secret.ts'}\n"
    (tmp_path / "list.m3u8").write_text(text + "#EXT-X-ENDLIST\n")
    with pytest.raises(DecodeError):
        read(tmp_path / "list.m3u8", (0,), "torchcodec")


@pytest.mark.parametrize(
    ("backend", "module"), [("torchcodec", "torchcodec.decoders"), ("nvdec", "nvidia.dali")]
)
def test_a_backend_that_is_not_installed_is_named(backend, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(BackendError, match=f"video backend {backend} cannot run here"):
        decode_clip(SAMPLES[0], 2, 32, backend=backend)


def test_the_gpu_graph_decodes_on_the_gpu_and_can_be_looked_at_without_one():
    graph = nvdec_graph("gpu", -1).serialize()
    assert b"decoders__Video" in graph
    assert b"mixed" in graph
    assert b"mixed" not in nvdec_graph("cpu", -1).serialize()
    with pytest.raises(ValueError, match="known: cpu, gpu"):
        nvdec_graph("mixed", -1)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize(("codec", "form"), [("libvpx-vp9", "mp4"), ("mjpeg", "mp4")])
def test_the_graph_gives_the_frames_of_pyav_on_a_cpu(codec, form, rotation):
    data = film(codec, form, rotation=rotation)
    numbers = [3, 0, 19, 12, 12]
    ours = np.array(read(data, numbers, "pyav"))
    theirs = np.array(video_backends._read_nvdec(data, numbers, LIMITS, device="cpu"))
    assert ours.shape == theirs.shape
    # Both decode the same YUV, but round differently on the way to RGB: 3 of 255 on average was
    # seen on other films, and neighbouring frames differ by STEP.
    assert np.abs(ours.astype(int) - theirs).mean(axis=(1, 2, 3)).max() < 3


def test_the_graph_is_built_again_after_a_film_that_it_cannot_read():
    with pytest.raises(RuntimeError):
        video_backends._read_nvdec(film("libx264"), [0], LIMITS, device="cpu")
    frames = video_backends._read_nvdec(film("mjpeg"), [7], LIMITS, device="cpu")
    assert round(float(frames[0][40:].mean()) / STEP) == 7


def test_nvdec_without_a_gpu_is_an_error_whatever_the_film():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for media in (SAMPLES[0], film("libx264", "mpegts")):  # PyAV would read the second one
        with pytest.raises(BackendError, match=r"nvdec cannot run here.*GPU"):
            decode_clip(media, 2, 32, backend="nvdec")


@pytest.mark.gpu
def test_nvdec_gives_the_frames_of_pyav_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    for media in (film("libx264"), film("libx265"), film("libx264", rotation=90), SAMPLES[0]):
        ours, theirs = (np.array(read(media, [3, 0, 19, 12], b)) for b in ("pyav", "nvdec"))
        assert np.abs(ours.astype(int) - theirs).mean(axis=(1, 2, 3)).max() < 4


def test_the_quickest_backend_is_chosen_and_said(monkeypatch, caplog):
    now = [0.0]
    cost = {"pyav": 3.0, "torchcodec": 2.0, "nvdec": 1.0}
    asked = []

    def decode(media, backend):
        if media == b"bad":
            raise DecodeError(media, "no film")
        if backend == "nvdec":
            raise BackendError("video backend nvdec cannot run: no GPU")
        asked.append((media, backend))
        now[0] += cost[backend]

    monkeypatch.setattr(video_backends.time, "perf_counter", lambda: now[0])
    with caplog.at_level(logging.INFO):
        assert choose_backend([b"one", b"bad", b"two"], BACKENDS, decode) == "torchcodec"
    (line,) = caplog.messages
    assert "video backend torchcodec: pyav 3000.0 ms a clip; torchcodec 2000.0 ms" in line
    assert "no GPU" in line
    assert "no film" in line
    for backend in ("pyav", "torchcodec"):
        assert {media for media, name in asked if name == backend} == {b"one", b"two"}
    cost["pyav"] = 1.0
    assert choose_backend([b"one"], BACKENDS, decode) == "pyav"
    assert choose_backend([b"bad", b"bad"], BACKENDS, decode) == "pyav"
    assert choose_backend([], BACKENDS, decode) == "pyav"
