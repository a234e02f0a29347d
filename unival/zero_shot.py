"""Measuring one model on a list of data sets that it was not fine-tuned on (Tables 10 and 11)."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unival.config import load_config
from unival.data.media import Loading, MediaOptions
from unival.evaluate import Ranks, join_ranks
from unival.files import write_json, write_text
from unival.training.options import Source

OURS = "UnIVAL"


@dataclass
class Cell:
    """One data set of a table, and what the paper says of it.

    title     of the column, as in the paper
    task      a key of unival.tasks.TASKS
    metric    of that task, and the factor that the paper's figures have to it
    answers   a file of candidate answers
    prompt    fine_tuning or pretraining: how the question is worded
    decoding  fields of Decoding that the search has otherwise
    media     fields of the table's `media` that this data set has otherwise
    paper     the figure of each model of the paper
    """

    title: str
    source: Source
    task: str
    metric: str
    factor: float = 100.0
    answers: str | None = None
    prompt: str = "fine_tuning"
    decoding: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    """A table of the paper: its data sets in order."""

    title: str
    cells: list[Cell]
    media: MediaOptions = field(default_factory=MediaOptions)
    loading: Loading = field(default_factory=Loading)
    batch: int = 16


def measure_cell(
    table: Table, cell: Cell, model: Any, vocabulary: Any, ranks: Ranks
) -> dict[str, float]:
    """The metrics of a model on one data set; empty on every rank but the first.

    Raises:
        ValueError, FileNotFoundError: a file of the data set is missing or cannot be used.
    """
    from unival.data.sources import open_table
    from unival.evaluation.runner import evaluate
    from unival.tasks import TASKS

    if cell.task not in TASKS:
        raise ValueError(f"{cell.title}: unknown task {cell.task!r}; known: {', '.join(TASKS)}")
    if cell.prompt not in ("fine_tuning", "pretraining"):
        raise ValueError(f"{cell.title}: prompt={cell.prompt!r}; known: fine_tuning, pretraining")
    source = cell.source
    opened = open_table(source.path, source.layout, source.medium, source.media_root)
    answers = []
    if cell.answers is not None:
        answers = Path(cell.answers).read_text(encoding="utf-8").splitlines()
    result = evaluate(
        model,
        vocabulary,
        {cell.title: opened},
        [cell.task],
        replace(table.media, **cell.media),
        loading=table.loading,
        answers=answers,
        decoding={cell.task: replace(TASKS[cell.task].decoding, **cell.decoding)},
        fine_tuned=[cell.task] if cell.prompt == "fine_tuning" else [],
        batch_size=table.batch,
        group=ranks.group,
    )
    return result.metrics.get(cell.task, {})


def is_the_papers(model: Any) -> bool:
    """Whether a model has the size of the paper's, so that its figures stand beside the paper's."""
    config = model.config
    found = (config.d_model, config.encoder_layers, config.decoder_layers, config.image_layers)
    return (*found[:3], list(found[3] or [])) == (768, 6, 6, [3, 4, 23, 3])


def markdown(table: Table, measured: dict[str, dict[str, float]], name: str, paper: bool) -> str:
    """The table in the paper's layout: a row a model, this one last."""
    lines = [f"# {table.title}", ""]
    lines.append("| Model | " + " | ".join(cell.title for cell in table.cells) + " |")
    lines.append("| --- |" + " ---: |" * len(table.cells))
    models = list(dict.fromkeys(name for cell in table.cells for name in cell.paper))
    models.sort(key=lambda row: row == OURS)  # the paper's own row comes last there too
    for row in models if paper else ():
        cells = [f"{cell.paper[row]:.2f}" if row in cell.paper else "–" for cell in table.cells]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    cells = [_figure(cell, measured.get(cell.title)) for cell in table.cells]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for cell in table.cells:
        scores = measured.get(cell.title)
        if scores is None:
            lines.append(f"- {cell.title}: not measured")
            continue
        skipped = scores.get("skipped", 0.0)
        lost = f", {skipped:.0f} that could not be read left out" if skipped else ""
        lines.append(f"- {cell.title}: {scores.get('samples', 0.0):.0f} samples{lost}")
    if not paper:
        lines.append("- The paper's rows are left out: this model has not the size of the paper's.")
    return "\n".join(lines) + "\n"


def _figure(cell: Cell, scores: dict[str, float] | None) -> str:
    if scores is None or cell.metric not in scores:
        return "–"
    return f"{cell.factor * scores[cell.metric]:.2f}"


def zero_shot(model_folder: Path, config: Path, out: Path, overrides: Sequence[str]) -> int:
    """Measure a model on the data sets of a table; writes results.json and results.md.

    Data sets that are measured already in results.json are not measured again. Returns 1 where one
    could not be measured; the others are.
    """
    from unival.model.loading import load_model
    from unival.vocabulary import Vocabulary

    table = load_config(Table, config, overrides)
    ranks = join_ranks()
    model = load_model(model_folder).eval().to(ranks.device)
    vocabulary = Vocabulary.from_pretrained(model_folder)
    path = out / "results.json"
    measured: dict[str, dict[str, float]] = {}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["model"] != str(model_folder.resolve()):
            raise ValueError(f"{path} is about {found['model']}; choose another --out")
        measured = found["metrics"]
    failed = []
    for cell in table.cells:
        if cell.title in measured:
            continue
        try:
            scores = measure_cell(table, cell, model, vocabulary, ranks)
        except (ValueError, FileNotFoundError) as error:
            failed.append(cell.title)
            if ranks.rank == 0:
                print(f"{cell.title}: not measured: {error}", file=sys.stderr)
            continue
        if ranks.rank == 0:
            if cell.metric not in scores:
                failed.append(cell.title)
                known = ", ".join(scores)
                print(f"{cell.title}: no {cell.metric!r} among {known}", file=sys.stderr)
            measured[cell.title] = scores
            told = {"model": str(model_folder.resolve()), "table": table.title, "metrics": measured}
            write_json(path, told)
    if ranks.rank == 0:
        text = markdown(table, measured, model_folder.name, is_the_papers(model))
        write_text(out / "results.md", text)
        print(text)
    return int(bool(failed))


def parser() -> argparse.ArgumentParser:
    """The options of `unival zero-shot`."""
    options = argparse.ArgumentParser(prog="unival zero-shot", description=__doc__)
    options.add_argument("--config", type=Path, required=True, help="a file of configs/evaluate")
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True, help="folder of results.json and .md")
    options.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("overrides", nargs="*", help="key=value")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a table; the exit status is 1 where a data set is missing, 2 for an unusable call."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return zero_shot(arguments.model, arguments.config, arguments.out, arguments.overrides)
    except (ValueError, FileNotFoundError) as error:
        print(f"unival zero-shot: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
