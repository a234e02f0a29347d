"""Evaluation over tables: items, scores known by hand, what is skipped, what is written."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from unival.data.media import MediaOptions
from unival.data.records import Answer, Origin, Record, RecordError
from unival.data.samples import make_samples
from unival.data.sources import open_table
from unival.evaluation import runner
from unival.evaluation.items import Catalogue, task_items
from unival.evaluation.runner import Evaluation, evaluate
from unival.generation.search import Hypothesis
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.vocabulary import EOS, FIRST_BIN, box_to_bins

SAMPLES = Path(__file__).parents[2] / "samples"
IMAGES = SAMPLES / "images"
SMALL = MediaOptions(image_size=64, video_size=32, video_frames=4, audio_samples=48_000)


class Table(list):
    """Records; an exception in their place is raised."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


def record(row, kind, file="cat.jpg", **fields):
    return Record(str(row), kind, IMAGES / file, Origin("train.tsv", row), **fields)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = UnivalConfig(
        d_model=32,
        ffn_dim=64,
        encoder_layers=1,
        decoder_layers=1,
        num_heads=2,
        image_layers=(1, 1, 1, 1),
        image_channels=(8, 16, 32, 32),
        video_layers=(1, 1, 1, 1),
        video_channels=(8, 16, 16, 32),
        video_cardinality=4,
        audio_channels=(4, 8, 8, 16, 16, 16),
        hop_size=480,
    )
    return UnivalForConditionalGeneration(config).eval()


@pytest.fixture
def script(monkeypatch, vocabulary):
    """Replaces the search: `answers` maps the encoder's text to an answer or to bins."""
    answers, batches = {}, []

    def search(model, task, batch, choices):
        assert not model.training
        batches.append(batch)
        found = []
        for ids in batch["input_ids"]:
            answer = answers[vocabulary.decode(ids).strip()]
            if isinstance(answer, str):
                tokens = vocabulary.encode_text(f" {answer}")
            else:
                tokens = [FIRST_BIN + number for number in answer]
            found.append(Hypothesis([*tokens, EOS], 0.0, []))
        return found

    monkeypatch.setattr(runner, "search_answers", search)
    answers["batches"] = batches
    return answers


def test_accuracy_counts_the_confidence_of_the_answer(model, vocabulary, script):
    half = (Answer("cat", 1.0), Answer("kitten", 0.6))
    rows = [
        record(0, "qa", question="what?", answers=half),
        record(1, "qa", question="which animal?", answers=half),
        record(2, "qa", question="who?", answers=half),
        record(3, "qa", "dog.jpg", question="how many?", answers=(Answer("1"),)),
    ]
    script |= {"what?": "cat", "which animal?": "kitten", "who?": "dog", "how many?": "1"}
    result = evaluate(model, vocabulary, {"t": rows}, ["vqa"], SMALL)
    assert result.metrics["vqa"]["accuracy"] == pytest.approx((1 + 0.6 + 0 + 1) / 4)
    assert result.metrics["vqa"]["samples"] == 4
    assert [p.answer for p in result.predictions] == ["cat", "kitten", "dog", "1"]
    assert result.predictions[0].references == ["cat", "kitten"]
    assert result.predictions[3].origin == "train.tsv, row 3"
    batch = script["batches"][0]
    assert batch["pixel_values"].shape[0] == 2  # the picture of three questions is there once
    assert batch["media_index"].tolist() == [0, 0, 0, 1]


def test_captions_of_a_medium_are_references_of_one_item(model, vocabulary, script):
    rows = [
        record(0, "caption", captions=("a cat plays with yarn",)),
        record(1, "caption", "dog.jpg", captions=("a dog stands in the grass",)),
        record(2, "caption", captions=("the kitten lies on red cloth",)),
    ]
    script["what does the image describe?"] = "the kitten lies on red cloth"
    metrics = evaluate(model, vocabulary, {"t": rows}, ["image_caption"], SMALL)
    first, second = metrics.predictions
    assert first.references == ["a cat plays with yarn", "the kitten lies on red cloth"]
    assert second.references == ["a dog stands in the grass"]
    # 6 words of the first match, of the second only "the": 7 of 12
    assert metrics.metrics["image_caption"]["BLEU-1"] == pytest.approx(7 / 12)
    assert metrics.metrics["image_caption"]["samples"] == 2


def test_boxes_are_compared_in_pixels_of_the_original(model, vocabulary, script):
    boxes = [(64.0, 48.0, 256.0, 192.0), (0.0, 0.0, 512.0, 384.0), (10.0, 10.0, 20.0, 20.0)]
    texts = ["the kitten", "everything", "nothing"]
    rows = [
        record(n, "visual_grounding", captions=(text,), box=box)
        for n, (text, box) in enumerate(zip(texts, boxes, strict=True))
    ]
    ask = 'which region does the text " {} " describe?'
    seen = [value * 64 / side for value, side in zip(boxes[0], (512, 384) * 2, strict=True)]
    script[ask.format("the kitten")] = box_to_bins(seen)
    script[ask.format("everything")] = box_to_bins((0, 0, 64, 40))  # overlap 40 / 64
    script[ask.format("nothing")] = "no box"
    result = evaluate(model, vocabulary, {"t": rows}, ["grounding"], SMALL)
    assert result.metrics["grounding"]["Acc@0.5"] == pytest.approx(2 / 3)
    kitten, _, nothing = result.predictions
    assert kitten.box == pytest.approx(list(boxes[0]), abs=2.1)  # half a bin is 2 pixels here
    assert kitten.box_reference == list(boxes[0])
    assert kitten.picture_size == [512, 384]
    assert nothing.box is None


def test_matching_asks_one_right_and_one_wrong_statement_of_each_record(vocabulary):
    captions = ["a cat plays", "a kitten with yarn", "a dog stands"]
    files = ["cat.jpg", "cat.jpg", "dog.jpg"]
    rows = [
        record(n, "caption", file, captions=(caption,))
        for n, (caption, file) in enumerate(zip(captions, files, strict=True))
    ]
    task = TASKS["image_text_matching"]
    for limit, count in ((None, 6), (1, 2)):
        for seed in range(5):
            catalogue = Catalogue.scan({"t": rows})
            items, skipped = task_items(task, catalogue, vocabulary, seed, limit)
            assert (len(items), skipped) == (count, 0)
            for item in items:
                text = vocabulary.decode(item.source)
                is_cat = item.record.media.name == "cat.jpg"
                true = any(c in text for c in (captions[:2] if is_cat else captions[2:]))
                assert item.truth == [Answer("yes" if true else "no")]
            assert sum(item.truth[0].text == "yes" for item in items) == count / 2


def test_matching_items_follow_the_seed(vocabulary):
    rows = [record(n, "caption", captions=(f"picture number {n}",)) for n in range(6)]
    rows += [record(9, "caption", "dog.jpg", captions=(f"a {w} dog",)) for w in ("big", "red")]
    task = TASKS["image_text_matching"]
    first, again, other = (
        [i.source for i in task_items(task, Catalogue.scan({"t": rows}), vocabulary, s, None)[0]]
        for s in (1, 1, 2)
    )
    assert first == again != other


def test_always_yes_is_half_right_in_matching(model, vocabulary, monkeypatch):
    yes = [*vocabulary.encode_text(" yes"), EOS]
    monkeypatch.setattr(
        runner, "search_answers", lambda m, t, b, c: [Hypothesis(yes, 0, [])] * len(b["input_ids"])
    )
    words = ("cat", "yarn", "red")
    rows = [record(n, "qa", question=f"q{w}?", answers=(Answer(w),)) for n, w in enumerate(words)]
    result = evaluate(model, vocabulary, {"t": rows}, ["answer_matching"], SMALL, batch_size=4)
    assert result.metrics["answer_matching"]["accuracy"] == 0.5
    assert sorted(p.references[0] for p in result.predictions) == ["no"] * 3 + ["yes"] * 3


def test_what_cannot_be_used_is_counted_and_its_reason_logged(model, vocabulary, script, caplog):
    broken = Record("5", "qa", b"no picture", Origin("train.tsv", 5), (), "what?", (Answer("a"),))
    rows = Table(
        [
            record(0, "qa", question="what?", answers=(Answer("cat"),)),
            RecordError(Origin("train.tsv", 1), "refs", "is not a list of answers"),
            record(2, "qa", question="", answers=(Answer("cat"),)),
            record(3, "qa", question="what?"),
            record(4, "qa", "none.jpg", question="what?", answers=(Answer("cat"),)),
            broken,
        ]
    )
    script["what?"] = "cat"
    result = evaluate(model, vocabulary, {"t": rows}, ["vqa"], SMALL)
    assert result.metrics["vqa"] == {"accuracy": 1.0, "samples": 1.0, "skipped": 4.0}
    assert result.metrics["tables"] == {"skipped": 1.0}
    for row, field in ((1, "refs"), (2, "question"), (3, "answers"), (4, "media"), (5, "media")):
        assert f"train.tsv, row {row}: field {field!r}" in caplog.text
    only_broken = evaluate(model, vocabulary, {"t": [broken]}, ["vqa"], SMALL)
    assert only_broken.metrics["vqa"] == {"samples": 0.0, "skipped": 1.0}


def test_a_task_without_records_and_an_unknown_task_are_refused(model, vocabulary):
    rows = [record(0, "caption", captions=("a cat",))]
    with pytest.raises(ValueError, match="'vqa': no record of kind qa in first, second"):
        evaluate(model, vocabulary, {"first": rows, "second": []}, ["vqa"], SMALL)
    with pytest.raises(ValueError, match="unknown task 'captions'; known: image_caption"):
        evaluate(model, vocabulary, {"t": rows}, ["captions"], SMALL)


def test_fine_tuned_tasks_are_asked_as_in_fine_tuning(model, vocabulary, script):
    rows = [record(0, "qa", question="what is it", answers=(Answer("cat"),))]
    script |= {"what is it?": "cat", "what is it": "dog"}
    tables = {"t": rows}
    tuned = evaluate(model, vocabulary, tables, ["vqa"], SMALL, fine_tuned=["vqa"])
    plain = evaluate(model, vocabulary, tables, ["vqa"], SMALL)
    assert (tuned.metrics["vqa"]["accuracy"], plain.metrics["vqa"]["accuracy"]) == (1.0, 0.0)
    prompts = [b["decoder_input_ids"].tolist() for b in script["batches"]]
    assert prompts == [[vocabulary.source(" what is it?")[:-1]], [[0]]]


def test_nothing_is_random_whatever_the_training_transforms(model, vocabulary, script):
    rows = [record(0, "qa", question="what?", answers=(Answer("cat"),))]
    script["what?"] = "cat"
    random_options = MediaOptions(
        image_size=64, image_transform="pretrain", video_indices="random", audio_random=True
    )
    for options in (random_options, MediaOptions(image_size=64)):
        evaluate(model, vocabulary, {"t": rows}, ["vqa"], options)
    first, second = (batch["pixel_values"] for batch in script["batches"])
    assert torch.equal(first, second)


def test_mode_of_the_model_is_restored(model, vocabulary, script):
    rows = [record(0, "qa", question="what?", answers=(Answer("cat"),))]
    model.train()
    try:
        with pytest.raises(KeyError):  # the script has no answer
            evaluate(model, vocabulary, {"t": rows}, ["vqa"], SMALL)
        assert model.training
    finally:
        model.eval()


def test_samples_through_the_real_search(model, vocabulary, tmp_path):
    make_samples(SAMPLES, tmp_path / "data")
    files = sorted((tmp_path / "data").glob("*.tsv"))
    tables = {file.stem: open_table(file, media_root=SAMPLES) for file in files}
    answers = (tmp_path / "data" / "answers.txt").read_text().splitlines()
    tasks = ["audio_caption", "grounding", "image_text_matching", "video_qa"]
    calls = []
    result = evaluate(
        model,
        vocabulary,
        tables,
        tasks,
        SMALL,
        answers=answers,
        fine_tuned=["video_qa"],
        batch_size=3,
        limit=2,
        folder=tmp_path / "run",
        progress=lambda *call: calls.append(call),
    )
    assert [p.task for p in result.predictions].count("image_text_matching") == 4
    assert ("image_text_matching", 4, 4) in calls and ("image_text_matching", 3, 4) in calls
    assert all(p.answer in answers for p in result.predictions if p.task == "video_qa")
    sizes = {}
    for prediction in result.predictions:
        with Image.open(tmp_path / "run" / prediction.thumbnail) as picture:
            sizes[prediction.medium] = picture.size
    assert sizes == {"image": (256, 192), "video": (512, 128), "audio": (512, 128)}
    result.save(tmp_path / "run")
    loaded = Evaluation.load(tmp_path / "run")
    assert (loaded.metrics, loaded.predictions) == (result.metrics, result.predictions)


def test_damaged_evaluation_names_the_file(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match=r"evaluation\.json: not an evaluation"):
        Evaluation.load(tmp_path)


def test_batches_of_any_size_give_the_same_answers(model, vocabulary):
    rng = random.Random(0)
    words = ["what", "is", "the", "colour", "of", "that", "thing", "here"]
    rows = [
        record(n, "qa", file, question=" ".join(rng.sample(words, n + 2)), answers=(Answer("a"),))
        for n, file in enumerate(["cat.jpg", "dog.jpg", "cat.jpg", "cow.jpg"])
    ]
    answers = ["cat", "dog", "red", "two birds", "green", "the sea"]
    one, three = (
        evaluate(model, vocabulary, {"t": rows}, ["vqa"], SMALL, answers=answers, batch_size=size)
        for size in (1, 3)
    )
    assert one.predictions == three.predictions
