"""The table of fine-tuning recipes, read from their configs: the paper's values beside the released
ones, which the configs hold in comments."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from unival.config import load_config
from unival.files import write_text
from unival.training.options import Run, decoding_of

RELEASED = re.compile(r"^\s*(\w+):.*?#.*?released:\s*(.+)$")
HEAD = """# Fine-tuning recipes

One config of `configs/finetune/` a row; `unival recipes` writes this page from them. A value is the
paper's; in brackets stands what the released scripts have where they differ. Lengths are in tokens,
the batch in samples of a step, warm-up as a share of all steps.
"""


def released(path: Path) -> dict[str, str]:
    """What a config's comments say of the released scripts: by the first key of the line."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = RELEASED.match(line)
        if match:
            found[match[1]] = match[2].strip()
    return found


def _loss(run: Run) -> str:
    stage = run.stages[-1]
    parts = [f"smoothing {stage.label_smoothing:g}"]
    if stage.log_end is not None:
        parts.insert(0, f"encouraging (log_end {stage.log_end:g})")
    if stage.drop_worst_ratio:
        parts.append(f"without the worst {stage.drop_worst_ratio:g} after {stage.drop_worst_after}")
    if stage.constrain_answers:
        parts.append("over the answers alone")
    if stage.constraint_range is not None:
        parts.append("over ids {}–{}".format(*stage.constraint_range))
    if stage.scst is not None:
        parts = [f"self-critical: {stage.scst.reward}"]
    return ", ".join(parts)


def _input(run: Run) -> str:
    media, medium = run.media, run.stages[-1].micro_batches[0].medium
    return {
        "image": f"{media.image_size} px, {media.image_transform}",
        "video": f"{media.video_frames} frames of {media.video_size} px, {media.video_transform}",
        "audio": f"{media.audio_samples / 48_000:g} s at {media.audio_sample_rate} Hz",
        "text": "text",
    }[medium]


def _search(run: Run) -> str:
    stage = run.stages[-1]
    task = stage.micro_batches[0].mixture[0].tasks[0]
    rules = decoding_of(stage, task)
    if rules.scoring == "all_candidates":
        return "all candidates" + (", prompted" if rules.decoder_prompt else "")
    if rules.constraint == "codes":
        return f"{rules.min_length} codes drawn among {rules.top_k}"
    parts = [f"beam {rules.beam_size}"]
    exact = rules.min_length == rules.max_length
    parts.append(f"{rules.max_length} tokens" if exact else f"at most {rules.max_length}")
    parts.append("normalised" if rules.normalize_scores else "unnormalised")
    if rules.no_repeat_ngram_size:
        parts.append(f"no {rules.no_repeat_ngram_size}-gram twice")
    if rules.constraint != "none":
        parts.append(f"only {rules.constraint}")
    if rules.decoder_prompt:
        parts.append("prompted")
    return ", ".join(parts)


def _batch(run: Run) -> str:
    return str(sum(mix.rows for mix in run.stages[-1].micro_batches[0].mixture))


def _trained(run: Run) -> str:
    stage = run.stages[-1]
    if stage.adapter is not None:
        return stage.adapter.kind
    rules = [rule.replace("_", " ") for rule in stage.freeze]
    if rules and rules[0].startswith("all but "):
        return (
            "only "
            + rules[0].removeprefix("all but ")
            + (", the rest in eval mode" if stage.frozen_in_eval else "")
        )
    return "all but " + ", ".join(rules) if rules else "all"


# Column -> (its cell, the config keys whose released values stand beside it).
COLUMNS: dict[str, tuple[Callable[[Run], str], tuple[str, ...]]] = {
    "task": (lambda run: ", ".join(run.stages[-1].evaluate), ()),
    "learning rate": (lambda run: f"{run.stages[-1].learning_rate:g}", ("learning_rate",)),
    "length": (
        lambda run: (
            f"{run.stages[-1].steps} steps"
            if run.stages[-1].epochs is None
            else f"{run.stages[-1].epochs:g} epochs"
        ),
        ("epochs",),
    ),
    "warm-up": (lambda run: f"{run.stages[-1].warmup_ratio:g}", ("warmup_ratio",)),
    "batch": (_batch, ("mixture",)),
    "input": (
        _input,
        (
            "image_size",
            "video_size",
            "video_frames",
            "video_indices",
            "audio_sample_rate",
            "audio_random",
        ),
    ),
    "loss": (_loss, ("label_smoothing", "log_end")),
    "EMA": (lambda run: f"{run.stages[-1].ema_decay or '–'}", ("ema_decay",)),
    "trained": (_trained, ("freeze", "frozen_in_eval")),
    "search": (
        _search,
        ("max_length", "normalize_scores", "constraint", "beam_size", "min_length"),
    ),
    "chosen by": (lambda run: run.stages[-1].best or "last", ()),
}


def row(path: Path, root: Path) -> str:
    """One recipe as a row of the Markdown table."""
    run, notes = load_config(Run, path), released(path)
    cells = []
    for cell, keys in COLUMNS.values():
        told = [(key, notes[key]) for key in keys if key in notes]
        named = len(keys) > 1
        beside = "; ".join(f"{key} {note}" if named else note for key, note in told)
        cells.append(cell(run) + (f" (released: {beside})" if beside else ""))
    return f"| `{path.relative_to(root)}` | " + " | ".join(cells) + " |"


def recipes(folder: Path) -> str:
    """The page about all configs in a folder and below it."""
    paths = sorted(folder.glob("*.yaml")) + sorted(folder.glob("*/*.yaml"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no config (.yaml) in this folder")
    lines = ["| config | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    lines += [row(path, folder) for path in paths]
    return HEAD + "\n" + "\n".join(lines) + "\n"


def write_recipes(folder: Path, out: Path) -> Path:
    """Write the page and return its path."""
    write_text(out, recipes(folder))
    return out
