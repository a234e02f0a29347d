"""Tables with named columns: what a row becomes, in three formats, and what must be refused."""

import base64
import csv
import io
import json
import multiprocessing
import pickle
import random

import pytest

from unival.data import tsv
from unival.data.columns import ColumnTable, user_splits
from unival.data.records import Answer, RecordError
from unival.data.sources import open_table
from unival.data.tsv import TsvTable

PICTURE = bytes(range(250)) + b"\xfb\xff\xbf"  # its base64 holds both + and /
CODED = base64.b64encode(PICTURE).decode()


def write(folder, text, name="table.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def json_lines(folder, *rows, name="table.jsonl"):
    return write(folder, "".join(json.dumps(row) + "\n" for row in rows), name)


def refusal(table, row, field):
    with pytest.raises(RecordError) as caught:
        table[row]
    assert caught.value.field == field
    assert f"{table.path}, row {row}:" in str(caught.value)
    return str(caught.value)


# Each: layout, medium, and one row in the three formats; then what it says.
ROWS = [
    (
        "caption",
        "image",
        "image,caption\na.jpg,a cat && a small cat\n",
        "image\tcaption\na.jpg\ta cat&&a small cat\n",
        {"image": "a.jpg", "caption": ["a cat", " a small cat "]},
        {"kind": "caption", "id": "0", "captions": ("a cat", "a small cat")},
    ),
    (
        "caption",
        "audio",
        "uid,audio,captions\nx7,a.wav,rain\n",
        "uid\taudio\tcaptions\nx7\ta.wav\train\n",
        {"uid": "x7", "audio": "a.wav", "captions": "rain"},
        {"kind": "audio_caption", "id": "x7", "captions": ("rain",)},
    ),
    (
        "vqa",
        "image",
        'question_id,image,question,answer\n9,a.jpg,"red, or blue?",blue\n',
        "question_id\timage\tquestion\tanswer\n9\ta.jpg\tred, or blue?\tblue\n",
        {"question_id": 9, "image": "a.jpg", "question": "red, or blue?", "answer": "blue"},
        {"kind": "qa", "id": "9", "question": "red, or blue?", "answers": (Answer("blue", 1.0),)},
    ),
    (
        "vqa",
        "video",
        "video,text,label\na.mp4,who?,0.6|!+a man&&0.4|!+nobody\n",
        "video\ttext\tlabel\na.mp4\twho?\t0.6|!+a man&&0.4|!+nobody\n",
        {"video": "a.mp4", "text": "who?", "label": [[0.6, "a man"], [0.4, "nobody"]]},
        {"kind": "video_qa", "answers": (Answer("a man", 0.6), Answer("nobody", 0.4))},
    ),
    (
        "refcoco",
        "image",
        'media,phrase,bbox\na.jpg,the cat,"1.5,2,30.25,40"\n',
        "media\tphrase\tbbox\na.jpg\tthe cat\t1.5,2,30.25,40\n",
        {"media": "a.jpg", "phrase": "the cat", "bbox": [1.5, 2, 30.25, 40]},
        {"kind": "visual_grounding", "captions": ("the cat",), "box": (1.5, 2.0, 30.25, 40.0)},
    ),
    (
        "refcoco",
        "image",
        "x1,y1,x0,y0,file_name,expression\n30,40,1,2,a.jpg,the cat\n",
        "x1\ty1\tx0\ty0\tfile_name\texpression\n30\t40\t1\t2\ta.jpg\tthe cat\n",
        {"x1": 30, "y1": 40.0, "x0": 1, "y0": "2", "file_name": "a.jpg", "expression": "the cat"},
        {"captions": ("the cat",), "box": (1.0, 2.0, 30.0, 40.0)},
    ),
    (
        "snli_ve",
        "image",
        "path,hypothesis,answer\na.jpg,a cat sleeps,Maybe\n",
        "path\thypothesis\tanswer\na.jpg\ta cat sleeps\tMaybe\n",
        {"path": "a.jpg", "hypothesis": "a cat sleeps", "answer": "maybe"},
        {"kind": "visual_entailment", "captions": ("a cat sleeps",), "label": "neutral"},
    ),
    (
        "image_generation",
        "image",
        "codes,text\n6674 4336 0,a cat\n",
        "codes\ttext\n6674 4336 0\ta cat\n",
        {"codes": [6674, 4336, 0], "text": "a cat"},
        {"kind": "image_generation", "captions": ("a cat",), "codes": (6674, 4336, 0)},
    ),
]


@pytest.mark.parametrize(("layout", "medium", "comma", "tab", "row", "expected"), ROWS)
def test_every_layout_in_every_format(tmp_path, layout, medium, comma, tab, row, expected):
    paths = [write(tmp_path, comma), write(tmp_path, tab, "t.tsv"), json_lines(tmp_path, row)]
    for path in paths:
        table = open_table(path, layout, medium)
        assert isinstance(table, ColumnTable)
        [record] = table
        assert {name: getattr(record, name) for name in expected} == expected
        assert record.origin.file == str(path)
        if layout == "image_generation":
            assert record.media == b""
        else:
            assert record.media.parent == tmp_path.resolve()


def test_names_have_any_case_and_order_and_other_columns_are_passed_by(tmp_path):
    text = " Answer ,SPLIT,Image,,\nyes,train,a.jpg,,\n"
    assert ColumnTable(write(tmp_path, text), "caption")[0].captions == ("yes",)
    path = json_lines(tmp_path, {"Answer": "yes", "n": {"x": 1}, "IMAGE": "a.jpg"})
    assert ColumnTable(path, "caption")[0].captions == ("yes",)


def test_the_first_known_name_wins(tmp_path):
    text = "path,file,answer,text,caption,image_id,id\np.jpg,f.jpg,an,tx,ca,5,6\n"
    record = ColumnTable(write(tmp_path, text), "caption")[0]
    assert (record.media.name, record.captions, record.id) == ("f.jpg", ("ca",), "6")


def test_rows_without_an_id_have_their_number(tmp_path):
    text = "id,image,caption\n,a.jpg,x\nb,a.jpg,y\n"
    assert [r.id for r in ColumnTable(write(tmp_path, text), "caption")] == ["0", "b"]
    rows = ({"image": "a.jpg", "caption": "x", "id": 3}, {"image": "a.jpg", "caption": "y"})
    assert [r.id for r in ColumnTable(json_lines(tmp_path, *rows), "caption")] == ["3", "1"]


class TestAnswers:
    def answers(self, folder, value):
        row = {"image": "a.jpg", "question": "what?", "answer": value}
        [from_json] = ColumnTable(json_lines(folder, row), "vqa")
        if isinstance(value, str):
            text = "image\tquestion\tanswer\na.jpg\twhat?\t" + value
            assert ColumnTable(write(folder, text, "t.tsv"), "vqa")[0].answers == from_json.answers
        return [(answer.text, answer.confidence) for answer in from_json.answers]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("sofa&&couch", [("sofa", 1.0), ("couch", 1.0)]),
            (["sofa", "couch"], [("sofa", 1.0), ("couch", 1.0)]),
            # Ten people: 6 / 3 -> 1, 3 / 3 = 1, 1 / 3.
            (["no"] * 6 + ["yes"] * 3 + ["x"], [("no", 1.0), ("yes", 1.0), ("x", 1 / 3)]),
            ("no&&yes && no&&x", [("no", 2 / 3), ("yes", 1 / 3), ("x", 1 / 3)]),
            ([{"text": "a"}, {"text": "b"}, {"text": "b"}], [("a", 1 / 3), ("b", 2 / 3)]),
            ([{"text": "a", "confidence": 0.25}], [("a", 0.25)]),
            ([[0.5, "a"], {"text": "b", "confidence": "0.5"}], [("a", 0.5), ("b", 0.5)]),
            ("0.5|!+a&&0.5|!+a", [("a", 0.5), ("a", 0.5)]),
            ([2, 2], [("2", 2 / 3)]),
            (["salt && pepper"], [("salt && pepper", 1.0)]),  # a list is not divided again
        ],
    )
    def test_confidences(self, tmp_path, value, expected):
        assert self.answers(tmp_path, value) == expected

    @pytest.mark.parametrize(
        "value",
        [
            "",
            " ",
            [],
            None,
            "yes&&",
            ["yes", ""],
            "0.6|!+yes&&no",
            [[0.6, "yes"], "no"],
            "x|!+yes",
            "nan|!+yes",
            "-1|!+yes",
            "1|!+",
            [[1, "a", "b"]],
            [[1, ["a"]]],
            [{"answer": "a"}],
            {"text": "a"},
            [True],
            [None],
            [0.5, "yes"],
            "\ud800",
        ],
    )
    def test_refused(self, tmp_path, value):
        good = {"image": "a.jpg", "question": "what?", "label": "yes"}
        table = ColumnTable(json_lines(tmp_path, good, good | {"label": value}), "vqa")
        assert table[0].answers == (Answer("yes"),)
        refusal(table, 1, "label")  # the name that the column has


@pytest.mark.parametrize(
    ("layout", "medium", "header", "words"),
    [
        ("vqa", "image", "image,question,anser", ["answer or answers or label", "'answer' by"]),
        ("vqa", "image", "image,question_id,answer", ["for the question: question or text"]),
        ("caption", "image", "img,caption", ["for the media", "image", "there are: img, caption"]),
        ("refcoco", "image", "image,text,x0,y0,x1", ["box or bbox, or x0, y0, x1, y1"]),
        ("caption", "image", "media,caption,image", ["columns media and image"]),
        ("caption", "video", "image,caption", ["column 'image'", "medium 'video'"]),
        ("caption", "audio", "video,caption", ["column 'video'", "medium 'audio'"]),
        ("caption", "image", "image,Caption,caption ", ["'caption'", "2 columns"]),
        ("caption", "image", "image;caption", ["there are: image;caption"]),
        ("caption", "image", "", ["empty"]),
        ("caption", "image", "\n\r\n", ["empty"]),
        ("caption", "image", 'image,"caption', ["row header", "never closed"]),
        ("caption", "image", 'image,cap"tion', ["row header", "quote"]),
        ("caption", "image", "image," + "x" * 70000, ["row header", "70007 bytes"]),
    ],
)
def test_a_header_that_will_not_do_is_refused_at_once(tmp_path, layout, medium, header, words):
    path = write(tmp_path, header + "\n" if header else "")
    with pytest.raises(ValueError) as caught:
        ColumnTable(path, layout, medium)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_no_name_that_is_in_use_is_taken_for_a_slip(tmp_path):
    with pytest.raises(ValueError) as caught:
        ColumnTable(write(tmp_path, "question_id,image,answer\n"), "vqa")
    assert "did you mean" not in str(caught.value)


def test_the_message_on_a_file_that_is_no_table_is_short(tmp_path):
    with pytest.raises(ValueError) as caught:
        ColumnTable(write(tmp_path, "x" * 5000 + ",a" * 10000), "caption")
    assert len(str(caught.value)) < 700


def test_an_object_without_a_column_is_refused_where_it_is_the_first_and_where_not(tmp_path):
    good = {"image": "a.jpg", "caption": "x"}
    table = ColumnTable(json_lines(tmp_path, good, {"image": "a.jpg"}, {"caption": "x"}), "caption")
    assert "missing" in refusal(table, 1, "caption")
    assert "missing" in refusal(table, 2, "image")
    with pytest.raises(ValueError, match="no column for the captions"):
        ColumnTable(json_lines(tmp_path, {"image": "a.jpg"}, good), "caption")


def test_a_table_of_no_rows_has_none(tmp_path):
    assert len(ColumnTable(write(tmp_path, "image,caption\n"), "caption")) == 0
    assert len(ColumnTable(write(tmp_path, "\n\n", "t.jsonl"), "caption")) == 0
    with pytest.raises(IndexError):
        ColumnTable(write(tmp_path, "image,caption"), "caption")[0]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_line_ends_blank_lines_and_marks_do_not_matter(
    tmp_path, monkeypatch, chunk, bom, end, blank, last, form
):
    monkeypatch.setattr(tsv, "SCAN_BYTES", chunk)
    lines = {
        "csv": ["image,caption", "a.jpg,é", 'b.jpg,"x"', "c.jpg,z"],
        "tsv": ["image\tcaption", "a.jpg\té", "b.jpg\tx", "c.jpg\tz"],
        "jsonl": [json.dumps({"image": f"{a}.jpg", "caption": b}) for a, b in ("aé", "bx", "cz")],
    }[form]
    text = end * blank + (end * (1 + blank)).join(lines) + (end if last else "")
    table = ColumnTable(write(tmp_path, bom + text.encode(), f"t.{form}"), "caption")
    assert [(r.media.name, r.captions[0]) for r in table] == [
        ("a.jpg", "é"),
        ("b.jpg", "x"),
        ("c.jpg", "z"),
    ]
    assert table[-1].origin.row == 2


def test_quoted_fields_hold_commas_line_breaks_and_quotes(tmp_path):
    text = 'image,caption\r\n"a,b.jpg","one ""word""\r\n\r\ntwo, three"\r\n"c.jpg","z"\r\n'
    table = ColumnTable(write(tmp_path, text), "caption")
    assert [record.captions[0] for record in table] == ['one "word"\r\n\r\ntwo, three', "z"]
    assert table[0].media.name == "a,b.jpg"


def test_a_mark_before_a_quoted_header_is_no_part_of_it(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf"image","caption"\n"a.jpg","x"\n')
    assert ColumnTable(path, "caption")[0].captions == ("x",)


def test_in_a_tsv_quotes_are_text(tmp_path):
    text = 'image\tcaption\na.jpg\t"a" 5" pipe\nb.jpg\t"\n'
    table = ColumnTable(write(tmp_path, text, "t.tsv"), "caption")
    assert [record.captions[0] for record in table] == ['"a" 5" pipe', '"']


def test_csv_as_the_standard_library_reads_it(tmp_path):
    """Random fields, written by the csv module, which quotes where it must or everywhere."""
    rng = random.Random(5)
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        rows = [
            ["".join(rng.choices('ab,"\n\r é', k=rng.randrange(9))) + "." for _ in range(2)]
            for _ in range(300)
        ]
        out = io.StringIO()
        writer = csv.writer(out, quoting=quoting)
        writer.writerows([["file", "caption"], *rows])
        path = write(tmp_path, out.getvalue())
        table = ColumnTable(path, "caption", "video")
        assert len(table) == 300
        for record, (file, caption) in zip(table, rows, strict=True):
            assert record.captions == (caption.strip(),)
            assert record.media == tmp_path.resolve() / file.strip()


def test_damaged_csv_has_the_rows_that_the_standard_library_finds(tmp_path):
    """Any text of quotes, commas and line breaks: the records are those of csv, which is lenient,
    and each is read as csv reads it, or refused."""
    rng = random.Random(6)
    outcomes = {"read": 0, "refused": 0, "open": 0}
    for _ in range(400):
        body = "".join(rng.choices('a"",,\n', k=rng.randrange(1, 20)))
        path = write(tmp_path, "file,caption\n" + body)
        expected = [row for row in csv.reader(io.StringIO(body)) if row]
        # A further line goes into the last record of a text whose last quote is never closed.
        longer = [row for row in csv.reader(io.StringIO(body + "\nx\n")) if row]
        if len(longer) == len(expected):
            with pytest.raises(RecordError, match="never closed"):
                ColumnTable(path, "caption", "video")
            outcomes["open"] += 1
            continue
        table = ColumnTable(path, "caption", "video")
        assert len(table) == len(expected)
        for number, row in enumerate(expected):
            try:
                record = table[number]
            except RecordError:
                outcomes["refused"] += 1
                continue
            assert [record.media.name, record.captions[0]] == [text.strip() for text in row]
            outcomes["read"] += 1
    assert min(outcomes.values()) > 10


def test_a_lone_quote_spoils_its_own_row_alone(tmp_path):
    lines = ["image,caption", "a.jpg,x", 'b.jpg,5" pipe', 'c.jpg,"y" z', 'd.jpg, "y"', "e.jpg,w"]
    table = ColumnTable(write(tmp_path, "\n".join(lines)), "caption")
    assert len(table) == 5
    for row in (1, 2, 3):
        assert "a quote out of place" in refusal(table, row, "caption")
    assert [table[row].captions for row in (0, 4)] == [("x",), ("w",)]


def test_a_quote_that_is_never_closed_is_found_before_any_row_is_lost(tmp_path):
    path = write(tmp_path, 'image,caption\na.jpg,x\nb.jpg,"y\nc.jpg,z\n')
    with pytest.raises(RecordError, match=r"table\.csv, row 1: .*never closed"):
        ColumnTable(path, "caption")


@pytest.mark.parametrize("row", ["a.jpg", "a.jpg,x,y", "a.jpg,x,", '"a.jpg,x"'])
def test_ragged_rows_say_both_numbers(tmp_path, row):
    table = ColumnTable(write(tmp_path, f"image,caption\na.jpg,x\n{row}\nb.jpg,y\n"), "caption")
    assert "the header has 2: image, caption" in refusal(table, 1, "row")
    assert table[2].captions == ("y",)
    tabs = write(tmp_path, "image\tcaption\na.jpg\tx\ty\n", "t.tsv")
    assert "3 columns" in refusal(ColumnTable(tabs, "caption"), 0, "row")


@pytest.mark.parametrize(
    ("line", "field", "word"),
    [
        (b"{", "json", ""),
        (b"[1]", "json", "not an object"),
        (b'"a"', "json", "not an object"),
        (b"{'image': 'a.jpg'}", "json", ""),
        (b'{"image": "a.jpg", "caption": "x"} {}', "json", "Extra"),
        (b'{"image": "\xff"}', "json", "utf-8"),
        (b"[" * 100_000, "json", ""),
        (b'{"x": ' + b"9" * 5000 + b"}", "json", ""),
        (b'{"image": "a.jpg", "Image": "b.jpg", "caption": "x"}', "image", "2 columns"),
        (b'{"image": "a.jpg", "caption": {"x": 1}}', "caption", "dict"),
        (b'{"image": "a.jpg", "caption": 1.5}', "caption", "float"),
        (b'{"image": ["a.jpg"], "caption": "x"}', "image", "list"),
        (b'{"image": "\\ud800.jpg", "caption": "x"}', "image", "UTF-8"),
        (b'{"image": "a\\u0000.jpg", "caption": "x"}', "image", "NUL"),
    ],
)
def test_lines_that_are_no_object_with_these_fields(tmp_path, line, field, word):
    good = b'{"image": "a.jpg", "caption": "x"}\n'
    table = ColumnTable(write(tmp_path, good + line + b"\n" + good, "t.jsonl"), "caption")
    assert word in refusal(table, 1, field)
    assert table[2].captions == ("x",)


def test_bytes_that_are_not_utf8_are_refused_in_their_column(tmp_path):
    table = ColumnTable(write(tmp_path, b"image,text,n\na.jpg,caf\xe9,\na.jpg,x,\xe9\n"), "caption")
    assert "not UTF-8" in refusal(table, 0, "text")
    assert table[1].captions == ("x",)  # a column that is passed by does not matter
    with pytest.raises(RecordError, match="not UTF-8"):
        ColumnTable(write(tmp_path, b"image,caf\xe9\n"), "caption")


@pytest.mark.parametrize(
    "box",
    [
        "",
        "1,2,3",
        "1,2,3,4,5",
        "1,2,x,4",
        "1,2,nan,4",
        "1,2,inf,4",
        "3,2,3,4",
        "1,4,3,2",
        "-1,2,3,4",
    ],
)
def test_a_bad_box_is_refused(tmp_path, box):
    text = f'image,text,bbox\na.jpg,the cat,"{box}"\n'
    refusal(ColumnTable(write(tmp_path, text), "refcoco"), 0, "bbox")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"y0": "nan"}, "y0"),
        ({"y0": ""}, "y0"),
        ({"y0": None}, "y0"),
        ({"y0": True}, "y0"),
        ({"y0": [2]}, "y0"),
        ({"y0": 4}, "x0, y0, x1, y1"),
    ],
)
def test_a_bad_corner_is_refused(tmp_path, change, field):
    good = {"image": "a.jpg", "text": "the cat", "x0": 1, "y0": 2, "x1": 3, "y1": 4}
    table = ColumnTable(json_lines(tmp_path, good, good | change), "refcoco")
    assert table[0].box == (1.0, 2.0, 3.0, 4.0)
    refusal(table, 1, field)
    nan = write(tmp_path, json.dumps(good | {"y0": float("nan")}), "nan.jsonl")  # writes NaN
    refusal(ColumnTable(nan, "refcoco"), 0, "y0")


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("entailment", "entailment"),
        ("Contradiction", "contradiction"),
        ("yes", "entailment"),
        ("NO", "contradiction"),
        ("maybe", "neutral"),
    ],
)
def test_labels(tmp_path, word, label):
    text = f"image,text,label\na.jpg,x,{word}\na.jpg,x,1\na.jpg,x,\n"
    table = ColumnTable(write(tmp_path, text), "snli_ve")
    assert table[0].label == label
    assert "none of entailment" in refusal(table, 1, "label")
    refusal(table, 2, "label")


def test_pictures_may_be_in_the_table(tmp_path):
    path = write(tmp_path, f"image,caption\n{CODED},x\n{CODED[:-3]},y\n,z\na.xyz,z\n")
    table = ColumnTable(path, "caption")
    assert table[0].media == PICTURE
    for row in (1, 2, 3):
        refusal(table, row, "image")
    assert ColumnTable(json_lines(tmp_path, {"image": CODED, "caption": "x"}), "caption")[
        0
    ].media == (PICTURE)
    films = ColumnTable(write(tmp_path, f"video,caption\n{CODED},x\n"), "caption", "video")
    assert films[0].media == (tmp_path / CODED).resolve()  # a film is never in a table


def test_a_cell_of_a_megabyte_is_read_and_one_above_the_limit_is_not(tmp_path, monkeypatch):
    large = "x" * (1 << 20)
    for quote in ("", '"'):
        path = write(tmp_path, f"image,caption\na.jpg,{quote}{large}{quote}\n")
        assert ColumnTable(path, "caption")[0].captions == (large,)
    monkeypatch.setattr(tsv, "MAX_ROW_BYTES", 100)
    for cell in ("x" * 100, '"' + "x" * 100 + '"', '"' + "x\n" * 60 + '"'):
        path = write(tmp_path, f"image,caption\na.jpg,w\nb.jpg,{cell}\nc.jpg,y\n")
        table = ColumnTable(path, "caption")
        assert len(table) == 3
        assert "100 at most" in refusal(table, 1, "row")
        assert [table[row].captions for row in (0, 2)] == [("w",), ("y",)]


class TestPaths:
    def table(self, folder, media, root=None):
        path = json_lines(folder, {"path": media, "caption": "x"})
        return ColumnTable(path, "caption", media_root=root)

    @pytest.mark.parametrize("media", ["../a.jpg", "x/../../a.jpg", "/etc/a.jpg", "a\0.jpg", ""])
    def test_refused(self, tmp_path, media):
        refusal(self.table(tmp_path, media), 0, "path")

    def test_a_nul_in_a_csv_is_refused(self, tmp_path):
        path = write(tmp_path, b"image,caption\na\0.jpg,x\n")
        assert "NUL" in refusal(ColumnTable(path, "caption"), 0, "image")

    def test_a_media_root_may_not_be_left(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        assert self.table(tmp_path, "b/../a.jpg", root)[0].media == root.resolve() / "a.jpg"
        assert "outside media_root" in refusal(self.table(tmp_path, "../a.jpg", root), 0, "path")

    def test_a_link_that_leads_out_is_refused(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in/link.jpg").symlink_to(tmp_path / "secret.jpg")
        refusal(self.table(tmp_path / "in", "link.jpg"), 0, "path")


def test_a_file_that_became_shorter_is_noticed(tmp_path):
    path = write(tmp_path, "image,caption\na.jpg,x\nb.jpg,yyy\n")
    table = ColumnTable(path, "caption")
    path.write_bytes(path.read_bytes()[:-4])
    assert table[0].captions == ("x",)
    assert "changed" in refusal(table, 1, "row")


def _captions(table, rows, queue):
    queue.put([table[row].captions[0] for row in rows])


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_forked_and_pickled_tables_read_on_their_own(tmp_path, form):
    texts = [f"{i}\n," * (i + 1) + "." for i in range(50)]
    if form == "jsonl":
        path = json_lines(tmp_path, *({"image": "a.jpg", "caption": text} for text in texts))
    else:
        path = write(tmp_path, "image,caption\n" + "".join(f'a.jpg,"{text}"\n' for text in texts))
    table = ColumnTable(path, "caption")
    assert table[0].captions == (texts[0],)  # opened before the fork
    context = multiprocessing.get_context("fork")
    queues = [context.Queue() for _ in range(2)]
    orders = [list(range(50)), list(range(49, -1, -1))]
    workers = [
        context.Process(target=_captions, args=(table, order, queue))
        for order, queue in zip(orders, queues, strict=True)
    ]
    for worker in workers:
        worker.start()
    for order, queue in zip(orders, queues, strict=True):
        assert queue.get(timeout=10) == [texts[i] for i in order]
    for worker in workers:
        worker.join()
    pickled = pickle.dumps(table)
    del table._reader  # closes our descriptor, on which a copy must not rest
    assert pickle.loads(pickled)[7].captions == (texts[7],)


class TestOpenTable:
    @pytest.mark.parametrize(
        ("layout", "medium", "row"),
        [
            ("pretrain", "image", ("1", CODED, "text", "", "", "path", "image", "caption")),
            ("caption", "image", ("7", "12455", "image", "sky", CODED)),
            ("caption", "audio", ("7", "a1", "rain", "", "x/a.wav")),
            ("vqa", "image", ("7", "9", "text", "0.6|!+label", "path", CODED)),
            ("refcoco", "image", ("79_1", "2", "image", "1,2,3,4", CODED)),
            ("snli_ve", "image", ("2.jpg", "2", CODED, "image", "two men", "neutral")),
            ("image_generation", "image", ("1", "6674 4336 0", "codes")),
        ],
    )
    def test_released_tables_have_no_header(self, tmp_path, layout, medium, row):
        path = write(tmp_path, "\t".join(row) + "\n", "vqa_train_1.tsv")
        table = open_table(path, layout, medium)
        assert type(table) is TsvTable
        assert [record.id for record in table] == [row[0]]

    def test_a_header_of_as_many_columns_as_the_layout_has_without_one(self, tmp_path):
        path = write(tmp_path, "id\tcodes\tcaption\n5\t1 2\tx\n", "t.tsv")
        assert [record.id for record in open_table(path, "image_generation")] == ["5"]

    def test_a_header_with_a_slip_is_still_a_header(self, tmp_path):
        path = write(tmp_path, "id\timage\tquestion\tanser\tsource\n", "t.tsv")
        with pytest.raises(ValueError, match="did you mean 'answer' by 'anser'"):
            open_table(path, "vqa")

    def test_what_no_reader_is_for(self, tmp_path):
        with pytest.raises(ValueError, match=r"\.csv, \.tsv, \.jsonl, shards end in \.tar"):
            open_table(tmp_path / "t.xlsx", "vqa")
        for layout in ("pretrain", "coco"):
            with pytest.raises(ValueError, match=rf"layout '{layout}' has no named columns"):
                open_table(tmp_path / "t.csv", layout)
        with pytest.raises(ValueError, match="no medium 'audio'"):
            open_table(write(tmp_path, "audio,question,answer\n"), "vqa", "audio")
        with pytest.raises(ValueError, match="named columns ends in"):
            ColumnTable(tmp_path / "t.txt", "vqa")
        for suffix in ("csv", "tsv", "jsonl"):
            with pytest.raises(FileNotFoundError):
                open_table(tmp_path / f"missing.{suffix}", "vqa")


class TestUserSplits:
    def folder(self, folder, *names):
        for name in names:
            (folder / name).touch()
        return folder

    @pytest.mark.parametrize("val", ["val.tsv", "valid.csv", "Validation.jsonl", "DEV.CSV"])
    def test_the_names_of_splits(self, tmp_path, val):
        self.folder(tmp_path, "train.jsonl", val, "test.csv", "notes.txt", "old_train.csv")
        assert user_splits(tmp_path) == {
            "train": tmp_path / "train.jsonl",
            "val": tmp_path / val,
            "test": tmp_path / "test.csv",
        }

    def test_one_table_by_itself_is_for_training(self, tmp_path):
        path = self.folder(tmp_path, "data.csv", "a.jpg") / "data.csv"
        assert user_splits(tmp_path) == {"train": path}
        assert user_splits(str(path)) == {"train": path}

    @pytest.mark.parametrize("pair", [("train.csv", "train.jsonl"), ("val.csv", "dev.csv")])
    def test_two_tables_for_one_split_are_refused(self, tmp_path, pair):
        self.folder(tmp_path, "train.tsv", *pair)
        with pytest.raises(ValueError) as caught:
            user_splits(tmp_path)
        assert all(name in str(caught.value) for name in pair)

    @pytest.mark.parametrize("names", [(), ("test.csv",), ("a.csv", "b.csv"), ("train.txt",)])
    def test_nothing_to_train_on(self, tmp_path, names):
        self.folder(tmp_path, *names)
        (tmp_path / "train.csv").mkdir()  # a folder is no table
        with pytest.raises(FileNotFoundError) as caught:
            user_splits(tmp_path)
        tables = [name for name in names if name.endswith("csv")]
        for word in (str(tmp_path), "train.csv, train.tsv, train.jsonl", *tables):
            assert word in str(caught.value)

    def test_no_folder_or_no_table(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such"):
            user_splits(tmp_path / "missing")
        with pytest.raises(ValueError, match=r"ends in \.csv"):
            user_splits(self.folder(tmp_path, "a.json") / "a.json")
