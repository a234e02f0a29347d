"""A user's tables made of the samples, and a small checkpoint to start from."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from unival.evaluate import evaluate_run, join_ranks
from unival.evaluation.runner import Evaluation
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.options import Run
from unival.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"


def save_checkpoint(folder: Path) -> Path:
    """A small model with fresh weights and its tokenizer, as a user would have them."""
    torch.manual_seed(0)
    config = UnivalConfig.from_yaml(
        ROOT / "configs/model/unival_tiny.yaml",
        d_model=32,
        ffn_dim=64,
        encoder_layers=1,
        decoder_layers=1,
    )
    UnivalForConditionalGeneration(config).save_pretrained(folder)
    Vocabulary("gpt2").tokenizer.save_pretrained(folder)
    return folder


def questions() -> list[tuple[str, str, str]]:
    """(file, question, answer) of the sample pictures."""
    found = []
    for line in (SAMPLES / "annotations.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "image":
            found += [(entry["file"], pair["q"], pair["a"]) for pair in entry.get("qa", ())]
    return found


def write_questions(folder: Path, counts: dict[str, int]) -> dict[str, list[tuple[str, str, str]]]:
    """NAME.csv for each count, of rows that no other has."""
    folder.mkdir(parents=True, exist_ok=True)
    rest, parts = questions(), {}
    for name, count in counts.items():
        parts[name], rest = rest[:count], rest[count:]
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "question", "answer"])
            writer.writerows(parts[name])
    return parts


def measure(model: Path, run: Run, tasks: list[str], split: str) -> Evaluation:
    """What a rank does that measures with others."""
    return evaluate_run(model, run, tasks, split, None, join_ranks())
