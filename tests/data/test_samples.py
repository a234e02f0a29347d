"""The sample media through both layouts: the same records, and every medium decodes."""

import dataclasses
import filecmp
import json
import random
import shutil
from pathlib import Path

import pytest

from unival.data.media import MediaOptions, load_media
from unival.data.samples import TABLES, make_samples
from unival.data.sources import open_table

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("samples")
    return out, make_samples(SAMPLES, out)


def annotations():
    return [json.loads(line) for line in (SAMPLES / "annotations.jsonl").open(encoding="utf-8")]


def comparable(record):
    media = record.media if isinstance(record.media, bytes) else record.media.read_bytes()
    return dataclasses.replace(record, media=media, origin=None)


def test_there_is_a_row_for_every_caption_question_and_box(made):
    counts = made[1]
    entries = annotations()

    def count(field, kind):
        return sum(len(entry.get(field, ())) for entry in entries if entry["kind"] == kind)

    assert counts == {
        "vision_language_caption.tsv": count("captions", "image"),
        "vision_language_qa.tsv": count("qa", "image"),
        "vision_language_ground.tsv": count("boxes", "image"),
        "video_caption.tsv": count("captions", "video"),
        "video_qa.tsv": count("qa", "video"),
        "audio_caption.tsv": count("captions", "audio"),
    }
    assert min(counts.values()) > 40


@pytest.mark.parametrize(
    ("medium", "kinds"),
    [
        ("image", ["caption", "qa", "visual_grounding"]),
        ("video", ["video_caption", "video_qa"]),
        ("audio", ["audio_caption"]),
    ],
)
def test_both_layouts_give_the_same_records(made, medium, kinds):
    out = made[0]
    rows = [r for kind in kinds for r in open_table(out / TABLES[kind], media_root=SAMPLES)]
    shard = open_table(out / f"samples-{medium}-000000.tar")
    assert [comparable(record) for record in shard] == [comparable(record) for record in rows]
    assert {record.kind for record in rows} == set(kinds)


def test_the_records_say_what_the_annotations_say(made):
    entry = annotations()[0]
    assert entry["file"] == "images/cat.jpg"
    captions = open_table(made[0] / TABLES["caption"])
    questions = open_table(made[0] / TABLES["qa"])
    boxes = open_table(made[0] / TABLES["visual_grounding"])
    assert captions[0].media == (SAMPLES / "images" / "cat.jpg").read_bytes()
    assert [captions[i].captions[0] for i in range(2)] == entry["captions"]
    assert [(questions[i].question, questions[i].best_answer.text) for i in range(3)] == [
        (pair["q"], pair["a"]) for pair in entry["qa"]
    ]
    assert boxes[1].captions == ("the ball of yarn",)
    assert boxes[1].box == (238.1, 115.2, 358.4, 245.8)


def test_every_medium_decodes_and_every_box_lies_in_its_picture(made):
    options = MediaOptions(image_size=32, video_size=32, video_frames=1, audio_samples=1600)
    done = set()
    for name in TABLES.values():
        for record in open_table(made[0] / name, media_root=SAMPLES):
            if record.box or record.media_key not in done:
                done.add(record.media_key)
                tensor, _ = load_media(record, options, random.Random(0))
                assert tensor.float().std() > 0
    assert len(done) == len(annotations())


def test_the_lists_of_negatives_and_answers(made):
    out = made[0]
    entries = annotations()
    captions = (out / "negative_sample" / "all_captions.txt").read_text().splitlines()
    assert set(captions) == {text for entry in entries for text in entry["captions"]}
    objects = (out / "negative_sample" / "object.txt").read_text().splitlines()
    assert {"kitten", "ball of yarn", "hen", "foal"} <= set(objects)
    assert not any(text.startswith("the ") or " on " in text for text in objects)
    answers = (out / "answers.txt").read_text().splitlines()
    assert len(answers) == len(set(answers))
    assert set(answers) == {pair["a"] for entry in entries for pair in entry.get("qa", ())}
    types = json.loads((out / "negative_sample" / "type2ans.json").read_text())
    assert types["yes/no"] == ["no", "yes"]
    assert types["how many"] == ["1", "2", "3", "4", "5"]
    assert set(answers) == {text for texts in types.values() for text in texts}


def test_the_same_samples_give_the_same_bytes(made, tmp_path):
    make_samples(SAMPLES, tmp_path)
    names = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert len(names) == 13
    same, different, failed = filecmp.cmpfiles(made[0], tmp_path, names, shallow=False)
    assert (set(same), different, failed) == (set(names), [], [])


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "smell"},
        {"file": "../cat.jpg"},
        {"file": "/etc/passwd"},
        {"captions": ["tab\there"]},
        {"captions": ["a&&b"]},
        {"captions": [""]},
        {"boxes": [{"text": "cat", "box": [1, 2]}]},
        {"qa": [{"q": "what?"}]},
    ],
)
def test_annotations_that_would_make_broken_tables_are_refused(tmp_path, change):
    good = {"kind": "image", "file": "cat.jpg", "captions": ["a cat"]}
    shutil.copy(SAMPLES / "images" / "cat.jpg", tmp_path)
    path = tmp_path / "annotations.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(ValueError, match=r"annotations\.jsonl, row 1"):
        make_samples(tmp_path, tmp_path / "out")
