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
import html
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_readers import (
    MARK,
    Found,
    Table,
    read_decoding,
    read_eager,
    read_generation,
    read_hours,
    read_kernels,
    read_scaling,
    read_zero,
)
from eager_baseline import LEAST, UNRELIABLE, LoadMeter, multiplies_bf16
from train_step import ROOT, describe_machine

from unival.training.logs import clock

LAST_LINES = 15  # of a section that failed
BUSY = 0.10  # of the cores; others that take more make a machine loaded
LISTEN = 1.0  # seconds for which the load is measured
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
    hours += ["--precision", "bf16"] if gpu else []
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
