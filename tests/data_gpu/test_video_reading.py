"""Reading frames by number: seeking gives what decoding from the start gives, whatever the codec,
the times, the edit list or the turn; what is damaged or too large is refused."""

import functools
import io
import random
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from unival.data_gpu import video_backends, video_scan
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.limits import Limits
from unival.data_gpu.video import decode_clip, probe_video, verify_video
from unival.data_gpu.video_backends import read_frames
from unival.data_gpu.video_scan import is_unreferenced, scan_film

LIMITS = Limits()
SAMPLES = Path(__file__).parents[2] / "samples"
FRAMES, STEP, RATE = 48, 5, 12
WIDTH, HEIGHT = 96, 64
FIXED = "bframes=3:b-adapt=0:scenecut=0"
# A keyframe every 12 frames and three B-frames, where the codec has them.
CODECS = {
    "h264": ("libx264", "mp4", {"g": "12", "bf": "3"}),
    "h264 open groups": ("libx264", "mp4", {"g": "12", "x264-params": f"open-gop=1:{FIXED}"}),
    "h264 pyramid": ("libx264", "matroska", {"g": "12", "bf": "5", "x264-params": "b-pyramid=2"}),
    "h264 gradual refresh": ("libx264", "mp4", {"g": "12", "x264-params": "intra-refresh=1"}),
    "h264 transport stream": ("libx264", "mpegts", {"g": "12", "bf": "3"}),
    "h264 avi": ("libx264", "avi", {"g": "12", "bf": "3"}),  # AVI has no times
    "h264 flv": ("libx264", "flv", {"g": "12", "bf": "3"}),
    "hevc": ("libx265", "mp4", {"x265-params": "keyint=12:open-gop=0:log-level=none"}),
    "hevc open groups": ("libx265", "mp4", {"x265-params": f"keyint=12:log-level=none:{FIXED}"}),
    "vp8": ("vp8", "webm", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9": ("libvpx-vp9", "webm", {"g": "12", "lag-in-frames": "16", "cpu-used": "8"}),
    "av1": ("libsvtav1", "mp4", {"g": "12", "preset": "12"}),
    "mpeg4": ("mpeg4", "mp4", {"g": "12", "bf": "2", "sc_threshold": "1000000000"}),
    "mpeg4 avi": ("mpeg4", "avi", {"g": "12", "bf": "2", "sc_threshold": "1000000000"}),
    "mpeg2": ("mpeg2video", "mpegts", {"g": "12", "bf": "2", "sc_threshold": "1000000000"}),
    "mjpeg": ("mjpeg", "avi", {}),
    "mjpeg mp4": ("mjpeg", "mp4", {}),
}
# Of these, the frames that come after a jump are not those that come from the start.
NOT_SEEKABLE = {"h264 gradual refresh", "h264 avi", "mpeg4 avi"}


def picture(number):
    """Grey STEP * number above, a pattern that moves and a black corner below."""
    columns = np.arange(WIDTH) + 2 * number
    pixels = np.full((HEIGHT, WIDTH, 3), STEP * number, dtype=np.uint8)
    rows = np.arange(HEIGHT // 2)[:, None, None]
    pixels[HEIGHT // 2 :] = 100 + 50 * np.sin(columns[:, None] / [5, 7, 9]) * np.cos(rows / 6)
    return pixels


@functools.cache
def film(name, frames=FRAMES, times=None, rotation=None):
    """`times` in 1/48 s, for each frame."""
    codec, form, options = CODECS[name]
    buffer = io.BytesIO()
    flags = {"moov_size": "8192"} if form == "mp4" else {}  # the header before the frames
    with av.open(buffer, "w", format=form, options=flags) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.bit_rate = WIDTH, HEIGHT, 2_000_000
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = options
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            if times:
                stream.codec_context.time_base = Fraction(1, 48)
                frame.pts, frame.time_base = times[number], Fraction(1, 48)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def all_frames(data):
    """The oracle: FFmpeg's decoder from the start to the end."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def number_of(frame):
    return round(frame[: HEIGHT // 2 - 4].mean() / STEP)


def read(data, *numbers, backend="pyav", limits=LIMITS):
    return read_frames(data, lambda length: list(numbers), backend, limits)


def spy_on_runs(monkeypatch):
    """The packets that decoding started at, call by call."""
    starts = []
    decode = video_backends._decode_runs

    def spy(media, film, runs, limits):
        starts.append([run.start for run in runs])
        return decode(media, film, runs, limits)

    monkeypatch.setattr(video_backends, "_decode_runs", spy)
    return starts


@pytest.mark.parametrize("name", CODECS)
def test_seeking_gives_exactly_the_frames_of_decoding_from_the_start(name, monkeypatch):
    data = film(name)
    expected = all_frames(data)
    assert [number_of(frame) for frame in expected] == list(range(FRAMES))
    starts = spy_on_runs(monkeypatch)
    for numbers in [(n,) for n in range(FRAMES)] + [(5, 17, 29, 41), (40, 3, 3), (11, 12), (0, 47)]:
        for number, frame in zip(numbers, read(data, *numbers), strict=True):
            assert np.array_equal(frame, expected[number]), (name, numbers)
    jumped = [calls for calls in starts if calls[0] > 0]
    if name in NOT_SEEKABLE:
        assert len(starts) > FRAMES + 4 or not jumped  # begun again from the start
    else:
        assert len(starts) == FRAMES + 4
        assert len(jumped) > FRAMES // 2


def test_only_the_groups_of_wanted_frames_are_decoded(monkeypatch):
    decoded = []
    is_next = video_backends._is_next

    def spy(film, frame, number, *rest):
        decoded.append(number)
        return is_next(film, frame, number, *rest)

    monkeypatch.setattr(video_backends, "_is_next", spy)
    read(film("mpeg4"), 14, 38)
    assert decoded == [12, 13, 14, 36, 37, 38]
    decoded.clear()
    # Of an H.264 film not even these: no other picture is predicted from 13 and 37.
    data = film("h264")
    needed = scan_film(data, LIMITS)
    apart = {number for number in (13, 37) if needed.ticks[number] in needed.unreferenced}
    assert apart
    read(data, 14, 38)
    assert decoded == sorted({12, 13, 14, 36, 37, 38} - apart)


def test_a_picture_that_no_other_needs_is_told_by_its_first_slice():
    header = bytes([1, 100, 0, 30, 0xFF])  # units have four bytes of length

    def unit(reference, kind, size=3):
        return (1 + size).to_bytes(4, "big") + bytes([reference << 5 | kind]) + b"\x88" * size

    def told(*units, header=header):
        return is_unreferenced(memoryview(b"".join(units)), header)

    assert told(unit(0, 1))
    assert not told(unit(2, 1))
    assert not told(unit(3, 5))
    assert told(unit(0, 9, 1), unit(0, 6), unit(0, 1))  # a delimiter and a message before it
    assert not told(unit(0, 6), unit(1, 1))
    for damaged in (b"", b"\0", b"\0\0\0\x09", unit(0, 6), b"\xff" * 40):
        assert not told(damaged)
    assert not told(b"\0\0\0\1\x01", header=b"\0\0\0\1\x67")  # start codes, no lengths


@pytest.mark.parametrize("name", ["h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2"])
def test_keyframes_that_are_none_do_not_change_the_frames(name, monkeypatch):
    data = film(name)
    expected = all_frames(data)
    scanned = scan_film(data, LIMITS)
    with av.open(io.BytesIO(data)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    false = replace(scanned, starts=sorted((tick, packet) for packet, tick in enumerate(times)))
    monkeypatch.setattr(video_backends, "scan_film", lambda media, limits: false)
    for number in range(FRAMES):
        assert np.array_equal(read(data, number)[0], expected[number])


@pytest.mark.parametrize("name", ["h264", "vp9", "mpeg4"])
def test_frames_of_uneven_length_are_counted_not_timed(name):
    times = tuple(4 * n + n % 3 + (200 if n > 20 else 0) for n in range(FRAMES))
    data = film(name, times=times)
    assert [number_of(read(data, n)[0]) for n in (0, 20, 21, 30, 47)] == [0, 20, 21, 30, 47]
    clip = decode_clip(data, 4, 32)
    assert [round(grey / STEP) for grey in clip[:, :, :12].mean(axis=(0, 2, 3))] == [5, 17, 29, 41]


def edit(data, first, frames):
    """Change the edit list: `frames` frames from number `first` on are shown."""
    data = bytearray(data)
    entry = data.index(b"elst") + 12
    media_time = int.from_bytes(data[entry + 4 : entry + 8], "big")
    ticks = 12288 // RATE * first  # 12288: the time scale that FFmpeg gives 12 frames a second
    data[entry : entry + 4] = (1000 * frames // RATE).to_bytes(4, "big")
    data[entry + 4 : entry + 8] = (media_time + ticks).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(("first", "count"), [(0, 24), (6, 24), (14, 34), (30, 18)])
def test_an_edit_list_leaves_only_the_frames_that_it_shows(first, count):
    data = edit(film("h264"), first, count)
    expected = all_frames(data)
    assert [number_of(frame) for frame in expected] == list(range(first, first + count))
    assert probe_video(data, LIMITS).frames == FRAMES
    assert verify_video(data, LIMITS).frames == count
    for number in (0, 1, count // 2, count - 1):
        assert np.array_equal(read(data, number)[0], expected[number])
    middles = [first + (count // 2 - 1) // 2, first + (count // 2 + count - 1) // 2]
    assert [number_of(frame) for frame in _uniform(data, 2)] == middles


def _uniform(data, count):
    chance = random.Random(0)
    choose = functools.partial(_choose_uniform, count, chance)
    return read_frames(data, choose, "pyav", LIMITS)


def _choose_uniform(count, chance, length):
    return video_backends.frame_indices(count, length, "uniform", chance)


def test_a_dropped_frame_is_not_taken_for_a_truncated_film():
    data = bytearray(film("mjpeg mp4"))
    sizes = data.index(b"stsz") + 16
    data[sizes + 4 * 47 : sizes + 4 * 48] = bytes(4)  # the last sample has no bytes
    assert verify_video(bytes(data), LIMITS).frames == 47
    assert [number_of(frame) for frame in read(bytes(data), 0, 46)] == [0, 46]


@pytest.mark.parametrize("name", ["h264 open groups", "hevc open groups"])
def test_a_film_cut_before_an_open_group_starts_with_its_first_whole_frame(name):
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(film(name))) as source,
        av.open(buffer, "w", format="matroska") as target,
    ):
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        keys = [n for n, packet in enumerate(packets) if packet.is_keyframe]
        kept = packets[keys[1] :]
        assert sum(packet.pts < kept[0].pts for packet in kept) >= 2  # need what was cut away
        for packet in kept:
            packet.stream = copy
            target.mux(packet)
    data = buffer.getvalue()
    assert scan_film(data, LIMITS).info.frames == FRAMES - 12
    assert [number_of(frame) for frame in read(data, 0, 1, 13, 35)] == [12, 13, 25, 47]


def turned(data, matrix):
    """Write (a, b, c, d) of the display matrix into the track header: a stored point (x, y) is
    shown at (a x + c y, b x + d y)."""
    data = bytearray(data)
    entry = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    values = (matrix[0], matrix[1], 0, matrix[2], matrix[3], 0)
    for number, value in enumerate(values):
        data[entry + 4 * number : entry + 4 * number + 4] = (value << 16).to_bytes(
            4, "big", signed=True
        )
    return bytes(data)


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda x: x),
        # What is stored right of another pixel is shown below it: a quarter turn clockwise.
        ((0, 1, -1, 0), lambda x: x.transpose(1, 0, 2)[:, ::-1]),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((0, -1, 1, 0), lambda x: x.transpose(1, 0, 2)[::-1]),
    ],
)
def test_frames_are_turned_upright_by_the_display_matrix(matrix, upright):
    data = film("h264")
    (frame,) = read(turned(data, matrix), 17)
    assert np.array_equal(frame, upright(all_frames(data)[17]))


def test_headers_and_counts_of_a_film():
    info = probe_video(film("h264"), LIMITS)
    assert (info.kind, info.format, info.width, info.height) == ("video", "mp4/h264", 96, 64)
    assert (info.frames, info.seconds, info.rate) == (48, 4.0, 12.0)
    assert probe_video(film("vp9"), LIMITS).frames == 0  # Matroska does not count
    assert probe_video(film("vp9"), LIMITS).seconds == 4.0
    info = verify_video(film("vp9"), LIMITS)
    assert (info.format, info.frames) == ("matroska/vp9", 48)
    assert info.seconds == pytest.approx(4.0, abs=1e-3)


# Transport streams and FLV promise no number of frames or bytes.
@pytest.mark.parametrize("name", [n for n in CODECS if CODECS[n][1] not in ("mpegts", "flv")])
def test_a_film_cut_at_any_tenth_is_refused(name):
    data = film(name)
    for tenth in range(1, 10):
        part = data[: len(data) * tenth // 10]
        for call in (functools.partial(read, part, 0), lambda p=part: verify_video(p, LIMITS)):
            with pytest.raises(DecodeError):
                call()


def flipped(name, seeds):
    """Films with one bit changed in one packet."""
    data = film(name)
    with av.open(io.BytesIO(data)) as container:
        packets = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    for seed in range(seeds):
        rng = random.Random(seed)
        position, size = rng.choice(packets)
        damaged = bytearray(data)
        damaged[position + rng.randrange(size)] ^= 1 << rng.randrange(8)
        yield bytes(damaged)


# How many of 40 films with one flipped bit are refused at least; the arithmetic coders of VP9 and
# HEVC decode nearly everything to something.
@pytest.mark.parametrize(
    ("name", "least"), [("h264", 20), ("mpeg4", 20), ("mjpeg", 6), ("av1", 10), ("hevc", 3)]
)
def test_flipped_bits_are_refused_or_give_whole_films(name, least):
    refused = 0
    for data in flipped(name, 40):
        try:
            assert verify_video(data, LIMITS).frames == FRAMES
            assert [frame.shape for frame in read(data, 3, 40)] == [(HEIGHT, WIDTH, 3)] * 2
        except DecodeError:
            refused += 1
    assert refused >= least


def test_valid_films_are_not_refused():
    for path in sorted((SAMPLES / "video").glob("*.mp4"))[:20]:
        assert verify_video(path, LIMITS).frames == probe_video(path, LIMITS).frames


@pytest.mark.parametrize("name", ["h264", "vp9"])  # Matroska's header counts no frames
def test_films_beyond_the_limits_are_refused(name):
    data = film(name)
    for limits, match in (
        (Limits(bytes=len(data) - 1), f"{len(data)} bytes"),
        (Limits(frame_pixels=96 * 64 - 1), "96 x 64"),
        (Limits(frames=47), "47"),
        (Limits(seconds=3.9), "4 seconds"),
    ):
        with pytest.raises(DecodeError, match=match):
            read(data, 0, limits=limits)
        with pytest.raises(DecodeError, match=match):
            verify_video(data, limits)
    exact = Limits(bytes=len(data), frame_pixels=96 * 64, frames=48, seconds=4.1)
    assert verify_video(data, exact).frames == 48


def test_a_frame_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path):
    # 16000 x 12000 in each JPEG's header: 288 MB decoded.
    size = HEIGHT.to_bytes(2, "big") + WIDTH.to_bytes(2, "big")
    huge = (12000).to_bytes(2, "big") + (16000).to_bytes(2, "big")
    data = re.sub(rb"(\xff\xc0\x00\x11\x08)" + size, rb"\g<1>" + huge, film("mjpeg"))
    (tmp_path / "huge.avi").write_bytes(data)
    (tmp_path / "good.avi").write_bytes(film("mjpeg"))
    code = """
import pathlib, resource, sys
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.limits import Limits
from unival.data_gpu.video import decode_clip
assert "torch" not in sys.modules  # which takes a second and 280 MB in each decoding process
folder = pathlib.Path(sys.argv[1])
decode_clip(folder / "good.avi", 4, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_clip(folder / "huge.avi", 4, 32)
except DecodeError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20_000  # kB


def test_metadata_in_an_unknown_encoding_does_not_matter():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        container.metadata["title"] = "Zuerich-Zuerich"
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(picture(9), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = buffer.getvalue().replace(b"Zuerich-Zuerich", b"Z\xfcrich-Z\xfcrich\xff\xfe")
    assert number_of(read(data, 0)[0]) == 9


def test_memory_does_not_grow_with_the_number_of_films():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    damaged = next(iter(flipped("h264", 1)))

    def decode(count):
        for number in range(count):
            decode_clip(film("h264"), 4, 32)
            if number % 4 == 0:
                with pytest.raises(DecodeError):
                    decode_clip(damaged[:-3000], 4, 32)

    decode(60)
    before = resident()
    decode(240)
    assert resident() - before < 8 << 20


def test_the_scan_names_what_it_found_truncated():
    data = film("vp9")
    with pytest.raises(DecodeError, match=f"truncated: {len(data) // 2} of {len(data)} bytes"):
        video_scan.scan_film(data[: len(data) // 2], LIMITS)
    with pytest.raises(DecodeError, match=r"of 48 frames|damaged or truncated"):
        video_scan.scan_film(film("h264")[: len(film("h264")) // 2], LIMITS)
