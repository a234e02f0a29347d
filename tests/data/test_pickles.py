"""Pickles of plain data are read; any other is refused before it does something."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct

import pytest

from unival.data import pickles
from unival.data.pickles import load_plain

PLAIN = {
    "refs": [{"ref_id": 1, "bbox": [1.5, 2.0], "sent": "a hen", "ids": (3, 4)}],
    "frequency": collections.defaultdict(float, {("a", "hen"): 2.0}),
    "ordered": collections.OrderedDict(yes=0, no=1),
    "set": {1, 2},
    "nothing": None,
    "long": 1 << 80,
}


class Runs:
    """What a pickle can do when it is read."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_come_back(tmp_path, protocol):
    path = tmp_path / "plain.p"
    path.write_bytes(pickle.dumps(PLAIN, protocol))
    found = load_plain(path)
    assert found == PLAIN
    assert found["frequency"]["missing"] == 0.0
    assert isinstance(found["ordered"], collections.OrderedDict)


def test_texts_of_python_2_are_utf_8(tmp_path):
    path = tmp_path / "two.p"
    path.write_bytes(b"(S'caf\\xc3\\xa9'\np0\nV\\u00e9\np1\nt.")  # protocol 0, a str and a unicode
    assert load_plain(path) == ("café", "é")


@pytest.mark.parametrize(
    "name", ["os\nsystem", "builtins\neval", "builtins\ngetattr", "numpy\nload"]
)
def test_a_name_that_is_not_plain_data_is_refused(tmp_path, name):
    path = tmp_path / "evil.p"
    path.write_bytes(f"c{name}\n(S'1'\ntR.".encode())
    with pytest.raises(ValueError, match=rf"evil\.p.*{name.partition(chr(10))[2]} is not plain"):
        load_plain(path)


def test_nothing_runs(tmp_path):
    path, trace = tmp_path / "runs.p", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"refs": [Runs(trace)]}))
    with pytest.raises(ValueError, match="not plain data"):
        load_plain(path)
    assert not trace.exists()


def test_what_is_outside_of_the_file_is_refused(tmp_path):
    out = io.BytesIO()
    pickler = pickle.Pickler(out)
    pickler.persistent_id = lambda value: "x" if value == "there" else None
    pickler.dump(["there"])
    path = tmp_path / "outside.p"
    path.write_bytes(out.getvalue())
    with pytest.raises(ValueError, match="outside of the file"):
        load_plain(path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"hello", pickle.dumps(PLAIN)[:-10]])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "damaged.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.p: not a pickle of plain data"):
        load_plain(path)


def test_a_length_in_a_header_is_not_believed(tmp_path):
    path = tmp_path / "huge.p"
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc")
    with pytest.raises(ValueError, match="not a pickle"):
        load_plain(path)


def test_a_file_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_BYTES", 10)
    path = tmp_path / "large.p"
    path.write_bytes(pickle.dumps(PLAIN))
    with pytest.raises(ValueError, match="10 at most"):
        load_plain(path)
    with pytest.raises(FileNotFoundError):
        load_plain(tmp_path / "absent.p")
