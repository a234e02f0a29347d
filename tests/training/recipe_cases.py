"""A folder in which the shipped configs run as they are: publishers' files in miniature prepared to
data/, a small model in place of the pretrained one in weights/."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import soundfile
import torch
from data.prepare import film_cases, image_cases
from PIL import Image
from ranks import on_ranks

from unival import cli
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.train import main
from unival.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
START = "weights/unival_stage2_highres"  # what every config of configs/finetune starts from
SMALL = {"image_size": 64, "video_size": 32, "video_frames": 2, "audio_samples": 16000}
AUDIO_CHANNELS = [8, 16, 32, 64, 128, 128]


@dataclass(frozen=True)
class Miniature:
    """A publisher's files; `options` is what `unival data prepare` is told of them."""

    write: Callable[[Path], None]
    options: dict[str, str] = field(default_factory=dict)


def of_case(cases: ModuleType, name: str) -> Miniature:
    """What the tests of the preparation write."""
    [case] = [case for case in cases.CASES if case.name == name]
    return Miniature(case.write, getattr(case, "options", {}))


def write_vqav2(folder: Path) -> None:
    """The miniature of the preparation with a ninth "no", which makes that a candidate beside
    "yes": a loss over a list of one answer would be 0."""
    image_cases.write_vqav2(folder)
    for name, key, row in (
        ("v2_OpenEnded_mscoco_val2014_questions", "questions", image_cases.question(510, 4)),
        (
            "v2_mscoco_val2014_annotations",
            "annotations",
            image_cases.annotation(510, 4, ["no"] * 10, "no"),
        ),
    ):
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        content[key].append(row)
        path.write_text(json.dumps(content))


def write_nocaps(folder: Path) -> None:
    """The miniature of the preparation with picture b outside of the domain."""
    image_cases.write_nocaps(folder)
    path = folder / "nocaps_val_4500_captions.json"
    path.write_text(path.read_text().replace("near-domain", "out-domain"))


MINIATURES = {
    "coco_caption": of_case(image_cases, "coco_caption"),
    "nocaps": Miniature(write_nocaps),
    "vqav2": Miniature(write_vqav2),
    "okvqa": of_case(image_cases, "okvqa"),
    "vizwiz": of_case(image_cases, "vizwiz"),
    "refcoco": of_case(image_cases, "refcoco"),
    "refcocoplus": of_case(image_cases, "refcoco_plus"),
    "refcocog": of_case(image_cases, "refcocog"),
    "snli_ve": of_case(image_cases, "snli_ve"),
    "coco_image_generation": of_case(image_cases, "coco_image_generation"),
    "msrvtt_caption": of_case(film_cases, "msrvtt"),
    "activitynet_caption": of_case(film_cases, "activitynet"),
    "msrvtt_qa": of_case(film_cases, "msrvtt_qa"),
    "msvd_qa": of_case(film_cases, "msvd_qa"),
    "audiocaps": of_case(film_cases, "audiocaps"),
    "clotho": of_case(film_cases, "clotho"),
}


def enlarge(folder: Path) -> None:
    """Make pictures of one pixel and sounds of ten milliseconds large enough for a model and for
    the boxes of RefCOCO; no two are alike."""
    noise = np.random.default_rng(0)
    media = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    for path in media:
        if path.suffix == ".jpg":
            small = noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((640, 480)).save(path, "JPEG")
        elif path.suffix in (".wav", ".flac"):
            soundfile.write(path, 0.1 * noise.standard_normal(8000), 8000, format="WAV")


def told_command(name: str, source: Path) -> list[str]:
    """The arguments of `unival` that prepare a data set, as its config says. A folder in capitals
    is the miniature's, which has media beside annotations; another one lies in that."""
    text = (ROOT / f"configs/finetune/{name}.yaml").read_text()
    found = re.search(rf"^# +unival (data prepare {name} .*)$", text, re.MULTILINE)
    assert found, f"{name}.yaml does not say how its data set is prepared"
    told = shlex.split(found[1])
    for place, flag in enumerate(told[:-1]):
        if flag in ("--source", "--media"):
            own = told[place + 1].isupper()
            told[place + 1] = str(source if own else source / told[place + 1].replace("-", "_"))
    return told


class Workspace:
    """The folder. `start` holds the weights that every run begins with."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.folder = folder
        self.prepared: set[str] = set()
        (folder / "configs").symlink_to(ROOT / "configs")
        # Like the pretrained models this one has seen no sounds.
        tiny = ROOT / "configs/model/unival_tiny.yaml"
        config = UnivalConfig.from_yaml(str(tiny), audio_channels=None)
        torch.manual_seed(1)
        model = UnivalForConditionalGeneration(config)
        model.save_pretrained(folder / START)
        vocabulary.tokenizer.save_pretrained(folder / START)

    def prepare(self, *names: str) -> None:
        """Write the shards of data sets by the commands that their configs tell of."""
        for name in names:
            if name in self.prepared:
                continue
            source = self.folder / "published" / name
            source.mkdir(parents=True)
            MINIATURES[name].write(source)
            enlarge(source)
            told = told_command(name, source)
            for option, value in MINIATURES[name].options.items():
                told += ["--option", f"{option}={value}"]
            cli.main(told)  # returns the number of bad rows, which other tests know
            assert (self.folder / "data" / f"{name}.prepared.json").is_file()
            self.prepared.add(name)

    def train(self, config: str, *overrides: str) -> None:
        """Train two steps by a shipped config, of which nothing but sizes is changed."""
        sizes = [f"media.{name}={value}" for name, value in SMALL.items()]
        sizes += ["loading.threads=1", "loading.workers=1", "loading.video_backend=pyav"]
        sizes += ["precision=fp32", "tensorboard=false"]
        sizes += ["checkpoint_every=1", "stages.0.evaluate_every=1", "stages.0.accumulate=1"]
        sizes += ["stages.0.epochs=null", "stages.0.steps=2", "stages.0.weights={}"]
        # The second step would have a learning rate of 0, were it the schedule's last.
        sizes += ["stages.0.schedule_steps=4", "stages.0.micro_batches.0.mixture.0.rows=2"]
        logs = self.folder / "logs" / config
        logs.mkdir(parents=True)
        told = ["--config", f"configs/finetune/{config}.yaml", *sizes, *overrides]
        assert on_ranks(logs, 1, train_in, self.folder, told) == [0], logs


def train_in(folder: Path, arguments: Sequence[str]) -> int:
    """`unival train` started from a folder."""
    os.chdir(folder)
    return main(list(arguments))
