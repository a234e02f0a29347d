"""What unival.training.engine.Engine adds to a training step, on this machine's CPU.

    python benchmarks/engine_overhead.py --out results/engine_overhead

Two copies of a model train in one process, in turns (A B, B A, ...), each on one micro-batch of
random pictures and ids, in float32 on one rank:

    engine  Engine.step and what the trainer does around it: agreement between ranks, seeding, the
            interval's sums, and the entry of the log, here after every step and not every tenth
    plain   the same forward pass and loss, backward, clipping, AdamW and clearing of gradients, in
            a loop of PyTorch

`overhead` is the engine's median step over the plain one's, less 1; `of pairs` is the median of the
same for neighbouring steps, which slow drifts of the machine's speed leave alone. `between parts`
is the share of the engine's step that is no forward, backward or optimizer by its own clock; the
aim is 3 % at most. CPU time is that of the process on all its threads, which other programs disturb
less. Where threads lose their cores they wait for each other by burning CPU time too: there,
`--threads 1` tells more.

Stage 0 does in the optimizer what the plain loop does. From stage 1 DeepSpeed, also on one rank,
copies gradients into buckets and partitions and parameters back from its masters.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_step import cpu_model

from unival.data.media import MediaOptions
from unival.training.batches import Batch
from unival.training.engine import Engine, World, init_distributed
from unival.training.freezing import freeze
from unival.training.losses import Criterion
from unival.training.options import (
    DeepSpeedOptions,
    MicroBatch,
    Mixture,
    ModelOptions,
    Run,
    Source,
    Stage,
)
from unival.training.parts import PartClock
from unival.training.trainer import Interval, make_model
from unival.vocabulary import BOS, EOS

PARTS = ("forward", "backward", "optimizer")
AIM = 0.03


def make_run(args: argparse.Namespace, zero_stage: int) -> Run:
    """A run of one stage with one micro-batch of pictures."""
    micro_batch = MicroBatch("image", [Mixture("image", args.rows)])
    return Run(
        output="",
        sources={"image": Source("")},
        stages=[Stage("overhead", 1000, [micro_batch], learning_rate=1e-5)],
        model=ModelOptions(args.model),
        media=MediaOptions(image_size=args.image),
        deepspeed=DeepSpeedOptions(zero_stage=zero_stage),
    )


def make_batch(args: argparse.Namespace) -> Batch:
    """Rows of noise and random ids."""
    source, rows = torch.Generator().manual_seed(0), args.rows
    words = torch.randint(4, 50_000, (rows, args.text), generator=source)
    targets = torch.randint(4, 50_000, (rows, args.target), generator=source)
    begin, end = torch.full((rows, 1), BOS), torch.full((rows, 1), EOS)
    tensors = {
        "input_ids": torch.cat([begin, words, end], 1),
        "attention_mask": torch.ones(rows, args.text + 2, dtype=torch.bool),
        "decoder_input_ids": torch.cat([begin, targets], 1),
        "labels": torch.cat([targets, end], 1),
        "loss_weight": torch.ones(rows),
        "media_index": torch.arange(rows),
        "pixel_values": torch.randn(rows, 3, args.image, args.image, generator=source),
    }
    return Batch(tensors, ["vqa"] * rows, 1.0, "image")


class Plain:
    """The step in plain PyTorch."""

    def __init__(self, run: Run) -> None:
        stage, options = run.stages[0], run.optimizer
        self.model = make_model(run, stage, None).train()
        freeze(self.model, stage.freeze, ["image"])
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=stage.learning_rate,
            betas=(options.betas[0], options.betas[1]),
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.criterion, self.clip_norm = Criterion(), stage.clip_norm
        self.clock = PartClock(torch.device("cpu"))

    def step(self, batch: Batch) -> float:
        """One update; returns the loss."""
        tensors: dict[str, Tensor] = dict(batch.tensors)
        labels, weight = tensors.pop("labels"), tensors.pop("loss_weight")
        with self.clock.part("forward"):
            out = self.model(**tensors, output_logits=False)
            states, embedding = out.decoder_last_hidden_state, self.model.get_input_embeddings()
            result = self.criterion.of_states(states, embedding.weight, labels, weight=weight)
            loss = result.loss / result.tokens
        with self.clock.part("backward"):
            loss.backward()
        with self.clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())


def timed(step: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Seconds of a step: by the wall's clock, of the CPU, and by part."""
    wall, cpu = time.perf_counter(), time.process_time()
    parts = step()
    return {"cpu": time.process_time() - cpu, "step": time.perf_counter() - wall, **parts}


def measure(args: argparse.Namespace, zero_stage: int, world: World) -> dict[str, Any]:
    """Steps of both in turns, and what they tell."""
    run, batch = make_run(args, zero_stage), make_batch(args)
    stage = run.stages[0]
    plain = Plain(run)
    engine = Engine(make_model(run, stage, None), run, stage, world)
    interval, updates = Interval(), 0

    def engine_step() -> dict[str, float]:
        nonlocal updates
        updates += 1
        began = time.monotonic()
        engine.request()
        result = engine.step([batch], updates)
        seconds = time.monotonic() - began
        interval.add(result, 0.0, seconds, [batch])
        told = interval.read(engine)
        return {name: share * seconds for name, share in told["parts"].items()}

    def plain_step() -> dict[str, float]:
        plain.step(batch)
        return plain.clock.read()

    steps = {"engine": engine_step, "plain": plain_step}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(args.warmup + args.steps):
        for name in order:
            found = timed(steps[name])
            if number >= args.warmup:
                runs[name].append(found)
        order.reverse()
    return {"zero_stage": zero_stage, **summary(runs), "runs": runs}


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both, and the engine's overhead."""
    medians = {
        name: {key: statistics.median(f[key] for f in found) for key in found[0]}
        for name, found in runs.items()
    }
    pairs = list(zip(runs["engine"], runs["plain"], strict=True))
    share = [1 - sum(found[part] for part in PARTS) / found["step"] for found in runs["engine"]]
    return {
        "medians": medians,
        "overhead": medians["engine"]["step"] / medians["plain"]["step"] - 1,
        "overhead_of_pairs": statistics.median(a["step"] / b["step"] - 1 for a, b in pairs),
        "overhead_cpu": statistics.median(a["cpu"] / b["cpu"] - 1 for a, b in pairs),
        "between_parts": statistics.median(share),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    machine, options = report["machine"], report["options"]
    lines = [
        "# Overhead of the engine",
        "",
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        "",
        f"    {report['command']}",
        "",
        f"{options['model']}, float32, {options['rows']} rows, pictures of {options['image']} px; "
        f"medians of {options['steps']} steps of each after {options['warmup']}. Seconds:",
        "",
        "| ZeRO stage | | step | forward | backward | optimizer | agree | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        for name, median in result["medians"].items():
            keys = ("step", *PARTS, "agree", "cpu")
            cells = [f"{median[key]:.3f}" if key in median else "" for key in keys]
            lines.append(f"| {result['zero_stage']} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| ZeRO stage | overhead | of pairs | of CPU time | between parts (aim: 3 %) |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        names = ("overhead", "overhead_of_pairs", "overhead_cpu", "between_parts")
        cells = [f"{result[name]:+.2%}" for name in names]
        lines.append(f"| {result['zero_stage']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print the tables, write the files; 1 if more than the aim is between the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="configs/model/unival_base.yaml")
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1], choices=range(4))
    for name, value, what in (
        ("rows", 2, "rows of the micro-batch"),
        ("image", 224, "pixels of a picture's side"),
        ("text", 24, "random tokens of the encoder's text"),
        ("target", 16, "random tokens of the decoder's"),
        ("steps", 7, "steps of each that are timed"),
        ("warmup", 2, "steps of each before"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    parser.add_argument("--threads", type=int, help="of torch (as many as it takes by itself)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.md and FILE.json")
    args = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    load, world, results = os.getloadavg(), init_distributed(), []
    for zero_stage in args.stages:
        results.append(measure(args, zero_stage, world))
        gc.collect()  # an engine holds itself in circles
    report = {
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load before": f"{load[0]:.2f}",
            "load after": f"{os.getloadavg()[0]:.2f}",
        },
        "command": shlex.join(["python", "benchmarks/engine_overhead.py", *sys.argv[1:]]),
        "options": {key: value for key, value in vars(args).items() if key != "out"},
        "results": results,
    }
    print(table(report))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        told = json.dumps(report, indent=2)
        args.out.with_suffix(".json").write_text(told + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(table(report) + "\n", encoding="utf-8")
    return 1 if max(result["between_parts"] for result in results) > AIM else 0


if __name__ == "__main__":
    sys.exit(main())
