"""The schema of a training run (configs/pretrain, configs/finetune)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unival.data.media import Loading, MediaOptions


@dataclass
class Source:
    """A table or shards of records; see unival.data.sources.open_table."""

    path: str
    layout: str = "pretrain"
    medium: str = "image"
    media_root: str | None = None


@dataclass
class Mixture:
    """Rows of one source in a micro-batch.

    rows   per rank
    tasks  each row gives one example for every task that accepts its kind
    every  take part only in every n-th step (CC12M: 8)
    """

    source: str
    rows: int
    tasks: list[str] = field(default_factory=list)
    every: int = 1


@dataclass
class MicroBatch:
    """One forward and backward pass: one medium, a mixture of rows, a weight of its mean loss."""

    medium: str
    mixture: list[Mixture]
    weight: float = 1.0


@dataclass
class Stage:
    """One stage of the curriculum: its steps, what a step is made of, its schedule and loss.

    schedule_steps  horizon of the linear decay; the stage may stop before it (released: 50 epochs)
    fine_tuning     prompts and targets of fine-tuning instead of pretraining
    evaluate        tasks measured on the stage's model; before the run, on the first model
    """

    name: str
    steps: int
    micro_batches: list[MicroBatch]
    learning_rate: float = 2e-4
    warmup_ratio: float = 0.01
    schedule_steps: int | None = None
    clip_norm: float = 5.0
    fine_tuning: bool = False
    label_smoothing: float = 0.0
    log_end: float | None = None
    drop_worst_ratio: float = 0.0
    drop_worst_after: int = 0
    evaluate: list[str] = field(default_factory=list)


@dataclass
class ModelOptions:
    """config: a file of configs/model; overrides: UnivalConfig fields; init_from: a saved model."""

    config: str = "configs/model/unival_base.yaml"
    overrides: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None


@dataclass
class Optimizer:
    """AdamW with decoupled decay on every parameter, as released."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass
class Run:
    """A training run.

    batchnorm        local (released), sync, or frozen
    precision        fp32 or bf16; bf16 wants zero_stage >= 1
    answers          a file of candidate answers, one a line, that questions are answered from
    evaluate_before  measure the first model too
    recompute        keep of each transformer layer only attention's results; backward makes the
                     rest again, all matrix products but those of scores and values
    checkpoint_every steps between checkpoints; keep: how many remain
    """

    output: str
    sources: dict[str, Source]
    stages: list[Stage]
    model: ModelOptions = field(default_factory=ModelOptions)
    media: MediaOptions = field(default_factory=MediaOptions)
    loading: Loading = field(default_factory=Loading)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluate_before: bool = True
    evaluate_batch: int = 16
    negatives: str | None = None
    answers: str | None = None
    text_order: str = "gpt2"
    dict_path: str | None = None
    seed: int = 7
    precision: str = "fp32"
    zero_stage: int = 1
    batchnorm: str = "local"
    recompute: bool = False
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = True
