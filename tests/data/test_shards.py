"""Tar shards: grouping, random access, and members that must be refused."""

import io
import json
import tarfile

import pytest

from unival.data.records import Answer, RecordError
from unival.data.shards import TarShards, expand
from unival.data.sources import open_table
from unival.data.tsv import TsvTable

CAPTION = {"kind": "caption", "captions": ["a cat"]}


def write(path, members):
    """members: (name, bytes) or a TarInfo without data."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, values=CAPTION, media=b"picture", suffix=".jpg"):
    return [(key + ".json", json.dumps(values).encode()), (key + suffix, media)]


def refusal(shards, row, field):
    with pytest.raises(RecordError) as caught:
        shards[row]
    assert caught.value.field == field
    assert caught.value.origin.file in str(caught.value)
    return str(caught.value)


def test_members_are_grouped_by_the_name_up_to_the_first_dot(tmp_path):
    everything = {
        "kind": "qa",
        "question": "what?",
        "answers": [[0.6, "cat"], [0.4, "dog"]],
        "objects": ["cat"],
        "dataset": "vqa",
    }
    ground = {"kind": "visual_grounding", "captions": ["the cat"], "box": [1, 2.5, 3, 4]}
    path = write(
        tmp_path / "s.tar",
        [
            *sample("d/0001", everything, b"one"),
            ("d/0001.seg.png", b"passed by"),
            ("d/0002.PNG", b"two"),  # the order within a sample is free
            ("d/0002.json", json.dumps(ground).encode()),
            *sample("0003", {"kind": "video_caption", "captions": ["x"], "id": "v"}, b"3", ".mp4"),
            ("readme.txt", b"no sample"),
        ],
    )
    shards = TarShards(path)
    assert len(shards) == 3
    assert shards[0].answers == (Answer("cat", 0.6), Answer("dog", 0.4))
    assert (shards[0].media, shards[0].objects, shards[0].dataset) == (b"one", ("cat",), "vqa")
    assert (shards[1].media, shards[1].box) == (b"two", (1.0, 2.5, 3.0, 4.0))
    assert (shards[2].media, shards[2].id) == (b"3", "v")
    assert shards[0].id == "d/0001"
    assert (shards[0].origin.file, shards[0].origin.row) == (str(path), "d/0001")
    assert shards[-1] == shards[2]


def test_patterns_name_shards_in_order(tmp_path):
    for number in range(12):
        name = f"s-{number:06}.tar"
        write(tmp_path / name, sample("k", {**CAPTION, "id": str(number)}))
    every = [str(i) for i in range(12)]
    assert [r.id for r in TarShards(tmp_path / "s-*.tar")] == every
    assert [r.id for r in open_table(f"{tmp_path}/s-{{000002..000004}}.tar")] == ["2", "3", "4"]
    pair = [tmp_path / "s-000007.tar", tmp_path / "s-000001.tar"]
    assert [r.id for r in TarShards(pair)] == ["7", "1"]
    with pytest.raises(FileNotFoundError, match="s-000012"):
        TarShards(f"{tmp_path}/s-{{000010..000012}}.tar")
    with pytest.raises(ValueError, match="empty or above"):
        expand("s-{0..99999999999}.tar")


def test_the_suffix_chooses_the_reader(tmp_path):
    (tmp_path / "t.tsv").write_text("1\t2\tx\n")
    assert isinstance(open_table(tmp_path / "t.tsv", "image_generation"), TsvTable)
    with pytest.raises(ValueError, match=r"\.tsv"):
        open_table(tmp_path / "t.csv")


def _special(kind):
    info = tarfile.TarInfo("0001.jpg")
    info.type = kind
    info.linkname = "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    path = write(tmp_path / "s.tar", [*sample("0000"), _special(kind)])
    with pytest.raises(RecordError, match=r"s\.tar, row 0001\.jpg.*link"):
        TarShards(path)


def test_a_tar_that_is_cut_off_or_none_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", sample("0000", media=b"x" * 5000))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(RecordError):
        TarShards(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(RecordError):
        TarShards(path)


def test_members_named_like_paths_stay_names(tmp_path):
    shards = TarShards(write(tmp_path / "s.tar", sample("../../etc/evil")))
    assert shards[0].media == b"picture"
    assert list(tmp_path.iterdir()) == [tmp_path / "s.tar"]


def test_two_media_members_in_one_sample_are_refused(tmp_path):
    path = write(tmp_path / "s.tar", [*sample("0000"), ("0000.png", b"y")])
    with pytest.raises(RecordError, match="two members"):
        TarShards(path)


def test_json_above_a_megabyte_is_not_read(tmp_path):
    values = {"kind": "caption", "captions": ["x" * (1 << 20)]}
    refusal(TarShards(write(tmp_path / "s.tar", sample("0", values))), 0, "json")


@pytest.mark.parametrize(
    "text", [b"{", b"[1]", b"\xff{}", b"[" * 100_000, b'{"kind": ' + b"9" * 5000 + b"}"]
)
def test_bad_json_is_refused(tmp_path, text):
    path = write(tmp_path / "s.tar", [("0.json", text), ("0.jpg", b"x")])
    refusal(TarShards(path), 0, "json")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"captions": ["x"]}, "kind"),
        ({"kind": 3}, "kind"),
        ({"kind": "caption"}, "captions"),
        ({"kind": "caption", "captions": "x"}, "captions"),
        ({"kind": "caption", "captions": [" "]}, "captions"),
        ({"kind": "caption", "captions": [3]}, "captions"),
        ({"kind": "qa", "answers": [[1.0, "x"]]}, "question"),
        ({"kind": "qa", "question": "x"}, "answers"),
        ({"kind": "qa", "question": "x", "answers": ["x"]}, "answers"),
        ({"kind": "qa", "question": "x", "answers": [["much", "x"]]}, "answers"),
        ({"kind": "visual_grounding", "captions": ["x"]}, "box"),
        ({"kind": "visual_grounding", "captions": ["x"], "box": [1, 2, 3]}, "box"),
        ({"kind": "visual_grounding", "captions": ["x"], "box": [1, 2, True, 4]}, "box"),
        ({"kind": "visual_grounding", "captions": ["x"], "box": [3, 2, 1, 4]}, "box"),
        ({"kind": "visual_grounding", "captions": ["x"], "box": [1, 2, 10**400, 4]}, "box"),
        ({"kind": "visual_entailment", "captions": ["x"], "label": "maybe"}, "label"),
        ({"kind": "video_caption", "captions": ["x"]}, "media"),
        ({"kind": "image_generation", "captions": ["x"], "codes": [9000]}, "codes"),
    ],
)
def test_a_bad_field_is_named(tmp_path, values, field):
    shards = TarShards(write(tmp_path / "s.tar", [*sample("a"), *sample("b", values)]))
    assert shards[0].captions == ("a cat",)
    refusal(shards, 1, field)


def test_missing_members_are_named(tmp_path):
    path = write(tmp_path / "s.tar", [("a.jpg", b"x"), ("b.json", json.dumps(CAPTION).encode())])
    shards = TarShards(path)
    refusal(shards, 0, "json")
    refusal(shards, 1, "media")
