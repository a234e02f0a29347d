"""python -m unival.kernels.report: what every shipped kernel takes on A100, H100 and B200.

Compiles each configuration ahead of time and takes the machine code apart; needs no GPU. Times are
predicted from bytes, operations and datasheets, never measured. Exit status 1 where a kernel spills
registers or asks for more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from unival.kernels.shipped import DTYPES, Call, calls
from unival.kernels.triton_tools.launch import INTERPRETED, Config, Launch
from unival.kernels.triton_tools.resources import (
    CHIPS,
    Resources,
    compile_launch,
    launch_key,
)
from unival.kernels.work import flops, touched, traffic

HEADER = """# Kernels: what the compiler made of them

Compiled ahead of time; no GPU was used. Registers a thread; shared memory and its limit in bytes a
block; tensor-core instructions (HMMA, HGMMA or UTC*MMA) in the code; share of loads from global
memory that are 128 bits wide. *Predicted* is a lower bound of the time of all launches of a row:
the larger of bytes / bandwidth and operations / peak of the chip's datasheet.

| op | shape | dtype | kernel | blocks | warps | chip | registers | spills | shared | limit \
| occupancy | tensor cores | 128-bit loads | MB | GFLOP | launches | predicted us |
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a table, write report.md and report.json."""
    args = parse(argv)
    if INTERPRETED:
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    archs = [int(name.removeprefix("sm_")) for name in args.arch]
    found = [call for call in calls(tuple(args.dtype)) if args.only in f"{call.op} {call.shape}"]
    launches = unique(launch for call in found for launch in candidates(call, args.sweep))
    started = time.monotonic()
    resources = compile_all(list(launches.values()), archs, args.jobs)
    rows = [row for call in found for row in report_rows(call, resources, archs, args.sweep)]
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*markdown(rows), *([] if args.sweep else traffic_table(found, archs))])
    (args.out / "report.md").write_text(text + "\n", encoding="utf-8")
    (args.out / "report.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    bad = [row for row in rows if not row["fits"]]
    print(summary(rows))
    print(
        f"{len(resources)} kernels compiled in {time.monotonic() - started:.0f} s, "
        f"{len({key for key, _ in resources})} for each chip; {len(bad)} rows do not fit; "
        f"{args.out / 'report.md'}, {args.out / 'report.json'}"
    )
    return 1 if bad and not args.sweep else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="unival.kernels.report", description=__doc__)
    names = [f"sm_{arch}" for arch in CHIPS]
    parser.add_argument("--arch", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--only", default="", help="calls with this in their operator and shape")
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="also compile neighbouring block sizes and warps, to see which candidates fit",
    )
    return parser.parse_args(argv)


def candidates(call: Call, sweep: bool) -> list[Launch]:
    """A call's launches; in a sweep also with halved and doubled blocks and other warps."""
    launches = [*call.forward, *call.backward]
    if not sweep:
        return launches
    found = list(launches)
    for launch in unique(launches).values():
        names = [name for name in launch.config.blocks if name in ("BLOCK_M", "BLOCK_N", "ROWS")]
        for factors in product((0.5, 1, 2), repeat=len(names)):
            sizes = {
                n: max(1, int(launch.config.blocks[n] * f))
                for n, f in zip(names, factors, strict=True)
            }
            for warps in (4, 8):
                config = Config(launch.config.blocks | sizes, warps, launch.config.num_stages)
                arguments = launch.arguments | sizes
                found.append(launch._replace(config=config, arguments=arguments))
    return found


def unique(launches: Iterable[Launch]) -> dict[str, Launch]:
    """Launches by what they compile to."""
    return {launch_key(launch): launch for launch in launches}


def compile_all(
    launches: list[Launch], archs: list[int], jobs: int
) -> dict[tuple[str, int], Resources]:
    """Resources by launch key and architecture; progress to standard error."""
    keys = [launch_key(launch) for launch in launches]
    tasks = [(key, arch) for key in keys for arch in archs]
    results: dict[tuple[str, int], Resources] = {}
    # Forked workers know the launches; only their numbers travel.
    _shared.clear()
    _shared.update(zip(keys, launches, strict=True))
    with ProcessPoolExecutor(jobs) as pool:
        started = time.monotonic()
        for done, (task, found) in enumerate(
            zip(tasks, pool.map(_compile, tasks), strict=True), start=1
        ):
            results[task] = found
            if done % 20 == 0 or done == len(tasks):
                left = (time.monotonic() - started) / done * (len(tasks) - done)
                print(f"compiled {done}/{len(tasks)}, {left:.0f} s left", file=sys.stderr)
    return results


_shared: dict[str, Launch] = {}


def _compile(task: tuple[str, int]) -> Resources:
    key, arch = task
    return compile_launch(_shared[key], arch)


def report_rows(
    call: Call, resources: dict[tuple[str, int], Resources], archs: list[int], sweep: bool
) -> list[dict[str, Any]]:
    """A row for each kernel of a call and each architecture."""
    rows = []
    for name, launches in (("forward", call.forward), ("backward", call.backward)):
        part = call._replace(forward=launches, backward=[])
        kinds: dict[str, list[Launch]] = defaultdict(list)
        for launch in candidates(part, sweep) if launches else []:
            kinds[launch_key(launch)].append(launch)
        for key, arch in product(kinds, archs):
            same, found = kinds[key], resources[key, arch]
            rows.append(
                {
                    "op": call.op,
                    "shape": call.shape,
                    "dtype": call.dtype,
                    "pass": name,
                    "kernel": same[0].kernel.__name__,
                    "blocks": dict(same[0].config.blocks),
                    "warps": same[0].config.num_warps,
                    "stages": same[0].config.num_stages,
                    "launches": len(same),
                    "programs": math.prod(same[0].grid),
                    "fits": found.fits,
                    "shared_limit": CHIPS[arch].shared_per_block,
                    **asdict(found),
                    **work(same, call.dtype, arch),
                }
            )
    return rows


def work(launches: list[Launch], dtype: str, arch: int) -> dict[str, Any]:
    """Bytes (each tensor of a launch once), operations, and the time they predict on a chip."""
    chip = CHIPS[arch]
    moved = sum(size for launch in launches for _, _, size in touched(launch))
    operations = sum(map(flops, launches))
    peak = chip.float32_flops if dtype == "fp32" else chip.tensor_flops
    seconds = max(moved / chip.bandwidth, operations / peak)
    return {
        "bytes": moved,
        "flops": operations,
        "chip": chip.name,
        "predicted_us": round(seconds * 1e6, 2),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each kernel and dtype: what its configurations take at most."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["op"], row["kernel"].removesuffix("_kernel"), row["dtype"]].append(row)
    lines = []
    for (op, kernel, dtype), same in groups.items():
        most = {name: max(row[name] for row in same) for name in ("registers", "spills", "shared")}
        fine = "fits" if all(row["fits"] for row in same) else "DOES NOT FIT"
        lines.append(
            f"{op:34} {kernel:24} {dtype}  registers {most['registers']:3}  "
            f"spills {most['spills']}  shared {most['shared']:6} B  {fine}"
        )
    return "\n".join(lines)


def traffic_table(found: list[Call], archs: list[int]) -> list[str]:
    """Memory traffic of forward and backward over the least possible."""
    names = [CHIPS[arch].name for arch in archs]
    lines = [
        "",
        "## Memory traffic",
        "",
        "Forward and backward, by formula: bytes moved to and from memory over those of each input",
        "and output once. The chip's second-level cache is modelled as holding whole tensors, of",
        "which the least recently used leave.",
        "",
        "| op | shape | dtype | MB at least | " + " | ".join(names) + " |",
        "|" + "---|" * (4 + len(archs)),
    ]
    for call in found:
        if not call.backward:
            continue
        ratios = []
        for arch in archs:
            moved, least = traffic(call, CHIPS[arch].l2)
            ratios.append(f"{moved / least:.2f}")
        cells = (call.op, call.shape, call.dtype, f"{least / 1e6:.1f}", *ratios)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The table for people."""
    lines = [HEADER + "|" + "---|" * 18]
    for row in rows:
        blocks = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in row["blocks"].items())
        share = row["loads_128"] / row["loads"] if row["loads"] else 1.0
        cores = row["hmma"] + row["hgmma"] + row["utcmma"]
        kernel = row["kernel"].removesuffix("_kernel")
        cells = (
            row["op"], row["shape"], row["dtype"], f"{kernel} ({row['pass']})", blocks,
            row["warps"], row["chip"], row["registers"], row["spills"], row["shared"],
            row["shared_limit"], f"{row['occupancy']:.2f}", cores, f"{share:.0%}",
            f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / 1e9:.2f}", row["launches"],
            row["predicted_us"],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
