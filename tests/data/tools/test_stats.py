"""`unival data stats`: numbers of a table whose numbers are known by hand."""

import base64
import io
import json
import sys
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from unival.cli import main


def picture(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def write_sound(path, seconds):
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(4 * 8000 * seconds))


def write_film(path, count):
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(5))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(count):
            black = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            film.mux(stream.encode(black))
        film.mux(stream.encode(None))


@pytest.fixture
def given(tmp_path):
    """Four pictures, a film that two rows name, two sounds, and three that are bad."""
    pictures = [base64.b64encode(picture(10 * n, 20)).decode() for n in (1, 2, 3, 5)]
    write_film(tmp_path / "film.mp4", 15)
    rows = [
        ("1", pictures[0], "one", "", "", "", "", "caption"),
        ("2", pictures[1], "one two three", "", "", "", "", "caption"),
        ("3", pictures[2], "", "what is it?", "0.5|!+a cat&&0.5|!+cat", "", "", "qa"),
        ("4", pictures[3], "the cat", "", "0,0,5,5", "", "", "visual_grounding"),
        ("5", "film.mp4", "a b c d", "", "", "", "", "video_caption"),
        ("6", "film.mp4", "a b", "", "", "", "", "video_caption"),
        ("7", "", "no picture", "", "", "", "", "caption"),
        ("8", base64.b64encode(b"<html>").decode(), "no picture", "", "", "", "", "caption"),
    ]
    table = tmp_path / "rows.tsv"
    table.write_text("".join("\t".join(row) + "\n" for row in rows))
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    write_sound(sounds / "a.wav", 1)
    write_sound(sounds / "b.wav", 4)
    (sounds / "c.wav").write_bytes(b"no sound")
    return table, sounds


def test_counts_lengths_and_sizes_are_those_of_the_table(given, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "stats", *map(str, given), "--out", str(out)]) == 1
    found = json.loads((out / "stats.json").read_text())
    assert found["records"] == {"caption": 3, "qa": 1, "video_caption": 2, "visual_grounding": 1}
    assert found["media"] == {"audio": 2, "image": 4, "video": 1}
    assert found["bad"] == 3
    values = found["values"]
    assert values["image width"] == {
        "count": 4,
        "sum": 110,
        "mean": 27.5,
        "min": 10,
        "max": 50,
        "p5": pytest.approx(11.5),
        "p50": 25,
        "p95": pytest.approx(47),
    }
    assert values["image bytes"]["sum"] == sum(len(picture(10 * n, 20)) for n in (1, 2, 3, 5))
    assert (values["video frames"]["count"], values["video frames"]["sum"]) == (1, 15)
    assert values["video seconds"]["sum"] == pytest.approx(3.0)
    assert (values["video width"]["sum"], values["video height"]["sum"]) == (64, 48)
    assert values["audio seconds"]["sum"] == pytest.approx(5.0)
    assert values["audio channels"]["mean"] == 2
    assert values["audio bytes"]["max"] == (given[1] / "b.wav").stat().st_size
    # one | one two three | the cat | a b c d | a b | no picture
    assert (values["caption words"]["count"], values["caption words"]["sum"]) == (6, 14)
    assert values["question words"]["mean"] == 3
    assert (values["answer words"]["count"], values["answer words"]["sum"]) == (2, 3)
    printed = capsys.readouterr().out
    assert "image width" in printed
    assert "27.5" in printed
    with Image.open(out / "stats.png") as drawn:
        assert len(set(np.asarray(drawn.convert("L")).ravel().tolist())) > 10


def test_without_matplotlib_it_says_what_to_install(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["data", "stats", str(given[0]), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'unival[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
