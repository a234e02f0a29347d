"""Several runs in one picture: their curves over the same steps, and numbers beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unival.evaluation.report import read_steps
from unival.files import finished_file, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG = "metrics.jsonl"
LOSS, OTHERS = ("loss",), ("lr", "grad_norm", "samples_per_second")  # drawn where none is named
STEPS = ("step", "global_step")  # of an entry: where it is, not what was measured
HIGHER = ("samples_per_second", "tokens_per_second", "tflops", "mfu")  # is better
LOWER = ("loss", "tasks", "step_seconds", "data_wait", "memory_gib")  # tasks: losses by task
UNITS = {
    "loss": "nats per token",
    "tasks": "nats per token",
    "parts": "share of the step",
    "data_wait": "share of the step",
    "memory_gib": "GiB",
    "step_seconds": "s",
}
COLOURS = 10  # of matplotlib's cycle
COLUMNS = ("last", "best", "at step", "last 10 %")  # of the table

Points = list[tuple[int, float]]  # (global step, value); NaN where the value was not finite


@dataclass(frozen=True)
class RunCurves:
    """What one run has logged, by metric: `loss`, `tasks/vqa`, `parts/forward`, and so on."""

    folder: Path
    last_step: int
    curves: dict[str, Points]


def compare(folders: Sequence[str | Path], out: str | Path, metric: str | None = None) -> Path:
    """Draw the logs of several runs into one picture, with a table of numbers beside it.

    Steps are those of the whole run, over its stages. A step that was logged twice, by a run that
    was resumed, counts as it was logged last; a value that was not finite is a gap in the curve.

    Args:
        folders: of runs, each with a metrics.jsonl; the legend has their names, with as many
            parents as tell them apart.
        out: a .png or .svg. The numbers go to the same name with .json: see `summarize`.
        metric: the only one to draw, such as grad_norm or tasks/vqa. By default: loss, the losses
            of the tasks that two runs share (or that the only run has), learning rate, gradient
            norm and samples per second.

    Returns:
        `out`.

    Raises:
        ValueError: nothing to compare, a folder that is not one of a run, a damaged log (with file
            and line), a metric that no run has, another kind of file, no matplotlib.
    """
    out = Path(out)
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"{out}: a picture is written as .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"{out.name} needs matplotlib: pip install 'unival[demo]'") from error
    runs = {name: read_run(Path(f)) for name, f in zip(names(folders), folders, strict=True)}
    panels = choose(runs, metric)
    picture = figure(runs, panels)
    with finished_file(out) as part:
        picture.savefig(part, format=out.suffix[1:])
    write_json(out.with_suffix(".json"), summarize(runs, panels))
    return out


def names(folders: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the folders' paths that differ from each other.

    Raises ValueError where there is no folder, or one twice.
    """
    if not folders:
        raise ValueError("no run to compare: name the folders of runs")
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    found = []
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice")
        ends = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
        end = next(e for e in ends if sum(p.parts[-len(e) :] == e for p in paths) == 1)
        found.append(str(Path(*end)))
    return found


def read_run(folder: Path) -> RunCurves:
    """The curves of a run.

    Raises ValueError where the folder is not one of a run, has logged nothing, or its log is
    damaged.
    """
    path = folder / LOG
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not path.is_file():
        raise ValueError(f"{folder} holds no {LOG}: it is not the folder of a run")
    try:
        steps = read_steps(path)
    except (TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not the log of a run: {error}") from error
    if not steps:
        raise ValueError(f"{path}: the run has logged nothing yet")
    curves: dict[str, Points] = {}
    for entry in steps:
        place = entry["global_step"]
        if not isinstance(place, int):
            raise ValueError(f"{path}: global_step {place!r} is not a whole number")
        for name, value in _measured(entry):
            curves.setdefault(name, []).append((place, value))
    return RunCurves(folder, steps[-1]["global_step"], curves)


def _measured(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a log entry; null, which the log has for what is not finite, as NaN."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _measured(value))
        elif name not in STEPS and (value is None or isinstance(value, int | float)):
            yield name, float(value) if value is not None and math.isfinite(value) else math.nan


def choose(runs: Mapping[str, RunCurves], metric: str | None) -> list[str]:
    """The metrics to draw. Raises ValueError where no run has a value of the one named."""
    counts: dict[str, int] = {}
    for run in runs.values():
        for name, points in run.curves.items():
            counts[name] = counts.get(name, 0) + any(not math.isnan(v) for _, v in points)
    if metric is not None:
        known = sorted(name for name, count in counts.items() if count)
        if metric not in known:
            raise ValueError(
                f"no run has a value of {metric!r}; those they have are {', '.join(known)}"
            )
        return [metric]
    least = min(2, len(runs))
    tasks = [n for n, count in counts.items() if n.startswith("tasks/") and count >= least]
    return [*LOSS, *sorted(tasks), *OTHERS]


def figure(runs: Mapping[str, RunCurves], panels: Sequence[str]) -> Figure:
    """A panel for each metric, in each a line for every run, and one legend."""
    # Not through pyplot: a figure of its own is drawn by Agg and needs no screen.
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(6.5 * columns, 3.2 * rows + 0.6), layout="constrained")
    for number, metric in enumerate(panels, start=1):
        axes = drawn.add_subplot(rows, columns, number)
        for index, (name, run) in enumerate(runs.items()):
            _draw(axes, index, name, run.curves.get(metric, []))
        axes.set_title(metric, fontsize=10, parse_math=False)
        axes.set_ylabel(UNITS.get(_kind(metric), ""))
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.25)
    lines = drawn.axes[0].get_lines()
    legend = drawn.legend(
        lines, [str(index) for index in range(len(lines))], loc="outside lower center", ncols=2
    )
    # Only now the names: as labels, those with a leading underscore would be left out.
    for text, name in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return drawn


def _draw(axes: Axes, index: int, name: str, points: Points) -> None:
    values = [math.nan, *(value for _, value in points), math.nan]
    alone = [  # a line shows nothing of a value between two gaps
        place
        for place, around in enumerate(zip(values, values[1:], values[2:], strict=False))
        if [math.isnan(value) for value in around] == [True, False, True]
    ]
    axes.plot(
        [step for step, _ in points],
        values[1:-1],
        label=name,
        color=f"C{index % COLOURS}",
        linestyle=("-", "--", ":", "-.")[index // COLOURS % 4],
        linewidth=1.4,
        marker="o",
        markersize=4,
        markevery=alone,
    )


def summarize(runs: Mapping[str, RunCurves], panels: Sequence[str]) -> dict[str, Any]:
    """The numbers beside the picture, which `table` prints.

    Each run has its folder, its last logged step, and of each metric `last` (null where it was not
    finite), `best` and `best_step` (null where neither more nor less is better, as for a learning
    rate), and `mean_last_tenth`: over the last tenth of the entries that have the metric, at least
    one, without those that were not finite.
    """
    return {
        "runs": {
            name: {
                "folder": str(run.folder),
                "last_step": run.last_step,
                "metrics": {m: _numbers(m, run.curves.get(m, [])) for m in panels},
            }
            for name, run in runs.items()
        }
    }


def _numbers(metric: str, points: Points) -> dict[str, float | int | None]:
    finite = [(value, step) for step, value in points if not math.isnan(value)]
    best: tuple[float | None, int | None] = (None, None)
    if finite and _kind(metric) in LOWER:
        best = min(finite)
    elif finite and _kind(metric) in HIGHER:
        best = max(finite, key=lambda point: point[0])
    tail = [value for _, value in points[-math.ceil(len(points) / 10) :] if not math.isnan(value)]
    last = points[-1][1] if points else math.nan
    return {
        "last": None if math.isnan(last) else last,
        "best": best[0],
        "best_step": best[1],
        "mean_last_tenth": sum(tail) / len(tail) if tail else None,
    }


def _kind(metric: str) -> str:
    """The group that a metric is in, or its own name: `tasks` of tasks/vqa."""
    return metric.split("/")[0]


def table(summary: Mapping[str, Any]) -> str:
    """A summary as plain text: a block for each metric, in it a line for each run."""
    runs = summary["runs"]
    width = 2 + max(len(name) for name in (*runs, *_metrics(runs)))
    lines = []
    for metric in _metrics(runs):
        lines += ["", f"{metric:<{width}}" + "".join(f"{column:>12}" for column in COLUMNS)]
        for name, run in runs.items():
            found = run["metrics"][metric]
            keys = ("last", "best", "best_step", "mean_last_tenth")
            lines.append(f"{name:<{width}}" + "".join(f"{_cell(found[key]):>12}" for key in keys))
    return "\n".join(lines[1:])


def _metrics(runs: Mapping[str, Any]) -> list[str]:
    return list(next(iter(runs.values()))["metrics"])


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6g}"
