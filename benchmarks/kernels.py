"""Time and memory of each operator beside other implementations of the same, on this machine.

    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cuda --dtype bf16 --ops attention layer

An operator's tests run first: while one is red, no speed-up is printed and the exit status is 1.
Then every implementation is compared with the operator's reference in float64 on a small case, and
those that agree are timed in turns, so that what else the machine does meets all of them. The
implementations are described in peers.py, the inputs in kernel_cases.py.

A speed-up is eager's median of forward and backward together over an implementation's. Forward is
timed with autograd recording. `saved_for_backward` (on a CPU) is the memory that autograd keeps
between the two, inputs left out, each storage once; `peak_memory` (on a GPU) is the most that was
allocated during both, above the inputs. On a GPU times are between events in the stream, so that
time in which the GPU waits for Python is part of them.

Other programs disturb these numbers: the load is printed; a row whose 80th percentile is more than
1.2 times its 20th is marked unreliable, and a speed-up that needs such a row is in parentheses.
Results are written to kernels.csv, in the columns of Liger-Kernel's benchmarks and some more, and
to one plot an operator.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ != "kernels":
    # transformers imports a package of that name where it finds one, and for the scripts of this
    # folder that is this file: then it must not import transformers again.
    from kernel_cases import KERNELS, SHAPES, Case, make_case
    from peers import PEERS, Peer, WrongPeer, check, differentiate
    from train_step import DTYPES, describe_machine

ROOT = Path(__file__).resolve().parents[1]
MODES = ("forward", "backward", "full")
WARMUP = 2
SPREAD = 1.2  # of the 80th percentile over the 20th; wider rows are marked
COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "commit",
    "torch",
    "triton",
    "driver",
    "clock_mhz",
    "threads",
    "load_1min",
)
# Files, and the part of them that is about the implementation `auto` runs on a CPU.
TESTS = {
    "attention": ("tests/kernels/test_attention.py", "sdpa"),
    "norms": ("tests/kernels/test_layernorm.py", "not triton"),
    "loss": ("tests/kernels/test_linear_cross_entropy.py", "torch"),
}
TESTS_OF = {
    "attention": ("attention",),
    "layer": ("attention", "norms"),
    "layer_norm": ("norms",),
    "gelu_layer_norm": ("norms",),
    "residual_layer_norm": ("norms",),
    "loss": ("loss",),
}


@dataclass
class Row:
    """One implementation of one kernel at one shape.

    seconds  of every pass by mode
    memory   bytes
    note     why the row says less than others, or nothing
    """

    op: str
    case: Case
    peer: Peer
    seconds: dict[str, list[float]]
    memory: int
    error: float
    load: float
    timestamp: str
    note: str = ""

    def percentiles(self, mode: str) -> tuple[float, float, float]:
        """20th, 50th and 80th, in ms."""
        found = sorted(1e3 * x for x in self.seconds[mode])
        if len(found) < 2:
            return found[0], found[0], found[0]
        cuts = statistics.quantiles(found, n=10, method="inclusive")
        return cuts[1], cuts[4], cuts[7]

    @property
    def spread(self) -> float:
        low, _, high = self.percentiles("full")
        return high / low

    @property
    def notes(self) -> str:
        wide = f"unreliable: p80/p20 {self.spread:.2f}" if self.spread > SPREAD else ""
        return "; ".join(note for note in (self.note, wide, self.peer.note) if note)


def run_tests(name: str, device: torch.device) -> bool:
    """Whether a group of TESTS passes, in a process of its own."""
    path, on_cpu = TESTS[name]
    chosen = on_cpu if device.type == "cpu" else "triton or gpu"
    arguments = ["-m", "pytest", "-q", "-rfE", path, "-k", chosen]
    print(f"$ {shlex.join(['python', *arguments])}", flush=True)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    for line in [x for x in lines if x.startswith(("FAILED", "ERROR"))] + lines[-1:]:
        print(f"  {line}", flush=True)
    return done.returncode == 0


def gates(ops: list[str], device: torch.device) -> dict[str, bool]:
    """Whether each operator's tests pass."""
    needed = [name for name in TESTS if any(name in TESTS_OF[op] for op in ops)]
    passed = {name: run_tests(name, device) for name in needed}
    return {op: all(passed[name] for name in TESTS_OF[op]) for op in ops}


def available(kernel: str, device: torch.device, dtype: torch.dtype) -> list[tuple[Peer, float]]:
    """Implementations that run here and agree with the reference, with their errors."""
    found = []
    for peer in PEERS[kernel]:
        reason = peer.absent(device, dtype)
        if reason is not None:
            print(f"  {kernel}: no {peer.name} here: {reason}", flush=True)
            continue
        case = make_case(kernel, SHAPES["tiny"][kernel][0], device, dtype, training=False)
        error = check(peer, case)
        print(f"  {kernel}: {peer.name} agrees with float64 to {error:.1e}", flush=True)
        found.append((peer, error))
    return found


def one_pass(peer: Peer, case: Case) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    leaves = peer.leaves(case, case.tensors)
    if leaves[0].is_cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        outputs = peer.run(case, case.tensors)
        marks[1].record()
        differentiate(outputs, leaves, case.slopes)
        marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3
    start = time.perf_counter()
    outputs = peer.run(case, case.tensors)
    middle = time.perf_counter()
    differentiate(outputs, leaves, case.slopes)
    return middle - start, time.perf_counter() - middle


def memory(peer: Peer, case: Case) -> int:
    """Bytes at the peak of a pass (GPU) or saved for its backward (CPU), above the inputs."""
    leaves = peer.leaves(case, case.tensors)
    if leaves[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        differentiate(peer.run(case, case.tensors), leaves, case.slopes)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    fixed = (x for x in case.fixed.values() if isinstance(x, Tensor))
    inputs = {x.untyped_storage().data_ptr() for x in (*case.tensors.values(), *fixed)}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in inputs:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = peer.run(case, case.tensors)
    total = sum(saved.values())
    del outputs  # until here, no saved storage may be freed and its address used again
    return total


def measure(
    op: str, case: Case, peers: list[tuple[Peer, float]], repeats: int, note: str
) -> list[Row]:
    """Time the peers in turns, each round starting with another one."""
    used = {peer.name: memory(peer, case) for peer, _ in peers}
    times: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer, _ in peers}
    for turn in range(WARMUP + repeats):
        first = turn % len(peers)
        for peer, _ in peers[first:] + peers[:first]:
            seconds = one_pass(peer, case)
            if turn >= WARMUP:
                times[peer.name].append(seconds)
    load, now = round(os.getloadavg()[0], 2), datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for peer, error in peers:
        forward, backward = (list(column) for column in zip(*times[peer.name], strict=True))
        full = [sum(pair) for pair in times[peer.name]]
        seconds = {"forward": forward, "backward": backward, "full": full}
        rows.append(Row(op, case, peer, seconds, used[peer.name], error, load, now, note))
    return rows


def output_of(*command: str) -> str:
    """What a program prints, without the last newline; nothing where it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_software(device: torch.device) -> dict[str, str]:
    """The columns about versions and clock."""
    commit = output_of("git", "rev-parse", "HEAD") or "unknown"
    if output_of("git", "status", "--porcelain"):
        commit += "-dirty"
    driver, clock = "none", ""
    if device.type == "cuda":
        query = "--query-gpu=driver_version,clocks.sm"
        index = f"--id={torch.cuda.current_device()}"
        told = output_of("nvidia-smi", query, index, "--format=csv,noheader,nounits")
        driver, _, clock = told.partition(", ")
    elif Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        speeds = [float(x) for x in re.findall(r"^cpu MHz\s*: (\S+)", text, re.MULTILINE)]
        clock = f"{statistics.mean(speeds):.0f}" if speeds else ""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton,
        "driver": driver,
        "clock_mhz": clock,
        "threads": str(torch.get_num_threads()),
    }


def csv_rows(rows: list[Row], args: argparse.Namespace, machine: dict[str, Any]) -> Iterator[dict]:
    """Rows of COLUMNS: three times and one memory for each implementation."""
    device = torch.device(args.device)
    software, metric = describe_software(device), memory_name(device)
    name = machine["device"] if device.type == "cuda" else machine["cpu"]
    for row in rows:
        extra = {
            **row.case.shape,
            "dtype": args.dtype,
            "repeats": args.repeats,
            "max_relative_error": row.error,
            "note": row.notes,
        }
        values = {mode: ("speed", "ms", row.percentiles(mode)) for mode in MODES}
        size = row.memory / 2**20
        for mode, (metric_name, unit, found) in [
            *values.items(),
            ("full", (metric, "MiB", (size, size, size))),
        ]:
            low, middle, high = found
            cells = (
                row.case.kernel, row.peer.name, mode, metric_name, unit, *row.case.x,
                middle, low, high, json.dumps(extra), name, row.timestamp,
            )  # fmt: skip
            yield dict(zip(COLUMNS, cells, strict=False)) | software | {"load_1min": row.load}


def memory_name(device: torch.device) -> str:
    return "peak_memory" if device.type == "cuda" else "saved_for_backward"


def write_csv(path: Path, rows: Iterator[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Bars of the full pass by shape and implementation, p20 to p80 as error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = list(dict.fromkeys(row.case.kernel for row in rows))
    figure, axes = pyplot.subplots(
        1, len(kernels), figsize=(7 * len(kernels), 5), squeeze=False, layout="constrained"
    )
    for kernel, axis in zip(kernels, axes[0], strict=True):
        chosen = [row for row in rows if row.case.kernel == kernel]
        shapes = list(dict.fromkeys(row.case.x[2] for row in chosen))
        providers = list(dict.fromkeys(row.peer.name for row in chosen))
        for number, provider in enumerate(providers):
            found = [row for row in chosen if row.peer.name == provider]
            low, middle, high = zip(*(row.percentiles("full") for row in found), strict=True)
            below = [m - x for m, x in zip(middle, low, strict=True)]
            above = [x - m for m, x in zip(middle, high, strict=True)]
            places = [shapes.index(row.case.x[2]) + 0.8 * number / len(providers) for row in found]
            width = 0.8 / len(providers)
            axis.bar(places, middle, width, yerr=(below, above), capsize=3, label=provider)
        middle_bar = 0.4 - 0.4 / len(providers)
        axis.set_xticks([i + middle_bar for i in range(len(shapes))], shapes)
        axis.set(xlabel=chosen[0].case.x[1], ylabel="forward + backward, ms", title=kernel)
        axis.legend()
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(rows: list[Row], speedups: dict[str, bool], device: torch.device) -> str:
    """Medians in ms; a speed-up only for operators whose tests are green."""
    shown = any(speedups[row.op] for row in rows)
    eager = {(r.case.kernel, r.case.x[2]): r for r in rows if r.peer.name == "eager"}
    head = ["kernel", "shape", "provider", "forward", "backward", "full", "p20-p80"]
    head += [f"{memory_name(device)} MiB", *(["over eager"] if shown else []), "load", "note"]
    lines = [head]
    for row in rows:
        low, middle, high = row.percentiles("full")
        line = [row.case.kernel, row.case.x[2], row.peer.name]
        line += [f"{row.percentiles(mode)[1]:.2f}" for mode in MODES]
        line += [f"{low:.2f}-{high:.2f}", f"{row.memory / 2**20:.1f}"]
        if shown:
            base = eager[row.case.kernel, row.case.x[2]]
            ratio = f"{base.percentiles('full')[1] / middle:.2f}x"
            ratio = ratio if max(row.spread, base.spread) <= SPREAD else f"({ratio})"
            line.append(ratio if speedups[row.op] else "")
        lines.append([*line, f"{row.load:.2f}", row.notes])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments; ends with status 2 where they cannot be served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ops", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=25, help="timed passes (25)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=list(SHAPES),
        help="lists of shapes (short; on a GPU short and long)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kernels")
    parser.add_argument(
        "--skip-tests", action="store_true", help="measure at once, and print no speed-up"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no usable GPU here")
    if args.shapes is None:
        args.shapes = ["short", "long"] if args.device == "cuda" else ["short"]
    return args


def measure_op(op: str, args: argparse.Namespace, note: str) -> list[Row]:
    """Check and time every kernel of an operator at the shapes that were asked for."""
    device, dtype, rows = torch.device(args.device), DTYPES[args.dtype], []
    for kernel in KERNELS[op]:
        peers = available(kernel, device, dtype)
        for shape in (shape for name in args.shapes for shape in SHAPES[name].get(kernel, ())):
            case = make_case(kernel, shape, device, dtype)
            rows += measure(op, case, peers, args.repeats, note)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Test, check, measure; write CSV and plots; print the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command = shlex.join(["python", "benchmarks/kernels.py", *argv])
    machine = describe_machine(torch.device(args.device))
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    print(f"{described}\n{command}\n", flush=True)
    if args.skip_tests:
        green = dict.fromkeys(args.ops, False)
        print("tests skipped: no speed-up is printed, since nothing says the operators are right")
    else:
        green = gates(args.ops, torch.device(args.device))
    note = "tests skipped" if args.skip_tests else "tests failed"
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for op in args.ops:
        try:
            found = measure_op(op, args, "" if green[op] else note)
        except WrongPeer as error:
            print(f"kernels.py: {error}", file=sys.stderr)
            return 1
        if found:
            plot(args.out / f"{op}.png", found, f"{described}\n{command}")
        rows += found
    write_csv(args.out / "kernels.csv", csv_rows(rows, args, machine))
    print(f"\n{table(rows, green, torch.device(args.device))}\n")
    print(f"medians of {args.repeats} passes in ms; {args.out}: kernels.csv and a plot an operator")
    red = [op for op in args.ops if not green[op]]
    if red and not args.skip_tests:
        print(f"kernels.py: no speed-up of {', '.join(red)}: tests fail", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
