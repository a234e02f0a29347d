"""Films and pictures encoded anew: what they show, where they lie, and what is not done again."""

import errno
import json
import struct
from concurrent.futures import Future
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from unival.cli import main
from unival.data.shards import TarShards
from unival.data.tools import encode as encoding
from unival.data.tools import reencode as module
from unival.data.tools.encode import Target, encode
from unival.data_gpu.video import open_container


def shown(number):
    """Frame `number` of the test film: a grey that tells the number, and a red left upper part."""
    frame = np.full((64, 96, 3), 20 + 16 * number, dtype=np.uint8)
    frame[:16, :24] = (200, 30, 30)
    return frame


def write_film(path, count=12, rate=10, times=None, sound=False):
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=rate, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if sound:
            noise = film.add_stream("aac", rate=16000, layout="mono")
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(shown(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, rate)
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
        if sound:
            tone = np.sin(np.arange(16000 * count // rate) * 0.2)[None].astype(np.float32) / 2
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.rate = 16000
            for piece in [frame, None]:
                film.mux(noise.encode(piece))
    return path


def turned(data, quarters):
    """The mp4 with a display matrix that turns it clockwise by quarters, written by hand."""
    one = 1 << 16
    a, b, c, d = [(one, 0, 0, one), (0, one, -one, 0), (-one, 0, 0, -one), (0, -one, one, 0)][
        quarters
    ]
    at = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[at : at + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def frames(path):
    """(seconds, is key frame, pixels) by PyAV alone."""
    with av.open(str(path)) as film:
        decoded = list(film.decode(video=0))
        return [(f.time, f.key_frame, f.to_ndarray(format="rgb24")) for f in decoded]


def numbers(found):
    """Which frame of the test film each is, by its grey."""
    greys = [pixels[-8:, -8:].mean() for _, _, pixels in found]
    found = [round((grey - 20) / 16) for grey in greys]
    assert all(abs(grey - 20 - 16 * n) < 6 for grey, n in zip(greys, found, strict=True))
    return found


def assert_alike(before, after):
    """The same frames at half the size; FFmpeg's rounding of colours takes a few levels."""
    for (_, _, old), (_, _, new) in zip(before, after, strict=True):
        half = np.asarray(Image.fromarray(old).resize((48, 32), Image.BICUBIC)).astype(int)
        assert np.abs(half - new).mean() < 4


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4")


def test_a_film_keeps_its_frames_and_times_and_gets_its_key_frames(film, tmp_path):
    assert encode(film, tmp_path / "o.mp4", "video", Target(32, gop=4)) is None
    found = frames(tmp_path / "o.mp4")
    assert numbers(found) == list(range(12))
    assert [time for time, _, _ in found] == pytest.approx([n / 10 for n in range(12)], abs=1e-3)
    assert [key for _, key, _ in found] == [number % 4 == 0 for number in range(12)]
    assert_alike(frames(film), found)
    assert np.abs(found[5][2][2:6, 2:10].mean((0, 1)) - (200, 30, 30)).max() < 8
    with av.open(str(tmp_path / "o.mp4")) as result:
        assert [stream.codec_context.name for stream in result.streams] == ["h264"]


def test_without_x264_films_become_mpeg4(film, tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    assert encode(film, tmp_path / "o.mp4", "video", Target(64, gop=4)) is None
    found = frames(tmp_path / "o.mp4")
    assert numbers(found) == list(range(12))
    assert [time for time, _, _ in found] == pytest.approx([n / 10 for n in range(12)], abs=1e-3)
    assert [key for _, key, _ in found][::4] == [True] * 3
    with av.open(str(tmp_path / "o.mp4")) as result:
        assert result.streams.video[0].codec_context.name == "mpeg4"


def test_a_full_disk_is_no_fault_of_the_film(film, tmp_path, monkeypatch):
    def full(source, out, target, limits):
        with open_container(source, limits):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoding, "encode_film", full)
    with pytest.raises(OSError, match=r"o\.mp4: No space left"):
        encode(film, tmp_path / "o.mp4", "video", Target(32))


def test_jpeg_frames_are_all_key_frames(film, tmp_path):
    assert encode(film, tmp_path / "o.avi", "video", Target(32, jpeg=True)) is None
    found = frames(tmp_path / "o.avi")
    assert numbers(found) == list(range(12))
    assert all(key for _, key, _ in found)
    assert_alike(frames(film), found)
    with av.open(str(tmp_path / "o.avi")) as result:
        assert result.streams.video[0].codec_context.name == "mjpeg"
        assert result.streams.video[0].average_rate == 10


@pytest.mark.parametrize(
    ("times", "fps", "expected"),
    [
        (None, 5, [0, 2, 4, 6, 8, 10]),
        (None, 4, [0, 2, 5, 7, 10]),  # at 0, 0.25, 0.5, 0.75, 1 s
        (None, 20, [n // 2 for n in range(23)]),
        ([0, 1, 2, 10, 11], 10, [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4]),
    ],
)
def test_frames_at_a_rate_are_those_seen_at_that_time(tmp_path, times, fps, expected):
    source = write_film(tmp_path / "f.mp4", len(times or range(12)), times=times)
    assert encode(source, tmp_path / "o.avi", "video", Target(64, jpeg=True, fps=fps)) is None
    found = frames(tmp_path / "o.avi")
    assert numbers(found) == expected
    assert found[-1][0] == pytest.approx((len(expected) - 1) / fps)


def test_times_between_frames_stay_uneven(tmp_path):
    source = write_film(tmp_path / "f.mp4", 4, times=[0, 1, 7, 8])
    assert encode(source, tmp_path / "o.mp4", "video", Target(64)) is None
    seconds = [time for time, _, _ in frames(tmp_path / "o.mp4")]
    assert seconds == pytest.approx([0, 0.1, 0.7, 0.8], abs=1e-3)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_films_are_written_upright(film, tmp_path, quarters):
    (tmp_path / "t.mp4").write_bytes(turned(film.read_bytes(), quarters))
    assert encode(tmp_path / "t.mp4", tmp_path / "o.mp4", "video", Target(64)) is None
    pixels = frames(tmp_path / "o.mp4")[3][2]
    expected = np.asarray(Image.fromarray(shown(3)).rotate(-90 * quarters, expand=True))
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 4


def test_sound_is_kept_only_where_it_is_wanted(tmp_path):
    source = write_film(tmp_path / "f.mp4", sound=True)
    for audio in (False, True):
        assert encode(source, tmp_path / "o.mp4", "video", Target(64, audio=audio)) is None
        with av.open(str(tmp_path / "o.mp4")) as result:
            assert len(result.streams.audio) == audio
            assert len(list(result.decode(video=0))) == 12
    with av.open(str(tmp_path / "o.mp4")) as result:
        pieces = [piece.to_ndarray() for piece in result.decode(audio=0)]
    samples = np.concatenate(pieces, axis=1)[0]
    assert len(samples) == pytest.approx(16000 * 1.2, abs=2100)
    middle = samples[4000:12000]  # AAC rings at its ends
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_become_small_upright_jpegs(tmp_path, orientation):
    stored = Image.fromarray(shown(0))
    tag = Image.Exif()
    tag[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=tag)
    assert encode(tmp_path / "p.png", tmp_path / "o.jpg", "image", Target(32)) is None
    array = shown(0)
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    flips = {1: "", 2: "x", 3: "xy", 4: "y", 5: "", 6: "x", 7: "xy", 8: "y"}[orientation]
    array = array[:: -1 if "y" in flips else 1, :: -1 if "x" in flips else 1]
    height, width = array.shape[:2]
    with Image.open(tmp_path / "o.jpg") as result:
        assert (result.format, result.size) == ("JPEG", (width // 2, height // 2))
        assert result.getexif().get(0x0112) is None
        expected = np.asarray(Image.fromarray(array).resize(result.size, Image.BICUBIC))
        assert np.abs(np.asarray(result).astype(int) - expected).mean() < 4


def test_small_pictures_stay_as_they_are(tmp_path):
    Image.fromarray(shown(0)[:33, :35]).save(tmp_path / "p.png")
    assert encode(tmp_path / "p.png", tmp_path / "o.jpg", "image", Target(64)) is None
    with Image.open(tmp_path / "o.jpg") as result:
        assert result.size == (35, 33)


def test_bad_media_give_a_reason_and_no_file(film, tmp_path):
    data = film.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("<html>")
    (tmp_path / "text.png").write_text("<html>")
    assert encode(tmp_path / "cut.mp4", tmp_path / "o.mp4", "video", Target(32))
    assert encode(tmp_path / "text.mp4", tmp_path / "o.mp4", "video", Target(32))
    assert encode(tmp_path / "text.png", tmp_path / "o.jpg", "image", Target(32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mp4", "text.mp4", "text.png"]


CALLS: list[str] = []


class AtOnce:
    """In place of Processes: runs in this process and counts."""

    def __init__(self, *_):
        CALLS.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, source, *arguments):
        CALLS.append(source.name)
        if source.name == "interrupt.png":
            raise KeyboardInterrupt
        future = Future()
        try:
            future.set_result(function(source, *arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(module, "Processes", AtOnce)
    monkeypatch.setattr(module, "cores", lambda: 1)
    CALLS.clear()
    return CALLS


def reencode(*arguments):
    return main(["data", "reencode", *map(str, arguments)])


def test_a_folder_keeps_its_paths_and_goes_on(film, tmp_path, at_once, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a.mkv").write_bytes(film.read_bytes())
    for name in ("b.png", "c.png", "interrupt.png", "z.png"):
        Image.fromarray(shown(1)).save(source / name)
    (source / "bad.webm").write_bytes(b"nothing")
    (source / "sound.wav").write_bytes(b"passed by")
    arguments = (source, "--out", out, "--size", 32)
    assert reencode(*arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    begun = list(at_once)
    assert begun == ["b.png", "bad.webm", "c.png", "a.mkv", "interrupt.png"]
    (source / "interrupt.png").unlink()
    assert reencode(*arguments) == 1
    assert f"{source / 'bad.webm'}: " in capsys.readouterr().out
    assert set(at_once) <= {"c.png", "a.mkv", "z.png"}  # two were in flight
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert made == {
        "b.jpg",
        "c.jpg",
        "z.jpg",
        "deep/a.mp4",
        "reencode.json",
        "reencode.jsonl",
    }
    assert numbers(frames(out / "deep" / "a.mp4")) == list(range(12))
    assert reencode(*arguments) == 1
    assert at_once == []
    Image.fromarray(shown(2)).save(source / "b.png")
    (source / "bad.webm").unlink()
    assert reencode(*arguments) == 0
    assert at_once == ["b.png"]
    assert reencode(source, "--out", out, "--size", 16) == 2
    assert "other inputs or options" in capsys.readouterr().err


def test_inputs_that_cannot_be_are_refused(film, tmp_path, at_once, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.mp4", "a.mkv"):
        (source / name).write_bytes(film.read_bytes())
    assert reencode(source, "--out", tmp_path / "out", "--size", 32) == 2
    assert "would both become" in capsys.readouterr().err
    assert reencode(source, "--out", source / "out", "--size", 32) == 2
    assert "lies in" in capsys.readouterr().err
    arguments = (source / "a.mp4", "--out", tmp_path / "o", "--size", 32, "--fps")
    assert reencode(*arguments, 3) == 2
    assert "--frames jpeg" in capsys.readouterr().err
    assert reencode(*arguments, 1e-9, "--frames", "jpeg") == 2
    assert "0.01 to 240" in capsys.readouterr().err
    assert at_once == []


def test_a_table_of_films_becomes_shards_with_its_rows(film, tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "one.mp4").write_bytes(film.read_bytes())
    (tmp_path / "films" / "bad.mp4").write_bytes(b"nothing")
    rows = [
        ("1", "films/one.mp4", "a grey that grows", "", "", "", "set", "video_caption"),
        ("2", "films/one.mp4", "", "what?", "1.0|!+grey", "", "set", "video_qa"),
        ("3", "films/bad.mp4", "bad", "", "", "", "set", "video_caption"),
        ("4", "films/one.png", "a picture", "", "", "", "set", "caption"),
        ("5", "../one.mp4", "outside", "", "", "", "set", "video_caption"),
    ]
    table = tmp_path / "films.tsv"
    table.write_text("".join("\t".join(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert reencode(table, "--out", out, "--size", 32, "--frames", "jpeg", "--fps", 5) == 1
    shards = TarShards(out / "films-000000.tar")
    assert [(r.id, r.kind, r.captions, r.question) for r in shards] == [
        ("1", "video_caption", ("a grey that grows",), ""),
        ("2", "video_qa", (), "what?"),
    ]
    (tmp_path / "back.avi").write_bytes(shards[1].media)
    found = frames(tmp_path / "back.avi")
    assert numbers(found) == [0, 2, 4, 6, 8, 10]
    assert all(key for _, key, _ in found)
    bad = map(json.loads, (out / "films.bad.jsonl").read_text().splitlines())
    assert [(entry["row"], entry["field"]) for entry in bad] == [
        (2, "media"),
        (3, "kind"),
        (4, "media"),
    ]
    assert reencode(table, "--out", out, "--size", 32, "--frames", "jpeg", "--fps", 5) == 1
