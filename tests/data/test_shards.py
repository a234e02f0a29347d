"""Tar shards: grouping, random access, and members that must be refused."""

import io
import json
import re
import tarfile
import zlib

import pytest

from unival.data.records import Answer, RecordError
from unival.data.shards import TarShards, expand, members, write_index
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


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "a/../../evil", "a\nb", "a\x1b[2J"])
def test_names_that_lead_out_or_hide_are_refused(tmp_path, name):
    with pytest.raises(RecordError, match=r"s\.tar, row byte \d+.*(evil|a\\)"):
        TarShards(write(tmp_path / "s.tar", sample(name)))
    assert list(tmp_path.iterdir()) == [tmp_path / "s.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_gives_the_members_that_tarfile_gives(tmp_path, form):
    names = ["./0.json", "d" * 90 + "/" + "n" * 40 + ".JPG", "d/2.tar.gz", "empty.txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + ".json", "größe/ü.png"]
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1  # as webdataset writes it
            data = b"x" * (600 * number)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "s.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    found = list(members(tmp_path / "s.tar"))
    assert [(m.offset, m.size) for m in found] == [(at, size) for _, at, size in expected]
    assert [m.key + m.suffix for m in found] == [
        name.removeprefix("./").replace(".JPG", ".jpg") for name, _, _ in expected
    ]


def header(name=b"0.jpg", kind=b"0", size=0):
    """A header block by the book (POSIX ustar); `size` also in the form for large numbers."""
    digits = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = digits
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
HUGE = b"\x80" + (1 << 60).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header(b"././@PaxHeader", b"x", 1 << 30) + END, "extension header of 1073741824"),
        (header(b"././@LongLink", b"L", 1 << 30) + END, "extension header of 1073741824"),
        (header(b"pax_global_header", b"g", HUGE) + END, "extension header of"),
        (header(size=HUGE) + END, "cut off"),
        (header(size=b"\xff" * 12) + END, "no size"),  # a negative number
        (header(size=b"-0000000512\0") + END, "no size"),
        (header(kind=b"S") + END, "sparse"),
        (header(kind=b"Z") + END, "link, a device"),
        (header(kind=b"x", size=31) + b"31 GNU.sparse.realsize=1000000\n".ljust(512, b"\0")
         + header() + END, "sparse"),
        (header(kind=b"x", size=7) + b"0 a=b\n\0".ljust(512, b"\0") + header() + END, "damaged"),
        (header(kind=b"x", size=20) + b"20 size=99999999999\n".ljust(512, b"\0") + header() + END,
         "cut off"),
        (header(kind=b"L", size=1500) + b"n" * 1500 + bytes(36) + header() + END, "1500 bytes"),
        (header() + header(b"0.json")[:300], "no end mark"),
        (header(), "no end mark"),
        (header()[:-1] + b"!" + END, "no header"),
    ],
)  # fmt: skip
def test_hand_made_hostile_tars_are_refused(tmp_path, content, problem):
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(RecordError, match=problem) as caught:
        TarShards(tmp_path / "s.tar")
    assert "s.tar" in str(caught.value)


def test_a_long_chain_of_extension_headers_is_passed(tmp_path):
    # tarfile would recurse once for each of them.
    comment = header(kind=b"x", size=13) + b"13 comment=x\n".ljust(512, b"\0")
    (tmp_path / "s.tar").write_bytes(comment * 3000 + header() + END)
    assert [m.key for m in members(tmp_path / "s.tar")] == ["0"]


def test_a_giant_member_of_a_sparse_file_is_neither_read_nor_looked_through(tmp_path):
    path = tmp_path / "s.tar"
    size = 1 << 40
    text = json.dumps(CAPTION).encode()
    with open(path, "wb") as file:
        file.write(header(b"0.json", size=len(text)) + text.ljust(512, b"\0"))
        file.write(header(b"0.jpg", size=b"\x80" + size.to_bytes(11, "big")))
        file.seek(size, 1)
        file.write(END)
    assert "1099511627776 bytes" in refusal(TarShards(path), 0, "media")


def test_a_key_that_comes_again_later_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", [*sample("0000"), *sample("0001"), *sample("0000")])
    with pytest.raises(RecordError, match=r"s\.tar, row 0000: .*again"):
        TarShards(path)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pth", ".npy", ".cls"])
def test_members_that_could_be_pickles_are_passed_by(tmp_path, suffix):
    path = write(tmp_path / "s.tar", [*sample("0"), ("0" + suffix, b"cos\nsystem\n(S'false'\ntR.")])
    assert (len(TarShards(path)), TarShards(path)[0].media) == (1, b"picture")


def indexed(tmp_path):
    path = write(tmp_path / "s.tar", [*sample("ü/0", media=b"one"), *sample("1", media=b"two")])
    with open(tmp_path / "s.index.jsonl", "wb") as file:
        assert write_index(path, file) == 4
    return path


def test_an_index_holds_what_a_scan_finds_and_the_crc_of_every_member(tmp_path):
    path = indexed(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "s.index.jsonl").read_text().splitlines()]
    assert (lines[0]["tar_bytes"], lines[0]["members"]) == (path.stat().st_size, 4)
    with tarfile.open(path) as tar:
        for line, member in zip(lines[1:], tar, strict=True):
            assert line["key"] + line["suffix"] == member.name
            assert (line["offset"], line["size"]) == (member.offset_data, member.size)
            assert line["crc32"] == zlib.crc32(tar.extractfile(member).read())
    found = list(TarShards(path))
    (tmp_path / "s.index.jsonl").unlink()
    assert found == list(TarShards(path))


def test_with_an_index_the_tar_is_not_scanned(tmp_path):
    path = indexed(tmp_path)
    data = bytearray(path.read_bytes())
    data[:512] = bytes(512)  # the first header is gone
    path.write_bytes(data)
    assert [record.media for record in TarShards(path)] == [b"one", b"two"]


def test_any_flipped_bit_of_a_member_is_found(tmp_path):
    path = indexed(tmp_path)
    data = path.read_bytes()
    spans = [(m.offset, m.size) for m in members(path)]
    for number, (offset, size) in enumerate(spans):
        for bit in range(8 * size):
            damaged = bytearray(data)
            damaged[offset + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            shards = TarShards(path)
            assert "crc32" in refusal(shards, number // 2, ("json", "media")[number % 2])
            assert shards[1 - number // 2].captions == ("a cat",)


def test_any_flipped_bit_of_an_index_is_found(tmp_path):
    path = indexed(tmp_path)
    index = tmp_path / "s.index.jsonl"
    data = index.read_bytes()
    expected = list(TarShards(path))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        index.write_bytes(damaged)
        try:  # spaces between the fields of the first line may change without changing it
            assert list(TarShards(path)) == expected
            assert damaged.split(b"\n")[1:] == data.split(b"\n")[1:]
        except RecordError as error:
            assert "s.index.jsonl" in str(error)
            assert re.search("remove the index|control char", str(error))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lines: lines[0].update(tar_bytes=5), "of a tar of 5 bytes"),
        (lambda lines: lines[2].update(offset=1 << 40), "ends after the tar"),
        (lambda lines: lines[2].update(size=-1), "numbers"),
        (lambda lines: lines[2].update(size=True), "numbers"),
        (lambda lines: lines[2].update(key=None), "no text"),
        (lambda lines: lines.pop(), "damaged: 3 lines of 4"),
        (lambda lines: lines[2].update(key="x"), "crc32"),
        (lambda lines: lines.__setitem__(1, []), "no object"),
        (lambda lines: lines[1].update(pad="x" * 100_000), "no JSON"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, problem):
    path = indexed(tmp_path)
    index = tmp_path / "s.index.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    change(lines)
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecordError, match=f"{problem}.*remove the index"):
        TarShards(path)


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
