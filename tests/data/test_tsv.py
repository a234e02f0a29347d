"""Tables: the columns of every layout, and rows that must be refused with file, row and field."""

import base64
import multiprocessing
import pickle

import pytest

from unival.data import tsv
from unival.data.records import Answer, RecordError
from unival.data.tsv import TsvTable

PICTURE = bytes(range(250)) + b"\xfb\xff\xbf"  # its base64 holds both + and /
CODED = base64.b64encode(PICTURE).decode()


def write(folder, *rows, name="table.tsv", end="\n"):
    path = folder / name
    path.write_bytes(b"".join(("\t".join(row) + end).encode() for row in rows))
    return path


def refusal(table, row, field):
    with pytest.raises(RecordError) as caught:
        table[row]
    assert caught.value.field == field
    assert str(table.path) in str(caught.value)
    assert f"row {row}" in str(caught.value)
    return str(caught.value)


def test_pretrain_rows_of_every_kind(tmp_path):
    rows = [
        ("1", CODED, "a cat", "", "", "cat&&mat", "cc3m", "caption"),
        ("2", CODED, "", "what?", "0.6|!+no&&0.4|!+not sure", "", "vqa", "qa"),
        ("3", CODED, "the cat", "", "1.5,2,30.25,40", "", "refcoco", "visual_grounding"),
        ("4", "clips/a.mp4", "a dog", "", "", "", "", "video_caption"),
        ("5", "clips/a.mp4", "", "who?", "1.0|!+nobody", "", "", "video_qa"),
        ("6", "a.ogg", "rain", "", "", "", "", "audio_caption"),
    ]
    table = TsvTable(write(tmp_path, *rows), "pretrain")
    assert [record.kind for record in table] == [row[7] for row in rows]
    assert table[0].media == PICTURE
    assert table[0].captions == ("a cat",)
    assert table[0].objects == ("cat", "mat")
    assert table[0].dataset == "cc3m"
    assert table[1].question == "what?"
    assert table[1].captions == ()
    assert table[1].answers == (Answer("no", 0.6), Answer("not sure", 0.4))
    assert table[2].box == (1.5, 2.0, 30.25, 40.0)
    assert table[3].media == tmp_path.resolve() / "clips" / "a.mp4"
    assert table[4].best_answer == Answer("nobody", 1.0)
    assert table[5].medium == "audio"
    assert [record.id for record in table] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("layout", "medium", "row", "expected"),
    [
        (
            "caption",
            "image",
            ("7", "12455", "the sun&&a sky", "sky&&water", CODED),
            {"kind": "caption", "captions": ("the sun", "a sky"), "objects": ("sky", "water")},
        ),
        (
            "caption",
            "audio",
            ("7", "a1", "rain&&wind", "", "x/a.wav"),
            {"kind": "audio_caption", "captions": ("rain", "wind")},
        ),
        (
            "vqa",
            "image",
            ("7", "9", "is it?", "0.6|!+no", "house&&short", CODED),
            {"kind": "qa", "question": "is it?", "answers": (Answer("no", 0.6),)},
        ),
        (
            "vqa",
            "video",
            ("7", "v9", "who is it?", "1.0|!+man", "", "v9.mp4"),
            {"kind": "video_qa", "question": "who is it?"},
        ),
        (
            "refcoco",
            "image",
            ("79_1", "2", "a woman", "230.79,121.75,423.66,463.06", CODED),
            {
                "kind": "visual_grounding",
                "captions": ("a woman",),
                "box": (230.79, 121.75, 423.66, 463.06),
            },
        ),
        (
            "snli_ve",
            "image",
            ("2.jpg#1r1n", "2", CODED, "people ride", "two men", "neutral"),
            {"kind": "visual_entailment", "captions": ("people ride",), "label": "neutral"},
        ),
        (
            "image_generation",
            "text",
            ("1", "6674 4336 0", "people posing"),
            {"kind": "image_generation", "captions": ("people posing",), "codes": (6674, 4336, 0)},
        ),
    ],
)
def test_fine_tuning_layouts(tmp_path, layout, medium, row, expected):
    record = TsvTable(write(tmp_path, row), layout, medium)[0]
    assert {name: getattr(record, name) for name in expected} == expected
    if layout == "image_generation":
        assert record.media == b""
    elif record.medium == "image":
        assert record.media == PICTURE


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 24])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "\n", "\r\n\n"])
def test_line_ends_and_chunk_borders_do_not_matter(tmp_path, monkeypatch, chunk, end, tail):
    monkeypatch.setattr(tsv, "SCAN_BYTES", chunk)
    rows = [(str(i), "1 2", "text " * i) for i in (1, 2, 3)]
    path = tmp_path / "table.tsv"
    text = end.join("\t".join(row) for row in rows)  # no newline behind the last row
    path.write_bytes((text + (end + tail if tail else "")).encode())
    table = TsvTable(path, "image_generation")
    assert [(record.id, record.captions[0]) for record in table] == [(r[0], r[2]) for r in rows]


def test_an_empty_line_in_the_middle_is_a_bad_row_and_an_empty_file_has_none(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes(b"1\t2\tx\n\n2\t2\ty\n")
    table = TsvTable(path, "image_generation")
    assert len(table) == 3
    refusal(table, 1, "row")
    assert table[2].id == "2"
    assert table[-1].id == "2"
    with pytest.raises(IndexError):
        table[3]
    path.write_bytes(b"")
    assert len(TsvTable(path, "image_generation")) == 0


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(PICTURE).decode(),
        base64.urlsafe_b64encode(PICTURE).decode(),
        base64.b64encode(PICTURE).decode().rstrip("="),
    ],
)
def test_base64_in_both_alphabets(tmp_path, text):
    row = ("1", text, "a cat", "", "", "", "", "caption")
    assert TsvTable(write(tmp_path, row), "pretrain")[0].media == PICTURE


@pytest.mark.parametrize("name", ["a/b.jpg", "B.JPEG", "c.webp", "d.png"])
def test_an_image_column_that_ends_like_a_picture_is_a_path(tmp_path, name):
    row = ("1", name, "a cat", "", "", "", "", "caption")
    assert TsvTable(write(tmp_path, row), "pretrain")[0].media == tmp_path.resolve() / name


GOOD = {
    "id": "1",
    "media": CODED,
    "caption": "a cat",
    "question": "",
    "refs": "",
    "objects": "",
    "dataset": "",
    "kind": "caption",
}
QUESTION = {"kind": "qa", "caption": "", "question": "what?", "refs": "1.0|!+cat"}
GROUND = {"kind": "visual_grounding", "refs": "1,2,3,4"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "detection"}, "kind"),
        ({"kind": "image_generation"}, "kind"),
        ({"id": ""}, "id"),
        ({"caption": ""}, "caption"),
        ({"caption": "  "}, "caption"),
        ({"media": ""}, "media"),
        ({"media": "===="}, "media"),
        ({"media": "not base64!"}, "media"),
        ({"media": "picture.xyz"}, "media"),
        ({"media": CODED[:-3]}, "media"),
        (QUESTION | {"question": ""}, "question"),
        (QUESTION | {"refs": ""}, "refs"),
        (QUESTION | {"refs": "cat"}, "refs"),
        (QUESTION | {"refs": "1.0|!+"}, "refs"),
        (QUESTION | {"refs": "x|!+cat"}, "refs"),
        (QUESTION | {"refs": "nan|!+cat"}, "refs"),
        (QUESTION | {"refs": "-1|!+cat"}, "refs"),
        (QUESTION | {"refs": "1.0|!+cat&&dog"}, "refs"),
        (GROUND | {"refs": ""}, "refs"),
        (GROUND | {"refs": "1,2,3"}, "refs"),
        (GROUND | {"refs": "1,2,3,4,5"}, "refs"),
        (GROUND | {"refs": "1,2,x,4"}, "refs"),
        (GROUND | {"refs": "3,2,3,4"}, "refs"),
        (GROUND | {"refs": "1,4,3,2"}, "refs"),
        (GROUND | {"refs": "-1,2,3,4"}, "refs"),
        (GROUND | {"refs": "1,2,inf,4"}, "refs"),
    ],
)
def test_a_bad_field_is_named(tmp_path, changes, field):
    table = TsvTable(
        write(tmp_path, tuple(GOOD.values()), tuple((GOOD | changes).values())), "pretrain"
    )
    assert table[0].captions == ("a cat",)
    refusal(table, 1, field)


def test_a_wrong_number_of_columns_says_both_numbers(tmp_path):
    table = TsvTable(write(tmp_path, ("1", "x", "y")), "pretrain")
    message = refusal(table, 0, "row")
    assert "3 columns" in message
    assert "has 8" in message


def test_bytes_that_are_not_utf8_are_refused_in_their_field(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes(b"1\t5 6\ta \xff cat\n")
    assert "not UTF-8" in refusal(TsvTable(path, "image_generation"), 0, "caption")


@pytest.mark.parametrize("codes", ["", "1 x", "-1", "8192", "1.5"])
def test_image_codes_outside_the_code_book_are_refused(tmp_path, codes):
    refusal(TsvTable(write(tmp_path, ("1", codes, "text")), "image_generation"), 0, "codes")


def test_a_label_must_be_known(tmp_path):
    row = ("1", "2", CODED, "people ride", "two men", "-")
    refusal(TsvTable(write(tmp_path, row), "snli_ve"), 0, "label")


def test_unknown_layout_or_medium_is_refused_at_once(tmp_path):
    path = write(tmp_path, ("1",))
    with pytest.raises(ValueError, match="layout 'coco'"):
        TsvTable(path, "coco")
    with pytest.raises(ValueError, match="no medium 'video'"):
        TsvTable(path, "refcoco", "video")


class TestPaths:
    def table(self, folder, media, root=None):
        row = ("1", media, "a dog", "", "", "", "", "video_caption")
        return TsvTable(write(folder, row), "pretrain", media_root=root)

    @pytest.mark.parametrize("media", ["../a.mp4", "x/../../a.mp4", "x/../a.mp4", "/etc/passwd"])
    def test_without_a_media_root_no_path_goes_up_or_starts_at_the_top(self, tmp_path, media):
        refusal(self.table(tmp_path, media), 0, "media")

    def test_a_media_root_may_be_entered_from_anywhere_but_not_left(self, tmp_path):
        root = tmp_path / "root"
        (root / "sub").mkdir(parents=True)
        inside = root.resolve() / "a.mp4"
        assert self.table(tmp_path, "a.mp4", root)[0].media == inside
        assert self.table(tmp_path, "sub/../a.mp4", root)[0].media == inside
        assert self.table(tmp_path, str(inside), root)[0].media == inside
        for media in ("../a.mp4", "/etc/passwd", str(tmp_path / "rooted.mp4")):
            assert "outside media_root" in refusal(self.table(tmp_path, media, root), 0, "media")

    @pytest.mark.parametrize("chosen", [False, True])
    def test_a_link_that_leads_out_of_the_folder_is_refused(self, tmp_path, chosen):
        (tmp_path / "secret.mp4").write_bytes(b"x")
        root = tmp_path / "root"
        root.mkdir()
        (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
        (root / "folder").symlink_to(tmp_path)
        for media in ("link.mp4", "folder/secret.mp4"):
            refusal(self.table(root, media, root if chosen else None), 0, "media")

    def test_a_nul_character_is_refused(self, tmp_path):
        refusal(self.table(tmp_path, "a\0.mp4"), 0, "media")


def test_a_file_that_became_shorter_is_noticed(tmp_path):
    path = write(tmp_path, ("1", "2", "some text"), ("2", "2", "more text"))
    table = TsvTable(path, "image_generation")
    path.write_bytes(path.read_bytes()[:20])
    assert table[0].id == "1"
    assert "changed" in refusal(table, 1, "row")


def _ids(table, rows, queue):
    queue.put([table[row].id for row in rows])


def test_forked_and_pickled_tables_read_on_their_own(tmp_path):
    rows = [(str(i), "2", "text " * (i + 1)) for i in range(50)]
    table = TsvTable(write(tmp_path, *rows), "image_generation")
    assert table[0].id == "0"  # opened before the fork
    context = multiprocessing.get_context("fork")
    queues = [context.Queue() for _ in range(2)]
    orders = [list(range(50)), list(range(49, -1, -1))]
    workers = [
        context.Process(target=_ids, args=(table, order, queue))
        for order, queue in zip(orders, queues, strict=True)
    ]
    for worker in workers:
        worker.start()
    for order, queue in zip(orders, queues, strict=True):
        assert queue.get(timeout=10) == [str(i) for i in order]
    for worker in workers:
        worker.join()
    pickled = pickle.dumps(table)
    record = table[7]
    del table._reader  # closes our descriptor, on which a copy must not rest
    assert pickle.loads(pickled)[7] == record
