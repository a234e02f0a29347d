"""Time of one training step by part, on this machine.

    python benchmarks/train_step.py --config unival_base --device cpu --batch 4 --image 384
    python benchmarks/train_step.py --config unival_tiny --medium image video audio --json out.json
    python benchmarks/train_step.py --config unival_base --trace runs/trace.json.gz

A step is what training does: take a batch from the files of samples/, move it, run the media
encoders, the language model's encoder and decoder, the loss over the whole vocabulary, the backward
pass, and the optimizer (gradient clipping and fused AdamW). With several media every medium is one
micro-batch of the step. Text is random ids of the given lengths.

As in training, the next step's batches are decoded and collated beside the step. `data_wait` is
what the step waits for them; the line `decoding` says what they take when nothing runs beside them.
On a CPU both share the cores: what the step does not wait for, its other parts pay for.

On a GPU each part ends with a synchronization; the step is timed once more without these. With
--dtype bf16 weights and optimizer state are bf16: the float32 master copy of DeepSpeed is no part
of it. The peak is measured in the same run: the fastest of some products of two square matrices of
the dtype. A GPU's float32 convolutions may use TF32 while the product does not; the machine line
says which.

--trace writes one more step, after those that are timed, as a profiler's trace that opens in
https://ui.perfetto.dev: the parts are ranges, with PyTorch's operators (and a GPU's kernels) below.

On a processor, other programs disturb these numbers: the last lines say how many cores this process
kept busy. Where these are fewer than its threads, the numbers say little about the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from unival.data.batch import MEDIUM_KEYS, collate
from unival.data.media import Loading, MediaLoader, MediaOptions
from unival.data.records import Origin, Record
from unival.kernels.cpu import native
from unival.kernels.cpu.memory import keep_freed
from unival.model import flops
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks.base import Example
from unival.training.losses import Criterion

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = {"image": "caption", "video": "video_caption", "audio": "audio_caption"}
PARTS = (
    "data_wait",
    "transfer",
    "image_encoder",
    "video_encoder",
    "audio_encoder",
    "lm_encoder",
    "lm_decoder",
    "loss",
    "backward",
    "optimizer",
)
FIRST_WORD, LAST_WORD = 4, 50000  # text ids drawn for the batch
MATMUL = {"cpu": 2048, "cuda": 8192}
CLIP_NORM = 5.0


class Clock:
    """Seconds by part; parts may be entered more than once in a step.

    Parts are ranges of a profiler's trace while `traced`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_part, self.traced = True, False
        self.ranges: dict[str, record_function] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}

    def now(self) -> float:
        """Seconds, after everything queued on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, name: str) -> None:
        if self.traced:
            self.ranges[name] = record_function(name)
            self.ranges[name].__enter__()
        if self.by_part:
            self._started[name] = self.now()

    def stop(self, name: str) -> None:
        if self.by_part:
            self.seconds[name] += self.now() - self._started.pop(name)
        if self.traced:
            self.ranges.pop(name).__exit__(None, None, None)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)

    def watch(self, module: nn.Module, name: str) -> None:
        """Time every forward pass of a module."""
        module.register_forward_pre_hook(lambda *_: self.start(name))
        module.register_forward_hook(lambda *_: self.stop(name))


class Samples:
    """Batches from the files of samples/, in the order of their annotations."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.options = MediaOptions(
            image_size=args.image,
            video_size=args.video,
            video_frames=args.frames,
            audio_samples=args.audio,
        )
        device = "gpu" if args.device == "cuda" else "cpu"
        self.loader = MediaLoader(self.options, Loading(device=device))
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.prepared: list[Future[dict[str, Tensor]]] = []
        self.rng = random.Random(0)
        self.next: dict[str, int] = defaultdict(int)
        self.records: dict[str, list[Record]] = defaultdict(list)
        path = ROOT / "samples" / "annotations.jsonl"
        for row, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            file = ROOT / "samples" / entry["file"]
            # As in tables: pictures are bytes, films and sounds are paths.
            media = file.read_bytes() if entry["kind"] == "image" else file
            kind = KINDS[entry["kind"]]
            record = Record(id=str(row), kind=kind, media=media, origin=Origin(str(path), row))
            self.records[entry["kind"]].append(record)

    def _words(self, count: int) -> list[int]:
        return [self.rng.randrange(FIRST_WORD, LAST_WORD) for _ in range(count)]

    def batch(self, medium: str) -> dict[str, Tensor]:
        """Decode and collate the next rows of a medium."""
        found, chosen = self.records[medium], []
        for _ in range(self.args.batch if medium != "text" else 0):
            chosen.append(found[self.next[medium] % len(found)])
            self.next[medium] += 1
        media = [loaded.tensor for loaded in self.loader.load(chosen, [""] * len(chosen))]
        rows = []
        for index in range(self.args.batch):
            target = self._words(self.args.target)
            source = [0, *self._words(self.args.text - 2), 2]
            rows.append((Example(source, [0, *target[:-1]], target), index))
        return collate(rows, media, medium)

    def prepare(self) -> None:
        """Begin with the micro-batches of the next step."""
        self.prepared += [self.worker.submit(self.batch, medium) for medium in self.args.medium]

    def take(self) -> dict[str, Tensor]:
        """The next micro-batch, as soon as it is ready."""
        return self.prepared.pop(0).result()

    def close(self) -> None:
        """End what is being prepared."""
        self.worker.shutdown(cancel_futures=True)
        self.loader.close()


class Step:
    """One training step of a model, timed by part."""

    def __init__(self, args: argparse.Namespace, config: UnivalConfig) -> None:
        torch.manual_seed(0)
        self.args, self.config = args, config
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        if self.device.type == "cpu":
            keep_freed()  # as training does
        self.clock, self.samples = Clock(self.device), Samples(args)
        model = UnivalForConditionalGeneration(config).to(self.device, self.dtype)
        self.model = model.train()
        self.criterion = Criterion()
        for medium in MEDIUM_KEYS:
            encoder = getattr(model.encoder, f"{medium}_encoder", None)
            if encoder is not None and medium in args.medium:
                self.clock.watch(encoder, f"{medium}_encoder")
        self.clock.watch(model.encoder, "lm_encoder")
        self.clock.watch(model.decoder, "lm_decoder")
        for name, parameter in model.named_parameters():
            # As in training: encoders of media that are not shown take no part.
            if any(name.startswith(f"encoder.{m}_") for m in MEDIUM_KEYS if m not in args.medium):
                parameter.requires_grad_(False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.01, fused=True)

    def run(self) -> tuple[float, dict[str, float]]:
        """One step: its seconds, and those of each part."""
        clock = self.clock
        clock.seconds.clear()
        start = clock.now()
        for number in range(len(self.args.medium)):
            with clock.part("data_wait"):
                tensors = self.samples.take()
            if number == 0:
                self.samples.prepare()
            self._micro_batch(tensors)
        with clock.part("optimizer"):
            nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        seconds, parts = clock.now() - start, dict(clock.seconds)
        inner = sum(parts.get(f"{medium}_encoder", 0.0) for medium in MEDIUM_KEYS)
        if "lm_encoder" in parts:
            parts["lm_encoder"] -= inner  # the media encoders run inside it
        return seconds, parts

    def _micro_batch(self, tensors: dict[str, Tensor]) -> None:
        clock = self.clock
        with clock.part("transfer"):
            tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            for name in ("pixel_values", "video_values"):
                if name in tensors:
                    tensors[name] = tensors[name].to(self.dtype)
        labels, weight = tensors.pop("labels"), tensors.pop("loss_weight")
        out = self.model(**tensors, output_logits=False)
        with clock.part("loss"):
            states, embedding = out.decoder_last_hidden_state, self.model.get_input_embeddings()
            result = self.criterion.of_states(states, embedding.weight, labels, weight=weight)
            loss = result.loss / result.tokens
        with clock.part("backward"):
            loss.backward()


def media_size(args: argparse.Namespace, medium: str) -> tuple[int, ...]:
    """Shape of one medium, as flops.forward takes it."""
    sizes = {
        "image": (args.image, args.image),
        "video": (args.frames, args.video, args.video),
        "audio": (args.audio,),
    }
    return sizes.get(medium, ())


def count_flops(args: argparse.Namespace, config: UnivalConfig) -> dict[str, int]:
    """Operations of a step by part."""
    total: dict[str, int] = defaultdict(int)
    for medium in args.medium:
        size = media_size(args, medium)
        found = flops.forward(config, medium, size, args.batch, args.text, args.target)
        for name, count in found.items():
            total[name] += count
    total["backward"] = flops.BACKWARD * sum(total.values())
    return dict(total)


def matmul_peak(device: torch.device, dtype: torch.dtype, tries: int = 5) -> dict[str, Any]:
    """The fastest of some large matrix products on the device."""
    size, clock = MATMUL[device.type], Clock(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(tries):
        start = clock.now()
        a @ b
        best = min(best, clock.now() - start)
    return {"size": size, "dtype": str(dtype), "flops_per_second": 2 * size**3 / best}


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Most bytes held so far."""
    if device.type == "cuda":
        return {
            "bytes": torch.cuda.max_memory_allocated(device),
            "what": "tensors on the GPU (max_memory_allocated)",
        }
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "what": "resident memory of the process, libraries included"}


def cpu_model() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    machine: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "device": "cpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        machine["compiled_passes"] = native.AVAILABLE
    else:
        machine["device"] = torch.cuda.get_device_name(device)
        machine["tf32_matmul"] = torch.backends.cuda.matmul.allow_tf32
        machine["tf32_conv"] = torch.backends.cudnn.allow_tf32
    return machine


def summarize(
    step: Step,
    runs: list[tuple[float, dict[str, float]]],
    compute: list[float],
    memory: dict[str, Any],
) -> dict[str, Any]:
    """Medians by part, with operations and their share of the peak."""
    counted = count_flops(step.args, step.config)
    peak = matmul_peak(step.device, step.dtype)
    parts: dict[str, dict[str, Any]] = {}
    for name in sorted(runs[0][1], key=PARTS.index):
        seconds = statistics.median(found[name] for _, found in runs)
        parts[name] = {"seconds": seconds}
        if name in counted:
            rate = counted[name] / seconds
            share = rate / peak["flops_per_second"]
            parts[name] |= {"flops": counted[name], "fraction_of_peak": share}
    total = statistics.median(seconds for seconds, _ in runs)
    rate = sum(counted.values()) / statistics.median(compute)
    return {
        "step_seconds": total,
        "compute_seconds": statistics.median(compute),
        "unattributed_seconds": total - sum(part["seconds"] for part in parts.values()),
        "parts": parts,
        "flops": sum(counted.values()),
        "fraction_of_peak": rate / peak["flops_per_second"],
        "matmul_peak": peak,
        "peak_memory": memory,
    }


def measure(args: argparse.Namespace, config: UnivalConfig) -> dict[str, Any]:
    """Warm up, time the steps, and describe the result."""
    machine = describe_machine(torch.device(args.device))
    step = Step(args, config)
    decoding = decode_seconds(step.samples)
    step.samples.prepare()
    for _ in range(args.warmup):
        step.run()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
    wall, busy = time.perf_counter(), time.process_time()
    runs = [step.run() for _ in range(args.steps)]
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    compute = [seconds - parts["data_wait"] for seconds, parts in runs]
    if step.device.type == "cuda":
        compute = [free_step(step) for _ in range(args.steps)]
    memory = peak_memory(step.device)  # before the trace and the peak's matrices are made
    if args.trace is not None:
        write_trace(step, args.trace)
    step.samples.close()
    return {
        "machine": machine,
        "command": shlex.join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        "options": {
            key: value for key, value in vars(args).items() if key not in ("json", "trace")
        },
        "cores_busy": busy / wall,
        "decode_seconds": decoding,
        **summarize(step, runs, compute, memory),
    }


def write_trace(step: Step, path: Path) -> None:
    """One step with its parts, operators and kernels; compressed if the name ends in .gz."""
    activities = [ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    step.clock.traced = True
    with profile(activities=activities) as profiler:
        step.run()
    step.clock.traced = False
    profiler.export_chrome_trace(str(path))


def decode_seconds(samples: Samples, tries: int = 3) -> float:
    """The median time to decode and collate the micro-batches of a step, nothing beside it."""
    found = []
    for _ in range(tries + 1):  # the first one starts processes and builds graphs
        start = time.perf_counter()
        for medium in samples.args.medium:
            samples.batch(medium)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def free_step(step: Step) -> float:
    """Seconds of a step on batches decoded before, without synchronization between its parts."""
    for waiting in step.samples.prepared:
        waiting.result()
    prepare, step.samples.prepare = step.samples.prepare, lambda: None  # type: ignore[method-assign]
    step.clock.by_part = False
    try:
        return step.run()[0]
    finally:
        step.clock.by_part = True
        step.samples.prepare = prepare  # type: ignore[method-assign]
        prepare()


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    machine, peak, memory = report["machine"], report["matmul_peak"], report["peak_memory"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        report["command"],
        "",
        f"{'part':<16}{'ms':>12}{'of step':>9}{'GFLOP':>12}{'GFLOP/s':>12}{'of peak':>9}",
    ]
    total = report["step_seconds"]

    def line(name: str, seconds: float, count: int | None = None, share: float = 0.0) -> str:
        text = f"{name:<16}{seconds * 1e3:>12.2f}{seconds / total:>9.1%}"
        if count is None:
            return text
        return text + f"{count / 1e9:>12.3f}{count / seconds / 1e9:>12.1f}{share:>9.1%}"

    for name, part in report["parts"].items():
        lines.append(
            line(name, part["seconds"], part.get("flops"), part.get("fraction_of_peak", 0.0))
        )
    compute, share = report["compute_seconds"], report["fraction_of_peak"]
    lines += [
        line("between parts", report["unattributed_seconds"]),
        line("step", total),
        line("without waiting", compute, report["flops"], share),
        line("decoding", report["decode_seconds"]) + "  beside the step",
        "",
        f"peak: {peak['flops_per_second'] / 1e9:.1f} GFLOP/s, product of two "
        f"{peak['size']} x {peak['size']} matrices of {peak['dtype']}, measured in this run",
        f"memory: {memory['bytes'] / 2**20:.0f} MiB, {memory['what']}",
        f"processor: this process kept {report['cores_busy']:.2f} of {machine['cores']} cores busy",
        f"medians of {report['options']['steps']} steps after {report['options']['warmup']}",
    ]
    return "\n".join(lines)


def parse(argv: list[str]) -> tuple[argparse.Namespace, UnivalConfig]:
    """Arguments and the model's config; ends with status 2 where they cannot be served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
    parser.add_argument("--config", default="unival_base", choices=names)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=JSON", help="config fields to change"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--medium", nargs="+", default=["image"], choices=[*MEDIUM_KEYS, "text"])
    for name, value, what in (
        ("batch", 4, "rows of a micro-batch"),
        ("image", 384, "pixels of a picture's side"),
        ("video", 224, "pixels of a clip's side"),
        ("frames", 8, "frames of a clip"),
        ("audio", 480000, "values of a sound"),
        ("text", 24, "tokens of the encoder's text"),
        ("target", 16, "tokens of the decoder"),
        ("steps", 5, "steps that are timed"),
        ("warmup", 1, "steps before"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    parser.add_argument(
        "--trace", type=Path, help="write one more step as a trace (.json, .json.gz) for Perfetto"
    )
    args = parser.parse_args(argv)
    for name, least in (("batch", 1), ("text", 2), ("target", 1), ("steps", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no usable GPU here")
    try:
        changed = {key: json.loads(value) for key, value in (x.split("=", 1) for x in args.set)}
        config = UnivalConfig.from_yaml(ROOT / f"configs/model/{args.config}.yaml", **changed)
    except ValueError as error:
        parser.error(f"--set: {error}")
    fields = {"image": "image_layers", "video": "video_layers", "audio": "audio_channels"}
    for medium in args.medium:
        if medium in fields and getattr(config, fields[medium]) is None:
            parser.error(f"{args.config} has no {medium} encoder; --set {fields[medium]}=[...]")
    return args, config


def main() -> int:
    """Measure, print the table, write the JSON."""
    args, config = parse(sys.argv[1:])
    report = measure(args, config)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.trace is not None:
        print(f"trace of one more step: {args.trace}, opens in https://ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    sys.exit(main())
