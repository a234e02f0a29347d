"""Whole runs of self-critical training and of adapters, as their configs start them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_cases import OVERRIDES, ROOT
from peft import PeftModel
from ranks import on_ranks

from unival.data.media import MediaOptions
from unival.model.loading import load_model
from unival.training.adapters import Adapter
from unival.training.options import MicroBatch, Mixture, ModelOptions, Run, Source, Stage
from unival.training.scst import Scst
from unival.training.trainer import make_model, train
from unival.vocabulary import BOS, EOS


def run_of(folder: Path, data: Path, source: str, task: str, **stage: object) -> Run:
    """Two steps of four rows of one table."""
    rows = [MicroBatch("image", [Mixture("rows", 4, [task])])]
    options = {"name": "one", "steps": 2, "micro_batches": rows, "learning_rate": 1e-2}
    options |= {"warmup_ratio": 0.0, "fine_tuning": True} | stage
    return Run(
        str(folder / "run"),
        {"rows": Source(str(data / source))},
        [Stage(**options)],  # type: ignore[arg-type]
        model=ModelOptions(str(ROOT / "configs/model/unival_tiny.yaml"), dict(OVERRIDES)),
        media=MediaOptions(image_size=32),
        evaluate_before=False,
        tensorboard=False,
        log_every=1,
        checkpoint_every=1,
    )


def steps_of(run: Run) -> list[dict]:
    lines = (Path(run.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_captions_are_trained_by_their_rewards_and_go_on_as_they_were(tmp_path, data):
    scst = Scst(samples=3, top_k=20)
    short = {"image_caption": {"max_length": 6, "no_repeat_ngram_size": 0}}
    table = "vision_language_caption.tsv"
    run = run_of(tmp_path, data, table, "image_caption", scst=scst, decoding=short)
    on_ranks(tmp_path / "whole", 1, train, run)
    steps = steps_of(run)
    assert [set(step["rewards"]) >= {"reward", "length"} for step in steps] == [True, True]
    assert all(0.0 <= step["rewards"]["reward"] <= 10.0 for step in steps)
    assert all(1.0 <= step["rewards"]["length"] <= 7.0 for step in steps)
    # What is drawn follows from seed, step and rank: another run does the same.
    other = run_of(tmp_path / "b", data, table, "image_caption", scst=scst, decoding=short)
    on_ranks(tmp_path / "again", 1, train, other)
    first, second = (load_model(Path(r.output) / "stages/one/model") for r in (run, other))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_boxes_are_trained_by_their_overlap(tmp_path, data):
    scst = Scst("iou", "none", "beam", samples=1, cross_entropy=True)
    table = "vision_language_ground.tsv"
    search = {"grounding": {"min_length": 4, "max_length": 4}}
    run = run_of(tmp_path, data, table, "grounding", scst=scst, decoding=search)
    on_ranks(tmp_path / "boxes", 1, train, run)
    assert all(step["rewards"]["reward"] in (0.0, 0.25, 0.5, 0.75, 1.0) for step in steps_of(run))
    assert all(step["loss"] > 0.0 for step in steps_of(run))


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_a_run_of_an_adapter_leaves_a_plain_model_and_the_adapter(tmp_path, data, kind):
    adapter = Adapter(kind, rank=2, alpha=4.0, virtual_tokens=3)
    run = run_of(tmp_path, data, "vision_language_qa.tsv", "vqa", adapter=adapter)
    on_ranks(tmp_path / kind, 1, train, run)
    folder = Path(run.output) / "stages/one"
    trained, base = load_model(folder / "model").eval(), make_model(run, run.stages[0], None).eval()
    with_adapter = PeftModel.from_pretrained(base, str(folder / "model_adapter")).eval()
    inputs = {
        "input_ids": torch.tensor([[BOS, 40, 41, 42, EOS]]),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "decoder_input_ids": torch.tensor([[BOS, 50]]),
    }
    with torch.no_grad():
        found = trained(**inputs).logits
        expected = with_adapter(**inputs).logits
        start = make_model(run, run.stages[0], None).eval()(**inputs).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - start).abs().max() > 1e-4
