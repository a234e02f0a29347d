"""Small runs for the tests of the engine, and what a rank does in them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unival.data.media import MediaOptions
from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.batches import Batch
from unival.training.engine import Engine, StepResult, World, init_distributed
from unival.training.options import (
    DeepSpeedOptions,
    MicroBatch,
    Mixture,
    ModelOptions,
    Optimizer,
    Run,
    Source,
    Stage,
)
from unival.training.trainer import make_model
from unival.vocabulary import BOS, EOS, IGNORE

ROOT = Path(__file__).parents[2]
# Without dropout, and small enough for twenty processes; the vocabulary stays whole.
OVERRIDES = {"d_model": 32, "ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 1}
MEDIA = MediaOptions(image_size=32, video_size=32, video_frames=2, audio_samples=3200)


def small_run(output: Path, stage: dict[str, Any] | None = None, **fields: Any) -> Run:
    """A run of one stage over images and clips, whose tables need not be there."""
    sources = {"qa": Source("qa.tsv"), "video_qa": Source("video_qa.tsv", medium="video")}
    options: dict[str, Any] = {
        "name": "one",
        "steps": 4,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.5,
        "clip_norm": 1.0,
        "micro_batches": [
            MicroBatch("image", [Mixture("qa", 4)]),
            MicroBatch("video", [Mixture("video_qa", 4)], weight=0.5),
        ],
    }
    run = Run(
        str(output),
        sources,
        [Stage(**(options | (stage or {})))],
        model=ModelOptions(str(ROOT / "configs/model/unival_tiny.yaml"), dict(OVERRIDES)),
        media=MEDIA,
        batchnorm="frozen",
        # Adam makes steps of full length of gradients that are nothing but rounding, such as those
        # of the keys' biases. This eps keeps them small, and so comparable.
        optimizer=Optimizer(eps=1e-3),
        evaluate_before=False,
        tensorboard=False,
        log_every=1,
        seed=8,  # with 7 and 11 rounding takes one element of a step in passes past its bound
    )
    return replace(run, **fields)


def stage_zero(run: Run, stage: int) -> Run:
    return replace(run, deepspeed=DeepSpeedOptions(zero_stage=stage))


def build(run: Run, world: World | None = None) -> Engine:
    stage = run.stages[0]
    return Engine(make_model(run, stage, None), run, stage, world or init_distributed())


def state_of(engine: Engine) -> dict[str, list[tuple[int, Tensor]]]:
    """This rank's pieces, and averages, by name: (first element, values)."""
    found = {}
    for index, piece in enumerate(engine.pieces):
        found[f"master/{piece.name}"] = [(piece.start, piece.master.detach().clone())]
        if engine.average is not None:
            found[f"average/{piece.name}"] = [(piece.start, engine.average.pieces[index].clone())]
    return found


def whole(states: list[dict[str, list[tuple[int, Tensor]]]]) -> dict[str, Tensor]:
    """The pieces of all ranks put together; where ranks hold the same ones, the first rank's."""
    parts: dict[str, dict[int, Tensor]] = {}
    for state in states:
        for name, runs in state.items():
            for start, values in runs:
                parts.setdefault(name, {}).setdefault(start, values)
    return {
        name: torch.cat([runs[start] for start in sorted(runs)]) for name, runs in parts.items()
    }


def rows_of_step(step: int) -> list[Batch]:
    """What all ranks together train on in a step: a micro-batch of images and one of clips."""
    return [noise("image", 4, 2 * step), noise("video", 4, 2 * step + 1, group=1, weight=0.5)]


def share_of(batches: list[Batch], rank: int, world: int, passes: int = 1) -> list[Batch]:
    """A rank's passes over the rows of a step."""
    found = []
    for batch in batches:
        rows = len(batch.tasks) // (world * passes)
        for number in range(passes):
            first = (number * world + rank) * rows
            tensors = {name: t[first : first + rows] for name, t in batch.tensors.items()}
            tensors["media_index"] = torch.arange(rows)
            found.append(replace(batch, tensors=tensors, tasks=batch.tasks[first : first + rows]))
    return found


def steps_on(engine: Engine, first: int, count: int) -> list[StepResult]:
    """Train for some steps on this rank's share of the rows."""
    rank, world = engine.world.rank, engine.world.size
    return [
        engine.step(share_of(rows_of_step(step), rank, world, engine.stage.accumulate), step)
        for step in range(first, first + count)
    ]


def train_steps(run: Run, steps: int) -> tuple[list[StepResult], dict]:
    """A rank's results of some steps and the state afterwards."""
    engine = build(run)
    return steps_on(engine, 1, steps), state_of(engine)


def train_and_rates(run: Run, steps: int) -> tuple[list[StepResult], list[float]]:
    """Results and learning rates of some steps, all on the same rows."""
    engine = build(run)
    pairs = [(engine.step(rows_of_step(1), step), engine.lr) for step in range(1, steps + 1)]
    return [result for result, _ in pairs], [rate for _, rate in pairs]


def train_and_record(run: Run, steps: int) -> list[dict]:
    """A rank's state before the first and after every step."""
    engine = build(run)
    states = [state_of(engine)]
    for step in range(steps):
        steps_on(engine, step + 1, 1)
        states.append(state_of(engine))
    return states


def train_and_compare(run: Run, steps: int) -> tuple[set[str], set[str]]:
    """Names of the parameters that some steps move, and of those that have optimizer state."""
    engine = build(run)
    before = full_parameters(engine)
    steps_on(engine, 1, steps)
    after = full_parameters(engine)
    moved = {name for name, old in before.items() if not old.equal(after[name])}
    return moved, {piece.name for piece in engine.pieces}


def full_parameters(engine: Engine) -> dict[str, Tensor]:
    """Every parameter whole, also where ZeRO 3 has left a rank a part of it."""
    import deepspeed

    found = {}
    for parameter, name in engine.names.items():
        with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def train_on(run: Run, given: list[list[list[Batch]]]) -> tuple[list[StepResult], dict]:
    """Steps on given batches: of rank r in step s, given[r][s]."""
    world = init_distributed()
    engine = build(run, world)
    results = [engine.step(b, update) for update, b in enumerate(given[world.rank], start=1)]
    return results, state_of(engine)


def noise(medium: str, rows: int, seed: int, group: int = 0, weight: float = 1.0) -> Batch:
    """A batch of random words with targets of 1 to 4 tokens, and of noise for the medium."""
    source = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 50_000, (rows, 6), generator=source)
    targets = torch.randint(4, 50_000, (rows, 4), generator=source)
    labels = torch.cat([targets[:, :-1], torch.full((rows, 1), EOS)], 1)
    lengths = torch.randint(1, 5, (rows, 1), generator=source)
    tensors = {
        "input_ids": torch.cat([torch.full((rows, 1), BOS), words], 1),
        "attention_mask": torch.ones(rows, 7, dtype=torch.bool),
        "decoder_input_ids": torch.cat([torch.full((rows, 1), BOS), targets[:, :-1]], 1),
        "labels": labels.masked_fill(torch.arange(4) >= lengths, IGNORE),
        "loss_weight": torch.ones(rows),
        "media_index": torch.arange(rows),
    }
    shapes = {"image": ("pixel_values", (3, 32, 32)), "video": ("video_values", (3, 2, 32, 32))}
    if medium == "audio":
        shapes["audio"] = ("audio_values", (3200,))
    if medium in shapes:
        name, shape = shapes[medium]
        tensors[name] = torch.randn(rows, *shape, generator=source)
    return Batch(tensors, ["vqa"] * rows, weight, medium, group)


def by_hand(
    run: Run, given: list[list[Batch]]
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Training in plain PyTorch, each step on all of its batches in one process.

    Returns:
        Losses and gradient norms of the steps; the trained weights.
    """
    stage = run.stages[0]
    model: UnivalForConditionalGeneration = make_model(run, stage, None)
    media = {micro.medium for micro in stage.micro_batches}
    trained = {}
    for name, parameter in model.named_parameters():
        absent = [m for m in ("image", "video", "audio") if m not in media]
        own = not any(name.startswith(f"encoder.{m}_") for m in absent)
        norm = ".bn" in name or "downsample.1" in name or "shortcut.1" in name
        if own and not norm:
            trained[name] = parameter
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            for parameter in module.parameters():
                for name in [n for n, p in trained.items() if p is parameter]:
                    del trained[name]
    optimizer = torch.optim.AdamW(
        trained.values(), lr=0.0, eps=run.optimizer.eps, weight_decay=0.01
    )
    losses, norms = [], []
    warmup = int(stage.warmup_ratio * stage.steps)
    for update, batches in enumerate(given, start=1):
        _set_training(model)
        rate = update / warmup if update <= warmup else (stage.steps - update) / (
            stage.steps - warmup
        )  # fmt: skip
        optimizer.param_groups[0]["lr"] = stage.learning_rate * rate
        groups: dict[int, list[tuple[Tensor, int]]] = {}
        weights = {batch.group: batch.weight for batch in batches}
        for batch in batches:
            tensors = dict(batch.tensors)
            labels = tensors.pop("labels")
            tensors.pop("loss_weight")
            logits = model(**tensors).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            count = int((labels != -100).sum())
            groups.setdefault(batch.group, []).append((loss, count))
        total = sum(
            weights[group] * sum(loss for loss, _ in parts) / sum(c for _, c in parts)
            for group, parts in groups.items()
        )
        optimizer.zero_grad()
        total.backward()
        for parameter in trained.values():  # what takes no part decays too
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), stage.clip_norm)))
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, norms, {f"master/{n}": p.detach().flatten() for n, p in trained.items()}


def _set_training(model: UnivalForConditionalGeneration) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    random.seed(0)
