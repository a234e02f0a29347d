"""Files of results and references: what is read, what is refused, and scores counted by hand."""

from __future__ import annotations

import json

import pytest

from unival.data.records import RecordError
from unival.evaluation import coco_tokens, result_files
from unival.evaluation.result_files import (
    read_answers,
    read_caption_references,
    read_caption_results,
    read_predicted_boxes,
    read_reference_boxes,
    read_vqa_references,
    read_vqa_results,
    score_files,
    write_caption_results,
    write_vqa_results,
)
from unival.evaluation.runner import Evaluation, Prediction

CAPTIONS = [
    {"image_id": 1, "id": 11, "caption": "A man rides a horse."},
    {"image_id": 2, "id": 12, "caption": "two dogs play outside today"},
    {"image_id": 1, "id": 13, "caption": "a man on a horse"},
]
VQA = {
    "annotations": [
        {
            "question_id": number,
            "answer_type": kind,
            "question_type": "what",
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer, "answer_id": n} for n in range(10)],
        }
        for number, kind, answer in [(1, "other", "dog"), (2, "yes/no", "no"), (3, "other", "cat")]
    ]
}


def asked(task, id, answer="", references=(), **fields):
    return Prediction(task, "image", "t.tsv, row 0", id, "?", answer, list(references), **fields)


@pytest.fixture
def write(tmp_path):
    def make(name, content):
        path = tmp_path / name
        if not isinstance(content, str):
            if name.endswith(".jsonl"):
                content = "\n".join(json.dumps(entry) for entry in content)
            else:
                content = json.dumps(content)
        path.write_text(content, encoding="utf-8")
        return path

    return make


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(coco_tokens.shutil, "which", lambda name: None)


@pytest.fixture
def evaluation(tmp_path):
    predictions = [
        asked("image_caption", "1", "a man rides a horse", ["a man rides a horse"]),
        asked("image_caption", "2", "two dogs play", ["two dogs play outside today"]),
        asked("grounding", "g", box=[0.0, 0.0, 9.0, 9.0], box_reference=[0.0, 0.0, 9.0, 9.0]),
        asked("grounding", "h", "no box", box_reference=[0.0, 0.0, 9.0, 9.0]),
        asked("vqa", "1", "dog", ["dog"]),
        asked("vqa", "2", "no", ["no"]),
        asked("vqa", "3", "dog", ["cat"]),
        asked("visual_entailment", "1", "yes", ["yes"]),
    ]
    return Evaluation({}, predictions).save(tmp_path)


def test_captions(write, no_java):
    said = [{"image_id": 1, "caption": "a man rides a horse"}, {"image_id": "2", "caption": ""}]
    result = score_files(
        "caption",
        write("said.json", said),
        write("truth.json", {"images": [{"id": 1}, {"id": 2}], "annotations": CAPTIONS}),
    )
    assert result["metric"] == "caption" and result["samples"] == 2
    # five of five words, against references of ten: brevity penalty exp(1 - 10/5)
    assert result["scores"]["BLEU-1"] == pytest.approx(2.718281828**-1, rel=1e-6)
    assert result["scores"]["ROUGE-L"] == pytest.approx(0.5)
    assert result["tokenizer"] == "own" and "METEOR" in result["missing"]
    assert json.loads(json.dumps(result)) == result


def test_all_references_of_an_image_are_read(write):
    path = write("truth.json", {"annotations": CAPTIONS})
    assert read_caption_references(path) == {
        "1": ["A man rides a horse.", "a man on a horse"],
        "2": ["two dogs play outside today"],
    }


def test_an_image_without_captions_is_named(write):
    truth = write(
        "truth.json", {"images": [{"id": 1}, {"id": 2}, {"id": 3}], "annotations": CAPTIONS}
    )
    said = write("said.json", [{"image_id": n, "caption": "x"} for n in (1, 2, 3)])
    with pytest.raises(ValueError, match=r"no reference caption .* for 1 ids: '3'"):
        score_files("caption", said, truth)


def test_vqa(write):
    # right, right but for an article and capital, wrong
    said = [("1", "A dog"), ("2", "No."), ("3", "dog")]
    path = write("said.json", [{"question_id": int(i), "answer": a} for i, a in said])
    assert score_files("vqa", path, write("truth.json", VQA)) == {
        "metric": "vqa",
        "samples": 3,
        "scores": {"accuracy": pytest.approx(2 / 3)},
        "groups": {
            "answer_type": {
                "other": {"accuracy": 0.5, "count": 2},
                "yes/no": {"accuracy": 1.0, "count": 1},
            },
            "question_type": {"what": {"accuracy": pytest.approx(2 / 3), "count": 3}},
        },
    }


def test_vizwiz_names_questions_by_pictures(write):
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    truth = [{"image": "V_1.jpg", "answers": answers, "answer_type": "unanswerable"}]
    said = write("said.json", [{"image": "V_1.jpg", "answer": "unanswerable"}])
    found = score_files("vqa", said, write("truth.json", truth))
    assert found["scores"] == {"accuracy": 1.0}
    assert found["groups"] == {"answer_type": {"unanswerable": {"accuracy": 1.0, "count": 1}}}


def test_types_that_some_questions_lack_make_no_groups(write):
    annotations = [dict(each) for each in VQA["annotations"]]
    del annotations[0]["answer_type"]
    found = read_vqa_references(write("truth.json", {"annotations": annotations}))
    assert set(found.groups) == {"question_type"} and found.answers["3"] == ["cat"] * 10


def test_boxes(write):
    truth = [{"id": f"{n}_1", "box": [0, 0, 10, 10 * n]} for n in (1, 2, 3, 4)]
    truth[3]["box"] = [0, 0, 400, 400]
    said = [
        {"id": "1_1", "box": [0, 0, 10, 10]},
        {"id": "2_1", "box": [0, 0, 10, 13]},  # 130 / 200 = 0.65
        {"id": "3_1", "box": None},
        {"id": "4_1", "box": [0, 0, 400, 300]},  # 0.75
    ]
    found = score_files("grounding", write("said.jsonl", said), write("truth.jsonl", truth))
    assert found["samples"] == 4
    names = [f"Acc@{t}" for t in ("0.4", "0.5", "0.6", "0.7", "0.8", "0.9")]
    assert [found["scores"][name] for name in names] == [0.75, 0.75, 0.75, 0.5, 0.25, 0.25]
    assert found["scores"]["Acc@0.5, of it small"] == 0.5
    assert found["scores"]["Acc@0.5, of it medium"] == 0.0
    assert found["scores"]["Acc@0.5, of it large"] == 0.25
    assert found["scores"]["Acc@0.8, of it large"] == 0.0


def test_answers(write):
    said = write("said.jsonl", '{"id": 1, "answer": "x"}\n\n{"id": "b", "answer": "y"}\n')
    truth = write("truth.jsonl", [{"id": "b", "answer": "Y"}, {"id": "1", "answer": "x"}])
    assert score_files("accuracy", said, truth)["scores"] == {"accuracy": 0.5}
    # A list of JSON says the same.
    listed = write("truth.json", [{"id": "b", "answer": "Y"}, {"id": "1", "answer": "x"}])
    assert score_files("accuracy", said, listed)["scores"] == {"accuracy": 0.5}


def test_an_evaluation_is_scored_against_official_files(evaluation, write, no_java):
    truth = write("truth.json", {"annotations": CAPTIONS})
    assert score_files("caption", evaluation, truth)["samples"] == 2
    found = score_files("vqa", evaluation, write("vqa.json", VQA), task="vqa")
    assert found["scores"]["accuracy"] == pytest.approx(2 / 3)
    answers = write("truth.jsonl", [{"id": "1", "answer": "no"}])
    found = score_files("accuracy", evaluation, answers, task="visual_entailment")
    assert found["scores"] == {"accuracy": 0.0}


def test_an_evaluation_is_scored_against_itself(evaluation, no_java):
    assert score_files("grounding", evaluation, evaluation)["scores"]["Acc@0.9"] == 0.5
    found = score_files("caption", evaluation, evaluation)["scores"]
    # eight of eight words, against ten
    assert found["BLEU-1"] == pytest.approx(2.718281828 ** (1 - 10 / 8), rel=1e-6)


def test_an_evaluation_of_several_tasks_needs_the_name(evaluation, write):
    truth = write("vqa.json", VQA)
    with pytest.raises(ValueError, match="of vqa, visual_entailment; name one of these"):
        score_files("vqa", evaluation, truth)
    with pytest.raises(ValueError, match="of vqa, visual_entailment, not of 'video_qa'"):
        score_files("vqa", evaluation, truth, task="video_qa")
    with pytest.raises(ValueError, match=r"evaluation\.json: an evaluation keeps no confidences"):
        score_files("accuracy", evaluation, evaluation, task="vqa")
    with pytest.raises(ValueError, match=r"evaluation\.json: not an object with 'annotations'"):
        score_files("vqa", evaluation, evaluation, task="vqa")
    future = write("future.json", {"metrics": {}, "predictions": [{"task": "ocr"}]})
    with pytest.raises(RecordError, match=r"predictions\[0\]: field 'task': unknown task 'ocr'"):
        read_caption_results(future)
    empty = write("empty.json", {"metrics": {}, "predictions": []})
    with pytest.raises(ValueError, match="no predictions of a task with the metric caption"):
        read_caption_results(empty)


BAD_ENTRIES = [
    (read_caption_results, [{"caption": "x"}], "image_id", "missing"),
    (read_caption_results, [{"image_id": 1}], "caption", "missing"),
    (read_caption_results, [{"image_id": 1, "caption": 5}], "caption", "int, not str"),
    (read_caption_results, [{"image_id": 1, "caption": None}], "caption", "NoneType, not str"),
    (read_caption_results, [{"image_id": True, "caption": "x"}], "image_id", "is no id"),
    (read_caption_results, [{"image_id": 1.0, "caption": "x"}], "image_id", "is no id"),
    (read_caption_results, [{"image_id": "", "caption": "x"}], "image_id", "is no id"),
    (read_caption_results, [{"image_id": [1], "caption": "x"}], "image_id", "is no id"),
    (read_caption_results, ["x"], "entry", "str, not an object"),
    (read_vqa_results, [{"answer": "x"}], "question_id", "missing"),
    (read_vqa_results, [{"question_id": 1, "answer": ["x"]}], "answer", "list, not str"),
    (read_vqa_references, [{"question_id": 1}], "answers", "missing"),
    (read_vqa_references, [{"question_id": 1, "answers": {}}], "answers", "dict, not list"),
    (read_vqa_references, [{"question_id": 1, "answers": ["x"]}], "answers", "str, not an object"),
    (read_vqa_references, [{"question_id": 1, "answers": [{}]}], "answer", "missing"),
    (read_predicted_boxes, [{"id": 1}], "box", "missing"),
    (read_predicted_boxes, [{"id": 1, "box": [1, 2, 3]}], "box", "3 numbers"),
    (read_predicted_boxes, [{"id": 1, "box": [1, 2, 3, float("nan")]}], "box", "not finite"),
    (read_predicted_boxes, [{"id": 1, "box": [1, 2, 3, "x"]}], "box", "not a number"),
    (read_predicted_boxes, [{"id": 1, "box": "1,2,3,4"}], "box", "str, not list"),
    (read_reference_boxes, [{"id": 1, "box": None}], "box", "NoneType, not list"),
    (read_reference_boxes, [{"id": 1, "box": [1, 2, 1, 4]}], "box", "empty box"),
    (read_reference_boxes, [{"id": 1, "box": [1, 2, 3, float("inf")]}], "box", "not finite"),
    (read_answers, [{"id": 1, "answer": 3}], "answer", "int, not str"),
    (read_answers, [{"id": None, "answer": "x"}], "id", "is no id"),
]


@pytest.mark.parametrize(("read", "entries", "field", "problem"), BAD_ENTRIES)
def test_a_bad_entry_is_named(write, read, entries, field, problem):
    good = {
        "image_id": 7,
        "question_id": 7,
        "id": 7,
        "caption": "x",
        "answer": "x",
        "box": [0, 0, 1, 1],
        "answers": [{"answer": "x"}],
    }
    with pytest.raises(RecordError, match=problem) as caught:
        read(write("file.json", [good, *entries]))
    assert caught.value.field == field
    assert str(caught.value.origin).endswith("file.json, row [1]")


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_caption_results, "image_id"),
        (read_vqa_results, "question_id"),
        (read_vqa_references, "question_id"),
        (read_predicted_boxes, "id"),
        (read_reference_boxes, "id"),
        (read_answers, "id"),
    ],
)
def test_an_id_that_comes_twice_is_refused(write, read, name):
    entry = {"caption": "x", "answer": "x", "answers": [{"answer": "x"}], "box": [0, 0, 1, 1]}
    entries = [entry | {name: 5}, entry | {name: 6}, entry | {name: "5"}]
    with pytest.raises(RecordError, match=rf"row \[2\]: field '{name}': '5' comes a second time"):
        read(write("file.json", entries))


def test_a_bad_line_is_named(write):
    for line in ['{"id": 1', "[" * 100_000, "5", "[]"]:
        path = write("said.jsonl", f'{{"id": 1, "answer": "x"}}\n\n{line}\n')
        with pytest.raises(RecordError, match=r"said\.jsonl, row 2: field 'line'"):
            read_answers(path)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_caption_results, "", "not JSON"),
        (read_caption_results, "[" * 100_000, "not JSON"),
        (read_caption_results, '{"image_id": 1}', "content: dict, not a list"),
        (read_caption_results, "null", "content: NoneType, not a list"),
        (read_caption_references, "[]", "not an object with 'annotations'"),
        (read_caption_references, '{"images": []}', "not an object with 'annotations'"),
        (read_caption_references, '{"images": 5, "annotations": []}', "images: int, not a list"),
        (read_caption_references, '{"annotations": {}}', "annotations: dict, not a list"),
        (read_vqa_references, '{"questions": []}', "the file with their answers is needed"),
        (read_vqa_references, '{"metrics": {}, "predictions": []}', "with 'annotations'"),
    ],
)
def test_another_kind_of_file_is_refused_by_name(write, read, content, message):
    with pytest.raises(ValueError, match=rf"file\.json: .*{message}"):
        read(write("file.json", content))


def test_an_empty_reference_caption_is_named(write):
    entries = [*CAPTIONS, {"image_id": 2, "caption": " "}]
    with pytest.raises(RecordError, match=r"annotations\[3\]: field 'caption': empty text"):
        read_caption_references(write("truth.json", {"annotations": entries}))


def test_other_ids_and_empty_files_are_refused(write):
    said = write("said.jsonl", [{"id": 1, "answer": "x"}, {"id": 2, "answer": "x"}])
    with pytest.raises(ValueError, match=r"1 without .* \('3'\) and 2 predicted .* \('1', '2'\)"):
        score_files("accuracy", said, write("truth.jsonl", [{"id": 3, "answer": "x"}]))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        score_files("accuracy", said, write("truth.jsonl", ""))


def test_an_unknown_metric_an_absent_file_and_a_huge_one(write, tmp_path, monkeypatch):
    path = write("a.jsonl", [{"id": 1, "answer": "x"}])
    with pytest.raises(ValueError, match="'bleu'; known: caption, vqa, grounding, accuracy"):
        score_files("bleu", path, path)
    with pytest.raises(FileNotFoundError, match="absent"):
        score_files("accuracy", tmp_path / "absent.jsonl", path)
    monkeypatch.setattr(result_files, "MAX_BYTES", 10)
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(ValueError, match=rf"{name}: more than 10 bytes"):
            read_answers(write(name, [{"id": 1, "answer": "x"}]))


def test_files_for_submission(tmp_path):
    write_caption_results(tmp_path / "c.json", {"391895": "a caf\u00e9", "7": ""})
    assert json.loads((tmp_path / "c.json").read_text()) == [
        {"image_id": 391895, "caption": "a caf\u00e9"},
        {"image_id": 7, "caption": ""},
    ]
    assert read_caption_results(tmp_path / "c.json") == {"391895": "a caf\u00e9", "7": ""}
    write_vqa_results(tmp_path / "v.json", {"1": "yes"})
    assert json.loads((tmp_path / "v.json").read_text()) == [{"question_id": 1, "answer": "yes"}]


@pytest.mark.parametrize("key", ["a", "-1", "1.0", "", "\u0661", "1 "])
def test_ids_that_the_official_formats_cannot_hold_are_refused(tmp_path, key):
    for write_results in (write_caption_results, write_vqa_results):
        with pytest.raises(ValueError, match="not a whole number"):
            write_results(tmp_path / "file.json", {"1": "x", key: "x"})
        assert not (tmp_path / "file.json").exists()
