"""Losses over the answers of a list alone, and the rules of what may be trained and measured on."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engine_cases import OVERRIDES, ROOT, small_run

from unival.data.batch import collate
from unival.data.records import Answer, Origin, Record, RecordError
from unival.generation.constraints import Trie
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.tasks.base import TaskContext, assemble
from unival.training.batches import FREE, answer_states
from unival.training.checks import check_run, with_steps
from unival.training.engine import TrainingModel
from unival.training.losses import Criterion
from unival.training.options import MicroBatch, Mixture, Source, decoding_of, measured_sources
from unival.vocabulary import BOS, EOS, IGNORE

ANSWERS = ([10, 11], [10, 12], [10], [20, 21, 22])
TRIE = Trie([BOS, *answer, EOS] for answer in ANSWERS)
# <s> 10 -> 11, 12 or the end; after 20 and 21 there is one way on.
FOLLOW = {(): {10, 20}, (10,): {11, 12, EOS}, (10, 11): {EOS}, (20,): {21}, (20, 21): {22}}


def examples(prompted: bool) -> list:
    sources = ([BOS, 30, 31, EOS], [BOS, 32, EOS])
    return [
        (assemble(source, answer, weight, prompted), 0)
        for source, answer, weight in zip(
            sources, ([10, 11], [20, 21, 22]), (1.0, 0.5), strict=True
        )
    ]


@pytest.mark.parametrize("prompted", [False, True])
def test_the_loss_is_over_the_answers_alone(prompted):
    """Against a softmax, in float64, of the logits of the tokens that the list allows."""
    rows = examples(prompted)
    batch = collate(rows, [], "text")
    batch.pop("media_index")
    batch["answer_states"] = answer_states(TRIE, rows, batch["labels"])
    assert ((batch["answer_states"] == FREE) == (batch["labels"] == IGNORE)).all()
    torch.manual_seed(0)
    config = UnivalConfig.from_yaml(ROOT / "configs/model/unival_tiny.yaml", **OVERRIDES)
    model = UnivalForConditionalGeneration(config).eval()
    smoothing = 0.1
    loss, _ = TrainingModel(model, Criterion(label_smoothing=smoothing), TRIE)(dict(batch), 1)
    with torch.no_grad():
        inputs = ("input_ids", "attention_mask", "decoder_input_ids")
        logits = model(**{name: batch[name] for name in inputs}).logits.double()
    expected = 0.0
    for row, (example, _) in enumerate(rows):
        answer = [token for token in example.target if token not in (IGNORE, EOS)]
        start = len(example.target) - len(answer) - 1
        for place, token in enumerate([*answer, EOS]):
            allowed = sorted(FOLLOW.get(tuple(answer[:place]), {EOS}))
            logs = logits[row, start + place, allowed].log_softmax(0) * example.weight
            nll = -logs[allowed.index(token)]
            # Section 2.5: eps_i = eps / (K - 1) over the K allowed tokens.
            share = smoothing / (len(allowed) - 1) if len(allowed) > 1 else smoothing
            expected += (1 - smoothing - share) * nll - share * logs.sum()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_a_target_is_the_best_answer_of_the_list(vocabulary):
    answers = (Answer("frisbee", 1.0), Answer("disc", 0.6), Answer("toy", 0.9))
    record = Record("1", "qa", b"", Origin("t.tsv", 4), question="what", answers=answers)
    task, rng = TASKS["vqa"], random.Random(0)
    open_context = TaskContext(fine_tuning=True)
    listed = replace(open_context, allowed_answers=frozenset({"disc", "toy"}))
    for context, text, weight in ((open_context, " frisbee", 1.0), (listed, " toy", 0.9)):
        example = task.example(record, vocabulary, rng, context)
        assert example.target[-1 - len(vocabulary.encode_text(text)) : -1] == (
            vocabulary.encode_text(text)
        )
        assert example.weight == weight
    none = replace(open_context, allowed_answers=frozenset({"ball", "bat"}))
    with pytest.raises(RecordError, match=r"t\.tsv, row 4.*answers.*'frisbee' is outside.* 2 ans"):
        task.example(record, vocabulary, rng, none)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"constrain_answers": True}, "one task that answers from a list; they name any"),
        (
            {
                "constrain_answers": True,
                "micro_batches": [MicroBatch("image", [Mixture("qa", 4, ["image_caption"])])],
            },
            "they name image_caption",
        ),
        ({"steps": 0}, "steps of at least 1 or epochs above 0, not both"),
        ({"steps": 4, "epochs": 2.0}, "not both"),
        ({"decoding": {"vqs": {}}}, "decoding='vqs'"),
        ({"decoding": {"vqa": {"beams": 3}}}, r"unknown decoding\.vqa\.beams"),
        ({"decoding": {"vqa": {"beam_size": 0}}}, r"decoding\.vqa: beam_size"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, stage, said):
    with pytest.raises(ValueError, match=said):
        check_run(small_run(tmp_path, stage), 1)


def test_only_training_splits_are_trained_on_and_test_is_never_measured(tmp_path):
    run = small_run(tmp_path)
    assert measured_sources(run) == ["qa", "video_qa"]
    run.sources["held"] = Source("held.tsv", split="test")
    assert measured_sources(run) == ["qa", "video_qa"]
    run.sources["chosen"] = Source("chosen.tsv", split="val")
    assert measured_sources(run) == ["chosen"]
    check_run(run, 1)
    for split in ("val", "test", "dev"):
        run.sources["qa"] = Source("qa.tsv", split=split)
        with pytest.raises(ValueError, match=r"whose split is|known: train, val, test"):
            check_run(run, 1)


def test_epochs_are_passes_over_the_sources_of_the_first_micro_batch(tmp_path):
    micro = [MicroBatch("image", [Mixture("qa", 4), Mixture("rare", 8, every=4)])]
    run = small_run(tmp_path, {"steps": 0, "epochs": 3.0, "micro_batches": micro})
    # (100 + 50) rows in steps of 4 + 8 / 4 rows: 25 steps an epoch.
    found = with_steps(run, {"qa": range(100), "rare": range(50)}).stages[0]
    assert (found.steps, found.epochs) == (75, None)


def test_a_stage_says_how_its_tasks_are_searched(tmp_path):
    stage = small_run(tmp_path, {"decoding": {"image_caption": {"beam_size": 3}}}).stages[0]
    assert decoding_of(stage, "image_caption") == replace(
        TASKS["image_caption"].decoding, beam_size=3
    )
    assert decoding_of(stage, "vqa") == TASKS["vqa"].decoding
