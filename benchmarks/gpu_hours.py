"""Device-hours of an epoch: the paper's tables 18 and 2 and its pretraining stages.

    python benchmarks/gpu_hours.py --device cuda --precision bf16 --out runs/gpu_hours
    python benchmarks/gpu_hours.py --device cpu --out runs/hours

OFA-base (its ResNet ends at stride 16) and UnIVAL-base take the same kernels, data path and recipe:
the engine of training (DeepSpeed, as the run config says) on batches that the loader of training
decodes from the files of samples/ beside the step, with random words of usual lengths. Every case
is a process of its own on one device; hours are the examples of an epoch over examples a second.
On a CPU, fewer media of a pass and smaller pictures are measured (4 and 2 times, or what is asked
for), by factors that stand in every row: such hours are those of the smaller work, and only ratios
compare with the paper's. The update takes as long for few rows as for many: the smaller the batch,
the nearer ratios come to 1.

At every moment of a step one part has the time, so parts add up to the step. Backward passes are
told apart by the gradients' arrival at the borders of modules: `gradients` is what DeepSpeed does
with them after the last. On a GPU borders are events that nobody waits for until the end.
`communication` is the ranks' agreement about a step; one device exchanges no gradients. Media
encoders have their own parts, projections belong to `lm_encoder`.

Hours without a device are predicted by unival.planning for the whole work, on as many GPUs as share
it, and stand in columns of their own. `mfu` is over the datasheet's peak; on a CPU over the fastest
of some large matrix products. A row whose spread, (p80 - p20) / p50, exceeds 10 % is unreliable,
and so is one of fewer than three steps.
The paper's GPUs are GCDs of MI250X with fp16.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from eager_baseline import LoadMeter, is_reliable, peak_memory, quantiles
from hours_cases import (
    MODELS,
    TABLE_2,
    TABLE_2_BATCH,
    TABLE_2_MEMORY,
    TASKS,
    Case,
    Decoded,
    Scale,
    cases,
    config_of,
    load_run,
    works,
)
from progress import Progress
from torch import Tensor, nn
from train_step import ROOT, describe_machine, matmul_peak

from unival.data.batch import MEDIUM_KEYS
from unival.model.modeling import UnivalForConditionalGeneration
from unival.planning.counts import DTYPES
from unival.planning.plan import Options, plan
from unival.training.engine import Engine, init_distributed
from unival.training.throughput import peak_flops, step_flops

ENCODERS = tuple(f"{medium}_encoder" for medium in MEDIUM_KEYS)
MODULES = (*ENCODERS, "lm_encoder", "lm_decoder", "loss")
PARTS = ("decode_wait", "transfer", *MODULES, *(f"{name}_backward" for name in MODULES))
PARTS += ("gradients", "optimizer", "communication", "other")
# What the engine's own parts are here.
ENGINE_PARTS = {
    "agree": "communication",
    "forward": "transfer",
    "backward": "loss_backward",
    "average": "optimizer",
}
COLUMNS = ("case", "table", "model", "device", "precision", "batch_factor", "image_factor")
COLUMNS += ("metric", "unit", "measured_p50", "measured_p20", "measured_p80", "reliable")
COLUMNS += ("predicted", "predicted_low", "predicted_high", "predicted_for", "paper")
COLUMNS += ("load_before", "load_after", "others_cores", "threads", "torch", "date")


class Timeline:
    """Whose the time is: a mark gives it to a part until the next mark. Takes the place of the
    engine's PartClock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.steps: list[list[tuple[str, Any]]] = []

    def begin(self) -> None:
        """A step begins; what came before the first is forgotten."""
        self.end()
        self.steps.append([])

    def end(self) -> None:
        """The last step ends."""
        if self.steps:
            self.mark("end")

    def mark(self, name: str, *_: object) -> None:
        """From now on the time is of this part."""
        if not self.steps:
            return
        if self.cuda:
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self.steps[-1].append((name, stamp))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the engine's, which marks inside divide."""
        self.mark(ENGINE_PARTS.get(name, name))
        yield
        self.mark("other")

    def read(self) -> list[dict[str, float]]:
        """Seconds by part of every step that has ended; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        found = []
        for stamps in self.steps:
            seconds: dict[str, float] = defaultdict(float)
            for (name, begin), (_, end) in itertools.pairwise(stamps):
                between = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
                seconds[name] += between
            found.append(dict(seconds))
        return found


def watch(model: UnivalForConditionalGeneration, timeline: Timeline) -> None:
    """Mark the borders of the modules, forward and backward.

    A gradient that arrives at a module's output begins the module's backward pass. Text embeddings,
    the decoder's too, belong to the encoder, whose backward pass they end after the medium's.
    """
    encoder, decoder = model.encoder, model.decoder

    def arrives(tensor: Tensor, part: str) -> None:
        if tensor.requires_grad:
            tensor.register_hook(partial(_mark_gradient, timeline, part))

    def encoded(_: nn.Module, __: Any, output: Any) -> None:
        timeline.mark("transfer")
        arrives(output.last_hidden_state, "lm_encoder_backward")

    def decoded(_: nn.Module, __: Any, output: Any) -> None:
        timeline.mark("loss")
        arrives(output.last_hidden_state, "lm_decoder_backward")

    def medium(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        timeline.mark("lm_encoder")
        arrives(output, f"{name}_backward")

    for module in (encoder.embed_tokens, encoder):
        module.register_forward_pre_hook(lambda *_: timeline.mark("lm_encoder"))
    encoder.register_forward_hook(encoded)
    decoder.register_forward_pre_hook(lambda *_: timeline.mark("lm_decoder"))
    decoder.register_forward_hook(decoded)
    for name in ENCODERS:
        module = getattr(encoder, name, None)
        if module is None:
            continue
        module.register_forward_pre_hook(lambda *_, name=name: timeline.mark(name))
        module.register_forward_hook(partial(medium, name))
        first = next(module.parameters())
        if first.requires_grad:
            first.register_post_accumulate_grad_hook(partial(timeline.mark, "lm_encoder_backward"))


def _mark_gradient(timeline: Timeline, part: str, _: Tensor) -> None:
    timeline.mark(part)
    if part == "lm_decoder_backward":  # the first border of a backward pass: know its end too
        at_end = torch.autograd.Variable._execution_engine.queue_callback
        at_end(partial(timeline.mark, "gradients"))


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """A case on this device: what a step takes, by part."""
    meter, world = LoadMeter(), init_distributed()
    if world.size > 1:
        raise ValueError(f"{world.size} ranks; device-hours are measured on one")
    scale = Scale(args.batch_factor, args.image_factor)
    run = load_run(case, scale, args.model, args.precision)
    run.loading.threads = run.loading.workers = max(1, min(4, (os.cpu_count() or 1) // 2))
    passes, stage, config = works(case, run, scale), run.stages[0], config_of(run)
    torch.manual_seed(0)
    engine = Engine(UnivalForConditionalGeneration(config), run, stage, world)
    timeline = Timeline(engine.device)
    engine.clock = timeline  # type: ignore[assignment]
    watch(engine.model, timeline)
    batches, flops = iter(Decoded(run, passes)), 0
    for number in range(args.warmup + args.steps):
        if number == args.warmup:
            meter.begin()
            own = _processor_seconds()
        if number >= args.warmup:
            timeline.begin()
        timeline.mark("decode_wait")
        found = next(batches)
        timeline.mark("other")
        flops = step_flops(config, found)
        engine.step(found, number + 1)
    timeline.end()
    parts = timeline.read()
    meter.end(_processor_seconds() - own)
    batches.close()  # type: ignore[attr-defined]
    memory = peak_memory(engine.device)  # before the peak's matrices are made
    peak = peak_flops(engine.device, args.precision)
    if engine.device.type == "cpu":
        peak = matmul_peak(engine.device, DTYPES[args.precision])["flops_per_second"]
    machine = describe_machine(engine.device) | meter.read()
    return {
        "examples": sum(work.rows for _, work in passes),
        "passes": [f"{work.media} x {work.medium} {work.media_size}" for _, work in passes],
        "steps": parts,
        "flops": flops,
        "peak_flops": peak,
        "peak_bytes": memory,
        "machine": machine,
    }


def _processor_seconds() -> float:
    """Of this process and of those that decode for it."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def summarize(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a measured case: p20, p50 and p80 by name, and whether they are reliable."""
    seconds = [sum(parts.values()) for parts in found["steps"]]
    step = quantiles(seconds)
    rates = {key: found["examples"] / step[key] for key in ("p20", "p50", "p80")}
    told: dict[str, dict[str, float]] = {
        "step_seconds": step,
        "samples_per_second": {"p20": rates["p80"], "p50": rates["p50"], "p80": rates["p20"]},
        "device_hours": {key: case.examples / rate / 3600 for key, rate in rates.items()},
        "peak_bytes": {"p50": found["peak_bytes"]},
    }
    if found["peak_flops"]:
        told["mfu"] = {"p50": found["flops"] / step["p50"] / found["peak_flops"]}
    names = [name for name in PARTS if any(name in parts for parts in found["steps"])]
    for name in names:
        values = [parts.get(name, 0.0) for parts in found["steps"]]
        told[f"seconds.{name}"] = {"p50": statistics.median(values)}
    for name in MODULES:
        if name in names:
            ways = (name, f"{name}_backward")
            values = [sum(parts.get(way, 0.0) for way in ways) for parts in found["steps"]]
            told[f"seconds.{name}_both_ways"] = {"p50": statistics.median(values)}
    return {"metrics": told, "reliable": is_reliable(seconds), "spread": step["spread"]}


def predict(case: Case, gpu: str, model: str | None = None) -> dict[str, dict[str, float]]:
    """Predicted metrics of the whole work on the case's GPUs of a kind: likely, low and high."""
    options = Options(text=case.text, target=case.target)
    run = load_run(case, Scale(), model)
    stage = plan(run, f"{case.gpus}x{gpu}", None, options).stages[0]
    rate = stage.samples_per_second
    hours = case.examples * case.gpus / 3600
    parts: dict[str, float] = defaultdict(float)
    for name, seconds in stage.parts.items():
        if name in MODULES or name == "projection":
            name = f"{'lm_encoder' if name == 'projection' else name}_both_ways"
        parts[f"seconds.{name}"] += seconds
    step = stage.step
    return {
        "step_seconds": {"likely": step.seconds, "low": step.low, "high": step.high},
        "samples_per_second": {
            "likely": rate.seconds / case.gpus,
            "low": rate.low / case.gpus,
            "high": rate.high / case.gpus,
        },
        "device_hours": {
            "likely": hours / rate.seconds,
            "low": hours / max(rate.low, rate.high),
            "high": hours / min(rate.low, rate.high),
        },
        "peak_bytes": {"likely": stage.memory[stage.zero_stage].total},
        **{name: {"likely": seconds} for name, seconds in parts.items()},
    }


def run_case(case: Case, argv: Sequence[str]) -> dict[str, Any]:
    """A case in a process of its own.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, *argv, "--worker", case.name, "--answer", str(answer)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not answer.exists():
            last = done.stderr.strip().splitlines()[-12:]
            raise RuntimeError(f"{case.name}: status {done.returncode}\n" + "\n".join(last))
        return json.loads(answer.read_text(encoding="utf-8"))


def collect(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Measure and predict all cases that are asked for."""
    rows, progress = [], Progress(len(chosen(args)))
    for case in chosen(args):
        run = load_run(case, Scale())
        whole = works(case, run, Scale())
        row: dict[str, Any] = {"case": case.name, "table": case.table, "gpus": case.gpus}
        row |= {"model": args.model or case.model, "paper": case.paper, "examples": case.examples}
        row |= {"step_examples": case.gpus * sum(work.rows for _, work in whole)}
        row |= {"batch_factor": args.batch_factor, "image_factor": args.image_factor}
        row["precision"] = run.precision  # predicted for; measured in the command line's
        if not args.predict_only:
            found = run_case(case, argv)
            row["measured"] = summarize(case, found) | {
                key: found[key] for key in ("machine", "passes", "flops", "peak_flops")
            }
        row["predicted"] = {gpu: predict(case, gpu, args.model) for gpu in args.predict}
        rows.append(row)
        progress.line(_said(row))
    return {
        "command": shlex.join(["python", "benchmarks/gpu_hours.py", *argv]),
        "options": {
            key: str(x) if isinstance(x, Path) else x
            for key, x in vars(args).items()
            if key not in ("worker", "answer")
        },
        "rows": rows,
    }


def _said(row: dict[str, Any]) -> str:
    if "measured" not in row:
        return f"{row['case']}: predicted"
    measured = row["measured"]
    load, rate = measured["machine"], measured["metrics"]["samples_per_second"]["p50"]
    return (
        f"{row['case']}: {rate:.2f} samples/s, spread {measured['spread']:.1%}, load "
        f"{load['load_after']}, others keep {load['others_cores']} cores busy"
    )


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases of the command line; all without --cases."""
    known = cases()
    return [known[name] for name in args.cases or known]


def csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every case, metric and GPU that is predicted for."""
    found = []
    for row in report["rows"]:
        measured = row.get("measured", {})
        metrics = measured.get("metrics", {})
        machine = measured.get("machine", {})
        case = {name: row[name] for name in ("case", "table", "model")}
        own = {name: machine.get(name, "") for name in COLUMNS} | case
        own |= {name: row[name] for name in ("batch_factor", "image_factor")}
        own["precision"] = report["options"]["precision"]
        for metric, value in metrics.items():
            told = {f"measured_{key}": value.get(key, "") for key in ("p20", "p50", "p80")}
            told |= {"metric": metric, "unit": unit(metric), "reliable": measured["reliable"]}
            paper = row["paper"] if metric == "device_hours" else None
            found.append(own | told | {"paper": "" if paper is None else paper})
        whole = dict.fromkeys(COLUMNS, "") | case
        whole |= {"batch_factor": 1, "image_factor": 1, "precision": row["precision"]}
        for gpu, predicted in row["predicted"].items():
            for metric, value in predicted.items():
                told = {"predicted": value["likely"], "predicted_for": gpu}
                told |= {f"predicted_{key}": value.get(key, "") for key in ("low", "high")}
                found.append(whole | told | {"metric": metric, "unit": unit(metric)})
    return found


def unit(metric: str) -> str:
    """Of a metric, by its name."""
    if "seconds" in metric:
        return "s"
    units = {"samples_per_second": "1/s", "device_hours": "h", "peak_bytes": "B"}
    return units.get(metric, "")


def value(row: dict[str, Any], metric: str, gpu: str | None = None) -> float | None:
    """A case's measured p50, or what is predicted for a GPU."""
    if gpu is not None:
        return row["predicted"].get(gpu, {}).get(metric, {}).get("likely")
    return row.get("measured", {}).get("metrics", {}).get(metric, {}).get("p50")


def columns(report: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Title and GPU of the columns with our figures: measured, and predicted by GPU."""
    options = report["options"]
    found: list[tuple[str, str | None]] = []
    if not options["predict_only"]:
        factors = options["batch_factor"], options["image_factor"]
        scaled = "" if factors == (1, 1) else " (batch / {}, pixels / {})".format(*factors)
        found.append((f"measured{scaled}", None))
    return found + [(f"*predicted*, {gpu}", gpu) for gpu in options["predict"]]


def _cell(number: float | None, form: str = "{:.2f}") -> str:
    return "" if number is None else form.format(number)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in body)]


def table_18(report: dict[str, Any]) -> list[str]:
    """Device-hours of an epoch, in the paper's layout."""
    rows = {row["case"]: row for row in report["rows"] if row["table"] == "18"}
    if not rows:
        return []
    ours = columns(report)
    tasks = [name for name in TASKS if any(f"{name}/{model}" in rows for model in MODELS)]
    head = ["Method"]
    for name in tasks:
        head += [f"{TASKS[name].title}: paper", *(title for title, _ in ours)]
    body = []
    for model, title in zip(MODELS, ("OFA", "UnIVAL"), strict=True):
        cells = [title]
        for name in tasks:
            row = rows.get(f"{name}/{model}")
            cells.append(_cell(TASKS[name].hours[model], "{:.1f}"))
            cells += [_cell(row and value(row, "device_hours", gpu)) for _, gpu in ours]
        body.append(cells)
    cells = ["OFA / UnIVAL"]
    for name in tasks:
        pair = [rows.get(f"{name}/{model}") for model in MODELS]
        hours = [TASKS[name].hours[model] for model in MODELS]
        cells.append(_cell(hours[0] / hours[1]))
        cells += [_cell(_ratio(pair, "device_hours", gpu)) for _, gpu in ours]
    return ["## Table 18: device-hours of an epoch", "", *_table(head, [*body, cells]), ""]


def _ratio(pair: Sequence[Any], metric: str, gpu: str | None) -> float | None:
    found = [row and value(row, metric, gpu) for row in pair]
    return None if None in found else found[0] / found[1]


def curriculum(
    report: dict[str, Any], metric: str, gpu: str | None = None
) -> tuple[float | None, float | None]:
    """A metric of one stage, and of the curriculum: the mean of images alone and of all."""
    rows = {row["case"]: row for row in report["rows"]}
    images, everything = (rows.get(f"table2/{name}") for name in ("images", "all"))
    if images is None or everything is None:
        return None, None
    if metric == "step_examples":
        return everything[metric], (images[metric] + everything[metric]) / 2
    one, other = value(images, metric, gpu), value(everything, metric, gpu)
    return (None, None) if one is None or other is None else (other, (one + other) / 2)


def table_2(report: dict[str, Any]) -> list[str]:
    """The curriculum against one stage, in the paper's layout."""
    if not any(row["table"] == "2" for row in report["rows"]):
        return []
    hours = tuple(TABLE_2[name] / 60 for name in ("one_stage", "curriculum"))
    batch = tuple(TABLE_2_BATCH[name] for name in ("one_stage", "curriculum"))
    found: list[tuple[str, str, tuple[float | None, float | None]]] = [
        ("hours of an epoch: paper, all GPUs", "{:.2f}", hours)
    ]
    for title, gpu in columns(report):
        found.append((f"device-hours, {title}", "{:.2f}", curriculum(report, "device_hours", gpu)))
    found += [
        ("average batch: paper", "{:,.0f}", batch),
        ("ours", "{:,.0f}", curriculum(report, "step_examples")),
        ("memory: paper, relative", "{:.2f}", (1.0, TABLE_2_MEMORY)),
    ]
    for title, gpu in columns(report):
        size, other = curriculum(report, "peak_bytes", gpu)
        gib = (size and size / 2**30, other and other / 2**30)
        found.append((f"GiB, {title}", "{:.2f}", gib))
    body = [
        [name, *(_cell(pair[place], form) for _, form, pair in found)]
        for place, name in enumerate(("One-stage", "MCL"))
    ]
    ratios = [_cell(one and other and other / one) for _, _, (one, other) in found]
    body.append(["MCL / one-stage", *ratios])
    head = ["Method", *(name for name, *_ in found)]
    return ["## Table 2: the curriculum", "", *_table(head, body), ""]


def table_all(report: dict[str, Any]) -> list[str]:
    """Every case: hours, speed, use and memory."""
    ours = columns(report)
    head = ["case", "model"]
    for title, gpu in ours:
        names = ["hours", "samples/s", *(["MFU"] if gpu is None else []), "GiB"]
        names += ["spread", ""] if gpu is None else []
        head += [f"{name}, {title}" if name else "" for name in names]
    body = []
    for row in report["rows"]:
        cells = [row["case"].split("/")[0] if row["table"] == "18" else row["case"], row["model"]]
        for _, gpu in ours:
            memory = value(row, "peak_bytes", gpu)
            cells += [
                _cell(value(row, "device_hours", gpu)),
                _cell(value(row, "samples_per_second", gpu)),
            ]
            if gpu is None:
                cells.append(_cell(value(row, "mfu"), "{:.1%}"))
            cells.append(_cell(memory and memory / 2**30))
            if gpu is None:
                cells.append(_cell(row["measured"]["spread"], "{:.1%}"))
                cells.append("" if row["measured"]["reliable"] else "unreliable")
        body.append(cells)
    return ["## All cases", "", *_table(head, body), ""]


def table_parts(report: dict[str, Any]) -> list[str]:
    """Milliseconds of a step by part."""
    rows = [row for row in report["rows"] if "measured" in row]
    if not rows:
        return []
    names = [part for part in PARTS if any(value(row, f"seconds.{part}") for row in rows)]
    body = []
    for part in names:
        found = [value(row, f"seconds.{part}") for row in rows]
        body.append([part, *(_cell(x and 1e3 * x, "{:.1f}") for x in found)])
    head = ["ms of a step, measured", *(row["case"] for row in rows)]
    return ["## Time by module", "", *_table(head, body), ""]


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# Device-hours", "", f"    {report['command']}", ""]
    measured = [row["measured"] for row in report["rows"] if "measured" in row]
    if measured:
        machine = measured[-1]["machine"]
        lines += [", ".join(f"{key} {x}" for key, x in machine.items()), ""]
        others = max(one["machine"]["others_cores"] for one in measured)
        lines += [
            f"{report['options']['precision']}, p50 of {report['options']['steps']} steps after "
            f"{report['options']['warmup']}; other programs kept up to {others} cores busy.",
            "",
        ]
    for part in (table_18, table_2, table_all, table_parts):
        lines += part(report)
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> list[Path]:
    """OFA's hours over UnIVAL's, and the shares of the modules in a measured step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    rows = {row["case"]: row for row in report["rows"]}
    tasks = [name for name in TASKS if all(f"{name}/{model}" in rows for model in MODELS)]
    if tasks:
        figure, axes = pyplot.subplots(figsize=(7, 3.5))
        bars = {"paper": [TASKS[n].hours[MODELS[0]] / TASKS[n].hours[MODELS[1]] for n in tasks]}
        for title, gpu in columns(report):
            pairs = [[rows[f"{name}/{model}"] for model in MODELS] for name in tasks]
            bars[title.replace("*", "")] = [_ratio(p, "device_hours", gpu) or 0.0 for p in pairs]
        width = 0.8 / len(bars)
        for number, (title, heights) in enumerate(bars.items()):
            places = [place + number * width for place in range(len(tasks))]
            axes.bar(places, heights, width, label=title)
        middle = [place + 0.4 - width / 2 for place in range(len(tasks))]
        axes.set_xticks(middle, [TASKS[name].title for name in tasks])
        axes.set_ylabel("hours of an epoch, OFA / UnIVAL")
        axes.legend(fontsize="small")
        written.append(_save(figure, path.with_name(path.name + "_ratios.png")))
    measured = [row for row in report["rows"] if "measured" in row]
    if measured:
        figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(measured) + 2.5))
        left = [0.0] * len(measured)
        for part in PARTS:
            found = [value(row, f"seconds.{part}") or 0.0 for row in measured]
            whole = [value(row, "step_seconds") or 1.0 for row in measured]
            widths = [x / y for x, y in zip(found, whole, strict=True)]
            if any(widths):
                hatch = "//" if part.endswith("_backward") else None
                axes.barh([r["case"] for r in measured], widths, left=left, label=part, hatch=hatch)
                left = [x + y for x, y in zip(left, widths, strict=True)]
        axes.set_xlabel("share of a step")
        axes.legend(fontsize="x-small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        written.append(_save(figure, path.with_name(path.name + "_parts.png")))
    return written


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def write(report: dict[str, Any], path: Path) -> None:
    """PATH.json, PATH.csv, PATH.md and the plots."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = json.dumps(report, indent=2)
    path.with_name(path.name + ".json").write_text(told + "\n", encoding="utf-8")
    path.with_name(path.name + ".md").write_text(markdown(report), encoding="utf-8")
    with path.with_name(path.name + ".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(report))
    plot(report, path)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; ends with status 2 where they cannot be served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(cases()), help="some (all)")
    parser.add_argument("--model", help="a config of configs/model in place of every case's own")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    for name, number, least, what in (
        ("batch-factor", None, 1, "media of a pass are divided by it (1; measured on a CPU 4)"),
        ("image-factor", None, 1, "pixels of a side are divided by it (1; measured on a CPU 2)"),
        ("steps", 5, 1, "steps that are timed (5)"),
        ("warmup", 2, 0, "steps before (2)"),
        ("threads", 0, 0, "of torch; 0: as many as it takes by itself (0)"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=what)
        parser.set_defaults(**{f"least:{name}": least})
    parser.add_argument("--predict", nargs="*", default=["H100"], metavar="GPU", help="(H100)")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write PATH.json, .csv, .md, .png")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    whole = args.device == "cuda" or args.predict_only
    for name, on_cpu in (("batch_factor", 4), ("image_factor", 2)):
        if getattr(args, name) is None:
            setattr(args, name, 1 if whole else on_cpu)
    for key in [key for key in vars(args) if key.startswith("least:")]:
        least, name = vars(args).pop(key), key.removeprefix("least:")
        if getattr(args, name.replace("-", "_")) < least:
            parser.error(f"--{name} must be at least {least}")
    if args.device == "cuda" and not args.predict_only and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no usable GPU here")
    if args.model and not (ROOT / f"configs/model/{args.model}.yaml").is_file():
        parser.error(f"--model {args.model}: no such file in configs/model")
    return args


def main() -> int:
    """Measure and predict, print the tables, write the files."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if args.worker:
        if args.threads:
            torch.set_num_threads(args.threads)
        answer = json.dumps(measure(cases()[args.worker], args))
        args.answer.write_text(answer, encoding="utf-8")
        return 0
    report = collect(args, argv)
    print(markdown(report))
    if args.out is not None:
        write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
