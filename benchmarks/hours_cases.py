"""What benchmarks/gpu_hours.py measures: the paper's tables 18 and 2, its pretraining stages, and
batches for them.

Sizes, batches, losses and what is frozen are those of the run configs; here stands what they do not
say: how many GPUs share a step, how long texts are, how many examples an epoch has, and the paper's
own figures.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from train_step import KINDS, ROOT

from unival.config import load_config
from unival.data.batch import collate
from unival.data.media import MediaLoader
from unival.data.records import Origin, Record, RecordError
from unival.model.configuration import UnivalConfig
from unival.planning.counts import Work
from unival.tasks.base import Example
from unival.training.batches import Batch, stage_media
from unival.training.options import MicroBatch, Run, Stage
from unival.vocabulary import BOS, EOS

WORDS = (4, 50_000)
TASK_NAMES = {"image": "image_caption", "video": "video_caption"}
MODELS = ("ofa_base", "unival_base")
# Only images from the first step on: what configs/pretrain/one_stage.yaml says of the curriculum.
IMAGES = "stages.0.micro_batches=[{medium: image, mixture: [{source: image, rows: 1024}]}]"
# The answer list and the weights to begin with are files that a measurement does not need.
WITHOUT_FILES = ("stages.0.constrain_answers=false", "stages.0.weights={}", "stages.0.init_from=")


@dataclass(frozen=True)
class Task:
    """A fine-tuning task of table 18.

    gpus          that share its batch: the released scripts' 16 or 8 rows a pass are then its part
    text, target  tokens of a row, as long as is usual; bins of a box and </s> are five
    examples      training rows of an epoch: table 15 (COCO: its 113K pictures' 566,747 captions)
    hours         GPU-hours of an epoch in the paper, by model
    """

    config: str
    title: str
    gpus: int
    text: int
    target: int
    examples: int
    hours: dict[str, float]


TASKS = {
    "coco": Task(
        "finetune/coco_caption.yaml", "COCO", 8, 9, 14, 566_747,
        {"ofa_base": 5.7, "unival_base": 3.1},
    ),
    "vqav2": Task(
        "finetune/vqav2.yaml", "VQAv2", 16, 12, 16, 443_000,
        {"ofa_base": 11.5, "unival_base": 8.0},
    ),
    "refcocoplus": Task(
        "finetune/refcocoplus.yaml", "RefCOCO+", 8, 16, 5, 120_000,
        {"ofa_base": 1.3, "unival_base": 0.7},
    ),
}  # fmt: skip
# Table 2: minutes of an epoch, on average over 20 of everything or over 10 of images and 10 of all;
# examples of a step; memory of the curriculum over that of one stage.
TABLE_2 = {"one_stage": 124.0, "curriculum": 102.0}
TABLE_2_BATCH = {"one_stage": 4_000, "curriculum": 3_000}
TABLE_2_MEMORY = 0.75


@dataclass(frozen=True)
class Case:
    """A model in a run.

    table     18, pretraining or 2
    examples  of an epoch
    paper     its device-hours in the paper, where it says them
    """

    name: str
    table: str
    model: str
    config: str
    gpus: int
    text: int
    target: int
    examples: int
    overrides: tuple[str, ...] = ()
    paper: float | None = None


@dataclass(frozen=True)
class Scale:
    """What a slower device does less of: media of a pass and pixels of a side are divided."""

    batch: int = 1
    image: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.image < 1:
            raise ValueError(f"{self}: factors are at least 1")


def cases() -> dict[str, Case]:
    """All by name, in the order of the report.

    Pretraining passes are of as many GPUs as make the released micro-batches of the configs'
    `accumulate`. Texts of its mixed tasks are taken to have 24 and 12 tokens.
    """
    found = [
        Case(
            f"{name}/{model}", "18", model, task.config, task.gpus, task.text, task.target,
            task.examples, paper=task.hours[model],
        )
        for name, task in TASKS.items()
        for model in MODELS
    ]  # fmt: skip
    # Stage 1: 5.03 M captions, 512 a step, which has 3,200 examples. Stage 2: 11.6 M rows of
    # images, 1,024 a step of 4,096. Table 2: 5,593,207 rows of images, two examples each.
    stages = {
        "stage1": 5_030_000 // 512 * 3_200,
        "stage2": 11_600_000 // 1_024 * 4_096,
        "stage2_highres": 11_600_000 // 1_024 * 4_096,
    }
    for name, examples in stages.items():
        config = f"pretrain/{name}.yaml"
        found.append(Case(name, "pretraining", "unival_base", config, 64, 24, 12, examples))
    for name, examples, overrides in (
        ("table2/images", 5_593_207 * 2, (IMAGES,)),
        ("table2/all", 5_593_207 * 4, ()),
    ):
        config = "pretrain/one_stage.yaml"
        found.append(Case(name, "2", "unival_base", config, 64, 24, 12, examples, overrides))
    return {case.name: case for case in found}


def load_run(case: Case, scale: Scale, model: str | None = None, precision: str = "") -> Run:
    """A case's run config; `model` is a config of configs/model to measure instead."""
    path, overrides = ROOT / "configs" / case.config, [*WITHOUT_FILES, *case.overrides]
    overrides.append(f"model.config={ROOT / 'configs' / 'model' / (model or case.model)}.yaml")
    if precision:
        overrides.append(f"precision={precision}")
    media = load_config(Run, path).media
    for name in ("image_size", "video_size"):
        overrides.append(f"media.{name}={getattr(media, name) // scale.image}")
    return load_config(Run, path, overrides)


def config_of(run: Run) -> UnivalConfig:
    """The model's config."""
    return UnivalConfig.from_yaml(run.model.config, **run.model.overrides)


def works(case: Case, run: Run, scale: Scale) -> list[tuple[int, Work]]:
    """The passes of one GPU in a step: number of the micro-batch, and shape.

    Sources of every n-th step are left out (CC12M: 2 % of stage 1's rows).

    Raises:
        ValueError: the case's GPUs do not share a step's rows evenly.
    """
    stage = run.stages[0]
    return [
        (group, work)
        for group, micro in enumerate(stage.micro_batches)
        for work in _passes(case, run, stage, micro, scale)
    ]


def _passes(case: Case, run: Run, stage: Stage, micro: MicroBatch, scale: Scale) -> Iterator[Work]:
    every_step = [mix for mix in micro.mixture if mix.every == 1]
    rows = micro.rows or sum(mix.rows for mix in every_step)
    parts = case.gpus * stage.accumulate
    if rows % parts:
        raise ValueError(f"{case.name}: {rows} rows are not shared evenly by {parts} passes")
    media = max(1, rows // parts // scale.batch)
    each = len(every_step[0].tasks) or 2  # a row of pretraining gives two examples
    sizes = {
        "image": (run.media.image_size, run.media.image_size),
        "video": (run.media.video_frames, run.media.video_size, run.media.video_size),
    }
    for _ in range(stage.accumulate):
        yield Work(micro.medium, sizes[micro.medium], media, media * each, case.text, case.target)


class Decoded:
    """A case's batches from the files of samples/, `prefetch` steps ahead."""

    def __init__(self, run: Run, passes: Sequence[tuple[int, Work]]) -> None:
        self.run, self.passes = run, passes
        self.loader = MediaLoader(stage_media(run, run.stages[0]), run.loading)
        self.rng, self.next = random.Random(0), defaultdict[str, int](int)
        self.records: dict[str, list[Record]] = defaultdict(list)
        path = ROOT / "samples" / "annotations.jsonl"
        for row, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            file, medium = ROOT / "samples" / entry["file"], entry["kind"]
            # As in tables: pictures are bytes, films and sounds are paths.
            media = file.read_bytes() if medium == "image" else file
            origin = Origin(str(path), row)
            self.records[medium].append(Record(str(row), KINDS[medium], media, origin=origin))

    def __iter__(self) -> Iterator[list[Batch]]:
        ahead: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as worker:
            try:
                while True:
                    while len(ahead) <= self.run.loading.prefetch:
                        ahead.append(worker.submit(self.step))
                    yield ahead.popleft().result()
            finally:
                worker.shutdown(cancel_futures=True)
                self.loader.close()

    def step(self) -> list[Batch]:
        """All passes of a step."""
        return [self._batch(group, work) for group, work in self.passes]

    def _batch(self, group: int, work: Work) -> Batch:
        found, chosen = self.records[work.medium], []
        for _ in range(work.media):
            chosen.append(found[self.next[work.medium] % len(found)])
            self.next[work.medium] += 1
        seeds = [str(self.rng.random()) for _ in chosen]
        media = []
        for loaded in self.loader.load(chosen, seeds):
            if isinstance(loaded, RecordError):
                raise loaded
            media.append(loaded.tensor)
        examples = [
            (self._example(work), row * work.media // work.rows) for row in range(work.rows)
        ]
        tensors = collate(examples, media, work.medium)
        return Batch(tensors, [TASK_NAMES[work.medium]] * work.rows, 1.0, work.medium, group)

    def _example(self, work: Work) -> Example:
        source = [BOS, *(self.rng.randrange(*WORDS) for _ in range(work.text - 2)), EOS]
        target = [*(self.rng.randrange(*WORDS) for _ in range(work.target - 1)), EOS]
        return Example(source, [BOS, *target[:-1]], target)
