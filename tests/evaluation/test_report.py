"""The report: one file that stands alone, escapes what it shows and says what is missing."""

import json
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from unival.evaluation.report import _stages, draw_curves, is_right, read_steps, write_report
from unival.evaluation.runner import Evaluation, Prediction

VOID = {"meta", "img", "br", "rect", "link", "input", "hr"}
NASTY = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """Checks that elements nest and keeps attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def step(number, stage="images", **fields):
    return {
        "stage": stage,
        "step": number,
        "global_step": number,
        "loss": 5.0 / number,
        "lr": 1e-4,
        "memory_gib": 1.25,
        "tokens_per_second": 1234.0,
        "data_wait": 0.04 * number,
        "bad_samples": {"web": number - 1, "own": 0},
        "tasks": {"vqa": 4.0 / number},
    } | fields


def prediction(**fields):
    values = {
        "task": "vqa",
        "medium": "image",
        "origin": "a.tsv, row 0",
        "id": "1",
        "question": "what?",
        "answer": "cat",
        "references": ["cat"],
        "thumbnail": "thumbnails/a.jpg",
    }
    return Prediction(**values | fields)


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run <1>"
    folder = run / "evaluation_after"
    (folder / "thumbnails").mkdir(parents=True)
    Image.new("RGB", (64, 32), "red").save(folder / "thumbnails" / "a.jpg")
    steps = [step(1), step(2), step(3, "video $x", tasks={"video_qa": 2.0})]
    (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (run / "config.yaml").write_text(f"output: {NASTY}\n")
    grounding = prediction(
        task="grounding",
        question="the cat",
        answer="<bin_1>",
        references=[],
        box=[100.0, 0.0, 200.0, 80.0],
        box_reference=[90.0, 0.0, 200.0, 80.0],
        picture_size=[640, 320],
    )
    predictions = [
        prediction(),
        prediction(question=NASTY, answer="dog"),
        grounding,
        prediction(task="audio_caption", medium="audio", answer="rain", thumbnail=""),
    ]
    Evaluation({"vqa": {"accuracy": 0.5, "samples": 2.0, "skipped": 0.0}}, predictions).save(folder)
    before = Evaluation({"vqa": {"accuracy": 0.125, "samples": 2.0, "skipped": 0.0}}, [])
    before.save(run / "evaluation_before")
    return run


def test_page_stands_alone_and_shows_everything(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    sources = [image["src"] for image in page.of("img")]
    assert sources[0].startswith("data:image/svg+xml;base64,")
    assert len(sources) == 3 and all(s.startswith("data:image/jpeg;base64,") for s in sources[1:])
    assert not page.of("script") and not page.of("link") and "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "do not measure generalisation" in " ".join(page.text.split())
    assert "0.125" in page.text and "0.500" in page.text
    assert "skipped" not in page.text  # nothing was
    assert page.text.count("✓ right") == 2 and page.text.count("✗ wrong") == 1
    assert "rain" in page.text and "memory up to 1.25 GiB" in page.text
    assert "8.0% of a logged step spent waiting for data" in page.text
    assert "2 bad samples replaced" in page.text
    assert NASTY in page.text and f"output: {NASTY}" in page.text  # as text, not as an element


def test_boxes_lie_on_the_picture_in_its_own_pixels(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    true, found = page.of("rect")
    assert page.of("svg")[0]["viewbox"] == "0 0 640 320"
    assert (true["class"], true["x"], true["width"], true["height"]) == ("true", "90", "110", "80")
    assert (found["class"], found["x"], found["width"]) == ("found", "100", "100")


def test_right_and_wrong():
    assert is_right(prediction()) is True
    assert is_right(prediction(answer="Cat")) is False
    assert is_right(prediction(task="image_caption")) is None
    box = [0.0, 0.0, 10.0, 10.0]
    for found, right in ((box, True), ([0.0, 0.0, 10.0, 4.0], False), (None, False)):
        assert is_right(prediction(task="grounding", box=found, box_reference=box)) is right


def test_only_an_evaluation_or_only_metrics_is_enough(run):
    (run / "metrics.jsonl").rename(run / "kept")
    assert "Training</h2>" not in write_report(run).read_text()
    (run / "kept").rename(run / "metrics.jsonl")
    for when in ("before", "after"):
        (run / f"evaluation_{when}" / "evaluation.json").unlink()
    text = write_report(run).read_text()
    assert "Training</h2>" in text and "Scores</h2>" not in text
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl nor an evaluation"):
        write_report(run)


def test_thumbnails_come_only_from_the_folder(run):
    (run / "secret.jpg").write_bytes(b"secret")
    Evaluation({}, [prediction(thumbnail="../secret.jpg")]).save(run / "evaluation_after")
    assert "c2VjcmV0" not in write_report(run).read_text()


def test_steps_of_a_resumed_run_count_once_and_a_cut_line_is_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(s) for s in (step(1), step(2), step(2, loss=9.0), step(3))]
    path.write_text("\n".join([*lines, '{"stage": "im']))
    assert [(s["global_step"], s["loss"]) for s in read_steps(path)][:2] == [(1, 5.0), (2, 9.0)]
    assert "line 5: incomplete" in caplog.text
    path.write_text("\n".join(["{", *lines]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not JSON"):
        read_steps(path)
    path.write_text('{"stage": "a", "step": 1, "global_step": 1, "lr": 0}\n')
    with pytest.raises(ValueError, match="line 1: lacks loss"):
        read_steps(path)


def test_stages_meet_where_the_next_one_begins():
    steps = [step(1), step(5), step(6, "video"), step(9, "video")]
    assert _stages(steps) == [("images", 1, 6), ("video", 6, 9)]


def test_one_step_and_values_that_are_not_numbers_can_be_drawn():
    drawn = draw_curves([step(1, tasks={"vqa": None, "grounding": float("nan")})])
    assert b"<svg" in drawn


def test_steps_that_were_not_finite_are_shown_with_module_and_samples(run):
    (run / "nonfinite").mkdir()
    sample = {"source": "web", "id": NASTY, "file": "web.tsv", "row": 31}
    module = {"module": "encoder.layers.3.ffn", "input_finite": True, "largest_input": 6.5e4}
    told = {"stage": "one", "step": 41, "rank": 2, "policy": "skip"}
    bad = {"medium": "video", "first_module": module, "samples": [sample]}
    gradient = {"medium": "image", "first_module": None, "first_gradient": "decoder.norm"}
    good = {"medium": "image", "first_module": None, "first_gradient": None, "samples": [sample]}
    passes = [bad, gradient | {"samples": []}, good]
    path = run / "nonfinite" / "one-step000041-rank2.json"
    path.write_text(json.dumps(told | {"passes": passes}))
    text = write_report(run).read_text()
    page = Page(text)
    assert "Steps that were not finite" in page.text
    assert "encoder.layers.3.ffn (inputs up to 6.5e+04)" in page.text
    assert "gradient of decoder.norm" in page.text
    assert f"web {NASTY} (row 31)" in page.text
    assert NASTY not in text
    assert page.text.count("skip") == 2
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"rank2\.json: no report of a step"):
        write_report(run)


def test_a_step_without_a_loss_is_a_gap_in_the_curve():
    steps = [
        {"stage": "one", "global_step": n, "loss": loss, "lr": 0.1, "tasks": {}, "step": n}
        for n, loss in ((1, 2.0), (2, None), (3, 1.0))
    ]
    assert b"<svg" in draw_curves(steps)


def test_without_matplotlib_the_report_says_so(run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Curves need matplotlib" in write_report(run).read_text()
