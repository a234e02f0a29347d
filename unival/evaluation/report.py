"""One self-contained HTML page about a training run: curves, scores and what the model says."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import math
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from unival.evaluation.grounding import is_hit
from unival.evaluation.runner import FILE, Evaluation, Prediction
from unival.tasks import TASKS

logger = logging.getLogger(__name__)

MEDIA = {"image": "Pictures", "video": "Films", "audio": "Sounds"}
COUNTS = ("samples", "skipped")
HIT = 0.5  # intersection over union
MAX_CARDS = 200  # of a medium
COLUMNS = ("stage", "step", "global_step", "loss", "lr")
STYLE = """
:root { color-scheme: light dark; --ink: #1c1f26; --soft: #5c6370; --paper: #fff; --card: #f5f6f8;
  --line: #d9dce3; --right: #1a7f37; --wrong: #b42318; --found: #d9480f; --true: #1971c2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #a3a9b6; --paper: #14161a;
  --card: #1e2127; --line: #363b45; --right: #57d27a; --wrong: #ff8a80; --found: #ff922b;
  --true: #74c0fc; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem } h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem }
.note { max-width: 48rem; color: var(--soft) }
figure { margin: 1rem 0; padding: .75rem; background: #fff; border: 1px solid var(--line);
  border-radius: 8px } figure img { width: 100%; display: block }
.scroll { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap } td.number { text-align: right; font-variant-numeric: tabular-nums }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)) }
.card { padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; overflow-wrap: anywhere }
.picture { position: relative; display: inline-block; max-width: 100%; line-height: 0 }
.picture img { max-width: 100%; border-radius: 4px }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100% }
rect { fill: none; stroke-width: 2.5; vector-effect: non-scaling-stroke }
rect.found { stroke: var(--found); stroke-dasharray: 6 3 } rect.true { stroke: var(--true) }
.asked { margin: .7rem 0 0 } .asked b { font-weight: 600 } .soft { color: var(--soft) }
.right { color: var(--right); font-weight: 600 } .wrong { color: var(--wrong); font-weight: 600 }
.found { color: var(--found) } .true { color: var(--true) }
pre { overflow-x: auto; padding: .75rem; background: var(--card); border-radius: 8px }
"""


def write_report(run: str | Path) -> Path:
    """Write report.html into the folder of a run and return its path.

    Reads what exists of metrics.jsonl, nonfinite/, evaluation_before/ and evaluation_after/
    (evaluation.json with its thumbnails), config.yaml and command.txt.

    Raises:
        ValueError: the run has neither metrics nor an evaluation, or one of them is damaged.
    """
    run = Path(run)
    steps = read_steps(run / "metrics.jsonl")
    found = {
        when: Evaluation.load(run / f"evaluation_{when}")
        for when in ("before", "after")
        if (run / f"evaluation_{when}" / FILE).exists()
    }
    if not steps and not found:
        raise ValueError(f"{run}: neither metrics.jsonl nor an evaluation to report about")
    parts = [_head(run.resolve().name), _curves(steps), _refused(run), _score_table(found)]
    if found:
        when = list(found)[-1]
        parts.append(_cards(found[when].predictions, run / f"evaluation_{when}", when))
    parts.append(_settings(run))
    path = run / "report.html"
    path.write_text("\n".join([*parts, "</body></html>", ""]), encoding="utf-8")
    return path


def read_steps(path: Path) -> list[dict]:
    """The logged steps, ordered by global_step; of a step logged twice (a resumed run) the last.

    Raises ValueError that names file and line. A cut last line, of a run that was killed, is left
    out with a warning.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    steps = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step = json.loads(line)
            missing = [name for name in COLUMNS if name not in step]
        except (ValueError, TypeError) as error:
            if number == len(lines):
                logger.warning("%s, line %d: incomplete, left out", path, number)
                continue
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if missing:
            raise ValueError(f"{path}, line {number}: lacks {', '.join(missing)}")
        steps[step["global_step"]] = step
    return [steps[key] for key in sorted(steps)]


def _head(name: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>UnIVAL: {html.escape(name)}</title><style>{STYLE}</style></head><body>
<h1>UnIVAL training run: {html.escape(name)}</h1>
<p class="note">The answers and scores below are about the data that the model was trained on. They
do not measure generalisation: they check that everything is wired, from files to answers.</p>"""


def _curves(steps: Sequence[dict]) -> str:
    if not steps:
        return ""
    try:
        picture = draw_curves(steps)
    except ImportError:
        logger.warning("the report has no curves: pip install matplotlib")
        return (
            '<h2>Training</h2><p class="note">Curves need matplotlib, which is not installed.</p>'
        )
    last = steps[-1]
    facts = [f"{len(steps)} logged steps, the last is step {last['global_step']}"]
    for key, unit in (("tokens_per_second", "tokens/s"), ("samples_per_second", "samples/s")):
        if isinstance(last.get(key), int | float):
            facts.append(f"{last[key]:,.0f} {unit}")
    peak = [s["memory_gib"] for s in steps if isinstance(s.get("memory_gib"), int | float)]
    if peak:
        facts.append(f"memory up to {max(peak):.2f} GiB")
    waits = [s["data_wait"] for s in steps if isinstance(s.get("data_wait"), int | float)]
    if waits:
        facts.append(f"{sum(waits) / len(waits):.1%} of a logged step spent waiting for data")
    bad = [sum(s["bad_samples"].values()) for s in steps if isinstance(s.get("bad_samples"), dict)]
    if bad and max(bad):
        facts.append(f"{max(bad)} bad samples replaced in a stage, see quarantine/")
    source = _data_url(picture, "image/svg+xml")
    return (
        f'<h2>Training</h2><figure><img alt="Loss of each task and learning rate over the steps" '
        f'src="{source}"></figure><p class="note">{html.escape("; ".join(facts))}.</p>'
    )


def draw_curves(steps: Sequence[dict]) -> bytes:
    """An SVG: loss of every task above, learning rate below, stages shaded in turn."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasSVG(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step in steps:
        for name, value in (step.get("tasks") or {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                lines[name].append((step["global_step"], value))
    for number, (name, points) in enumerate(lines.items()):
        style = "-" if number < 10 else "--"  # the colours repeat after ten
        losses.plot(
            *zip(*points, strict=True),
            style,
            label=name,
            linewidth=1.4,
            markersize=3,
            marker="o" if len(points) < 3 else None,
        )
    places = [step["global_step"] for step in steps]
    losses.plot(places, [step["loss"] for step in steps], color="black", alpha=0.35, label="total")
    rates.plot(places, [step["lr"] for step in steps], color="black", linewidth=1.2)
    for number, (name, first, last) in enumerate(_stages(steps)):
        for axis in (losses, rates):
            axis.axvspan(
                first, last, color="#4c6ef5" if number % 2 else "#adb5bd", alpha=0.12, lw=0
            )
        losses.text(
            (first + last) / 2,
            1.01,
            name,
            transform=losses.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
            parse_math=False,
        )
    losses.set_ylabel("loss (nats per token)")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    losses.grid(alpha=0.25)
    rates.grid(alpha=0.25)
    losses.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    target = io.BytesIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def _stages(steps: Sequence[dict]) -> list[tuple[str, float, float]]:
    """(name, first step, last step) of every stretch of one stage; a stretch ends where the next
    begins."""
    starts: list[tuple[str, float]] = []
    for step in steps:
        if not starts or starts[-1][0] != str(step["stage"]):
            starts.append((str(step["stage"]), step["global_step"]))
    ends = [start for _, start in starts[1:]] + [steps[-1]["global_step"]]
    return [(name, start, end) for (name, start), end in zip(starts, ends, strict=True)]


def _refused(run: Path) -> str:
    """Where the values of a step were not finite: a row for each pass of the ranks that saw it."""
    rows = []
    for path in sorted((run / "nonfinite").glob("*.json")):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            passes = [(p, _where(p)) for p in told["passes"]]
            samples = [
                ", ".join(f"{s['source']} {s['id']} (row {s['row']})" for s in p["samples"])
                for p in told["passes"]
            ]
            head = [told[name] for name in ("stage", "step", "rank", "policy")]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: no report of a step: {error!r}") from error
        for (each, where), shown in zip(passes, samples, strict=True):
            if where:
                cells = [*head, each["medium"], where, shown]
                rows.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
    if not rows:
        return ""
    names = ("stage", "step", "rank", "policy", "medium", "first where", "samples")
    head_row = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<h2>Steps that were not finite</h2><div class="scroll"><table><thead><tr>'
        f"{head_row}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="note">No weights were changed by these steps.</p>'
    )


def _where(found: dict) -> str:
    """The first module of a pass whose output, or its gradient, was not finite."""
    module = found["first_module"]
    if module is None:
        gradient = found.get("first_gradient")
        return f"gradient of {gradient}" if gradient else ""
    cause = "" if module["input_finite"] else ", whose input was not finite either"
    return f"{module['module']} (inputs up to {module['largest_input']:.3g}{cause})"


def _score_table(found: dict[str, Evaluation]) -> str:
    if not found:
        return ""
    head = "".join(f"<th>{when}</th>" for when in found)
    rows = []
    for task in dict.fromkeys(task for each in found.values() for task in each.metrics):
        tables = [each.metrics.get(task, {}) for each in found.values()]
        names = dict.fromkeys(name for table in tables for name in table)
        for name in names:
            values = [table.get(name) for table in tables]
            if name == "skipped" and not any(values):
                continue
            cells = "".join(f'<td class="number">{_number(name, v)}</td>' for v in values)
            labels = f"<td>{html.escape(task)}</td><td>{html.escape(name)}</td>"
            rows.append(f"<tr>{labels}{cells}</tr>")
    return (
        '<h2>Scores</h2><div class="scroll"><table><thead><tr><th>task</th><th>metric</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">Accuracy, BLEU, ROUGE-L and Acc@0.5 reach 1; CIDEr reaches 10 (papers '
        "print 100 times the value).</p>"
    )


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return f"{value:.0f}" if name in COUNTS else f"{value:.3f}"


def _cards(predictions: Iterable[Prediction], folder: Path, when: str) -> str:
    """For every medium a grid; a card holds all that was asked about one thumbnail."""
    groups: dict[str, dict[str, list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    for item in predictions:
        groups[item.medium][item.thumbnail or item.origin].append(item)
    parts = []
    for medium in [*MEDIA, *sorted(groups.keys() - MEDIA.keys())]:
        cards = list(groups[medium].values()) if medium in groups else []
        if not cards:
            continue
        shown = [_card(items, folder) for items in cards[:MAX_CARDS]]
        count = f"{len(cards)}" if len(cards) <= MAX_CARDS else f"{MAX_CARDS} of {len(cards)}"
        title = html.escape(MEDIA.get(medium, medium))
        parts.append(f"<h2>{title}, {when} training ({count})</h2>")
        if any(item.box_reference for items in cards for item in items):
            parts.append(
                '<p class="note"><span class="found">Dashed: the box the model found.</span> '
                '<span class="true">Solid: the true box.</span></p>'
            )
        parts.append(f'<div class="grid">{"".join(shown)}</div>')
    return "\n".join(parts)


def _card(items: list[Prediction], folder: Path) -> str:
    """The picture, then questions; each box question gets a picture of its own."""
    plain = [item for item in items if item.box_reference is None]
    boxed = [item for item in items if item.box_reference is not None]
    parts = [_picture(items[0].thumbnail, folder)] if plain else []
    parts += [_asked(item) for item in plain]
    for item in boxed:
        parts.append(_picture(item.thumbnail, folder, item) + _asked(item))
    return f'<div class="card">{"".join(parts)}</div>'


def _picture(name: str, folder: Path, item: Prediction | None = None) -> str:
    path = folder / name
    if not name or ".." in Path(name).parts or not path.is_file():
        return ""
    source = _data_url(path.read_bytes(), "image/jpeg")
    overlay = ""
    if item is not None and item.picture_size:
        width, height = item.picture_size
        boxes = _rect("true", item.box_reference) + _rect("found", item.box)
        overlay = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{boxes}</svg>'
    return f'<span class="picture"><img alt="" src="{source}">{overlay}</span>'


def _rect(kind: str, box: Sequence[float] | None) -> str:
    if box is None:
        return ""
    x0, y0, x1, y1 = box
    width, height = max(x1 - x0, 0.0), max(y1 - y0, 0.0)
    return f'<rect class="{kind}" x="{x0:g}" y="{y0:g}" width="{width:g}" height="{height:g}"/>'


def _asked(item: Prediction) -> str:
    right = is_right(item)
    verdict = ""
    if right is not None:
        word = "right" if right else "wrong"
        verdict = f' <span class="{word}">{"✓" if right else "✗"} {word}</span>'
    answer = item.answer
    if item.task in TASKS and TASKS[item.task].metric == "grounding" and item.box is None:
        answer = f"{answer} (no box)".strip()
    truth = " / ".join(item.references)
    truth = f'<br><span class="soft">truth:</span> {html.escape(truth)}' if truth else ""
    return (
        f'<p class="asked"><span class="soft">{html.escape(item.task)}: '
        f"{html.escape(item.question)}</span><br><b>{html.escape(answer) or '(nothing)'}</b>"
        f"{verdict}{truth}</p>"
    )


def is_right(item: Prediction) -> bool | None:
    """Whether an answer equals a reference or a box overlaps enough; None for captions."""
    metric = TASKS[item.task].metric if item.task in TASKS else "none"
    if metric == "accuracy":
        return item.answer in item.references
    if metric == "grounding" and item.box_reference is not None:
        box = None if item.box is None else tuple(item.box)
        return is_hit(box, tuple(item.box_reference), HIT)  # type: ignore[arg-type]
    return None


def _settings(run: Path) -> str:
    config, command = run / "config.yaml", run / "command.txt"
    line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if command.exists():
        line = command.read_text(encoding="utf-8").strip()
    parts = ["<h2>Settings</h2>", f"<pre>{html.escape(line)}</pre>"]
    if config.exists():
        text = html.escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    machine = f"{os.cpu_count()} CPUs, PyTorch {torch.__version__}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    parts.append(f'<p class="note">Written on a machine with {html.escape(machine)}.</p>')
    return "\n".join(parts)


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
