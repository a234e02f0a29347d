"""How time and memory grow: attention with tokens, a pass with rows and text, an engine with ranks.

    python benchmarks/scaling.py --out runs/scaling
    python benchmarks/scaling.py --device cuda --dtype bf16 --out runs/scaling

attention  one layer's encoder attention of unival_base (12 heads of 64, batch 1) with position
           terms, relative biases and head scale, forward and backward, as kernel_cases.py makes its
           inputs: a quarter of the tokens is text, the rest a picture of up to 24 x 32 cells, or
           the frames of a clip. `ours` is what the model runs; `eager` has all scores in memory.
           `saved` is what is kept for backward, `peak` the most that is allocated within a pass,
           both above the inputs.
batch      forward and backward of a model with 1, 2, ... rows, each with a picture.
text       the same for one row with more and more tokens of text.
ranks      steps of unival.training.engine.Engine on gloo processes of this machine, with the same
           rows on every rank. Cores are divided between ranks (cores // ranks threads each), so
           that an efficiency of 1, samples a second over those of one rank, is what to hope for.

Time of attention must grow at most with the square of the tokens, its memory at most linearly. The
slope of a quantity is that of the least-squares line through its logarithms from 256 tokens on; it
holds if it exceeds the limit by at most 0.1. A slope of time that rests on unreliable measurements
neither holds nor fails: those whose spread, (p80 - p20) / p50, exceeds 10 %, and those of fewer
than three passes. The exit status is 1 if a slope fails.

All sizes of a section take turns, so that what else the machine does meets all of them. On a CPU
`peak` of attention is counted from the profiler's allocations, and that of `batch` is the process's
resident memory, libraries included, after the first pass of each size in ascending order.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import json
import math
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.multiprocessing
from eager_baseline import (
    LoadMeter,
    Subject,
    Variant,
    config_of,
    is_reliable,
    make_batch,
    peak_memory,
    quantiles,
)
from engine_overhead import make_batch as make_rank_batch
from engine_overhead import make_run
from kernel_cases import Case, Maker, make_case, ours
from peers import Peer, check, differentiate, eager
from progress import Progress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from train_step import DTYPES, ROOT, describe_machine
from zero_memory import free_port

from unival.training.engine import Engine, init_distributed
from unival.training.trainer import make_model

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
FIT_FROM = 256  # below, fixed costs hide how a quantity grows
EAGER_MOST = 2048  # scores of more tokens take gigabytes
HEADS = {"batch": 1, "heads": 12, "width": 64}
PICTURE = 768  # cells of the largest picture; more are a clip's frames
LEAST_SECONDS = 0.05  # of a measurement: short passes are repeated within it
PEERS = (Peer("ours", ours), Peer("eager", eager))
QUANTITIES = {"time": "p50", "saved": "saved_bytes", "peak": "peak_bytes"}
LIMITS = {"time": 2.0, "saved": 1.0, "peak": 1.0}
TOLERANCE = 0.1
TEXT, TARGET = 20, 16  # tokens of a row where they do not vary
COLUMNS = ("section", "variant", "value", "p20", "p50", "p80", "spread", "reliable", "ratio")
COLUMNS += ("slope", "saved_bytes", "peak_bytes", "samples_per_second", "threads", "efficiency")
COLUMNS += ("others_cores",)
MIB = 2**20


@dataclass
class Timed:
    """What takes turns: a pass, and what its row says besides its seconds."""

    run: Callable[[], object]
    row: dict[str, Any]
    passes: int = 1


def kernels_script() -> ModuleType:
    """benchmarks/kernels.py, which must not get the name of the folder kernels/."""
    path = ROOT / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("kernels_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def attention_case(tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Encoder attention of batch 1 over so many tokens (one of TOKENS)."""
    text, cells = tokens // 4, tokens - tokens // 4
    frames = max(1, cells // PICTURE)
    cells //= frames
    rows = max(x for x in range(1, math.isqrt(cells) + 1) if cells % x == 0)
    shape = {**HEADS, "rows": rows, "columns": cells // rows, "text": text}
    case = make_case("attention", shape, device, dtype)
    return case if frames == 1 else _clip(case, frames, cells, Maker(device, dtype))


def _clip(case: Case, frames: int, cells: int, maker: Maker) -> Case:
    """The case with more frames, all of which have the cells of the first."""
    length = cells * frames + case.shape["text"]
    heads = ("query", "key", "value", "position_query", "position_key")
    tensors = case.tensors | {name: maker.heads(1, length, case.shape) for name in heads}

    def repeat(codes: Tensor) -> Tensor:
        return torch.cat([codes[:, :cells].repeat(1, frames), codes[:, cells:]], dim=1)

    old = case.fixed["padding"]
    padding = torch.cat([old[:, :cells].repeat(1, frames), old[:, cells:]], dim=1)
    fixed = case.fixed | {
        "codes": tuple(repeat(codes) for codes in case.fixed["codes"]),
        "image_ids": case.fixed["image_ids"].repeat(1, frames),
        "padding": padding,
    }
    slope = maker.slope(1, length, HEADS["heads"], HEADS["width"]).transpose(1, 2)
    x = (*case.x[:2], str(length))
    return replace(case, x=x, tensors=tensors, slopes=(slope,), fixed=fixed)


def allocated_peak(call: Callable[[], object]) -> int:
    """The most bytes that a call has allocated on the CPU at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def attention_memory(peer: Peer, case: Case, script: ModuleType) -> dict[str, int]:
    """Bytes saved for backward, and at the peak of a pass, above the inputs."""

    def run() -> object:
        leaves = peer.leaves(case, case.tensors)
        return differentiate(peer.run(case, case.tensors), leaves, case.slopes)

    found = script.memory(peer, case)
    if case.slopes[0].is_cuda:
        before = torch.cuda.memory_allocated()
        outputs = peer.run(case, case.tensors)
        saved = torch.cuda.memory_allocated() - before
        del outputs
        return {"saved_bytes": saved, "peak_bytes": found}
    return {"saved_bytes": found, "peak_bytes": allocated_peak(run)}


def take_turns(timed: Sequence[Timed], repeats: int) -> list[dict[str, Any]]:
    """Rows with the quantiles of each one's seconds; every other round in reverse order."""
    seconds: list[list[float]] = [[] for _ in timed]
    order, meter, progress = list(range(len(timed))), LoadMeter(), Progress(repeats)
    for _ in range(repeats):
        for number in order:
            one = timed[number]
            meter.begin()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(one.passes):
                one.run()
            seconds[number].append((time.perf_counter() - wall) / one.passes)
            meter.end(time.process_time() - cpu)
        order.reverse()
        progress.line(f"a turn of {len(timed)} cases")
    others = meter.read()["others_cores"]
    return [
        one.row | quantiles(found) | {"reliable": is_reliable(found), "others_cores": others}
        for one, found in zip(timed, seconds, strict=True)
    ]


def warmed(run: Callable[[], object], row: dict[str, Any]) -> Timed:
    """After a pass, or two short ones, with so many a measurement that it is not too short."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        if seconds >= LEAST_SECONDS:
            break
    return Timed(run, row, max(1, math.ceil(LEAST_SECONDS / seconds)))


def attention_rows(args: Namespace) -> list[dict[str, Any]]:
    """Attention over more and more tokens, ours and eager."""
    device, dtype, script = torch.device(args.device), DTYPES[args.dtype], kernels_script()
    timed, progress = [], Progress(len(args.tokens))
    for tokens in sorted(args.tokens):
        case = attention_case(tokens, device, dtype)
        for peer in PEERS:
            if peer.name == "eager" and tokens > EAGER_MOST:
                continue
            if tokens == min(args.tokens):
                check(peer, case)
            row = {"section": "attention", "variant": peer.name, "value": tokens}
            row |= attention_memory(peer, case, script)

            def run(peer: Peer = peer, case: Case = case) -> float:
                return sum(script.one_pass(peer, case))  # waits for a GPU

            timed.append(warmed(run, row))
        progress.line(f"attention {tokens}: prepared")
    return with_slopes(take_turns(timed, args.repeats))


def with_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with time's ratio to, and slope from, the same variant's next smaller size."""
    last: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["value"]):
        before = last.get(row["variant"])
        if before is not None:
            row["ratio"] = row["p50"] / before["p50"]
            row["slope"] = math.log(row["ratio"]) / math.log(row["value"] / before["value"])
        last[row["variant"]] = row
    return rows


def fit(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through the logarithms of at least two points."""
    x, y = ([math.log(pair[i]) for pair in points] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fitted slopes of both variants' attention; verdicts on ours. Fewer than two sizes: none."""
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant and row["value"] >= FIT_FROM]
        if len(own) < 2:
            continue
        sizes = [row["value"] for row in own]
        for quantity, key in QUANTITIES.items():
            slope = fit([(row["value"], row[key]) for row in own])
            told: dict[str, Any] = {"variant": variant, "quantity": quantity, "slope": slope}
            told |= {"from": min(sizes), "to": max(sizes)}
            if variant == "ours":
                verdict = "holds" if slope <= LIMITS[quantity] + TOLERANCE else "fails"
                if quantity == "time" and not all(row["reliable"] for row in own):
                    verdict = "unreliable"
                told |= {"limit": LIMITS[quantity], "tolerance": TOLERANCE, "verdict": verdict}
            found.append(told)
    return found


def pass_rows(args: Namespace) -> list[dict[str, Any]]:
    """Passes of a model with more and more rows, then with more and more text."""
    sizes = {"config": args.config, "device": args.device, "image": args.image}
    sizes |= {"batch": 1, "text": TEXT, "target": TARGET}
    subject, config = (
        Subject(Namespace(**sizes), Variant("ours", args.dtype)),
        config_of(args.config),
    )
    timed, progress = [], Progress(len(args.batches) + len(args.texts))
    for section, option in (("batch", "batches"), ("text", "texts")):
        for value in sorted(getattr(args, option)):
            batch = make_batch(config, Namespace(**sizes | {section: value}))
            batch = {name: x.to(subject.device) for name, x in batch.items()}
            batch["pixel_values"] = batch["pixel_values"].to(DTYPES[args.dtype])

            def run(batch: dict[str, Tensor] = batch) -> None:
                subject.batch = batch
                subject.run("pass")

            row: dict[str, Any] = {"section": section, "variant": "ours", "value": value}
            timed.append(warmed(run, row))
            if section == "batch":
                row["peak_bytes"] = peak_memory(subject.device)
            progress.line(f"{section} {value}: prepared")
    rows = take_turns(timed, args.repeats)
    for row in rows:
        row["samples_per_second"] = (row["value"] if row["section"] == "batch" else 1) / row["p50"]
    return rows


def rank_work(rank: int, port: int, ranks: int, args: Namespace, folder: str) -> None:
    """What a rank does: steps, whose seconds go to a file."""
    os.dup2(2, 1)  # DeepSpeed's talk
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(threads_of(ranks))
    options = Namespace(model=str(ROOT / f"configs/model/{args.config}.yaml"), image=args.image)
    options.rows, options.text, options.target = args.rows, TEXT - 2, TARGET - 1
    batch = make_rank_batch(options)
    options.rows *= ranks
    run, world = make_run(options, 0), init_distributed()
    engine = Engine(make_model(run, run.stages[0], None), run, run.stages[0], world)
    engine.step([batch], 1)
    world.barrier()
    meter, seconds, cpu = LoadMeter(), [], time.process_time()
    for update in range(args.repeats):
        start = time.perf_counter()
        engine.step([batch], update + 2)
        seconds.append(time.perf_counter() - start)
    own = torch.tensor([time.process_time() - cpu])
    torch.distributed.all_reduce(own)
    meter.end(float(own))
    if rank == 0:
        told = {"seconds": seconds, **meter.read()}
        (Path(folder) / "rank0.json").write_text(json.dumps(told), encoding="utf-8")
    world.barrier()  # nobody leaves while another one still computes


def threads_of(ranks: int) -> int:
    """Of each rank: an equal part of the cores."""
    return max(1, (os.cpu_count() or 1) // ranks)


def rank_rows(args: Namespace) -> list[dict[str, Any]]:
    """Steps of the engine on more and more ranks of this machine's cores."""
    # A GPU's ranks would be of several GPUs; these are processes of the CPU everywhere.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "error"}
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["unival.training.trainer", "deepspeed"]
    )
    rows: list[dict[str, Any]] = []
    progress = Progress(len(args.ranks))
    for ranks in sorted(args.ranks):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                rank_work, (free_port(), ranks, args, folder), ranks, start_method="forkserver"
            )
            told = json.loads((Path(folder) / "rank0.json").read_text(encoding="utf-8"))
        row: dict[str, Any] = {"section": "ranks", "variant": "ours", "value": ranks}
        row |= quantiles(told["seconds"]) | {"reliable": is_reliable(told["seconds"])}
        row |= {"threads": threads_of(ranks), "others_cores": told["others_cores"]}
        row["samples_per_second"] = ranks * args.rows / row["p50"]
        rows.append(row)
        if rows[0]["value"] == 1:
            row["efficiency"] = row["samples_per_second"] / rows[0]["samples_per_second"]
        progress.line(f"ranks {ranks}: measured")
    return rows


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in body), ""]


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    options, rows = report["options"], report["rows"]
    lines = ["# Scaling", "", ", ".join(f"{k} {x}" for k, x in report["machine"].items()), ""]
    lines += [f"    {report['command']}", ""]
    titles = {
        "attention": "Attention over tokens",
        "batch": f"A pass of {options['config']} at {options['image']} px over rows",
        "text": f"A pass of {options['config']} of one row over tokens of text",
        "ranks": f"Steps of the engine, {options['rows']} rows a rank, over ranks that share "
        "the cores (cores // ranks threads each)",
    }
    columns = {
        "attention": (("ratio", ".2f"), ("slope", ".2f"), ("saved_bytes", ""), ("peak_bytes", "")),
        "batch": (("samples_per_second", ".2f"), ("peak_bytes", "")),
        "text": (("samples_per_second", ".2f"),),
        "ranks": (("threads", ""), ("samples_per_second", ".2f"), ("efficiency", ".2f")),
    }
    for section, title in titles.items():
        chosen = [row for row in rows if row["section"] == section]
        if not chosen:
            continue
        names = [name.replace("_bytes", " MiB").replace("_", " ") for name, _ in columns[section]]
        head = [section, "variant", "p50 ms", "spread", *names, ""]
        body = []
        for row in chosen:
            cells = [str(row["value"]), row["variant"], f"{row['p50'] * 1e3:.2f}"]
            cells.append(f"{row['spread']:.1%}")
            for name, form in columns[section]:
                value = row.get(name)
                if name.endswith("_bytes") and value is not None:
                    value, form = value / MIB, ".1f"
                cells.append(_cell(value, form))
            body.append([*cells, "" if row["reliable"] else "unreliable"])
        lines += [f"## {title}", "", *_table(head, body)]
    if report["slopes"]:
        lines += [f"## Slopes of attention, fitted from {FIT_FROM} tokens on", ""]
        body = [
            [
                slope["variant"], slope["quantity"], f"{slope['from']} to {slope['to']}",
                f"{slope['slope']:.3f}",
                f"at most {slope['limit']:g} (+{slope['tolerance']:g})" if "limit" in slope else "",
                slope.get("verdict", ""),
            ]
            for slope in report["slopes"]
        ]  # fmt: skip
        lines += _table(["variant", "quantity", "tokens", "slope", "maths", "verdict"], body)
    return "\n".join(lines)


def write(report: dict[str, Any], path: Path) -> None:
    """FILE.json, FILE.md and FILE.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = json.dumps(report, indent=2)
    path.with_name(path.name + ".json").write_text(told + "\n", encoding="utf-8")
    path.with_name(path.name + ".md").write_text(table(report), encoding="utf-8")
    with path.with_name(path.name + ".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(report["rows"])


def parse(argv: Sequence[str]) -> Namespace:
    """Arguments; ends with status 2 where they cannot be served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
    parser.add_argument("--config", default="unival_base", choices=names, help="of all passes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    for name, values, what in (
        ("tokens", TOKENS, "of attention"),
        ("batches", (1, 2, 4, 8), "rows of a pass"),
        ("texts", (64, 128, 256, 512), "tokens of text of a pass"),
        ("ranks", (1, 2), "processes of the engine"),
    ):
        told = f"{what} ({' '.join(map(str, values))}; none: not measured)"
        parser.add_argument(f"--{name}", nargs="*", type=int, default=list(values), help=told)
    for name, value, what in (
        ("rows", 4, "rows of every rank"),
        ("image", 128, "pixels of a picture's side"),
        ("repeats", 5, "measurements of each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json, .md and .csv")
    args = parser.parse_args(argv)
    if not set(args.tokens) <= set(TOKENS):
        parser.error(f"--tokens: wanted some of {' '.join(map(str, TOKENS))}")
    for name, least in (("rows", 1), ("image", 32), ("repeats", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    for name in ("batches", "texts", "ranks"):
        if min(getattr(args, name), default=1) < 1:
            parser.error(f"--{name}: at least 1 each")
    if max(args.texts, default=1) > config_of(args.config).max_text_positions:
        parser.error(f"--texts: {args.config} has positions for fewer tokens")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no usable GPU here")
    return args


def collect(args: Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """All sections; the passes first, since the peak of resident memory only rises."""
    machine, load = describe_machine(torch.device(args.device)), os.getloadavg()[0]
    rows = pass_rows(args) if args.batches or args.texts else []
    gc.collect()
    attention = attention_rows(args) if args.tokens else []
    rows = attention + rows + (rank_rows(args) if args.ranks else [])
    machine |= {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    machine["others_cores"] = max((row["others_cores"] for row in rows), default=0.0)
    return {
        "machine": machine,
        "command": shlex.join(["python", "benchmarks/scaling.py", *argv]),
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "rows": rows,
        "slopes": judge(attention),
    }


def main() -> int:
    """Measure, print the tables, write the files."""
    argv = sys.argv[1:]
    args = parse(argv)
    report = collect(args, argv)
    print(table(report))
    if args.out is not None:
        write(report, args.out)
    return 1 if any(slope.get("verdict") == "fails" for slope in report["slopes"]) else 0


if __name__ == "__main__":
    sys.exit(main())
