"""The schema of a training run (configs/pretrain, configs/finetune)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from unival.data.media import Loading, MediaOptions
from unival.tasks import TASKS
from unival.tasks.base import Decoding
from unival.training.adapters import Adapter
from unival.training.scst import Scst


@dataclass
class Source:
    """A table or shards of records; see unival.data.sources.open_table.

    split  train: trained on; val: measured during the run, and what decides which checkpoint is the
           best; test: measured by `unival evaluate --split test` alone
    """

    path: str
    split: str = "train"
    layout: str = "pretrain"
    medium: str = "image"
    media_root: str | None = None


@dataclass
class Mixture:
    """A source's part in a micro-batch.

    rows    in a step, of all ranks together; 0 where the micro-batch's `rows` are shared out
    tasks   each row gives one example for every task that accepts its kind
    every   take part only in every n-th step (CC12M: 8)
    weight  share of the micro-batch's rows, with `balance: weights`
    """

    source: str
    rows: int = 0
    tasks: list[str] = field(default_factory=list)
    every: int = 1
    weight: float = 1.0


@dataclass
class MicroBatch:
    """One medium, a mixture of rows, a weight of its mean loss.

    rows     in a step, of all ranks together, shared by the sources as `balance` says; absent:
             every mixture says its own
    balance  balanced (all alike), proportional (to the sources' sizes) or weights (the mixtures')
    """

    medium: str
    mixture: list[Mixture]
    weight: float = 1.0
    rows: int | None = None
    balance: str = "balanced"


@dataclass
class Stage:
    """One stage of the curriculum: its steps, what a step is made of, its schedule and loss.

    steps           optimizer steps; or
    epochs          passes over the first source of the first micro-batch, which give the steps
    accumulate      passes that a rank's rows of each micro-batch are split into
    schedule_steps  horizon of the linear decay; the stage may stop before it (released: 50 epochs)
    init_from       a saved model; absent: the stage before, or fresh weights in the first
    weights         public weight files by part (text, image, video, audio) that replace those
    freeze          what is not trained: names of unival.training.freezing.RULES
    frozen_in_eval  frozen modules keep their statistics and have no dropout (released: they train
                    on in both)
    adapter         LoRA or a soft prompt, trained alone
    ema_decay       of an average of the weights (released: 0.9999), measured instead of them
    media           fields of the run's `media` that this stage has otherwise
    fine_tuning     prompts and targets of fine-tuning instead of pretraining
    constrain_answers  the loss is over the answers of the list alone, as the search is
    scst            self-critical training: the loss is of the model's own outputs, by their reward
    constraint_range  first id, one past the last: the loss is over those ids and the specials
    evaluate        tasks measured on the stage's model; before the run, on the first model. On the
                    sources of split val, or, where a run has none, on all of split train
    decoding        by task, fields of unival.tasks.base.Decoding that its search has otherwise
    evaluate_every  steps between measurements during the stage; absent: at its end only
    best            `task/metric` whose highest decides which checkpoint is the stage's model;
                    absent: the last
    """

    name: str
    steps: int = 0
    micro_batches: list[MicroBatch] = field(default_factory=list)
    epochs: float | None = None
    accumulate: int = 1
    init_from: str | None = None
    weights: dict[str, str] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    frozen_in_eval: bool = True
    adapter: Adapter | None = None
    ema_decay: float | None = None
    media: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-4
    warmup_ratio: float = 0.01
    schedule_steps: int | None = None
    clip_norm: float = 5.0
    fine_tuning: bool = False
    constrain_answers: bool = False
    constraint_range: list[int] | None = None
    scst: Scst | None = None
    label_smoothing: float = 0.0
    log_end: float | None = None
    drop_worst_ratio: float = 0.0
    drop_worst_after: int = 0
    evaluate: list[str] = field(default_factory=list)
    decoding: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluate_every: int | None = None
    best: str | None = None


@dataclass
class ModelOptions:
    """config: a file of configs/model; overrides: UnivalConfig fields."""

    config: str = "configs/model/unival_base.yaml"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class DeepSpeedOptions:
    """How the state of training is spread over the ranks.

    config             a ds_config JSON, used as it is; the other fields here, `precision`,
                       `optimizer` and `clip_norm` then speak only where it is silent
    zero_stage         0: nothing is sharded, 1: optimizer state, 2: and gradients, 3: and weights
    offload_optimizer  optimizer state and its arithmetic on the CPU
    """

    config: str | None = None
    zero_stage: int = 1
    offload_optimizer: bool = False


@dataclass
class Optimizer:
    """AdamW with decoupled decay on every parameter, as released."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass
class Run:
    """A training run.

    batchnorm         local (released), sync, frozen, or folded: frozen and part of the convolutions
    precision         fp32, bf16 or fp16; halves want deepspeed.zero_stage of at least 1
    answers           a file of candidate answers, one a line, that questions are answered from
    evaluate_before   measure the first model too
    recompute         keep of each transformer layer only attention's results; backward makes the
                      rest again, all matrix products but those of scores and values
    compile           off, default, or cuda_graphs, which wants text_lengths
    text_lengths      source and target tokens that every row is padded to; absent: the longest's
    nonfinite         what a step with a loss or gradient that is not finite ends in: skip, halt or
                      rollback to the last checkpoint, with the samples after the step's
    nonfinite_limit   such steps in a row, or rollbacks, before the run halts all the same
    checkpoint_every  steps between checkpoints; keep: how many remain; keep_best: and of the best
    wandb             a Weights & Biases project
    """

    output: str
    sources: dict[str, Source]
    stages: list[Stage]
    model: ModelOptions = field(default_factory=ModelOptions)
    media: MediaOptions = field(default_factory=MediaOptions)
    loading: Loading = field(default_factory=Loading)
    optimizer: Optimizer = field(default_factory=Optimizer)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    evaluate_before: bool = True
    evaluate_batch: int = 16
    negatives: str | None = None
    answers: str | None = None
    text_order: str = "gpt2"
    dict_path: str | None = None
    seed: int = 7
    precision: str = "fp32"
    batchnorm: str = "local"
    recompute: bool = False
    compile: str = "off"
    text_lengths: list[int] | None = None
    nonfinite: str = "halt"
    nonfinite_limit: int = 8
    checkpoint_every: int = 100
    keep: int = 2
    keep_best: int = 1
    log_every: int = 10
    tensorboard: bool = True
    wandb: str | None = None


def decoding_of(stage: Stage, task: str) -> Decoding:
    """How a task's answer is searched for in a stage.

    Raises:
        ValueError: `decoding` names a field that there is not, or a value that cannot be.
    """
    own = stage.decoding.get(task, {})
    known = [entry.name for entry in fields(Decoding)]
    for name in own:
        if name not in known:
            raise ValueError(
                f"stage {stage.name!r}: unknown decoding.{task}.{name}; known: {', '.join(known)}"
            )
    try:
        return replace(TASKS[task].decoding, **own)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: decoding.{task}: {error}") from error


def measured_sources(run: Run) -> list[str]:
    """What a run is measured on while it goes: its sources of split val, else those of train."""
    val = [name for name, source in run.sources.items() if source.split == "val"]
    return val or [name for name, source in run.sources.items() if source.split == "train"]
