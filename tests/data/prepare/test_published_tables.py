"""The tables that OFA and UnIVAL publish open as they are: a miniature of each, by its layout."""

import base64
import io

import pytest
from PIL import Image

from unival.data.records import Answer, RecordError
from unival.data.sources import open_table


def encoded(kind):
    data = io.BytesIO()
    Image.new("RGB", (2, 1), (200, 30, 7)).save(data, kind)
    return data.getvalue(), base64.b64encode(data.getvalue()).decode()


JPEG, JPEG_TEXT = encoded("JPEG")
PNG, PNG_TEXT = encoded("PNG")
CODES = [6674, 4336, 0, 8191] * 256
CODES_TEXT = " ".join(map(str, CODES))

# file name, layout, medium, columns, what the record says
TABLES = [
    (
        "caption_stage1_train_1.tsv",
        ("caption", "image"),
        (
            "162365",
            "12455",
            "the sun sets over the trees beyond some docks.",
            "sky&&water&&dock&&pole",
            JPEG_TEXT,
        ),
        {
            "id": "162365",
            "kind": "caption",
            "captions": ("the sun sets over the trees beyond some docks.",),
            "objects": ("sky", "water", "dock", "pole"),
            "media": JPEG,
        },
    ),
    (
        "caption_test.tsv",
        ("caption", "image"),
        ("0", "391895", "A man.&&A bike&&on a road", "", PNG_TEXT),
        {"id": "0", "captions": ("A man.", "A bike", "on a road"), "objects": (), "media": PNG},
    ),
    (
        "nocaps_val.tsv",
        ("caption", "image"),
        ("0", "0", "a baby&&an infant", "", "nocaps/val/0013ea2087020901.jpg"),
        {"id": "0", "captions": ("a baby", "an infant"), "media": "0013ea2087020901.jpg"},
    ),
    (
        "vqa_train_1.tsv",
        ("vqa", "image"),
        (
            "79459",
            "79459",
            "is this person wearing shorts?",
            "0.6|!+no",
            "house&&short&&wall",
            JPEG_TEXT,
        ),
        {
            "id": "79459",
            "kind": "qa",
            "question": "is this person wearing shorts?",
            "answers": (Answer("no", 0.6),),
            "objects": ("house", "short", "wall"),
            "media": JPEG,
        },
    ),
    (
        "vqa_val.tsv",
        ("vqa", "image"),
        (
            "262148000",
            "262148",
            "where is he looking?",
            "1.0|!+down&&0.3|!+at table",
            "",
            JPEG_TEXT.replace("+", "-").replace("/", "_"),
        ),
        {
            "answers": (Answer("down", 1.0), Answer("at table", 0.3)),
            "objects": (),
            "media": JPEG,
        },
    ),
    (
        "okvqa_acc_val.tsv",
        ("vqa", "image"),
        (
            "2971475",
            "297147",
            "What sport?",
            "1.0|!+race&&0.67|!+motocross",
            "",
            "coco/val2014/COCO_val2014_000000297147.jpg",
        ),
        {
            "id": "2971475",
            "answers": (Answer("race", 1.0), Answer("motocross", 0.67)),
            "media": "COCO_val2014_000000297147.jpg",
        },
    ),
    (
        "refcocog_train_1.tsv",
        ("refcoco", "image"),
        (
            "79_1",
            "237367",
            "A woman in a white blouse holding a glass of wine.",
            "230.79,121.75,423.66,463.06",
            JPEG_TEXT,
        ),
        {
            "id": "79_1",
            "kind": "visual_grounding",
            "captions": ("A woman in a white blouse holding a glass of wine.",),
            "box": (230.79, 121.75, 423.66, 463.06),
            "media": JPEG,
        },
    ),
    (
        "snli_ve_dev.tsv",
        ("snli_ve", "image"),
        (
            "252244149.jpg#1r1n",
            "252244149",
            JPEG_TEXT,
            "a man in pink and gold is chewing on a wooden toothpick.",
            "a man in pink.",
            "neutral",
        ),
        {
            "id": "252244149.jpg#1r1n",
            "kind": "visual_entailment",
            "captions": ("a man in pink and gold is chewing on a wooden toothpick.",),
            "label": "neutral",
            "media": JPEG,
        },
    ),
    (
        "coco_vqgan_train_1.tsv",
        ("image_generation", "image"),
        ("1", CODES_TEXT, "the people are posing for a group photo."),
        {
            "id": "1",
            "kind": "image_generation",
            "captions": ("the people are posing for a group photo.",),
            "codes": tuple(CODES),
            "media": b"",
        },
    ),
    (
        "msrvtt_caption_test3k.tsv",
        ("caption", "video"),
        ("7010", "video7010", "a girl&&a woman talks", "", "MSRVTT/videos/all/video7010.mp4"),
        {"kind": "video_caption", "captions": ("a girl", "a woman talks")},
    ),
    (
        "msrvtt_qa_4k_test.tsv",
        ("vqa", "video"),
        ("158581", "video7010", "what is a girl doing?", "1.0|!+talk", "", "video7010.mp4"),
        {"kind": "video_qa", "answers": (Answer("talk", 1.0),), "media": "video7010.mp4"},
    ),
    (
        "audiocaps_test.tsv",
        ("caption", "audio"),
        ("103549", "7fmOlUlwoNg", "rain&&a storm", "", "AudioCaps/7fmOlUlwoNg.wav"),
        {"kind": "audio_caption", "captions": ("rain", "a storm"), "media": "7fmOlUlwoNg.wav"},
    ),
    (
        "vision_language_caption.tsv",
        ("pretrain", "image"),
        (
            "2796604",
            "cc3m/train/8/12.jpg",
            "a very typical bus station",
            "",
            "",
            "",
            "cc3m",
            "caption",
        ),
        {
            "id": "2796604",
            "kind": "caption",
            "captions": ("a very typical bus station",),
            "dataset": "cc3m",
            "media": "12.jpg",
        },
    ),
    (
        "vision_language_qa.tsv",
        ("pretrain", "image"),
        (
            "5593206",
            "train2014/COCO_train2014_000000000009.jpg",
            "",
            "Is that a laptop?",
            "1.0|!+yes",
            "",
            "vqa_train",
            "qa",
        ),
        {"kind": "qa", "question": "Is that a laptop?", "answers": (Answer("yes", 1.0),)},
    ),
    (
        "vision_language_ground.tsv",
        ("pretrain", "image"),
        (
            "7",
            "coco/train2014/COCO_train2014_000000581857.jpg",
            "the lady",
            "",
            "103.93,299.99,238.15,477.40",
            "",
            "refcoco_train",
            "visual_grounding",
        ),
        {"kind": "visual_grounding", "box": (103.93, 299.99, 238.15, 477.4)},
    ),
]


# UnIVAL's own tables were written by Python's csv module, which ends lines with CRLF.
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize(
    ("name", "layout", "columns", "expected"), TABLES, ids=[table[0] for table in TABLES]
)
def test_a_published_table_opens_unchanged(name, layout, columns, expected, end, tmp_path):
    text = "\t".join(columns) + end
    (tmp_path / name).write_bytes(2 * text.encode())
    table = open_table(tmp_path / name, *layout, tmp_path)
    assert len(table) == 2
    for record in table:
        found = {key: getattr(record, key) for key in expected}
        if isinstance(expected.get("media"), str):
            assert record.media == (tmp_path / columns[-1 if len(columns) < 8 else 1]).resolve()
            found["media"] = record.media.name
        assert found == expected


@pytest.mark.parametrize(
    "columns", [("1", "a caption"), ("1", JPEG_TEXT, "a caption", CODES_TEXT)], ids=["2", "4"]
)
def test_text_to_image_tables_of_two_and_four_columns_are_refused(columns, tmp_path):
    # The original reader takes them too; none of the published tables has them.
    (tmp_path / "codes.tsv").write_text("\t".join(columns) + "\n")
    with pytest.raises(RecordError, match=f"{len(columns)} columns; .* has 3: id, codes, caption"):
        open_table(tmp_path / "codes.tsv", "image_generation")[0]
