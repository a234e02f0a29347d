"""All benchmarks that this machine can run in half an hour, and one report of them with plots.

    make bench
    python benchmarks/bench.py --out runs/bench --minutes 28
    python benchmarks/bench.py --only scaling hours
    python benchmarks/bench.py --quick

Every section is a script of this folder in a process of its own. Its limit is its share of the
minutes that are left, so that the whole ends in time; a section that fails or runs over its limit
is shown with its last lines, and the others still run. The exit status is 1 if one did not end
well. --quick makes everything tiny: it shows that all of it works, and its numbers say nothing.

report.html needs nothing beside it: plots are in it. What each script wrote and said (NAME.log)
stays in the folder. Before each section the load is measured for a second, while nothing of ours
runs; numbers whose spread, (p80 - p20) / p50, exceeds 10 %, or that rest on fewer than three
measurements, are marked unreliable. Predicted times and the paper's stand in columns of their own.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import importlib.util
import io
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from eager_baseline import (
    BASELINE,
    LEAST,
    UNRELIABLE,
    LoadMeter,
    is_reliable,
    multiplies_bf16,
)
from train_step import ROOT, describe_machine

MIB = 2**20
LAST_LINES = 15  # of a section that failed
BUSY = 0.10  # of the cores; others that take more make a machine loaded
LISTEN = 1.0  # seconds for which the load is measured
MARK = "unreliable"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: right; }
th { background: #f2f2f2; } td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: .7em; overflow-x: auto; }
.failed, .unreliable { color: #b00020; font-weight: bold; } .skipped { color: #666; }
.tiny { background: #fff3cd; padding: .6em; }
"""


@dataclass
class Table:
    """Cells as they are shown; the first row is the head."""

    head: list[str]
    body: list[list[str]]


@dataclass
class Found:
    """What a section's results say: a sentence, tables, plots as PNG, and what is unreliable."""

    says: str
    tables: list[Table]
    plots: list[bytes] = field(default_factory=list)
    unreliable: list[str] = field(default_factory=list)


@dataclass
class Section:
    """One script.

    arguments  of the script, its name first
    result     the file that `reader` reads
    seconds    what it takes on two slow cores: its share of the time
    note       what it leaves out
    skip       why it does not run at all
    """

    name: str
    title: str
    arguments: list[str]
    result: Path
    reader: Callable[[Path], Found]
    seconds: int
    note: str = ""
    skip: str = ""

    @property
    def command(self) -> str:
        """As a user would type it in the repository's folder."""
        return shlex.join(["python", f"benchmarks/{self.arguments[0]}", *self.arguments[1:]])


@dataclass
class Outcome:
    """What became of a section: `status` is done, failed or skipped; `reason` says why."""

    section: Section
    status: str
    reason: str = ""
    last: str = ""
    seconds: float = 0.0
    others_cores: float = 0.0
    load: float = 0.0
    found: Found | None = None


# Plots.


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def grouped_bars(
    axis: Any, groups: Sequence[str], bars: dict[str, Sequence[float | None]], form: str = "%.2f"
) -> None:
    """A bar of each kind at each group; None leaves its place empty."""
    width = 0.8 / max(len(bars), 1)
    for number, (kind, heights) in enumerate(bars.items()):
        places = [place + (number - (len(bars) - 1) / 2) * width for place in range(len(groups))]
        drawn = axis.bar(places, [math.nan if h is None else h for h in heights], width, label=kind)
        labels = ["" if h is None else form % h for h in heights]
        axis.bar_label(drawn, labels, fontsize=7, padding=2)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.margins(y=0.15)
    if len(bars) > 1:
        axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def mark(reliable: bool) -> str:
    return "" if reliable else MARK


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# Readers: a section's file in, what the report shows out.


def read_eager(path: Path) -> Found:
    """Of eager_baseline.py."""
    report = read_json(path)
    rows, options = report["rows"], report["options"]
    head = ["phase", "variant", "p50 s", "p20", "p80", "spread", "times faster", "peak MiB"]
    head += ["of eager's", ""]
    body = [
        [
            row["phase"], row["variant"], *(f"{row[key]:.3f}" for key in ("p50", "p20", "p80")),
            f"{row['spread']:.1%}", f"{row['faster']:.2f}", f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['memory']:.2f}", mark(row["reliable"]),
        ]
        for row in rows
    ]  # fmt: skip
    told = "; ".join(
        f"a {row['phase']} takes {row['p50']:.2f} s in {row['variant']}, {row['faster']:.2f} times "
        f"as fast as {BASELINE}, with {row['memory']:.2f} of its peak memory"
        for row in rows
        if row["variant"] != BASELINE
    )
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    by_place = {(row["phase"], row["variant"]): row for row in rows}
    figure = new_figure(13, 3.6)
    axes = figure.subplots(1, 3)
    for axis, (key, label, scale, form) in zip(
        axes,
        (
            ("p50", "seconds", 1, "%.2f"),
            ("faster", f"speed-up over {BASELINE}", 1, "%.2f"),
            ("peak_bytes", "peak memory, MiB", MIB, "%.0f"),
        ),
        strict=True,
    ):
        bars = {v: [by_place[p, v][key] / scale for p in phases] for v in variants}
        grouped_bars(axis, phases, bars, form)
        axis.set_ylabel(label)
    axes[1].axhline(1, color="grey", linewidth=0.8)
    figure.suptitle(
        f"{options['config']}, batch {options['batch']}, {options['image']} px", fontsize=10
    )
    bad = [f"{row['phase']} of {row['variant']}" for row in rows if not row["reliable"]]
    return Found(f"{options['config']}: {told}.", [Table(head, body)], [png(figure)], bad)


def read_hours(path: Path) -> Found:
    """Of gpu_hours.py: cases are TASK/MODEL, OFA's before UnIVAL's."""
    report = read_json(path)
    rows, options = report["rows"], report["options"]
    measured = [row["measured"]["metrics"] for row in rows]
    parts = list(
        dict.fromkeys(
            name.removeprefix("seconds.")
            for metrics in measured
            for name in metrics
            if name.startswith("seconds.") and not name.endswith("_both_ways")
        )
    )
    seconds = {
        part: [metrics.get(f"seconds.{part}", {}).get("p50", 0.0) for metrics in measured]
        for part in parts
    }
    head = ["case", "step s", "samples/s", "peak MiB", "spread", ""]
    body = [
        [
            row["case"], f"{metrics['step_seconds']['p50']:.2f}",
            f"{metrics['samples_per_second']['p50']:.2f}",
            f"{metrics['peak_bytes']['p50'] / MIB:.0f}", f"{row['measured']['spread']:.1%}",
            mark(row["measured"]["reliable"]),
        ]
        for row, metrics in zip(rows, measured, strict=True)
    ]  # fmt: skip
    by_part = Table(
        ["ms of a step, measured", *(row["case"] for row in rows)],
        [[part, *(f"{x * 1e3:.1f}" for x in seconds[part])] for part in parts],
    )
    ratios, says = hours_ratios(rows, options)
    tables = [ratios, Table(head, body), by_part]
    plots = [plot_parts([row["case"] for row in rows], seconds), plot_ratios(ratios)]
    bad = [row["case"] for row in rows if not row["measured"]["reliable"]]
    return Found(says, tables, plots, bad)


def hours_ratios(rows: Sequence[dict[str, Any]], options: dict[str, Any]) -> tuple[Table, str]:
    """OFA's hours of an epoch over UnIVAL's by task, by where they come from; and a sentence."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault(row["case"].split("/")[0], []).append(row)
    gpus = list(dict.fromkeys(gpu for row in rows for gpu in row["predicted"]))
    factors = options["batch_factor"], options["image_factor"]
    own = "" if factors == (1, 1) else " (batch / {}, side / {})".format(*factors)
    head = ["OFA / UnIVAL, hours of an epoch", f"measured, {options['device']}{own}"]
    head += [*(f"predicted, {gpu}" for gpu in gpus), "paper, MI250X", ""]
    body, told = [], []
    for task, pair in pairs.items():
        if len(pair) != 2:
            continue
        one, other = (row["measured"]["metrics"]["device_hours"]["p50"] for row in pair)
        cells = [task, f"{one / other:.2f}"]
        for gpu in gpus:
            one_gpu, other_gpu = (row["predicted"][gpu]["device_hours"]["likely"] for row in pair)
            cells.append(f"{one_gpu / other_gpu:.2f}")
        paper = [row["paper"] for row in pair]
        cells.append("" if None in paper else f"{paper[0] / paper[1]:.2f}")
        reliable = all(row["measured"]["reliable"] for row in pair)
        body.append([*cells, mark(reliable)])
        told.append(f"{cells[1]} ({task}; the paper's {cells[-1]})")
    scaled = "the whole batches and pictures"
    if own:
        scaled = (
            "batches of 1/{} and pictures of 1/{} of the side, of which only ratios compare with "
            "the paper's"
        ).format(*factors)
    says = f"Measured with {scaled}, OFA-base takes UnIVAL-base's time times {', '.join(told)}."
    return Table(head, body), says


def plot_parts(cases: Sequence[str], seconds: dict[str, list[float]]) -> bytes:
    """A step of every case, stacked by part."""
    from matplotlib import colormaps

    figure = new_figure(11, 0.5 * len(cases) + 2.2)
    axis, left = figure.subplots(), [0.0] * len(cases)
    modules = list(dict.fromkeys(part.removesuffix("_backward") for part in seconds))
    for part, widths in seconds.items():
        module = part.removesuffix("_backward")
        color = colormaps["tab20"](modules.index(module) % 20)
        hatch = "///" if part != module else None
        axis.barh(cases, widths, left=left, label=part, color=color, hatch=hatch, edgecolor="white")
        left = [x + y for x, y in zip(left, widths, strict=True)]
    axis.bar_label(axis.containers[-1], [f"{x:.2f} s" for x in left], padding=3, fontsize=8)
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a training step (hatched: backward)")
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
    )
    return png(figure)


def plot_ratios(table: Table) -> bytes:
    """Measured, predicted and the paper's ratios of every task."""
    figure = new_figure(8, 3.4)
    axis = figure.subplots()
    columns = range(1, len(table.head) - 1)
    bars = {
        table.head[i]: [float(row[i]) if row[i] else None for row in table.body] for i in columns
    }
    grouped_bars(axis, [row[0] for row in table.body], bars)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_ylabel("OFA's hours / UnIVAL's")
    return png(figure)


def read_scaling(path: Path) -> Found:
    """Of scaling.py."""
    report = read_json(path)
    rows, slopes = report["rows"], report["slopes"]
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sections.setdefault(row["section"], []).append(row)
    tables, plots = [], []
    verdicts = Table(
        ["attention's slope", "variant", "tokens", "fitted", "maths: at most", "verdict"],
        [
            [
                slope["quantity"], slope["variant"], f"{slope['from']} to {slope['to']}",
                f"{slope['slope']:.3f}",
                f"{slope['limit']:g} (+{slope['tolerance']:g})" if "limit" in slope else "",
                slope.get("verdict", ""),
            ]
            for slope in slopes
        ],
    )  # fmt: skip
    if slopes:
        tables.append(verdicts)
    for name, own in sections.items():
        tables.append(scaling_table(name, own))
    if "attention" in sections:
        plots.append(plot_attention(sections["attention"], slopes))
    if sections.keys() - {"attention"}:
        plots.append(plot_passes(sections, report["options"]))
    told = [
        f"{slope['quantity']} grows with the power {slope['slope']:.2f} of the tokens "
        f"(at most {slope['limit']:g}: {slope['verdict']})"
        for slope in slopes
        if "limit" in slope
    ]
    for row in sections.get("ranks", []):
        if row["value"] > 1 and "efficiency" in row:
            told.append(
                f"{row['value']} ranks on the same cores make {row['efficiency']:.2f} times the "
                f"samples a second of one{'' if row['reliable'] else ' (unreliable)'}"
            )
    bad = [f"{r['section']} {r['value']} {r['variant']}" for r in rows if not r["reliable"]]
    return Found(f"{'; '.join(told) or 'No slope was measured'}.", tables, plots, bad)


def scaling_table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A section's rows, with the columns that any of them has."""
    wanted = {
        "ratio": ("ratio", "{:.2f}", 1),
        "slope": ("slope", "{:.2f}", 1),
        "saved_bytes": ("saved MiB", "{:.1f}", MIB),
        "peak_bytes": ("peak MiB", "{:.1f}", MIB),
        "samples_per_second": ("samples/s", "{:.2f}", 1),
        "threads": ("threads a rank", "{:.0f}", 1),
        "efficiency": ("efficiency", "{:.2f}", 1),
    }
    shown = {key: how for key, how in wanted.items() if any(key in row for row in rows)}
    first = {"attention": "tokens of attention", "batch": "rows of a pass"}
    first |= {"text": "tokens of text of a pass", "ranks": "ranks"}
    head = [first.get(name, name), "variant", "p50 ms", "spread"]
    head += [title for title, _, _ in shown.values()]
    body = []
    for row in rows:
        cells = [str(row["value"]), row["variant"], f"{row['p50'] * 1e3:.2f}"]
        cells.append(f"{row['spread']:.1%}")
        for key, (_, form, unit) in shown.items():
            cells.append(form.format(row[key] / unit) if key in row else "")
        body.append([*cells, mark(row["reliable"])])
    return Table([*head, ""], body)


def plot_attention(rows: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]]) -> bytes:
    """Time and memory over tokens, both axes logarithmic, with the fitted lines."""
    figure = new_figure(13, 4)
    axes = figure.subplots(1, 3)
    panels = (
        ("time", "p50", "ms", 1e3),
        ("saved", "saved_bytes", "MiB saved for backward", 1 / MIB),
    )
    panels += (("peak", "peak_bytes", "MiB at the peak", 1 / MIB),)
    for axis, (quantity, key, label, scale) in zip(axes, panels, strict=True):
        for number, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            own = [row for row in rows if row["variant"] == variant]
            x, y = [row["value"] for row in own], [row[key] * scale for row in own]
            axis.plot(x, y, "o", color=f"C{number}", label=variant)
            for slope in slopes:
                if (slope["variant"], slope["quantity"]) != (variant, quantity):
                    continue
                ends = [slope["from"], slope["to"]]
                fitted = [(a, b) for a, b in zip(x, y, strict=True) if ends[0] <= a <= ends[1]]
                middle = [statistics.fmean(math.log(p[i]) for p in fitted) for i in (0, 1)]
                line = [
                    math.exp(middle[1] + slope["slope"] * (math.log(e) - middle[0])) for e in ends
                ]
                axis.plot(ends, line, color=f"C{number}", label=f"slope {slope['slope']:.2f}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        ticks = sorted({row["value"] for row in rows})
        axis.set_xticks(ticks, [str(x) for x in ticks], fontsize=8)
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("encoder attention of one layer, forward and backward", fontsize=10)
    return png(figure)


def plot_passes(sections: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> bytes:
    """Samples a second and memory over rows, time over text, samples a second over ranks."""
    figure = new_figure(13, 3.6)
    panels: list[tuple[str, str, str, float, str]] = [
        ("batch", "samples_per_second", "samples/s", 1, "rows of a pass"),
        ("batch", "peak_bytes", "peak memory, MiB", MIB, "rows of a pass"),
        ("text", "p50", "seconds of a pass", 1, "tokens of text"),
        ("ranks", "samples_per_second", "samples/s", 1, "ranks on the same cores"),
    ]
    panels = [panel for panel in panels if panel[0] in sections]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (section, key, label, unit, below) in zip(axes, panels, strict=True):
        rows = sections[section]
        heights = [row[key] / unit for row in rows]
        form = "%.0f" if max(heights) >= 100 else "%.2f"
        grouped_bars(axis, [str(row["value"]) for row in rows], {"": heights}, form)
        axis.set(xlabel=below, ylabel=label)
    figure.suptitle(f"{options['config']} at {options['image']} px", fontsize=10)
    return png(figure)


def read_kernels(path: Path) -> Found:
    """Of kernels.py; no speed-up of operators whose tests did not run or failed."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [row for row in csv.DictReader(file) if row["kernel_operation_mode"] == "full"]
    times = [row for row in lines if row["metric_name"] == "speed"]
    memory = {place(row): row for row in lines if row["metric_name"] != "speed"}
    eager = {place(row)[:2]: row for row in times if row["kernel_provider"] == "eager"}
    head = [
        "kernel",
        "shape",
        "provider",
        "ms, forward + backward",
        "spread",
        "times eager's speed",
    ]
    head += ["MiB", ""]
    body, bad = [], []
    bars: dict[str, dict[tuple[str, str], float]] = {}
    for row in times:
        extra = json.loads(row["extra_benchmark_config_str"])
        low, middle, high = (float(row[f"y_value_{share}"]) for share in (20, 50, 80))
        spread, base = (high - low) / middle, eager.get(place(row)[:2])
        reliable = extra["repeats"] >= LEAST and spread <= UNRELIABLE
        cells = [*place(row), f"{middle:.2f}", f"{spread:.1%}", "", ""]
        if base is not None and not extra["note"].startswith("tests "):
            faster = float(base["y_value_50"]) / middle
            cells[5] = f"{faster:.2f}"
            if row["kernel_provider"] != "eager":
                bars.setdefault(row["kernel_provider"], {})[place(row)[:2]] = faster
        if place(row) in memory:
            cells[6] = f"{float(memory[place(row)]['y_value_50']):.1f}"
        body.append([*cells, mark(reliable)])
        if not reliable:
            bad.append(" ".join(place(row)))
    plots = [plot_speedups(list(eager), bars)] if bars else []
    own = [f"{kernel} of {shape} {x:.2f}" for (kernel, shape), x in bars.get("unival", {}).items()]
    says = f"Times as fast as the released formulation: {', '.join(own)}."
    if not own:
        says = "No speed-up: the operators' tests did not run or failed, or nothing was compared."
    return Found(says, [Table(head, body)], plots, bad)


def place(row: dict[str, str]) -> tuple[str, str, str]:
    return row["kernel_name"], row["x_value"], row["kernel_provider"]


def plot_speedups(
    shapes: Sequence[tuple[str, str]], bars: dict[str, dict[tuple[str, str], float]]
) -> bytes:
    figure = new_figure(13, 3.8)
    axis = figure.subplots()
    heights = {name: [found.get(shape) for shape in shapes] for name, found in bars.items()}
    grouped_bars(axis, ["\n".join(shape) for shape in shapes], heights, "%.1f")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_ylabel("speed-up over eager")
    return png(figure)


def read_decoding(path: Path) -> Found:
    """Of decoding.py."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    head = ["section", "setting", "loader", "per second", "per second and core", "spread", ""]
    body, bad = [], []
    for row in rows:
        spread, memory = float(row["spread"]), row["section"] == "memory"
        reliable = memory or (spread <= UNRELIABLE and int(row["rounds"]) >= LEAST)
        cells = [row["section"], row["setting"], row["loader"]]
        cells += [f"{float(row['rate']):.1f} {row['unit']}s", f"{float(row['rate_per_core']):.1f}"]
        body.append([*cells, f"{spread:.1%}", mark(reliable)])
        if not reliable:
            bad.append(f"{row['section']} by {row['loader']}")
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["section"] != "memory":
            groups.setdefault(f"{row['section']}: {row['setting']}", []).append(row)
    told = [
        f"{title}: {best['loader']} is the fastest with {float(best['rate']):.0f} a second"
        for title, best in (
            (title, max(own, key=lambda row: float(row["rate"]))) for title, own in groups.items()
        )
    ]
    told += [
        f"memory: resident memory stays within {float(row['spread']):.1%} over {row['samples']} "
        "samples"
        for row in rows
        if row["section"] == "memory"
    ]
    plots = [plot_decoding(groups)] if groups else []
    return Found(f"{'; '.join(told)}.", [Table(head, body)], plots, bad)


def plot_decoding(groups: dict[str, list[dict[str, str]]]) -> bytes:
    """Bars of the rates, a panel for each section and setting."""
    count = sum(len(own) for own in groups.values())
    figure = new_figure(10, 0.35 * count + 1.0 * len(groups))
    heights = [len(own) for own in groups.values()]
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, own) in zip(axes, groups.items(), strict=True):
        bars = axis.barh([row["loader"] for row in own], [float(row["rate"]) for row in own])
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{title}, {own[0]['unit']}s a second", fontsize=9)
    return png(figure)


def read_generation(path: Path) -> Found:
    """Of generation.py."""
    report = read_json(path)
    rates, rounds = report["tokens_per_second"], report["seconds"]
    body = [
        [name, f"{statistics.median(found):.3f}", f"{rates[name]:.2f}", mark(is_reliable(found))]
        for name, found in rounds.items()
    ]
    figure = new_figure(6, 3.2)
    axis = figure.subplots()
    axis.bar_label(axis.bar(list(rates), list(rates.values())), fmt="%.2f", padding=2)
    axis.margins(y=0.15)
    axis.set_ylabel("tokens/s")
    says = (
        f"Beam search that keeps the encoder's keys is {report['speedup']:.2f} times as fast as "
        f"one that recomputes them; a trie costs {report['trie_cost']:+.1%}."
    )
    bad = [name for name, found in rounds.items() if not is_reliable(found)]
    return Found(says, [Table(["search", "median s", "tokens/s", ""], body)], [png(figure)], bad)


def read_zero(path: Path) -> Found:
    """Of zero_memory.py."""
    report = read_json(path)
    names = ("parameters", "gradients", "optimizer")
    head = ["precision, ranks, stage"]
    head += [title for name in names for title in (f"{name} MiB", "formula", "off")]
    body, groups = [], []
    found: dict[str, list[float]] = {name: [] for name in names}
    wanted: dict[str, list[float]] = {name: [] for name in names}
    for result in report["results"]:
        groups.append(f"{result['precision']}, {result['ranks']}, {result['stage']}")
        cells = [groups[-1]]
        for name in names:
            expected, off = result["formula"][name] / MIB, result["deviation"][name]
            wanted[name].append(expected)
            found[name].append(expected * (1 + off))
            cells += [f"{expected * (1 + off):.1f}", f"{expected:.1f}", f"{off:+.1%}"]
        body.append(cells)
    figure = new_figure(max(6, 1.3 * len(groups)), 3.6)
    axis, bottom = figure.subplots(), [[0.0] * len(groups) for _ in range(2)]
    for color, name in enumerate(names):
        for side, (heights, alpha) in enumerate(((found[name], 1.0), (wanted[name], 0.45))):
            places = [x + 0.4 * side - 0.2 for x in range(len(groups))]
            label = f"{name}{', formula' if side else ''}"
            style = {"color": f"C{color}", "alpha": alpha, "label": label}
            axis.bar(places, heights, 0.38, bottom=bottom[side], **style)
            bottom[side] = [x + y for x, y in zip(bottom[side], heights, strict=True)]
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.set(xlabel="precision, ranks, ZeRO stage", ylabel="MiB a rank")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    out = report["out_of_bounds"]
    says = f"Live tensors of a rank are within {report['bound']:.0%} of the formula of ZeRO."
    return Found("; ".join(out) or says, [Table(head, body)], [png(figure)])


# What runs.


def sections(folder: Path, device: str, quick: bool) -> list[Section]:
    """All, in the order in which they run; `folder` as it stands in commands."""
    threads = ["--threads", str(torch.get_num_threads())]
    gpu = device == "cuda"
    on_gpu = ["--device", "cuda"] if gpu else []
    note = ""
    if not multiplies_bf16(torch.device(device)):
        note = f"bf16 is left out: the {device} here has no instructions for it."
    hours = ["--cases"]
    hours += [
        f"{t}/{m}" for t in ("coco", "vqav2", "refcocoplus") for m in ("ofa_base", "unival_base")
    ]
    hours += ["--precision", "bf16"] if gpu else ["--batch-factor", "4", "--image-factor", "2"]
    sizes = {
        "eager": ["--steps", "3", "--warmup", "1"],
        "hours": [*hours, "--steps", "3", "--warmup", "1"],
        "scaling": ["--repeats", "3"],
        "kernels": ["--ops", "attention", "layer", "loss", "--repeats", "9"],
        "decoding": ["--only", "images", "memory", "--rounds", "3", "--samples", "3000"],
        "generation": ["--batch", "4", "--steps", "8", "--repeats", "3"],
        "zero": ["--ranks", "2"],
    }
    models, skip = {"unival": "unival_base", "ofa": "ofa_base"}, ""
    if quick:
        sizes, skip = QUICK, "--quick measures one model"
        models["unival"] = "unival_tiny"
    dtype = ["--dtype", "bf16"] if gpu else []

    def eager(name: str, seconds: int) -> Section:
        out, model = folder / f"eager_{name}", models[name]
        arguments = ["eager_baseline.py", "--config", model]
        arguments += [*on_gpu, *threads, *sizes["eager"], "--out", str(out)]
        title = f"{model}: the released formulation and ours"
        result = out.with_suffix(".json")
        return Section(f"eager_{name}", title, arguments, result, read_eager, seconds, note)

    def section(
        name: str,
        title: str,
        script: str,
        options: list[str],
        result: str,
        reader: Any,
        seconds: int,
    ) -> Section:
        arguments = [script, *options, *sizes[name], "--out", str(folder / name)]
        return Section(name, title, arguments, folder / result, reader, seconds)

    ofa = eager("ofa", 340)
    ofa.skip = skip
    found = [
        eager("unival", 195),
        ofa,
        section(
            "hours", "OFA against UnIVAL: a step by part, and device-hours", "gpu_hours.py",
            [*on_gpu, *threads], "hours.json", read_hours, 330,
        ),
        section(
            "scaling", "Scaling with tokens, rows and ranks", "scaling.py", [*on_gpu, *dtype],
            "scaling.json", read_scaling, 210,
        ),
        section(
            "kernels", "Operators beside other implementations", "kernels.py", [*on_gpu, *dtype],
            "kernels/kernels.csv", read_kernels, 110,
        ),
        section(
            "decoding", "Media decoding", "decoding.py", [], "decoding/decoding.csv",
            read_decoding, 110,
        ),
        section(
            "generation", "Beam search", "generation.py", [], "generation/generation.json",
            read_generation, 80,
        ),
        section(
            "zero", "Memory of a rank under ZeRO", "zero_memory.py", [], "zero.json", read_zero, 100
        ),
    ]  # fmt: skip
    return [replace(one, seconds=QUICK_SECONDS) for one in found] if quick else found


QUICK_SECONDS = 20
QUICK = {
    "eager": ["--batch", "1", "--image", "64", "--steps", "1", "--warmup", "0"],
    "hours": [
        "--cases", "coco/ofa_base", "coco/unival_base", "--model", "unival_tiny",
        "--batch-factor", "16", "--image-factor", "5", "--steps", "1", "--warmup", "0",
    ],
    "scaling": [
        "--config", "unival_tiny", "--image", "64", "--tokens", "64", "128", "256", "512",
        "--batches", "1", "2", "--texts", "8", "16", "--rows", "1", "--repeats", "1",
    ],
    "kernels": ["--ops", "layer_norm", "--repeats", "1", "--skip-tests"],
    "decoding": ["--only", "sounds", "memory", "--rounds", "1", "--samples", "1000"],
    "generation": [
        "--config", "unival_tiny", "--batch", "1", "--image", "64", "--beams", "2", "--steps", "2",
        "--answers", "10", "--repeats", "1",
    ],
    "zero": ["--ranks", "1", "--stages", "0", "--precision", "fp32"],
}  # fmt: skip


def listen() -> float:
    """Cores that other programs keep busy for a second in which nothing of ours runs."""
    meter = LoadMeter()
    meter.begin()
    time.sleep(LISTEN)
    meter.end(0.0)
    return meter.read()["others_cores"]


def execute(section: Section, limit: float, log: Path) -> str:
    """Run a section's script; why it did not end well, or nothing."""
    script, *options = section.arguments
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {clock(limit)}"
        finally:
            end_group(process)
    return f"exit status {status}" if status else ""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a script and the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        time.sleep(0.5)
    process.wait()


def run_section(section: Section, limit: float, folder: Path) -> Outcome:
    """Run it and read what it wrote; results of an earlier run are removed first."""
    log, result = folder / f"{section.name}.log", ROOT / section.result
    result.unlink(missing_ok=True)
    outcome = Outcome(section, "done", others_cores=listen())
    start = time.monotonic()
    outcome.reason = execute(section, limit, log)
    outcome.seconds, outcome.load = time.monotonic() - start, os.getloadavg()[0]
    if result.is_file():
        try:
            outcome.found = section.reader(result)
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            told = f"{section.result} cannot be read: {type(error).__name__}: {error}"
            outcome.reason = "; ".join(reason for reason in (outcome.reason, told) if reason)
    elif not outcome.reason:
        outcome.reason = f"it wrote no {section.result}"
    if outcome.reason:
        outcome.status = "failed"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        outcome.last = "\n".join(lines[-LAST_LINES:])
    return outcome


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run_all(chosen: Sequence[Section], minutes: float, folder: Path) -> list[Outcome]:
    """Sections in turn, each with its share of the time that is left."""
    start, outcomes = time.monotonic(), []
    for number, section in enumerate(chosen, start=1):
        name = f"[{number} of {len(chosen)}] {section.name}"
        if section.skip:
            print(f"{name}: skipped: {section.skip}", flush=True)
            outcomes.append(Outcome(section, "skipped", section.skip))
            continue
        waiting = sum(x.seconds for x in chosen[number - 1 :] if not x.skip)
        left = max(0.0, 60 * minutes - (time.monotonic() - start))
        limit = left * section.seconds / waiting
        print(
            f"{name}: begins after {clock(time.monotonic() - start)}, limit {clock(limit)}; "
            f"about {clock(min(left, waiting))} to go with the rest; {folder / section.name}.log",
            flush=True,
        )
        outcome = run_section(section, limit, folder)
        print(f"{name}: {outcome.status} in {clock(outcome.seconds)} {outcome.reason}", flush=True)
        outcomes.append(outcome)
    return outcomes


# The report.


def render(outcomes: Sequence[Outcome], machine: dict[str, Any], command: str, quick: bool) -> str:
    """The report as HTML; all that is not ours to write is escaped."""
    title = "Benchmarks of UnIVAL" + (" - TINY SIZES, to see that it works" if quick else "")
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
    ]
    if quick:
        parts.append('<p class="tiny">Sizes are tiny (--quick): these numbers say nothing.</p>')
    parts.append(f"<p>{escape(', '.join(f'{key} {x}' for key, x in machine.items()))}</p>")
    parts.append(f"<pre>{escape(command)}</pre>")
    parts.append(html_table(overview(outcomes, machine)))
    for outcome in outcomes:
        parts += render_section(outcome)
    return "\n".join([*parts, "</body></html>", ""])


def overview(outcomes: Sequence[Outcome], machine: dict[str, Any]) -> Table:
    """What ran, how long, and beside what."""
    head = ["section", "result", "time", "cores of others before", "load after", "unreliable", ""]
    body = []
    for outcome in outcomes:
        cells = [outcome.section.name, outcome.status]
        if outcome.status == "skipped":
            body.append([*cells, "", "", "", "", outcome.reason])
            continue
        bad = len(outcome.found.unreliable) if outcome.found else 0
        busy = outcome.others_cores > BUSY * machine["cores"]
        cells += [clock(outcome.seconds), f"{outcome.others_cores:.2f}", f"{outcome.load:.2f}"]
        cells += [
            str(bad or ""),
            "; ".join(x for x in ("loaded machine" * busy, outcome.reason) if x),
        ]
        body.append(cells)
    return Table(head, body)


def render_section(outcome: Outcome) -> list[str]:
    """A section: what it shows, its command, what is wrong with it, tables and plots."""
    section, found = outcome.section, outcome.found
    parts = [f'<h2 id="{escape(section.name)}">{escape(section.title)}</h2>']
    if outcome.status == "skipped":
        return [*parts, f'<p class="skipped">Skipped: {escape(outcome.reason)}</p>']
    if found is not None:
        parts.append(f"<p>{escape(found.says)}</p>")
    parts.append(f"<pre>{escape(section.command)}</pre>")
    if section.note:
        parts.append(f"<p>{escape(section.note)}</p>")
    if outcome.status == "failed":
        parts.append(f'<p class="failed">Failed: {escape(outcome.reason)}. Its last lines:</p>')
        parts.append(f"<pre>{escape(outcome.last)}</pre>")
    if found is None:
        return parts
    if found.unreliable:
        told = f"Unreliable (spread above {UNRELIABLE:.0%}, or fewer than {LEAST} measurements): "
        parts.append(f'<p class="unreliable">{told}{escape(", ".join(found.unreliable))}</p>')
    for plot in found.plots:
        data = base64.b64encode(plot).decode("ascii")
        parts.append(
            f'<p><img alt="{escape(section.title)}" src="data:image/png;base64,{data}"></p>'
        )
    return parts + [html_table(table) for table in found.tables]


def html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    lines = [f"<table><tr>{head}</tr>"]
    for row in table.body:
        cells = (
            f'<td class="{cell}">{cell}</td>'
            if cell in (MARK, "failed", "skipped")
            else f"<td>{escape(cell)}</td>"
            for cell in row
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def escape(text: str) -> str:
    return html.escape(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, and `sections` that are asked for; ends with status 2 where it cannot be done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="(runs/bench)")
    parser.add_argument("--minutes", type=float, default=28, help="of all sections (28)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some sections")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error("--minutes must be above 0")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the report needs matplotlib: pip install -e '.[test]'")
    args.out = args.out.resolve()
    shown = args.out.relative_to(ROOT) if args.out.is_relative_to(ROOT) else args.out
    known = sections(shown, "cuda" if torch.cuda.is_available() else "cpu", args.quick)
    names = [section.name for section in known]
    for name in args.only or []:
        if name not in names:
            parser.error(f"--only {name}: sections are {', '.join(names)}")
    args.sections = [x for x in known if args.only is None or x.name in args.only]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and write the report."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the section that runs
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device) | {"others_cores": listen()}
    print(", ".join(f"{key} {x}" for key, x in machine.items()), flush=True)
    outcomes = run_all(args.sections, args.minutes, args.out)
    machine["load_after"] = round(os.getloadavg()[0], 2)
    command = shlex.join(["python", "benchmarks/bench.py", *argv])
    path = args.out / "report.html"
    path.write_text(render(outcomes, machine, command, args.quick), encoding="utf-8")
    print(f"{path}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
