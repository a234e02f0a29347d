"""`unival finetune` on a user's own tables, and measuring on several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finetune_cases import SAMPLES, measure, questions, save_checkpoint, write_questions
from ranks import on_ranks

from unival.cli import main
from unival.config import load_config
from unival.evaluate import all_caption_scores
from unival.evaluation.runner import Evaluation, Prediction
from unival.finetune import USER_TASKS, Request, user_run
from unival.model.loading import load_model
from unival.training.checks import check_run
from unival.training.options import Run

TINY = ["media.image_size=64", "precision=fp32", "tensorboard=false"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def request_for(task: str, data: Path, checkpoint: Path, **fields: object) -> Request:
    return Request(task, data, checkpoint, data / "run", media_root=SAMPLES, **fields)  # type: ignore[arg-type]


def test_a_users_questions_are_trained_on_measured_and_reported(tmp_path, checkpoint, capfd):
    parts = write_questions(tmp_path, {"train": 12, "val": 5, "test": 7})
    answers = sorted({answer for rows in parts.values() for _, _, answer in rows})
    (tmp_path / "answers.txt").write_text("\n".join(answers) + "\n")
    out = tmp_path / "run"
    words = ["finetune", "--task", "vqa", "--data", str(tmp_path), "--from", str(checkpoint)]
    words += ["--media-root", str(SAMPLES), "--answers", str(tmp_path / "answers.txt")]
    assert main([*words, "--out", str(out), *TINY]) == 0
    said = capfd.readouterr().out
    assert "test: vqa: accuracy" in said
    assert "samples 7" in said
    run = load_config(Run, out / "config.yaml")
    assert run.stages[0].steps == 5  # five epochs of one step of all 12 rows
    assert run.stages[0].constrain_answers
    found = Evaluation.load(out / "evaluation_test")
    assert [p.question for p in found.predictions] != []
    assert {p.answer for p in found.predictions} <= set(answers)
    asked = {question for _, question, _ in parts["test"]}
    assert len(found.predictions) == 7
    assert all(any(q.lower().rstrip("?") in p.question for q in asked) for p in found.predictions)
    assert (out / "report.html").stat().st_size > 1000
    model = load_model(out / "stages/vqa/model")
    before = load_model(checkpoint)
    changed = {
        name
        for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert "encoder.embed_tokens.weight" not in changed  # the recipe freezes it
    assert any(name.startswith("decoder.layers") for name in changed)


def test_two_ranks_measure_as_one_does_whatever_is_left_over(tmp_path, checkpoint):
    """7 rows in batches of 3 are 3 batches, which 2 ranks do not share evenly."""
    write_questions(tmp_path, {"train": 4, "test": 7})
    run = user_run(request_for("vqa", tmp_path, checkpoint))
    run.media.image_size, run.evaluate_batch = 64, 3
    found = {
        world: on_ranks(tmp_path / str(world), world, measure, checkpoint, run, ["vqa"], "test")
        for world in (1, 2)
    }
    (alone,) = found[1]
    assert alone.metrics["vqa"]["samples"] == 7
    first, other = found[2]
    assert first == alone
    assert (other.predictions, other.metrics) == ([], {})


def test_all_scores_of_captions_say_what_is_missing(monkeypatch):
    """Without Java: what needs it is named with the reason, the rest is there."""
    monkeypatch.setenv("PATH", "")
    said = [
        Prediction("image_caption", "image", "t, row 0", "0", "", "a cat", ["a cat", "one cat"]),
        Prediction("image_caption", "image", "t, row 1", "1", "", "a red hen", ["the hen runs"]),
        Prediction("vqa", "image", "t, row 2", "2", "", "yes", ["yes"]),
    ]
    metrics = {"image_caption": {"samples": 2.0}, "vqa": {"accuracy": 1.0}}
    found = all_caption_scores(Evaluation(metrics, said))
    assert set(found) == {"image_caption"}
    scores = found["image_caption"]
    assert scores["tokenizer"] == "own"
    # Clipped unigrams: 2 of 2 and 1 of 3; the words are 5, the closest references have 5.
    assert scores["scores"]["BLEU-1"] == pytest.approx(3 / 5, rel=1e-6)
    assert set(scores["missing"]) == {"METEOR", "SPICE", "PTB tokenizer"}
    assert all("`java` was not found" in scores["missing"][n] for n in ("METEOR", "PTB tokenizer"))
    assert scores["missing"]["SPICE"]


def test_every_task_has_a_recipe_that_can_be_run(tmp_path, checkpoint):
    rows = {
        "caption": '{"media": "cat.jpg", "caption": "a cat"}',
        "vqa": '{"media": "cat.jpg", "question": "what is it", "answer": "cat"}',
        "refcoco": '{"media": "cat.jpg", "text": "the cat", "box": [1, 2, 30, 40]}',
        "snli_ve": '{"media": "cat.jpg", "text": "a cat sleeps", "label": "neutral"}',
        "image_generation": json.dumps({"caption": "a cat", "codes": [1, 2, 3, 4]}),
    }
    for name, task in USER_TASKS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text((rows[task.layout] + "\n") * 40)
        for ranks in (1, 3):
            run = user_run(request_for(name, folder, checkpoint, ranks=ranks))
            check_run(run, ranks)
            (stage,) = run.stages
            assert stage.evaluate == [name]
            assert stage.init_from == str(checkpoint)
            assert stage.best is None  # there is no val table
            # Without a list of answers only the tasks that have one of their own keep to it.
            assert stage.constrain_answers == (name == "visual_entailment")
            assert 0 < stage.micro_batches[0].mixture[0].rows <= 40


def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, checkpoint, capsys):
    write_questions(tmp_path, {"train": 4})
    for words, said in (
        (["--task", "vqs"], "unknown task 'vqs'; known: image_caption"),
        (["--task", "grounding"], "no column for the text"),
        (["--data", str(tmp_path / "absent")], "absent"),
        (["--from", str(tmp_path)], "no saved model"),
    ):
        given = {"--task": "vqa", "--data": str(tmp_path), "--from": str(checkpoint)}
        given |= dict([words])
        assert main(["finetune", *(word for pair in given.items() for word in pair)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert len(questions()) > 24  # what the tests above take their rows from
