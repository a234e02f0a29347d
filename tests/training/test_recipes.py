"""The shipped configs of configs/finetune and configs/evaluate in miniature: from a publisher's
files over two steps of training to the figures of the test part."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from recipe_cases import AUDIO_CHANNELS, ROOT, START, Workspace
from safetensors.torch import load_file
from torch import Tensor

from unival import zero_shot
from unival.config import load_config
from unival.evaluate import Ranks, evaluate_run, run_of
from unival.evaluation.runner import Evaluation
from unival.model.configuration import UnivalConfig
from unival.model.loading import load_model
from unival.recipes import recipes
from unival.text import strip_punctuation
from unival.training.options import Stage
from unival.zero_shot import Table, is_the_papers, markdown

VOCABULARY = 59457
LENGTH = 20  # of captions: untrained models do not end theirs
ALONE = Ranks(0, "cpu", None)
# Biases that start from 0 and that no row shows a gradient: there is nothing that could decay.
UNUSED_BY_TEXT = {"decoder.code_norm.bias", "decoder.grid_position_norm.bias"}
UNUSED_BY_CODES = {
    "decoder.token_norm.bias",
    "decoder.text_position_norm.bias",
    "encoder.patch_norm.bias",  # there is no medium
    "encoder.grid_position_norm.bias",
}


@dataclass(frozen=True)
class Recipe:
    """A config and what must come of its miniature.

    ids       of the test part, counted by hand
    nll       of a token at random weights: the logarithm of how many the loss is over
    choices   the answers that there are; empty where they are free
    trained   the maps alone ("linear"), all but the matrix of words ("frozen words"), all
    data      data sets that it needs, where they are others than its name
    """

    config: str
    task: str
    medium: str
    ids: tuple[str, ...]
    nll: float = math.log(VOCABULARY)
    choices: tuple[str, ...] = ()
    trained: str = "frozen words"
    data: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        if self.medium == "audio":
            short = f"stages.0.decoding.audio_caption.max_length={LENGTH}"
            return [f"model.overrides.audio_channels={AUDIO_CHANNELS}", short]
        if self.task == "video_caption":
            return [f"stages.0.decoding.video_caption.max_length={LENGTH}"]
        return []


# Answers of one token: of it and </s>, which must follow, the first has the logarithm of the
# number of answers, the second nothing.
YES_NO = {"nll": math.log(2) / 2, "choices": ("no", "yes")}
MAN_CAT = {"nll": math.log(2) / 2, "choices": ("man", "cat")}
BOXES = {"task": "grounding", "medium": "image", "trained": "all"}
RECIPES = (
    Recipe("coco_caption", "image_caption", "image", ("74",)),
    Recipe("nocaps", "image_caption", "image", ("0", "1"), data=("coco_caption", "nocaps")),
    Recipe("vqav2", "vqa", "image", ("600",), **YES_NO),
    Recipe(
        "okvqa",
        "vqa",
        "image",
        ("31",),
        nll=math.log(3) / 2,
        choices=("race", "pony tail", "sport"),
    ),
    # " unanswerable", the answer of one of the two rows of which one is trained on, is of two
    # tokens, " can", the other's, of one: two or three with </s>.
    Recipe(
        "vizwiz",
        "vqa",
        "image",
        ("VizWiz_val_00000000.jpg",),
        nll=math.log(2) / 2.5,
        choices=("unanswerable", "can"),
    ),
    Recipe("refcoco", ids=("10", "20"), **BOXES),
    Recipe("refcocoplus", ids=("10", "10"), **BOXES),
    Recipe("refcocog", ids=("10",), **BOXES),
    Recipe(
        "snli_ve",
        "visual_entailment",
        "image",
        ("12.jpg#0r1n",),
        nll=math.log(3) / 2,
        choices=("no", "yes", "maybe"),
        trained="all",
    ),
    # The loss is over 8,192 codes and the four specials; 1,024 codes and </s> are foretold.
    Recipe(
        "coco_image_generation",
        "image_generation",
        "text",
        ("51",),
        nll=math.log(8196),
        trained="all",
    ),
    Recipe("msrvtt_caption", "video_caption", "video", ("video7010",)),
    Recipe("activitynet_caption", "video_caption", "video", ("v_two-0",)),
    Recipe("msrvtt_qa", "video_qa", "video", ("30", "31"), **MAN_CAT),
    Recipe("msvd_qa", "video_qa", "video", ("30", "31"), **MAN_CAT),
    Recipe("audiocaps", "audio_caption", "audio", ("t_5",)),
    Recipe("clotho", "audio_caption", "audio", ("t.wav",)),
    *(
        Recipe(f"linear/{name}", task, medium, ids, trained="linear", data=(name,), **more)
        for name, task, medium, ids, more in (
            ("coco_caption", "image_caption", "image", ("74",), {}),
            ("vqav2", "vqa", "image", ("600",), YES_NO),
            ("msrvtt_caption", "video_caption", "video", ("video7010",), {}),
            ("msrvtt_qa", "video_qa", "video", ("30", "31"), MAN_CAT),
            ("audiocaps", "audio_caption", "audio", ("t_5",), {}),
        )
    ),
)
QUICK = ("coco_caption", "refcoco", "audiocaps", "linear/coco_caption")


@pytest.fixture(scope="session")
def made(tmp_path_factory, vocabulary) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("recipes"), vocabulary)


@pytest.fixture
def workspace(made, monkeypatch) -> Workspace:
    """The folder with the small model, which the test then works in."""
    monkeypatch.chdir(made.folder)
    return made


def marked(recipe: Recipe):
    slow = () if recipe.config in QUICK else (pytest.mark.slow,)
    return pytest.param(recipe, id=recipe.config, marks=slow)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def differing(some: dict[str, Tensor], others: dict[str, Tensor]) -> set[str]:
    assert some.keys() == others.keys()
    return {name for name, tensor in some.items() if not tensor.equal(others[name])}


class Trained:
    """What a run has left."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.run = run_of(Path("runs") / recipe.config.replace("/", "_") / "x", None)
        [self.stage] = self.run.stages
        self.folder = Path(self.run.output)
        self.place = self.folder / "stages" / self.stage.name
        # What is measured is the average of the weights where there is one.
        self.measured = "model" if self.stage.ema_decay is None else "model_ema"

    def checkpoint(self, step: int) -> Path:
        return self.place / "checkpoints" / f"step-{step:06d}"

    def score(self, step: int) -> float:
        task, metric = self.stage.best.split("/")
        return Evaluation.load(self.checkpoint(step) / "evaluation").metrics[task][metric]


def check_loss(trained: Trained) -> None:
    """Of nearly random weights; a loss over other tokens than the recipe's is far from this."""
    recipe = trained.recipe
    lines = (trained.folder / "metrics.jsonl").read_text().splitlines()
    [entry] = [entry for entry in map(json.loads, lines) if entry["step"] == 2]
    assert math.isfinite(entry["loss"])
    assert entry["tasks"] == {recipe.task: pytest.approx(recipe.nll, rel=0.03, abs=0.12)}


def expected_to_stay(recipe: Recipe, names: set[str]) -> set[str]:
    """What no step may change."""
    own = rf"encoder\.{recipe.medium}_"
    if recipe.trained == "linear":
        return {name for name in names if not re.match(rf"{own}proj\.", name)}
    constant = {name for name in names if re.search(r"\.text_bucket$|\.logmel\.", name)}
    others = {n for n in names if re.match(r"encoder\.(image|video|audio)_", n)}
    others = {name for name in others if not re.match(own, name)}
    unused = UNUSED_BY_CODES if recipe.medium == "text" else UNUSED_BY_TEXT
    stays = constant | others | unused
    return stays | {"encoder.embed_tokens.weight"} if recipe.trained == "frozen words" else stays


def check_weights(trained: Trained) -> None:
    """Exactly what the recipe trains has changed, statistics of batch norm included."""
    before = weights(Path(START))
    first, last = (weights(trained.checkpoint(step) / "model") for step in (1, 2))
    added = {name: tensor for name, tensor in first.items() if name not in before}
    assert bool(added) == (trained.recipe.medium == "audio")
    changed = differing(before | added, last)
    assert changed == last.keys() - expected_to_stay(trained.recipe, set(last))


def check_size(trained: Trained) -> None:
    """What the recipe sets of the model: 32 x 32 codes of a picture, an encoder of sounds."""
    config, medium = load_model(trained.place / "model").config, trained.recipe.medium
    assert config.code_image_size == (256 if medium == "text" else 128)
    assert config.audio_channels == (AUDIO_CHANNELS if medium == "audio" else None)
    assert medium != "audio" or (config.mel_bins, config.hop_size) == (64, 200)


def check_choice(trained: Trained) -> None:
    """The stage's model is the checkpoint of the higher score; of equal ones the earlier."""
    scores = {step: trained.score(step) for step in (1, 2)}
    assert all(map(math.isfinite, scores.values()))
    best = 2 if scores[2] > scores[1] else 1
    for name in {"model", trained.measured}:
        found = weights(trained.place / name)
        assert not differing(found, weights(trained.checkpoint(best) / name))
        assert differing(found, weights(trained.checkpoint(3 - best) / name))


def check_answer(recipe: Recipe, stage: Stage, text: str) -> None:
    """An answer is of the kind that the task gives."""
    if recipe.choices:
        assert text in recipe.choices
    elif recipe.task == "grounding":
        assert re.fullmatch(r"(<bin_\d{1,3}> ){3}<bin_\d{1,3}>", text), text
    elif recipe.task == "image_generation":
        codes = [int(code) for code in text.split()]
        assert len(codes) == 1024
        assert 0 <= min(codes) <= max(codes) < 8192
    else:
        words = text.split()
        assert 1 <= len(words) <= stage.decoding[recipe.task]["max_length"]  # of one token each
        assert text == strip_punctuation(text)


def check_test(trained: Trained) -> None:
    """The test part is measured whole, and by the metric that the checkpoint is chosen by."""
    recipe, out = trained.recipe, trained.folder / "test"
    model = trained.place / trained.measured
    result = evaluate_run(model, run_of(model, None), [recipe.task], "test", out, ALONE)
    assert sorted(p.id for p in result.predictions) == sorted(recipe.ids)
    for prediction in result.predictions:
        check_answer(recipe, trained.stage, prediction.answer)
    scores = result.metrics[recipe.task]
    assert (scores["samples"], scores["skipped"]) == (len(recipe.ids), 0)
    if "vqav2" in recipe.config:  # whose test answers are not public
        assert scores["unanswered"] == len(recipe.ids)
    else:
        assert math.isfinite(scores[trained.stage.best.split("/")[1]])
    assert Evaluation.load(out) == result


@pytest.mark.parametrize("recipe", [marked(recipe) for recipe in RECIPES])
def test_a_miniature_goes_from_its_publishers_files_to_a_score(recipe, workspace):
    workspace.prepare(*(recipe.data or (recipe.config,)))
    workspace.train(recipe.config, *recipe.overrides)
    trained = Trained(recipe)
    check_loss(trained)
    check_weights(trained)
    check_size(trained)
    check_choice(trained)
    check_test(trained)


def test_every_shipped_recipe_has_a_miniature():
    folder = ROOT / "configs/finetune"
    shipped = [*folder.glob("*.yaml"), *folder.glob("linear/*.yaml")]
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in shipped}
    assert names == {recipe.config for recipe in RECIPES}
    assert len(RECIPES) == 16 + 5


def test_the_page_of_recipes_is_that_of_the_configs():
    assert (ROOT / "docs/recipes.md").read_text() == recipes(ROOT / "configs/finetune")


# --- Tables 10 and 11 -----------------------------------------------------------------------------

TABLE_10 = ROOT / "configs/evaluate/table10.yaml"
TABLE_11 = ROOT / "configs/evaluate/table11.yaml"
SMALL_MEDIA = ["media.image_size=64", "loading.threads=1"]


@pytest.fixture
def folder(workspace, tmp_path, monkeypatch) -> Path:
    """An own folder for a table, with `data` still empty and the model of the workspace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / START).parent.mkdir()
    (tmp_path / START).symlink_to(workspace.folder / START)
    return tmp_path


def lend(workspace: Workspace, monkeypatch, folder: Path, *names: str) -> None:
    """Put the shards and answers of data sets into a table's folder."""
    monkeypatch.chdir(workspace.folder)
    workspace.prepare(*names)
    monkeypatch.chdir(folder)
    for name in names:
        for path in (workspace.folder / "data").glob(f"{name}[_.]*"):
            (folder / "data" / path.name).symlink_to(path)


def measure(config: Path, *overrides: str) -> tuple[int, dict, list[str]]:
    """Exit status, results.json and the lines of results.md."""
    told = ["--config", str(config), "--model", START, "--out", "out", *SMALL_MEDIA, *overrides]
    status = zero_shot.main(told)
    found = json.loads(Path("out/results.json").read_text())
    return status, found, Path("out/results.md").read_text().splitlines()


def test_table_10_is_measured_on_the_data_sets_that_pretraining_saw(workspace, folder, monkeypatch):
    lend(workspace, monkeypatch, folder, "vqav2", "coco_caption", "refcocoplus")
    status, found, lines = measure(TABLE_10, "cells.3.media={image_size: 64}")
    assert status == 0
    titles = ["VQAv2 val Acc", "COCO caption val CIDEr", "COCO caption test CIDEr"]
    titles.append("RefCOCO+ val Acc@0.5")
    assert lines[2] == f"| Model | {' | '.join(titles)} |"
    counts = [found["metrics"][title]["samples"] for title in titles]
    # Of VQAv2 the two questions on the picture that is held out.
    assert counts == [2, 1, 1, 1]
    metrics = ("accuracy", "CIDEr", "CIDEr", "Acc@0.5")
    scores = [found["metrics"][t][m] for t, m in zip(titles, metrics, strict=True)]
    figures = " | ".join(f"{100 * score:.2f}" for score in scores)
    # A model that is not of the paper's size stands alone.
    assert lines[4:6] == [f"| unival_stage2_highres | {figures} |", ""]
    assert lines[-1].startswith("- The paper's rows are left out")
    assert found["model"] == str((workspace.folder / START).resolve())


def test_table_11_names_what_is_missing_and_measures_it_when_it_is_there(
    workspace, folder, monkeypatch, capsys
):
    lend(workspace, monkeypatch, folder, "okvqa", "vizwiz")
    (folder / "data/vizwiz.answers.txt").unlink()
    asked = []
    measure_cell = zero_shot.measure_cell

    def noted(table, cell, *others):
        asked.append(cell.title)
        return measure_cell(table, cell, *others)

    monkeypatch.setattr(zero_shot, "measure_cell", noted)
    status, first, lines = measure(TABLE_11)
    titles = ["OK-VQA val Acc", "VizWiz val Acc", "nocaps out-domain CIDEr"]
    titles += ["MSRVTT-QA test Acc", "MSVD-QA test Acc"]
    assert status == 1
    assert asked == titles
    assert list(first["metrics"]) == ["OK-VQA val Acc"]
    assert lines[2] == f"| Model | {' | '.join(titles)} |"
    figure = f"{100 * first['metrics']['OK-VQA val Acc']['accuracy']:.2f}"
    assert lines[4] == f"| unival_stage2_highres | {figure} | – | – | – | – |"
    assert lines[6] == "- OK-VQA val Acc: 1 samples"
    assert [f"- {title}: not measured" for title in titles[1:]] == lines[7:11]
    told = capsys.readouterr().err
    for title, file in (
        ("VizWiz val Acc", "data/vizwiz.answers.txt"),
        ("nocaps out-domain CIDEr", "data/nocaps_out_domain-"),
        ("MSRVTT-QA test Acc", "data/msrvtt_qa_test-"),
    ):
        assert re.search(rf"^{title}: not measured: .*{re.escape(file)}", told, re.M), told

    asked.clear()
    lend(workspace, monkeypatch, folder, "nocaps")
    status, second, lines = measure(TABLE_11)
    assert status == 1
    assert asked == titles[1:]
    assert second["metrics"].pop("nocaps out-domain CIDEr")["samples"] == 1  # picture b
    assert second["metrics"] == first["metrics"]
    assert lines[8] == "- nocaps out-domain CIDEr: 1 samples"


@pytest.mark.slow
def test_table_11_is_measured_on_clips_too(workspace, folder, monkeypatch):
    lend(workspace, monkeypatch, folder, "msrvtt_qa", "msvd_qa")
    small = ["media.video_size=32", "media.video_frames=2", "loading.video_backend=pyav"]
    status, found, _ = measure(TABLE_11, *small)
    assert status == 1
    # None of the two test questions is about "dog" or "moon": one answer, "man", is in the list.
    scores = [found["metrics"][f"{name} test Acc"] for name in ("MSRVTT-QA", "MSVD-QA")]
    assert [s["samples"] for s in scores] == [2, 2]
    assert all(s["accuracy"] in (0.0, 0.5) for s in scores)


def test_results_of_another_model_are_not_mixed(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/results.json").write_text('{"model": "/other", "metrics": {}}')
    told = ["--config", str(TABLE_11), "--model", START, "--out", "out"]
    assert zero_shot.main(told) == 2
    assert "out/results.json is about /other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        # Of the paper; VQAv2 and COCO have two decimals there, or one.
        (
            TABLE_10,
            [
                "| Unified-IO Base | 61.80 | 104.00 | – | – |",
                "| OFA Base | 68.91 | 74.47 | 75.27 | 30.45 |",
                "| UnIVAL | 70.18 | 90.07 | 91.04 | 70.81 |",
            ],
        ),
        (
            TABLE_11,
            [
                "| Unified-IO Base | 37.80 | 45.80 | – | – | – |",
                "| OFA Base | 40.16 | 17.33 | 48.95 | – | – |",
                "| Flamingo-3B | 41.20 | 28.90 | – | 11.00 | 27.50 |",
                "| LAVENDER | – | – | – | 4.50 | 11.60 |",
                "| UnIVAL | 38.91 | 20.22 | 47.68 | 5.84 | 21.15 |",
            ],
        ),
    ],
    ids=["table10", "table11"],
)
def test_a_model_of_the_papers_size_stands_below_the_papers_rows(config, rows):
    table = load_config(Table, config)
    measured = {
        cell.title: {cell.metric: (number + 1) / 8, "samples": 1000.0, "skipped": 2.0}
        for number, cell in enumerate(table.cells)
    }
    lines = markdown(table, measured, "mine", True).splitlines()
    # An eighth is 12.50 of a hundred.
    figures = ["12.50", "25.00", "37.50", "50.00", "62.50"][: len(table.cells)]
    assert lines[4 : 4 + len(rows) + 1] == [*rows, f"| mine | {' | '.join(figures)} |"]
    assert lines[-1].endswith(": 1000 samples, 2 that could not be read left out")


@pytest.mark.parametrize(
    ("name", "right"),
    [("unival_base", True), ("unival_tiny", False), ("unival_large", False), ("ofa_base", False)],
)
def test_the_papers_model_is_known_by_its_size(name, right):
    config = UnivalConfig.from_yaml(str(ROOT / f"configs/model/{name}.yaml"))
    assert is_the_papers(SimpleNamespace(config=config)) is right
