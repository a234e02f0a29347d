"""Bytes of parameters, gradients and optimizer state that a rank holds under each ZeRO stage.

    python benchmarks/zero_memory.py --out results/zero_memory
    python benchmarks/zero_memory.py --model configs/model/unival_base.yaml --ranks 2

A training step of unival.training.engine.Engine runs on random rows, on gloo processes of this
machine that the script starts. Live tensors are counted on every rank: each storage once, with all
its bytes, in the first of these categories that it belongs to.

    parameters  what the model computes with; at stage 3 a rank's part of them, and `whole`: those
                below `stage3_param_persistence_threshold` elements, also whole on every rank
    optimizer   Adam's two moments, and float32 masters where these are not the parameters
    gradients   what a step sums its passes in
    pass        bf16 gradients of one pass where the sum is a float32 buffer beside them
    buckets     DeepSpeed's buffers for gradients that are about to be reduced
    rest        the model's buffers, the batch, and what else is there

They are counted before the update, when backward has made all gradients, and after it, when moments
and new parameters are there; a figure is the larger one. `update` are the gradients at AdamW's call
inside the update: stage 3 copies them for it. What lives only within backward (at stage 2 the
buckets), or at other times in the update, is not seen.

The first three have to be within 10 % of Rajbhandari et al. (2020), for P trained parameters on N
ranks, in bytes:

                 parameters              optimizer                gradients
    fp32         4 P, stage 3: 4 P / N   8 P, from 1: 12 P / N    4 P, from stage 2: 4 P / N
    bf16         2 P, stage 3: 2 P / N   from stage 1: 12 P / N   4 P, from stage 2: 4 P / N

At fp32 and stage 0 the parameters are their own masters; from stage 1 DeepSpeed keeps a float32
master beside them also in fp32 (4 of the 12). In bf16 the engine sums gradients in float32, and it
refuses stage 0.

The formula knows nothing of two things that weigh more in a small model: the parameters kept whole
at stage 3, and, in fp32 at stage 2, gradients of parameters that a border between two ranks cuts,
which both keep whole. The default model is therefore `unival_tiny` with a small vocabulary and wide
layers (WIDE); `unival_base` is large enough as it is. Encoders of media that are not shown are left
out.

The exit status is 1 if a figure is out of bounds. Results go to FILE.md and FILE.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from unival.model.configuration import UnivalConfig
from unival.planning.memory import zero_state
from unival.training.batches import Batch
from unival.training.engine import Engine, init_distributed
from unival.training.options import (
    DeepSpeedOptions,
    MicroBatch,
    Mixture,
    ModelOptions,
    Run,
    Source,
    Stage,
)
from unival.training.trainer import make_model
from unival.training.zero_state import base_optimizer, zero_stage
from unival.vocabulary import BOS, EOS

ROOT = Path(__file__).resolve().parents[1]
TINY = "configs/model/unival_tiny.yaml"
# No parameter is a large part of what a rank of four holds, nor are the small ones together.
WIDE = [
    "vocab_size=2000",
    "d_model=512",
    "ffn_dim=1024",
    "encoder_layers=4",
    "decoder_layers=4",
    "num_heads=8",
    "num_text_positions=66",
    "max_text_positions=64",
    "token_bucket_size=16",
    "image_bucket_size=8",
]
BOUND = 0.10
FORMULA = ("parameters", "gradients", "optimizer")
CATEGORIES = (*FORMULA, "whole", "pass", "buckets", "rest")
# The field that leaves a medium's encoder out, and the shape of one of the medium.
FIELDS = {"image": "image_layers", "video": "video_layers", "audio": "audio_channels"}
SHAPES = {
    "image": ("pixel_values", (3, 64, 64)),
    "video": ("video_values", (3, 4, 64, 64)),
    "audio": ("audio_values", (48000,)),
}
WORDS = 6  # of a row's source and of its target
# Where DeepSpeed's optimizers keep gradients that are no parameter's `grad`.
HELD = (
    "all_grad_tensors",
    "averaged_gradients",
    "grads_in_partition",
    "fp32_groups_gradients_flat",
    "grad_partitions_flat_buffer",
)
MIB = 2**20


@dataclass
class Case:
    """One configuration of the grid."""

    precision: str
    stage: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.precision}, stage {self.stage}, ranks {self.ranks}"


def formula(parameters: int, case: Case) -> dict[str, float]:
    """Bytes of a rank after Rajbhandari et al. (2020), padding and small parameters left out."""
    return asdict(zero_state(parameters, case.precision, case.stage, case.ranks))


def live_tensors() -> Iterator[Tensor]:
    """Every tensor that Python knows, and gradients that only their parameters know."""
    gc.collect()
    for found in gc.get_objects():
        # By type: isinstance would ask lazily imported modules for their class.
        if issubclass(type(found), Tensor) and found.device.type != "meta":
            yield found
            if found.is_leaf and found.grad is not None:
                yield found.grad


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage that is not empty, by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def parts_of(engine: Engine) -> list[Tensor]:
    """This rank's part of every parameter at stage 3."""
    return [part for p in engine.names if (part := getattr(p, "ds_tensor", None)) is not None]


def held(engine: Engine) -> dict[str, dict[int, int]]:
    """Storages of each category but the rest; one may be in several, and belongs to the first."""
    parameters, optimizer = list(engine.names), base_optimizer(engine.deepspeed)
    masters = [piece.flat for piece in engine.pieces]
    passing = [p.grad for p in parameters if p.grad is not None and p.dtype != torch.float32]
    sums = [p.grad for p in parameters if p.grad is not None and p.dtype == torch.float32]
    sums += [p.grad for p in masters if p.grad is not None and p.dtype == torch.float32]
    wrapper = engine.deepspeed.optimizer
    sums += tensors_in([getattr(wrapper, name, None) for name in HELD])
    buckets = getattr(wrapper, "ipg_buckets", {}).values()
    return {
        "parameters": storages([*parameters, *parts_of(engine)]),
        "optimizer": storages([*tensors_in(list(optimizer.state.values())), *masters]),
        "buckets": storages(tensors_in([bucket.buffer for bucket in buckets])),
        "gradients": storages(sums),
        "pass": storages(passing),
    }


def count(engine: Engine) -> dict[str, int]:
    """Bytes of this rank's live tensors by category."""
    members, found = held(engine), dict.fromkeys(CATEGORIES, 0)
    left = storages(live_tensors())
    for own in members.values():
        left |= own
    for category, own in members.items():
        found[category] = sum(left.pop(address, 0) for address in own)
    found["rest"] = sum(left.values())
    if zero_stage(engine.deepspeed) == 3:  # a parameter that is not whole is empty
        whole, parts = storages(engine.names), storages(parts_of(engine))
        found["whole"] = sum(size for address, size in whole.items() if address not in parts)
    return found


def make_run(args: argparse.Namespace, case: Case) -> Run:
    """A run of one stage whose micro-batches are of the media, one row a rank."""
    micro_batches = [MicroBatch(medium, [Mixture(medium, case.ranks)]) for medium in args.media]
    return Run(
        output="",
        sources={medium: Source("", medium=medium) for medium in args.media},
        stages=[Stage("memory", 1, micro_batches, learning_rate=1e-5)],
        model=ModelOptions(str(args.model), args.changed),
        precision=case.precision,
        deepspeed=DeepSpeedOptions(zero_stage=case.stage),
    )


def row(medium: str, group: int, vocabulary: int, rank: int) -> Batch:
    """A micro-batch of one row of random ids and of noise for the medium."""
    source = torch.Generator().manual_seed(rank)
    words = torch.randint(4, vocabulary, (2, 1, WORDS), generator=source)
    begin, end = torch.full((1, 1), BOS), torch.full((1, 1), EOS)
    name, shape = SHAPES[medium]
    tensors = {
        "input_ids": torch.cat([begin, words[0], end], 1),
        "attention_mask": torch.ones(1, WORDS + 2, dtype=torch.bool),
        "decoder_input_ids": torch.cat([begin, words[1]], 1),
        "labels": torch.cat([words[1], end], 1),
        "loss_weight": torch.ones(1),
        "media_index": torch.zeros(1, dtype=torch.long),
        name: torch.randn(1, *shape, generator=source),
    }
    return Batch(tensors, ["vqa"], 1.0, medium, group)


def observe(engine: Engine) -> dict[str, dict[str, int]]:
    """Count before, in and after the next update; the dict fills with it."""
    found: dict[str, dict[str, int]] = {}
    update = engine.deepspeed.step

    def step() -> None:
        found["before"] = count(engine)
        update()
        found["after"] = count(engine)

    def call(*_: Any) -> None:
        found["update"] = count(engine)

    engine.deepspeed.step = step
    base_optimizer(engine.deepspeed).register_step_pre_hook(call)
    return found


def work(rank: int, port: int, case: Case, args: argparse.Namespace, folder: str) -> None:
    """What a rank does: one step; its counts go to a file."""
    os.dup2(2, 1)  # DeepSpeed's talk
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // case.ranks))
    run = make_run(args, case)
    world = init_distributed()
    engine = Engine(make_model(run, run.stages[0], None), run, run.stages[0], world)
    moments = observe(engine)
    vocabulary = engine.model.config.vocab_size
    engine.step([row(m, g, vocabulary, rank) for g, m in enumerate(args.media)], 1)
    sizes = [engine.shapes[name].numel() for name in engine.names.values()]
    threshold = engine.deepspeed.zero_param_persistence_threshold()
    told = {
        "parameters": sum(sizes),
        "moments": moments,
        "small_parameters": sum(size for size in sizes if size < threshold),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    world.barrier()  # nobody leaves while another one still computes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The counts of all ranks of a case, and the deviations of the worst rank from the formula."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            work, (free_port(), case, args, folder), case.ranks, start_method="forkserver"
        )
        paths = [Path(folder) / f"{rank}.json" for rank in range(case.ranks)]
        told = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    expected = formula(told[0]["parameters"], case)
    peaks = []
    for moments in (t["moments"] for t in told):
        peak = {c: max(moments["before"][c], moments["after"][c]) for c in CATEGORIES}
        peaks.append(peak | {"update": moments["update"]["gradients"]})
    deviations = {
        name: max((peak[name] / expected[name] - 1 for peak in peaks), key=abs) for name in FORMULA
    }
    return {
        **asdict(case),
        "parameters": told[0]["parameters"],
        "small_parameters": told[0]["small_parameters"],
        "formula": expected,
        "deviation": deviations,
        "peak": peaks,
        "moments": [t["moments"] for t in told],
    }


def wrong(results: list[dict[str, Any]]) -> list[str]:
    """What is out of bounds, in words."""
    return [
        f"{result['precision']}, stage {result['stage']}, ranks {result['ranks']}: bytes of {name} "
        f"are {deviation:+.1%} from the formula's {result['formula'][name] / MIB:.1f} MiB a rank"
        for result in results
        for name, deviation in result["deviation"].items()
        if abs(deviation) > BOUND
    ]


def describe() -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    first = report["results"][0]
    others = [name for name in first["peak"][0] if name not in FORMULA]
    lines = [
        "# Bytes of a rank under ZeRO",
        "",
        ", ".join(f"{key} {value}" for key, value in report["environment"].items()),
        "",
        f"    {report['command']}",
        "",
        f"Model: {report['model']}, {first['parameters']:,} parameters, of which "
        f"{first['small_parameters']:,} in ones that stage 3 keeps whole. MiB of live tensors: of "
        "the rank farthest from the formula / by formula; in the other columns of that with most.",
        "",
        "| precision | ranks | stage | parameters | gradients | optimizer "
        f"| {' | '.join(others)} |",
        f"|{'---|' * (6 + len(others))}",
    ]
    for result in report["results"]:
        cells = [result["precision"], str(result["ranks"]), str(result["stage"])]
        for name in FORMULA:
            expected, deviation = result["formula"][name], result["deviation"][name]
            found = expected * (1 + deviation)
            cells.append(f"{found / MIB:.1f} / {expected / MIB:.1f} ({deviation:+.1%})")
        cells += [f"{max(p[name] for p in result['peak']) / MIB:.1f}" for name in others]
        lines.append(f"| {' | '.join(cells)} |")
    out = report["out_of_bounds"] or [f"Every figure is within {BOUND:.0%} of the formula."]
    return "\n".join([*lines, "", *out])


def parse(argv: list[str]) -> argparse.Namespace:
    """Options; `changed` has the fields of the model's config that are not the file's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=TINY, help=f"a model's config ({TINY})")
    parser.add_argument(
        "--set",
        nargs="*",
        metavar="FIELD=JSON",
        help=f"config fields to change ({' '.join(WIDE)} where the model is the default one)",
    )
    parser.add_argument("--media", nargs="+", default=["image"], choices=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"]
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.md and FILE.json")
    args = parser.parse_args(argv)
    fields = args.set if args.set is not None else WIDE if args.model == TINY else []
    try:
        args.changed = {key: json.loads(value) for key, value in (x.split("=", 1) for x in fields)}
        args.changed |= {field: None for m, field in FIELDS.items() if m not in args.media}
        config = UnivalConfig.from_yaml(args.model, **args.changed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for medium in args.media:
        if getattr(config, FIELDS[medium]) is None:
            parser.error(f"{args.model} has no {medium} encoder; --set {FIELDS[medium]}=[...]")
    if min(args.ranks) < 1:
        parser.error("--ranks must be at least 1")
    args.cases = [
        Case(precision, stage, ranks)
        for precision in args.precision
        for ranks in args.ranks
        for stage in args.stages
        if (precision, stage) != ("bf16", 0)
    ]
    if not args.cases:
        parser.error("bf16 at stage 0 is what the engine refuses; nothing is left to measure")
    return args


def main() -> int:
    """Measure, print the table, write the files."""
    args = parse(sys.argv[1:])
    # Of all ranks; they are forked from a server that has imported everything.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "error"}
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["unival.training.trainer", "deepspeed"]
    )
    results = []
    for number, case in enumerate(args.cases, start=1):
        print(f"{number} of {len(args.cases)}: {case}", file=sys.stderr)
        results.append(measure(case, args))
    report = {
        "environment": describe(),
        "command": shlex.join(["python", "benchmarks/zero_memory.py", *sys.argv[1:]]),
        "model": " ".join([args.model, *(f"{k}={json.dumps(v)}" for k, v in args.changed.items())]),
        "bound": BOUND,
        "out_of_bounds": wrong(results),
        "results": results,
    }
    print(table(report))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        told = json.dumps(report, indent=2)
        args.out.with_suffix(".json").write_text(told + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(table(report) + "\n", encoding="utf-8")
    return 1 if report["out_of_bounds"] else 0


if __name__ == "__main__":
    sys.exit(main())
