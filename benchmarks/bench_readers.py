"""What the benchmarks wrote, as tables, sentences and plots of the report that bench.py makes."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eager_baseline import BASELINE, LEAST, UNRELIABLE, is_reliable

MIB = 2**20
MARK = "unreliable"


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
