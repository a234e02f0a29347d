"""Image data sets: from miniatures of the published files to the records in the shards."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from data.prepare import image_cases as cases

from unival.data.prepare import web_captions
from unival.data.prepare.base import Source, prepare
from unival.data.prepare.vqav2 import soft_answers
from unival.data.records import RecordError
from unival.data.sources import open_table

FIELDS = [
    "kind",
    "captions",
    "question",
    "box",
    "objects",
    "dataset",
    "label",
    "codes",
    "unanswered",
]


def made(case, folder, out):
    folder.mkdir()
    case.write(folder)
    bad = prepare(case.name, case.dataset, Source(folder), out)
    summary = json.loads((out / f"{case.name}.prepared.json").read_text())
    return bad, summary


def records(case, split, folder, out):
    """id -> the fields that are not empty."""
    pictures = {
        path.read_bytes(): str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".jpg", ".png")
    }
    found = {}
    for record in open_table(out / f"{case.name}_{split}-000000.tar"):
        values = {name: getattr(record, name) for name in FIELDS if getattr(record, name)}
        if record.answers:
            values["answers"] = tuple((a.confidence, a.text) for a in record.answers)
        if record.media:
            values["media"] = pictures[record.media]
        assert record.id not in found
        found[record.id] = values
    return found


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_good_row_is_a_record_and_every_bad_row_is_counted(case, tmp_path):
    folder, out = tmp_path / "published", tmp_path / "out"
    bad, summary = made(case, folder, out)
    assert set(summary["splits"]) == {s for name in case.records for s in name.split("+")}
    for name, expected in case.records.items():
        parts = [records(case, split, folder, out) for split in name.split("+")]
        assert {id: values for part in parts for id, values in part.items()} == expected
        assert sum(map(len, parts)) == len(expected)
        if len(parts) == 2:
            media = [{values.get("media", id) for id, values in part.items()} for part in parts]
            assert not media[0] & media[1]
            assert len(media[1]) == (case.held_out or 1)
    counts = {s: dict(part["bad"]) for s, part in summary["splits"].items() if part["bad"]}
    assert counts == case.bad
    assert bad == sum(sum(fields.values()) for fields in case.bad.values())
    for text in case.notes:
        assert any(text in note for note in summary["notes"]), summary["notes"]
    answers = out / f"{case.name}.answers.txt"
    assert (answers.read_text().splitlines() if case.answers else []) == list(case.answers)
    assert answers.exists() == bool(case.answers)


def test_a_pair_without_a_label_says_why(tmp_path):
    made(cases.SNLI_VE, tmp_path / "published", tmp_path / "out")
    lines = (tmp_path / "out/snli_ve_train.bad.jsonl").read_text().splitlines()
    reasons = {row["row"]: row["reason"] for row in map(json.loads, lines)}
    assert reasons[4] == "'-': those who labelled it did not agree"
    assert reasons[6] == "'maybe' is none of entailment, neutral, contradiction"


def test_bad_rows_name_file_and_row(tmp_path):
    made(cases.REFCOCO, tmp_path / "published", tmp_path / "out")
    lines = (tmp_path / "out/refcoco_train.bad.jsonl").read_text().splitlines()
    bad = {(row["row"], row["field"]): row for row in map(json.loads, lines)}
    assert bad[4, "split"]["reason"] == "'test' is none of train, val, testA, testB"
    assert bad[4, "split"]["file"].endswith("refcoco/refs(unc).p")
    assert "not finite" in bad[6, "bbox"]["reason"]
    assert bad[11, "ann_id"]["reason"] == "instances.json has no annotation 70"


def test_confidences_are_the_mean_over_ten_people_left_out():
    # The official rule, by brute force: each person in turn is left out of those compared with.
    for count in range(1, 11):
        answers = ["x"] * count + [f"other {n}" for n in range(10 - count)]
        scores = [
            min(1, (answers[:left] + answers[left + 1 :]).count("x") / 3) for left in range(10)
        ]
        found = {text: confidence for confidence, text in soft_answers(answers)}
        assert found["x"] == pytest.approx(sum(scores) / 10, abs=1e-12)


def test_rows_outside_the_candidates_are_noted(tmp_path):
    _, summary = made(cases.VQAV2, tmp_path / "published", tmp_path / "out")
    train = open_table(tmp_path / "out/vqav2_train-000000.tar")
    answered = [{answer.text for answer in record.answers} for record in train]
    outside = sum("yes" not in texts for texts in answered)
    assert outside in (9, 10)  # 8 of "no", and 1 or 2 of "two"
    # And the one whose picture is missing, which is found when the shards are written.
    assert any(note.startswith(f"{outside + 1} training rows") for note in summary["notes"])


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_an_empty_folder_is_refused_by_the_name_of_a_file_it_lacks(case, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path)):
        prepare(case.name, case.dataset, Source(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("case", "file"),
    [
        (cases.COCO_CAPTION, "dataset_coco.json"),
        (cases.VQAV2, "v2_mscoco_val2014_annotations.json"),
        (cases.OKVQA, "OpenEnded_mscoco_train2014_questions.json"),
        (cases.VIZWIZ, "train.json"),
        (cases.REFCOCO, "refcoco/refs(unc).p"),
        (cases.REFCOCO, "refcoco/instances.json"),
        (cases.NOCAPS, "nocaps_val_4500_captions.json"),
        (cases.GENERATION, "codes.tsv"),
        (cases.GENERATION, "annotations/captions_train2014.json"),
        (cases.VG_REGIONS, "image_data.json"),
        (cases.VG_QA, "question_answers.json"),
        (cases.CC12M, "cc12m.tsv"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("content", [b"", b"7", b'{"images": 7}', b"<html>Not found</html>"])
def test_a_file_of_another_format_is_refused_by_name(case, file, content, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    case.write(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        prepare(case.name, case.dataset, Source(folder), tmp_path / "out")
    assert file in str(refusal.value)


class Command:
    def __reduce__(self):
        return print, ("run by the pickle",)


def test_references_that_are_a_program_do_not_run(tmp_path, capsys):
    folder = tmp_path / "published"
    folder.mkdir()
    cases.REFCOCO.write(folder)
    (folder / "refcoco/refs(unc).p").write_bytes(pickle.dumps([Command()]))
    with pytest.raises(ValueError, match=r"refs.unc..p: not a pickle of plain data"):
        prepare("refcoco", cases.REFCOCO.dataset, Source(folder), tmp_path / "out")
    assert "run by the pickle" not in capsys.readouterr().out


def test_pictures_may_lie_in_one_folder_or_apart_from_the_annotations(tmp_path):
    annotations, media = tmp_path / "annotations", tmp_path / "media"
    for folder in (annotations, media):
        folder.mkdir()
    cases.SNLI_VE.write(annotations)
    for path in annotations.rglob("*.jpg"):
        path.rename(media / path.name)
    source = Source(annotations, media)
    prepare("snli_ve", cases.SNLI_VE.dataset, source, tmp_path / "out")
    assert set(records(cases.SNLI_VE, "train", media, tmp_path / "out")) == {
        "11.jpg#1r1n",
        "11.jpg#1r1e",
        "12.jpg#4r1c",
    }


def test_rows_without_codes_leave_validation_out_and_say_so(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    cases.GENERATION.write(folder)
    kept = [
        line for line in (folder / "codes.tsv").read_text().splitlines() if not line.startswith("5")
    ]
    (folder / "codes.tsv").write_text("\n".join(kept))
    prepared = cases.GENERATION.dataset.read(Source(folder))
    assert set(prepared.splits) == {"train"}
    assert sum("codes.tsv has none of its pictures" in note for note in prepared.notes) == 2


def test_the_test_part_of_text_to_image_is_thirty_thousand_pictures_of_val2014(tmp_path):
    # val2014 has 40,504 pictures.
    cases.write(tmp_path, "captions_train2014.json", {"annotations": []})
    captions = [{"image_id": n, "id": n, "caption": "a"} for n in range(40_504)]
    cases.write(tmp_path, "captions_val2014.json", {"annotations": captions})
    # Which pictures are chosen does not depend on their codes; two lines let both splits be.
    lines = [cases.line(n, [n]) for n in range(100)]
    (tmp_path / "codes.tsv").write_text("\n".join(lines))
    splits = cases.GENERATION.dataset.read(Source(tmp_path)).splits
    assert {split: len(table) for split, table in splits.items()} == {
        "train": 0,
        "val": 10_504,
        "test": 30_000,
    }


def test_web_pictures_that_come_later_are_noticed(tmp_path):
    folder, out = tmp_path / "published", tmp_path / "out"
    made(cases.SBU, folder, out)
    cases.sidecar(folder, "00000/000000002", "a bird")
    with pytest.raises(ValueError, match="other inputs"):
        prepare("sbu", cases.SBU.dataset, Source(folder), out)


def test_at_most_five_thousand_web_pictures_are_held_out():
    # 5% of 120,000 would be 6,000.
    names = np.array([f"{n // 10_000:05}/{n:09}".encode() for n in range(120_000)], "S")
    train, val = web_captions.divide(names)
    assert (len(train), len(val)) == (115_000, 5_000)
    assert set(train.tolist()) | set(val.tolist()) == set(names.tolist())
    # From everywhere: of the 10,000 of a folder about 417 are held out, with a deviation of 20.
    folders = Counter(name.split(b"/")[0] for name in val.tolist())
    assert len(folders) == 12
    assert all(abs(count - 417) < 5 * 20 for count in folders.values())


def test_a_region_is_read_only_when_it_is_asked_for(tmp_path):
    cases.VG_REGIONS.write(tmp_path)
    val = cases.VG_REGIONS.dataset.read(Source(tmp_path)).splits["val"]
    assert len(val) == 8
    assert val[0].id == "11"
    with pytest.raises(RecordError, match="'9'"):
        val[1]
