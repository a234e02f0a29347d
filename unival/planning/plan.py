"""`plan`: memory, speed, hours and cost of a run on GPUs that need not be there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from unival.data.media import MediaOptions
from unival.model.configuration import UnivalConfig
from unival.planning.ceilings import Ceilings, find_ceilings, parse_gpus, read_ceilings
from unival.planning.counts import Counts, Training, Work, count, parameter_counts
from unival.planning.memory import RESERVED, buffer_bytes, largest, zero_state
from unival.planning.predict import (
    ZERO,
    Estimate,
    communication_seconds,
    pass_seconds,
    update_seconds,
)
from unival.training.batches import stage_media
from unival.training.checks import check_run, with_steps
from unival.training.deepspeed_config import (
    deepspeed_config,
    precision_of,
    zero_stage_of,
)
from unival.training.options import MicroBatch, Run, Stage

GIB = 2**30
# Media that one core makes ready in a second, on an AMD EPYC. Pictures: 640 x 480 JPEG to 384
# pixels with RandAugment, 1.4 ms to decode, 0.5 to resize, 3 to augment (benchmarks/NOTES.md).
# Films: 8 frames of 20 s of H.264 in 596 x 336 by seeking, 260 ms. Sounds: 10 s.
# benchmarks/decoding.py measures a machine's own.
DECODED = {"image": 200.0, "video": 3.8, "audio": 140.0, "text": math.inf}


@dataclass(frozen=True)
class Options:
    """What a config does not say.

    text, target  tokens of the encoder's text and of the decoder in a padded row
    price         of a GPU for an hour, in any currency
    decoded       media per second and core, by medium, instead of DECODED's
    rows          rows of sources, by name, for stages of `epochs`
    """

    text: int = 40
    target: int = 20
    price: float | None = None
    decoded: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text < 1 or self.target < 1:
            raise ValueError(f"text={self.text}, target={self.target}; wanted at least 1")
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise ValueError(f"price={self.price}; wanted a number of at least 0")
        for medium, rate in self.decoded.items():
            if medium not in DECODED or not rate > 0:
                known = ", ".join(DECODED)
                raise ValueError(f"decoded.{medium}={rate}; wanted above 0, of {known}")
        for name, rows in self.rows.items():
            if rows < 1:
                raise ValueError(f"rows.{name}={rows}; wanted at least 1")


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at a ZeRO stage. `refused`: the engine does not run it at this precision."""

    zero_stage: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    others: float
    refused: bool

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.others


@dataclass(frozen=True)
class MicroPlan:
    """One micro-batch of a stage: media of a pass of a rank, the most that fit, and cores.

    cores  of all ranks together, to decode as fast as the GPUs train
    """

    medium: str
    media: int
    examples: int
    largest: int
    per_second: float
    cores: float


@dataclass(frozen=True)
class StagePlan:
    """A stage. All times are predicted.

    step   seconds of an optimizer step; parts: likely seconds of it
    hours  of the stage; None where its steps are unknown
    memory by ZeRO stage; `zero_stage` is the run's own
    knobs  where it does not fit: what one change makes of it, in words
    """

    name: str
    steps: int
    examples: float
    step: Estimate
    parts: dict[str, float]
    samples_per_second: Estimate
    hours: Estimate | None
    gpu_hours: Estimate | None
    cost: Estimate | None
    parameters: dict[str, int]
    zero_stage: int
    memory: tuple[Memory, ...]
    fits: bool
    over: float
    knobs: tuple[str, ...]
    micro_batches: tuple[MicroPlan, ...]
    cores_needed: float
    cores_configured: int


@dataclass(frozen=True)
class Plan:
    """A run on a number of GPUs of a kind."""

    gpus: int
    ceilings: Ceilings
    precision: str
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, seconds, hours."""
        told = asdict(self)
        told["fits"] = self.fits
        for stage, own in zip(told["stages"], self.stages, strict=True):
            for memory, row in zip(stage["memory"], own.memory, strict=True):
                memory["total"] = row.total
        return told


def plan(run: Run, gpus: str, ceilings: Path | None = None, options: Options | None = None) -> Plan:
    """Plan a run before anything is launched.

    Args:
        run: its config.
        gpus: number and kind, such as `4xA6000`; with `ceilings` the name may be any.
        ceilings: a file instead of those of configs/ceilings.

    Raises:
        FileNotFoundError: no such file of ceilings, or of the model's config.
        ValueError: an unknown GPU, or a run that no step could be made of on so many.
    """
    options = options or Options()
    number, name = parse_gpus(gpus)
    device = find_ceilings(name) if ceilings is None else read_ceilings(ceilings)
    check_run(run, number)
    if options.rows:
        run = _with_steps(run, options.rows)
    stages = tuple(_Planner(run, stage, number, device, options).plan() for stage in run.stages)
    precision = precision_of(_deepspeed(run, run.stages[0]))
    return Plan(number, device, precision, stages, _assumptions(run, device, options))


def _with_steps(run: Run, rows: Mapping[str, int]) -> Run:
    unknown = [name for name in rows if name not in run.sources]
    if unknown:
        raise ValueError(f"rows of {unknown[0]!r}; sources are {', '.join(run.sources)}")
    for stage in run.stages:
        for mix in stage.micro_batches[0].mixture if stage.epochs is not None else ():
            if mix.source not in rows:
                raise ValueError(
                    f"stage {stage.name!r} has epochs: give the rows of source {mix.source!r} too"
                )
    return with_steps(run, {name: range(count) for name, count in rows.items()})


def _deepspeed(run: Run, stage: Stage) -> dict[str, Any]:
    """The ds_config as far as a plan reads it. fp16 is planned without a GPU, too."""
    if run.precision == "fp16":
        config = deepspeed_config(replace(run, precision="bf16"), stage)
        config["fp16"] = {"enabled": bool(config.pop("bf16", {}).get("enabled"))}
        return config
    return deepspeed_config(run, stage)


class _Planner:
    """Works out one stage."""

    def __init__(
        self, run: Run, stage: Stage, ranks: int, device: Ceilings, options: Options
    ) -> None:
        self.run, self.stage, self.ranks, self.device = run, stage, ranks, device
        self.options, self.media = options, stage_media(run, stage)
        for name in ("adapter", "scst"):
            if getattr(stage, name) is not None:
                raise ValueError(
                    f"stage {stage.name!r} has {name}, whose passes are not those that a plan "
                    "counts: it cannot be planned"
                )
        self.config = UnivalConfig.from_yaml(run.model.config, **run.model.overrides)
        deepspeed = _deepspeed(run, stage)
        self.precision, self.zero_stage = precision_of(deepspeed), zero_stage_of(deepspeed)
        self.offload = "offload_optimizer" in deepspeed.get("zero_optimization", {})
        shown = [micro.medium for micro in stage.micro_batches]
        self.parameters = parameter_counts(self.config, shown, stage.freeze)
        self.counted: dict[tuple[Work, Training], Counts] = {}
        self.passes = len(stage.micro_batches) * stage.accumulate

    def plan(self) -> StagePlan:
        """All about the stage."""
        stage = self.stage
        parts: dict[str, Estimate] = defaultdict(lambda: ZERO)
        for micro in stage.micro_batches:
            for part, seconds in self._pass_seconds(micro).items():
                parts[part] = parts[part] + seconds.times(stage.accumulate)
        told = (self.ranks, self.zero_stage, self.device, self.precision)
        parts["optimizer"] = update_seconds(self.parameters["trained"], self.passes, *told)
        parts["communication"] = communication_seconds(
            self.parameters["trained"], self.passes, *told
        )
        step = sum(parts.values(), ZERO)
        examples = sum(examples_of(stage, micro) for micro in stage.micro_batches)
        hours = step.times(stage.steps / 3600) if stage.steps else None
        gpu_hours = hours.times(self.ranks) if hours else None
        price = self.options.price
        memory = tuple(self.memory(zero) for zero in range(4))
        over = memory[self.zero_stage].total - self.device.memory
        micro_plans = tuple(self._micro(micro, step) for micro in stage.micro_batches)
        loading = self.run.loading
        return StagePlan(
            name=stage.name,
            steps=stage.steps,
            examples=examples,
            step=step,
            parts={part: seconds.seconds for part, seconds in parts.items()},
            samples_per_second=Estimate(
                examples / step.seconds, examples / step.high, examples / step.low
            ),
            hours=hours,
            gpu_hours=gpu_hours,
            cost=gpu_hours.times(price) if gpu_hours and price is not None else None,
            parameters=self.parameters,
            zero_stage=self.zero_stage,
            memory=memory,
            fits=over <= 0,
            over=max(over, 0.0),
            knobs=tuple(self._knobs()) if over > 0 else (),
            micro_batches=micro_plans,
            cores_needed=sum(micro.cores for micro in micro_plans),
            cores_configured=self.ranks * (loading.threads + loading.workers),
        )

    def memory(
        self, zero_stage: int, activations: float | None = None, precision: str | None = None
    ) -> Memory:
        """A rank's bytes; `activations` of another pass than the run's own."""
        precision = precision or self.precision
        trained, frozen = self.parameters["trained"], self.parameters["frozen"]
        state = zero_state(trained, precision, zero_stage, self.ranks, frozen)
        if activations is None:
            activations = self._most_activations(self._training())
        if zero_stage == 3:  # weights that are gathered for a pass: all, up to a limit above ours
            activations += zero_state(trained, precision, 0, 1, frozen).parameters
        others = RESERVED + buffer_bytes(trained, precision, zero_stage, self.ranks)
        if self.stage.ema_decay is not None:
            others += 4 * trained / (self.ranks if zero_stage >= 1 else 1)
        return Memory(
            zero_stage,
            state.parameters,
            state.gradients,
            0.0 if self.offload and zero_stage else state.optimizer,
            activations,
            others,
            refused=precision != "fp32" and zero_stage == 0,
        )

    def _training(self, **changed: Any) -> Training:
        own = Training(
            self.precision,
            self.device.overlapped,
            self.run.recompute,
            "local" if self.run.batchnorm == "sync" else self.run.batchnorm,
            tuple(self.stage.freeze),
        )
        return replace(own, **changed)

    def _counts(self, micro: MicroBatch, media: int, training: Training | None = None) -> Counts:
        each = max(1, round(examples_of(self.stage, micro) / max(_media_of(micro), 1e-9)))
        work = Work(
            micro.medium,
            media_size(self.config, self.media, micro.medium),
            media,
            media * each,
            self.options.text,
            self.options.target,
        )
        training = training or self._training()
        if (work, training) not in self.counted:
            self.counted[work, training] = count(self.config, work, training)
        return self.counted[work, training]

    def _media(self, micro: MicroBatch) -> int:
        """The most media of a pass of a rank."""
        rows = micro.rows or sum(mix.rows for mix in micro.mixture)
        return math.ceil(rows / (self.ranks * self.stage.accumulate))

    def _pass_seconds(self, micro: MicroBatch) -> dict[str, Estimate]:
        """By part, of a pass with a mean number of media."""
        media = self._media(micro)
        found: dict[str, Estimate] = defaultdict(lambda: ZERO)
        mean = _media_of(micro) / (self.ranks * self.stage.accumulate)
        counts = self._counts(micro, media)
        for (part, _), seconds in pass_seconds(counts, self.device, self.precision).items():
            found[part] = found[part] + seconds.times(mean / media)
        return found

    def _most_activations(self, training: Training, divided: int = 1) -> float:
        """Of the largest pass; with 1 / `divided` of its media."""
        return max(
            self._counts(micro, math.ceil(self._media(micro) / divided), training).activations
            for micro in self.stage.micro_batches
        )

    def _micro(self, micro: MicroBatch, step: Estimate) -> MicroPlan:
        """What fits, and what must be decoded. Activations grow by the same with every medium."""
        media = self._media(micro)
        one, two = (float(self._counts(micro, n).activations) for n in (media, 2 * media))
        slope = (two - one) / media
        left = self.device.memory - self.memory(self.zero_stage, activations=0.0).total
        per_second = _media_of(micro) / step.seconds
        rate = self.options.decoded.get(micro.medium, DECODED[micro.medium])
        return MicroPlan(
            micro.medium,
            media,
            media * max(1, round(examples_of(self.stage, micro) / _media_of(micro))),
            largest(lambda n: one + slope * (n - media) <= left, media),
            per_second,
            per_second / rate,
        )

    def _divides(self, times: int) -> bool:
        """Whether the rows of the stage can be split into so many times its passes."""
        rows = [
            count
            for micro in self.stage.micro_batches
            for count in ([micro.rows] if micro.rows else [mix.rows for mix in micro.mixture])
        ]
        return not any(count % (self.ranks * self.stage.accumulate * times) for count in rows)

    def _knobs(self) -> list[str]:
        """What single changes make of a stage that does not fit."""
        own = self._training()
        found: list[tuple[str, int | str, Memory]] = []
        activations = self._most_activations(own)
        for zero in range(self.zero_stage + 1, 4):
            found.append(("deepspeed.zero_stage", zero, self.memory(zero, activations)))
        divided = 2
        while self._divides(divided):
            now = self.memory(self.zero_stage, self._most_activations(own, divided))
            if now.total <= self.device.memory or not self._divides(2 * divided):
                found.append(("accumulate", divided * self.stage.accumulate, now))
                break
            divided *= 2
        if not self.run.recompute:
            again = self._most_activations(replace(own, recompute=True))
            found.append(("recompute", "true", self.memory(self.zero_stage, again)))
        if self.precision == "fp32":
            half = self._most_activations(replace(own, precision="bf16"))
            zero = max(self.zero_stage, 1)
            found.append(("precision", "bf16", self.memory(zero, half, "bf16")))
        sizes = self.media
        smaller = replace(
            sizes,
            image_size=_smaller(sizes.image_size),
            video_size=_smaller(sizes.video_size),
        )
        if smaller != sizes:
            self.media = smaller
            less = self.memory(self.zero_stage, self._most_activations(own))
            self.media = sizes
            told = f"{smaller.image_size}, media.video_size={smaller.video_size}"
            found.append(("media.image_size", told, less))
        return [_knob(name, value, memory, self.device.memory) for name, value, memory in found]


def _smaller(pixels: int) -> int:
    """Two thirds of a side, in whole cells of 32 pixels."""
    return max(32, pixels * 2 // 3 // 32 * 32)


def _knob(name: str, value: int | str, memory: Memory, limit: int) -> str:
    over = memory.total - limit
    verdict = f"still {over / GIB:.1f} GiB too much" if over > 0 else "fits"
    return f"{name}={value}: {memory.total / GIB:.1f} GiB, {verdict}"


def media_size(config: UnivalConfig, media: MediaOptions, medium: str) -> tuple[int, ...]:
    """Of one medium, as counts.Work takes it."""
    return {
        "text": (),
        "image": (media.image_size, media.image_size),
        "video": (media.video_frames, media.video_size, media.video_size),
        "audio": (1 + media.audio_samples // config.hop_size, config.mel_bins),
    }[medium]


def _media_of(micro: MicroBatch) -> float:
    """Rows of a step on average, of all ranks together."""
    return micro.rows or sum(mix.rows / mix.every for mix in micro.mixture)


def examples_of(stage: Stage, micro: MicroBatch) -> float:
    """Examples of a step on average. A row without named tasks gives two, of sounds one."""
    usual = 1 if micro.medium == "audio" else 2
    each = [len(mix.tasks) or usual for mix in micro.mixture]
    if micro.rows:
        return micro.rows * sum(each) / len(each)
    rows = [mix.rows / mix.every for mix in micro.mixture]
    return sum(n * k for n, k in zip(rows, each, strict=True))


def _assumptions(run: Run, device: Ceilings, options: Options) -> tuple[str, ...]:
    decoded = {**DECODED, **options.decoded}
    kinds = [
        f"{kind} {reach.peak.likely:.0%} ({reach.peak.low:.0%} to {reach.peak.high:.0%})"
        for kind, reach in device.efficiency.items()
        if kind not in ("memory", "statistics")
    ]
    memory = device.efficiency["memory"].bandwidth
    made = "measured on it" if device.measured else "datasheet; efficiencies are experience"
    return (
        f"every time is predicted, none measured. Ceilings of {device.name}: {device.source} "
        f"({made})",
        f"of the peak: {', '.join(kinds)}; of the bandwidth: {memory.likely:.0%} "
        f"({memory.low:.0%} to {memory.high:.0%}); {device.launch * 1e6:g} us a launch, eager",
        "the band: every efficiency at its worst together, and at its best together; "
        "communication from wholly hidden to twice as long",
        f"text padded to {options.text} tokens, targets to {options.target}; a row gives an "
        "example for each of its mixture's tasks, two where none is named (sounds: one)",
        f"one core decodes {decoded['image']:g} pictures, {decoded['video']:g} films or "
        f"{decoded['audio']:g} sounds a second (AMD EPYC; 20 s films by seeking); loading is not "
        "part of a step's time",
        "activations: the most that lives at once in a counted pass, without libraries' "
        f"workspace; {RESERVED / GIB:.0f} GiB are set aside for CUDA, NCCL and fragments",
        f"the model is {run.model.config}; evaluation and checkpoints are not counted",
    )
