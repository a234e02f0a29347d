"""`unival data check`: what it says of each file and record, and what it does not do again."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import wave
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unival.cli import main
from unival.data.tools import check as module
from unival.data_gpu.errors import DecodeError, MediaInfo


def picture(colour=0, form="PNG"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(colour).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


class Fake:
    """In place of DecodeWorkers: media that hold `bad` are bad; counts what is decoded."""

    decoded: list[tuple[str, str]]

    def __init__(self, count, limits):
        assert count >= 1
        assert limits.decode_seconds == 120

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def verify(self, media, medium):
        data = media.read_bytes() if isinstance(media, Path) else media
        Fake.decoded.append((data.decode(), medium))
        if data == b"interrupt":
            raise KeyboardInterrupt
        future = Future()
        if data == b"broken machine":
            future.set_exception(RuntimeError("a decoding process did not start"))
        elif b"bad" in data:
            future.set_exception(DecodeError(media, "truncated"))
        else:
            future.set_result(MediaInfo(medium, "X"))
        return future


@pytest.fixture
def decoded(monkeypatch):
    monkeypatch.setattr(module, "DecodeWorkers", Fake)
    monkeypatch.setattr(module, "cores", lambda: 1)
    Fake.decoded = []
    return Fake.decoded


def check(*arguments):
    return main(["data", "check", *map(str, arguments)])


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "media"
    (root / "deep").mkdir(parents=True)
    for name, text in {
        "a.jpg": "a",
        "b.mp4": "bad b",
        "deep/c.WAV": "c",
        "notes.txt": "passed by",
        "deep/d.png": "d",
    }.items():
        (root / name).write_text(text)
    return root


def test_files_are_decoded_by_kind_and_the_exit_status_counts(folder, tmp_path, decoded, capsys):
    log = tmp_path / "log.jsonl"
    assert check(folder, "--json", log) == 1
    assert decoded == [("a", "image"), ("bad b", "video"), ("c", "audio"), ("d", "image")]
    found = entries(log)
    assert [(e["path"], e["row"], e["kind"], e["ok"], e["reason"]) for e in found] == [
        (str(folder / "a.jpg"), None, "image", True, None),
        (str(folder / "b.mp4"), None, "video", False, "truncated"),
        (str(folder / "deep/c.WAV"), None, "audio", True, None),
        (str(folder / "deep/d.png"), None, "image", True, None),
    ]
    status = (folder / "a.jpg").stat()
    assert (found[0]["size"], found[0]["mtime_ns"]) == (1, status.st_mtime_ns)
    assert capsys.readouterr().out.splitlines() == [
        f"{folder / 'b.mp4'}: truncated",
        "check: 3 good, 1 bad",
    ]
    assert check(folder / "a.jpg", folder / "deep") == 0
    assert check(folder / "notes.txt") == 1
    assert "not a medium" in capsys.readouterr().out


def test_what_cannot_run_gives_two(folder, tmp_path, decoded, capsys):
    assert check(tmp_path / "none") == 2
    assert "none: no such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert check(tmp_path / "empty") == 2
    assert check(folder, "--json", tmp_path) == 2
    assert check(folder, "--json", folder / "notes.txt") == 2
    (folder / "e.jpg").write_text("broken machine")
    capsys.readouterr()
    assert check(folder) == 2
    assert "did not start" in capsys.readouterr().err


def test_unchanged_files_are_not_decoded_again(folder, tmp_path, decoded, capsys):
    log = tmp_path / "log.jsonl"
    check(folder, "--json", log)
    first = log.read_text().splitlines()
    decoded.clear()
    assert check(folder, "--json", log) == 1
    assert decoded == []
    assert log.read_text().splitlines() == first
    assert "3 good, 1 bad, 4 of them known from" in capsys.readouterr().out
    (folder / "b.mp4").write_text("b again")
    (folder / "deep" / "d.png").write_text("bad")
    (folder / "new.png").write_text("new")
    assert check(folder, "--json", log) == 1
    assert sorted(decoded) == [("b again", "video"), ("bad", "image"), ("new", "image")]
    found = {Path(e["path"]).name: e["ok"] for e in entries(log)}
    assert len(entries(log)) == 5
    assert found == {"a.jpg": True, "b.mp4": True, "c.WAV": True, "d.png": False, "new.png": True}


def test_an_interrupted_check_goes_on(folder, tmp_path, decoded, capsys):
    (folder / "deep" / "cc.png").write_text("interrupt")
    for number in range(6):
        (folder / f"b{number}.png").write_text(f"b{number}")
    log = tmp_path / "log.jsonl"
    assert check(folder, "--json", log) == 130
    assert "interrupted" in capsys.readouterr().err
    done = [Path(e["path"]).name for e in entries(log)]
    assert done == ["a.jpg", "b.mp4", "b0.png", "b1.png", "b2.png", "b3.png"]
    (folder / "deep" / "cc.png").write_text("fine")
    decoded.clear()
    assert check(folder, "--json", log) == 1
    assert [text for text, _ in decoded] == ["b4", "b5", "c", "fine", "d"]
    assert len(entries(log)) == 11


def table(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def test_records_of_tables_and_shards_are_checked(folder, tmp_path, decoded, capsys):
    def text(data):
        return base64.b64encode(data).decode()

    path = table(
        tmp_path / "rows.tsv",
        [
            ("1", text(b"one"), "x", "", "", "", "set", "caption"),
            ("2", "media/b.mp4", "x", "", "", "", "set", "video_caption"),
            ("3", "media/b.mp4", "y", "", "", "", "set", "video_caption"),
            ("4", text(b"bad four"), "x", "", "", "", "set", "caption"),
            ("5", text(b"five"), "", "", "", "", "set", "caption"),
            ("6", "media/none.mp4", "x", "", "", "", "set", "audio_caption"),
        ],
    )
    (folder / "none.mp4").write_text("here after all")
    main(["data", "shard", str(folder / "deep"), "--out", str(tmp_path / "shards")])
    (folder / "deep" / "d.txt").write_text("a caption")
    main(["data", "shard", str(folder / "deep"), "--out", str(tmp_path / "shards2")])
    tar = tmp_path / "shards2" / "deep-000000.tar"
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    log = tmp_path / "log.jsonl"
    assert check(path, tar, tmp_path / "broken.tar", "--json", log) == 1
    found = entries(log)
    assert [(e["row"], e["kind"], e["reason"]) for e in found[:-1]] == [
        (0, "image", None),
        (1, "video", "truncated"),
        (2, "video", "truncated"),
        (3, "image", "truncated"),
        (4, None, "field 'caption': empty text"),
        (5, "audio", None),
        ("000000001", "image", None),
    ]
    assert {e["path"] for e in found} == {str(path), str(tar), str(tmp_path / "broken.tar")}
    assert [e["media"] for e in found[:3]] == [None, *[str(folder / "b.mp4")] * 2]
    assert "no end mark" in found[-1]["reason"]
    assert [t for t, _ in decoded] == ["one", "bad b", "bad four", "here after all", "d"]
    decoded.clear()
    (folder / "b.mp4").write_text("good now")
    check(path, tar, tmp_path / "broken.tar", "--json", log)
    assert [t for t, _ in decoded] == ["good now"]
    assert sum(not e["ok"] for e in entries(log)) == 3


def test_real_media_with_real_workers(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    data = picture()
    (root / "good.png").write_bytes(data)
    (root / "cut.png").write_bytes(data[: len(data) // 2])
    (root / "page.jpg").write_text("<html>")
    with wave.open(str(root / "good.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\1\2" * 8000)
    (root / "cut.wav").write_bytes((root / "good.wav").read_bytes()[:9000])
    (root / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    log = tmp_path / "log.jsonl"
    assert check(root, "--json", log) == 1
    found = {Path(e["path"]).name: e["ok"] for e in entries(log)}
    assert found == {
        "bad.mp4": False,
        "cut.png": False,
        "cut.wav": False,
        "good.png": True,
        "good.wav": True,
        "page.jpg": False,
    }


def test_ctrl_c_ends_a_check_and_keeps_what_is_done(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    pictures = [picture(seed) for seed in range(7)]
    for number in range(4000):
        (root / f"{number:04}.png").write_bytes(pictures[number % 7])
    log = tmp_path / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "unival.cli", "data", "check", str(root), "--json", str(log)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
        # A shell's background jobs, and so their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "unival data: interrupted; the same command goes on"
    found = entries(log)
    assert 0 < len(found) < 4000
    assert all(e["ok"] for e in found)
