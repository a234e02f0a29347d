"""Clips: which frames come, that they are those frames, what is done to them, hostile files."""

import io
import random
from pathlib import Path

import av
import numpy as np
import pytest

from unival.data_gpu import video_augment
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.limits import Limits
from unival.data_gpu.video import RANDOM_MODES, decode_clip, frame_indices

SAMPLES = Path(__file__).parents[2] / "samples"
BUNNY = SAMPLES / "video" / "bbb_00.mp4"  # 320 x 180, 48 frames
STEP = 12
NO_DRAW = random.Random(0)


def film(frames, width=64, height=48, form="mp4", codec="mpeg4", first=0):
    """Frame i is grey STEP * (first + i); its left half is darker by half."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        for index in range(frames):
            pixels = np.full((height, width, 3), STEP * (first + index), dtype=np.uint8)
            pixels[:, : width // 2] //= 2
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def numbers(clip):
    """Which frames a clip of `film` shows, from the grey of the right half."""
    grey = clip[:, :, :, clip.shape[3] * 3 // 4 :].mean(axis=(0, 2, 3))
    return np.rint(grey / STEP).astype(int).tolist()


def test_uniform_takes_the_middle_of_each_interval():
    # Borders of 48 in 4: 0 12 24 36 48; middles (a + b - 1) // 2.
    assert frame_indices(4, 48, "uniform", NO_DRAW) == [5, 17, 29, 41]
    # Borders of 10 in 4: 0 2 5 7 10 (whole parts of 2.5 and 7.5).
    assert frame_indices(4, 10, "uniform", NO_DRAW) == [0, 3, 5, 8]
    assert frame_indices(4, 3, "uniform", NO_DRAW) == [0, 1, 2, 2]
    assert frame_indices(3, 1, "uniform", NO_DRAW) == [0, 0, 0]


def test_random_never_takes_the_last_frame_of_an_interval():
    rng = random.Random(0)
    drawn = np.array([frame_indices(4, 10, "random", rng) for _ in range(400)])
    # Intervals [0,2) [2,5) [5,7) [7,10).
    assert [set(column.tolist()) for column in drawn.T] == [{0}, {2, 3}, {5}, {7, 8}]


def test_random_draws_sorted_frames_where_an_interval_is_too_short():
    rng = random.Random(0)
    drawn = np.array([frame_indices(4, 5, "random", rng) for _ in range(200)])
    assert (np.diff(drawn, axis=1) > 0).all()
    assert set(drawn.flatten().tolist()) == set(range(5))
    assert frame_indices(4, 2, "random", rng) == [0, 1, 1, 1]


@pytest.mark.parametrize("form", ["mp4", "matroska"])  # Matroska's header counts no frames
def test_the_clip_shows_the_frames_that_the_rule_names(form):
    data = film(20, form=form)
    clip = decode_clip(data, 4, 32)
    assert clip.shape == (3, 4, 32, 32)
    assert clip.dtype == np.uint8
    assert clip.flags.c_contiguous
    assert numbers(clip) == [2, 7, 12, 17]
    seen = {
        n
        for seed in range(30)
        for n in numbers(decode_clip(data, 4, 32, indices="random", rng=random.Random(seed)))
    }
    assert seen <= set(range(20)) - {4, 9, 14, 19}
    assert len(seen) > 12


def test_a_short_film_repeats_its_last_frame():
    assert numbers(decode_clip(film(3), 6, 16)) == [0, 1, 2, 2, 2, 2]


def test_real_films_from_path_and_bytes_agree():
    clip = decode_clip(BUNNY, 8, 64)
    assert np.array_equal(clip, decode_clip(BUNNY.read_bytes(), 8, 64))
    with av.open(str(BUNNY)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    wanted = frames[frame_indices(8, 48, "uniform", NO_DRAW)[3]].resize((64, 64), 3)  # 3: bicubic
    far = np.abs(clip[:, 3].astype(int) - np.array(wanted).transpose(2, 0, 1))
    assert far.max() <= 1  # torch's resizing rounds otherwise than Pillow's
    assert far.mean() < 0.02


def test_center_crop_pads_with_black_and_cuts_the_border():
    # 64 x 48 in 60: 2 columns cut on each side, 6 black rows above and below.
    clip = decode_clip(film(2, 64, 48), 1, 60, mode="center_crop_pad")
    whole = decode_clip(film(2, 64, 48), 1, 64, mode="center_crop_pad")
    assert (clip[:, :, :6] == 0).all()
    assert (clip[:, :, 54:] == 0).all()
    assert np.array_equal(clip[:, :, 6:54], whole[:, :, 8:56, 2:62])


def test_center_crop_puts_the_odd_pixel_right_and_below():
    frame = np.full((3, 5, 3), 9, dtype=np.uint8)
    padded = video_augment.center_crop_pad(frame, 8)[:, :, 0]
    assert (padded[2:5, 1:6] == 9).all()
    assert padded.sum() == 9 * 15


def test_random_crops_cover_half_to_all_of_the_area_within_the_ratio():
    rng = random.Random(0)
    for _ in range(300):
        left, top, width, height = video_augment.random_crop(320, 180, rng)
        assert 0 <= left <= 320 - width
        assert 0 <= top <= 180 - height
        assert 0.48 * 320 * 180 < width * height <= 320 * 180
        assert 0.74 < width / height < 1.35
    # Too long for any allowed ratio: the middle part with the largest.
    assert video_augment.random_crop(1000, 30, rng) == (480, 0, 40, 30)


@pytest.mark.parametrize("mode", RANDOM_MODES)
def test_all_frames_of_a_clip_share_what_is_drawn(mode):
    clips = [
        decode_clip(film(1, first=9), 3, 32, mode=mode, rng=random.Random(seed))
        for seed in range(40)
    ]
    for clip in clips:
        assert clip.shape == (3, 3, 32, 32)
        assert np.array_equal(clip[:, 0], clip[:, 1])
        assert np.array_equal(clip[:, 0], clip[:, 2])
    assert len({clip.tobytes() for clip in clips}) > 20


def test_frames_that_differ_share_crop_and_flip():
    sides = set()
    bright = film(20)
    for seed in range(12):
        rng = random.Random(seed)
        clip = decode_clip(bright, 2, 32, mode="random_resized_crop", rng=rng)
        darker_left = clip[:, :, :, 0].mean(axis=(0, 2)) < clip[:, :, :, -1].mean(axis=(0, 2))
        assert darker_left[0] == darker_left[1]
        sides.add(bool(darker_left[0]))
    assert sides == {True, False}


def test_pretrain_augments_after_the_crop_and_fine_tuning_before(monkeypatch):
    seen = []
    augment = video_augment.apply_operation

    def spy(frames, operation):
        seen.append(frames[0].shape)
        return augment(frames, operation)

    monkeypatch.setattr(video_augment, "apply_operation", spy)
    decode_clip(film(3), 2, 32, mode="pretrain", rng=random.Random(0))
    decode_clip(film(3), 2, 32, mode="fine_tuning", rng=random.Random(0))
    assert seen == [(32, 32, 3)] * 2 + [(48, 64, 3)] * 2


def test_the_same_seed_gives_the_same_clip_whatever_else_is_random():
    for mode in RANDOM_MODES:
        clips = []
        for seed in (1, 2):
            np.random.seed(seed)
            random.seed(seed)
            rng = random.Random("a sample")
            clips.append(decode_clip(BUNNY, 4, 48, indices="random", mode=mode, rng=rng))
        assert np.array_equal(*clips)


def test_a_film_that_ends_early_is_refused_even_if_the_wanted_frames_are_there():
    data = BUNNY.read_bytes()
    with av.open(str(BUNNY)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        end = packets[30].pos + packets[30].size
    with pytest.raises(DecodeError, match="31 of 48 frames"):
        decode_clip(data[:end], 1, 32)
    with pytest.raises(DecodeError, match="damaged or truncated"):
        decode_clip(data[: end + 5], 8, 32)
    with pytest.raises(DecodeError):
        decode_clip(data[:1000], 8, 32)


def test_what_is_no_film_is_refused(tmp_path):
    for data in (b"", b"garbage" * 999, (SAMPLES / "audio" / "opensfx_03.ogg").read_bytes()):
        with pytest.raises(DecodeError):
            decode_clip(data, 2, 32)
    with pytest.raises(DecodeError, match="no such file"):
        decode_clip(tmp_path / "none.mp4", 2, 32)


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4"])
def test_a_playlist_cannot_make_us_open_another_file(tmp_path, name):
    segment = tmp_path / "secret.ts"
    segment.write_bytes(film(8, form="mpegts", codec="mpeg2video"))
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{segment}\n#EXT-X-ENDLIST\n"
    (tmp_path / name).write_text(text)
    if name == "list.m3u8":  # FFmpeg itself would follow it
        with av.open(str(tmp_path / name)) as container:
            assert container.format.name == "hls"
    for media in (tmp_path / name, text.encode()):
        with pytest.raises(DecodeError):
            decode_clip(media, 2, 32)


def test_clips_beyond_the_limits_are_refused():
    with pytest.raises(DecodeError, match="64 x 48"):
        decode_clip(film(4), 2, 32, limits=Limits(frame_pixels=64 * 48 - 1))
    for form in ("mp4", "matroska"):
        with pytest.raises(DecodeError, match="3"):
            decode_clip(film(4, form=form), 2, 32, limits=Limits(frames=3))


def test_wrong_arguments_are_the_callers_errors():
    with pytest.raises(ValueError, match="known"):
        decode_clip(BUNNY, 2, 32, mode="squash")
    with pytest.raises(ValueError, match="rng"):
        decode_clip(BUNNY, 2, 32, indices="random")
    with pytest.raises(ValueError, match="rng"):
        decode_clip(BUNNY, 2, 32, mode="pretrain")
    with pytest.raises(ValueError, match="known: pyav, torchcodec, nvdec"):
        decode_clip(BUNNY, 2, 32, backend="decord")
