"""Writing shards: what comes back, bad rows, interruptions, COCO and folders."""

import base64
import io
import json
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from unival.cli import main
from unival.data.shards import TarShards
from unival.data.tools import running
from unival.data.tools.shard import CocoTable, FolderTable, write_shards
from unival.data.tsv import TsvTable


def picture(colour, form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def row(number, media, kind="caption"):
    columns = {
        "caption": (f"a picture && {number}", "", ""),
        "qa": ("", "what?", "0.75|!+red&&0.25|!+pink"),
        "visual_grounding": ("the red", "", "1,2,3.5,4"),
    }[kind]
    return "\t".join([f"id/{number}", media, *columns, "cat&&dog", "set", kind]) + "\n"


@pytest.fixture
def table(tmp_path):
    """Eight good rows and two bad ones (3 and 9)."""
    kinds = ["caption", "qa", "visual_grounding"]
    lines = []
    for number in range(10):
        form = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"][number % 6]
        media = base64.b64encode(picture(number, form)).decode()
        lines.append(row(number, media, kinds[number % 3]))
    lines[3] = row(3, base64.b64encode(b"<html>not found</html>").decode())
    lines[9] = "only\tthree\tcolumns\n"
    path = tmp_path / "train.v1.tsv"
    path.write_text("".join(lines))
    return path


def shard(*arguments):
    return main(["data", "shard", *map(str, arguments)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_the_records_of_the_table(table, tmp_path, capsys):
    assert shard(table, "--out", tmp_path / "out", "--samples-per-shard", 3) == 1
    shards = TarShards(tmp_path / "out" / "train_v1-{000000..000002}.tar")
    good = [0, 1, 2, 4, 5, 6, 7, 8]
    expected = [TsvTable(table, "pretrain")[number] for number in good]
    assert [replace(r, origin=None) for r in shards] == [replace(r, origin=None) for r in expected]
    assert [r.origin.row for r in shards] == [f"{number:09}" for number in good]
    assert "8 samples in 3 shards" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out" / "train_v1-000000.tar") as tar:
        assert [(m.name, m.mtime, m.uid, m.mode) for m in tar][:3] == [
            ("000000000.json", 0, 0, 0o644),
            ("000000000.png", 0, 0, 0o644),
            ("000000001.json", 0, 0, 0o644),
        ]
    bad = (tmp_path / "out" / "train_v1.bad.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in bad] == [
        {
            "file": str(table),
            "row": 3,
            "field": "media",
            "reason": "not a picture of a known format",
        },
        {
            "file": str(table),
            "row": 9,
            "field": "row",
            "reason": json.loads(bad[1])["reason"],
        },
    ]
    assert json.loads(bad[1])["reason"].startswith("3 columns")


def test_a_shard_is_closed_before_it_exceeds_its_bytes(table, tmp_path):
    shard(table, "--out", tmp_path / "one")
    with tarfile.open(tmp_path / "one" / "train_v1-000000.tar") as tar:
        sizes = [member.size for member in tar]
    samples = [a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    limit = max(samples[0] + samples[1], max(samples) - 1)
    expected = [[]]
    for size in samples:
        if expected[-1] and sum(expected[-1]) + size > limit:
            expected.append([])
        expected[-1].append(size)
    assert {len(group) for group in expected} >= {1, 2}  # alone above the limit, and at it
    shard(table, "--out", tmp_path / "out", "--max-bytes", limit)
    found = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            sizes = [member.size for member in tar]
        found.append([a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)])
    assert found == expected


class Interrupted:
    """A table that is interrupted when a row is read."""

    def __init__(self, table, at):
        self.table, self.at = table, at

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return self.table[index]


@pytest.mark.parametrize("at", range(10))
def test_a_run_interrupted_at_any_row_goes_on_to_the_same_bytes(table, tmp_path, at):
    rows = TsvTable(table, "pretrain")
    write_shards([rows], tmp_path / "whole", "t", {}, 3)
    read = []
    with pytest.raises(KeyboardInterrupt):
        write_shards([Interrupted(rows, at)], tmp_path / "parts", "t", {}, 3)
    for path in (tmp_path / "parts").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()

    class Counted(Interrupted):
        def __getitem__(self, index):
            read.append(index)
            return self.table[index]

    made = write_shards([Counted(rows, -1)], tmp_path / "parts", "t", {}, 3)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert (made.samples, made.bad) == (8, 2)
    # 0 1 2 | 4 5 6 | 7 8: a shard is finished when the first sample of the next is read
    assert read[0] == (0 if at <= 4 else 4 if at <= 7 else 7)


def test_a_run_that_dies_at_any_rename_goes_on_to_the_same_bytes(table, tmp_path, monkeypatch):
    rows = TsvTable(table, "pretrain")
    write_shards([rows], tmp_path / "whole", "t", {}, 3)
    replace_file, calls = running.os.replace, 0
    for fatal in range(11):
        left = fatal

        def dying(source, target):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            replace_file(source, target)

        monkeypatch.setattr(running.os, "replace", dying)
        folder = tmp_path / f"parts{fatal}"
        with pytest.raises(KeyboardInterrupt):
            write_shards([rows], folder, "t", {}, 3)
        calls += 1
        monkeypatch.setattr(running.os, "replace", replace_file)
        write_shards([rows], folder, "t", {}, 3)
        assert contents(folder) == contents(tmp_path / "whole")
    assert calls == 11  # options, state, 3 shards of two files, 2 states between, the last state


def test_a_finished_run_does_nothing_again(table, tmp_path):
    out = tmp_path / "out"
    assert shard(table, "--out", out) == 1
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert shard(table, "--out", out) == 1
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before


def test_shards_of_something_else_are_not_overwritten(table, tmp_path, capsys):
    out = tmp_path / "out"
    shard(table, "--out", out)
    before = contents(out)
    assert shard(table, "--out", out, "--samples-per-shard", 2) == 2
    assert "other inputs or options" in capsys.readouterr().err
    table.write_text(row(0, base64.b64encode(picture(9)).decode()))
    assert shard(table, "--out", out) == 2
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train_v1-000000.tar").write_bytes(b"of the user")
    assert shard(table, "--out", tmp_path / "mine") == 2
    assert "there already" in capsys.readouterr().err
    assert contents(tmp_path / "mine") == {"train_v1-000000.tar": b"of the user"}


def test_what_cannot_run_says_so(table, tmp_path, capsys):
    assert shard(tmp_path / "none.tsv", "--out", tmp_path / "out") == 2
    assert "none.tsv: no such file" in capsys.readouterr().err
    assert shard(table) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "empty.tsv").write_text("")
    assert shard(tmp_path / "empty.tsv", "--out", tmp_path / "out") == 2
    assert "no rows" in capsys.readouterr().err


def test_a_tar_of_others_gets_an_index(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert shard(tmp_path / "s.tar") == 0
    assert '"key": "a"' in (tmp_path / "s.index.jsonl").read_text()
    (tmp_path / "t.tar").write_bytes(b"no tar" * 200)
    assert shard(tmp_path / "t.tar") == 2
    assert not (tmp_path / "t.index.jsonl").exists()


def test_a_folder_gives_media_with_their_texts(tmp_path):
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(1))
    (folder / "a.txt").write_text("\ufeffone\n\n two \n", encoding="utf-8")
    (folder / "sub" / "b.JPG").write_bytes(picture(2, "JPEG"))
    (folder / "sub" / "b.json").write_text(
        json.dumps({"kind": "qa", "question": "what?", "answers": [[1, "red"]], "id": "own"})
    )
    (folder / "c.png").write_bytes(picture(3))
    (folder / "d.mp4").write_bytes(b"film")
    (folder / "d.json").write_text("[1]")
    (folder / "e.png").symlink_to("/etc/passwd")
    (folder / "notes.md").write_text("no medium")
    assert shard(folder, "--out", tmp_path / "out") == 1
    first, second = TarShards(tmp_path / "out" / "media-000000.tar")
    assert (first.id, first.kind, first.captions) == ("a", "caption", ("one", "two"))
    assert (first.media, second.media) == (picture(1), picture(2, "JPEG"))
    assert (second.id, second.kind, second.question) == ("own", "qa", "what?")
    bad = map(json.loads, (tmp_path / "out" / "media.bad.jsonl").read_text().splitlines())
    assert [(entry["row"], entry["field"]) for entry in bad] == [
        ("c.png", "captions"),
        ("d.mp4", "json"),
        ("e.png", "media"),
    ]
    assert len(FolderTable(folder)) == 5


def test_coco_annotations_give_captions_and_boxes(tmp_path):
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(picture(len(name)))
    annotations = {
        "images": [{"id": 1, "file_name": "one.png"}, {"id": 2, "file_name": "../two.png"}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [
            {"image_id": 1, "caption": "a cat", "id": 30},
            {"image_id": 1, "bbox": [1, 2, 3.5, 2], "category_id": 7, "id": 31},
            {"image_id": 2, "caption": "leads out", "id": 32},
            {"image_id": 1, "caption": "the same cat", "id": 33},
            {"image_id": 1, "bbox": [1, 2, 0, 2], "category_id": 7},
            {"image_id": 3, "caption": "of no image"},
            {"image_id": 1, "bbox": [0, 0, 1, 1], "caption": "left ear", "id": 36},
            {"image_id": [1], "caption": "x"},
            "nonsense",
            {"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 8},
        ],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(annotations))
    assert shard(path, "--out", tmp_path / "out") == 1
    records = list(TarShards(tmp_path / "out" / "coco-000000.tar"))
    assert [(r.id, r.kind, r.captions, r.box) for r in records] == [
        ("1", "caption", ("a cat", "the same cat"), None),
        ("1-31", "visual_grounding", ("cat",), (1.0, 2.0, 4.5, 4.0)),
        ("1-36", "visual_grounding", ("left ear",), (0.0, 0.0, 1.0, 1.0)),
    ]
    bad = map(json.loads, (tmp_path / "out" / "coco.bad.jsonl").read_text().splitlines())
    assert [(entry["row"], entry["field"]) for entry in bad] == [
        ("annotations[2]", "file_name"),
        ("annotations[4]", "box"),
        ("annotations[5]", "image_id"),
        ("annotations[7]", "image_id"),
        ("annotations[8]", "annotations"),
        ("annotations[9]", "captions"),
    ]
    for text in ("[]", "{}", '{"images": 3, "annotations": []}', "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"coco\.json"):
            CocoTable(path, None)
