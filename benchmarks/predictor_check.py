"""Is the predictor right where it can be checked: on one core of this processor?

    python benchmarks/predictor_check.py --json runs/predictor_check.json
    python benchmarks/predictor_check.py --ceilings configs/ceilings/cpu_reference.yaml

Forward and backward passes of `unival_base` and `ofa_base` (float32, one row, an image and texts of
several lengths) are run and predicted. The ceilings are measured between the shapes, on operators
that are no model and have none of these shapes, or read from a file. Compared are

    ratio   seconds of OFA over those of UnIVAL, passes without the recorder
    shares  of image encoder, projection, encoder, decoder and loss in a pass: every operator timed
            by the recorder that counts them

Times are processor time of the thread, the least of --tries: other programs count only by what they
do to caches and memory. Parts of less than 5 % of a pass are printed and not judged. The exit
status is 1 if a ratio or a share is more than 15 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unival.kernels.cpu.memory import keep_freed
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.planning.calibrate import Calibration
from unival.planning.ceilings import Ceilings, read_ceilings
from unival.planning.counts import Recorder, Training, Work, count, make_batch, run_pass
from unival.planning.predict import pass_seconds

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("unival_base", "ofa_base")
# (pixels of a side, tokens of the encoder's text, tokens of the decoder)
SHAPES = ((128, 20, 8), (160, 12, 20), (192, 30, 10), (224, 40, 14), (256, 8, 24), (288, 24, 12))
SHAPES += ((352, 16, 16),)
BOUND, SMALL = 0.15, 0.05


def config_of(name: str) -> UnivalConfig:
    """A model of configs/model without video encoder."""
    return UnivalConfig.from_yaml(ROOT / f"configs/model/{name}.yaml", video_layers=None)


def works(shapes: tuple[tuple[int, int, int], ...]) -> list[Work]:
    """The passes: one row each."""
    return [Work("image", (side, side), 1, 1, text, target) for side, text, target in shapes]


def measure(
    models: dict[str, UnivalForConditionalGeneration], work: Work, tries: int
) -> dict[str, dict[str, Any]]:
    """Least seconds of a pass of each model, and by part; the models take turns."""
    batch = make_batch(work, torch.float32, "cpu")
    whole: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(1 + tries):  # the first one makes what is made once
        for name, model in models.items():
            start = time.thread_time()
            run_pass(model, batch).backward()
            whole[name].append(time.thread_time() - start)
            model.zero_grad()
            parts[name].append(timed_parts(model, batch))
    return {
        name: {
            "seconds": min(whole[name][1:]),
            "parts": {
                part: min(found[part] for found in parts[name][1:]) for part in parts[name][0]
            },
        }
        for name in models
    }


def timed_parts(
    model: UnivalForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Seconds of one pass's operators by part."""
    recorder = Recorder(time.thread_time)
    recorder.watch(model)
    with recorder:
        recorder.backward(run_pass(model, batch))
    recorder.release()
    model.zero_grad()
    found: dict[str, float] = defaultdict(float)
    for (part, _, _), seconds in recorder.seconds.items():
        found[part] += seconds
    return dict(found)


def predict(config: UnivalConfig, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """Predicted seconds of a pass, and by part."""
    by_part: dict[str, float] = defaultdict(float)
    counts = count(config, work, Training("fp32", fused=False))
    for (part, _), estimate in pass_seconds(counts, ceilings, "fp32").items():
        by_part[part] += estimate.seconds
    return {"seconds": sum(by_part.values()), "parts": dict(by_part)}


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Of the parts in a pass."""
    whole = sum(found["parts"].values())
    return {part: seconds / whole for part, seconds in found["parts"].items()}


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios and shares, predicted over measured, by shape."""
    told = []
    for row in rows:
        measured, predicted = row["measured"], row["predicted"]
        ratio = {
            name: found["ofa_base"]["seconds"] / found["unival_base"]["seconds"]
            for name, found in (("measured", measured), ("predicted", predicted))
        }
        off = {"ratio": ratio["predicted"] / ratio["measured"] - 1}
        for model in MODELS:
            found = shares(measured[model])
            for part, share in shares(predicted[model]).items():
                off[f"{model} {part}"] = share / found[part] - 1
        small = [
            f"{model} {part}"
            for model in MODELS
            for part, share in shares(measured[model]).items()
            if share < SMALL
        ]
        told.append(
            {
                "shape": row["shape"],
                "load": row["load"],
                "ratio": ratio,
                "off": off,
                "small": small,
            }
        )
    return told


def table(compared: list[dict[str, Any]]) -> str:
    """For people."""
    lines = []
    for row in compared:
        side, text, target = row["shape"]
        ratio = row["ratio"]
        lines.append(
            f"{side} pixels, {text} + {target} tokens, load {row['load']:.1f}: OFA / UnIVAL "
            f"measured {ratio['measured']:.3f}, predicted {ratio['predicted']:.3f} "
            f"({row['off']['ratio']:+.1%})"
        )
        for name, off in row["off"].items():
            if name != "ratio":
                small = "  (small)" if name in row["small"] else ""
                lines.append(f"    {name:<28} share {off:+7.1%}{small}")
    return "\n".join(lines)


def misses(compared: list[dict[str, Any]]) -> list[str]:
    """What is further off than the bound."""
    return [
        f"{row['shape']}: {name} {off:+.1%}"
        for row in compared
        for name, off in row["off"].items()
        if abs(off) > BOUND and name not in row["small"]
    ]


def main() -> int:
    """Calibrate, measure, predict, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ceilings", type=Path, help="a file, instead of a calibration now")
    parser.add_argument("--tries", type=int, default=3, help="passes of each shape (3)")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--save", type=Path, help="write the calibration to this file of ceilings")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args()
    if args.tries < 1 or args.shapes < 1:
        parser.error("--tries and --shapes must be at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed()  # as training does
    calibration = None if args.ceilings else Calibration()
    models = {name: UnivalForConditionalGeneration(config_of(name)).train() for name in MODELS}
    rows: list[dict[str, Any]] = []
    shapes = list(zip(SHAPES, works(SHAPES[: args.shapes]), strict=False))
    for shape, work in shapes:
        if calibration is not None:
            calibration.round()
        measured = measure(models, work, args.tries)
        rows.append({"shape": shape, "measured": measured, "load": os.getloadavg()[0]})
        print(f"{shape} measured, load {rows[-1]['load']:.1f}", file=sys.stderr, flush=True)
    ceilings = read_ceilings(args.ceilings) if calibration is None else calibration.ceilings()
    if args.save is not None:
        ceilings.save(args.save)
    for row, (_, work) in zip(rows, shapes, strict=True):
        row["predicted"] = {name: predict(config_of(name), work, ceilings) for name in MODELS}
    compared = compare(rows)
    wrong = misses(compared)
    print(table(compared))
    print("", *(wrong or [f"everything is within {BOUND:.0%}"]), sep="\n")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        told = {
            "command": " ".join(sys.argv),
            "torch": torch.__version__,
            "ceilings": asdict(ceilings),
            "rows": rows,
            "compared": compared,
            "misses": wrong,
        }
        args.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
