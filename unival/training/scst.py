"""Self-critical training: a micro-batch becomes the model's own outputs, weighted by their reward.

Rennie et al., Self-critical Sequence Training for Image Captioning; boxes as the reward models of
RefCOCO+ were trained. The loss of a row is -weight * log p, so that with the advantage as weight an
ordinary step of the engine is the policy gradient.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unival.data.batch import MEDIUM_KEYS, collate
from unival.data.media import MediaOptions
from unival.evaluation.cider_d import DocumentFrequencies, cider_d_scores
from unival.evaluation.grounding import is_hit
from unival.generation.boxes import Box, ids_to_box
from unival.generation.constraints import BinConstraint
from unival.generation.generate import to_model
from unival.generation.sampling import sample
from unival.generation.search import SearchOptions, beam_search
from unival.model.encoder import EncoderOutput
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks.base import Decoding, Example, Task
from unival.vocabulary import BOS, EOS, Vocabulary

if TYPE_CHECKING:
    from unival.training.batches import Batch
    from unival.training.options import Run, Stage

COORDINATES = 4  # bins of a box
METRICS = {"cider_d": "caption", "iou": "grounding"}  # of the tasks that a reward fits
BASELINES = ("mean_of_others", "greedy", "beam", "none")
SEARCHES = ("sample", "beam")

Outputs = list[list[list[int]]]  # tokens of every output of every row


@dataclass
class Scst:
    """Self-critical training of a stage.

    reward         cider_d: of captions, 0 to 10; iou: of boxes, 1 where the overlap is enough
    baseline       what is taken from a reward: the mean of the row's other samples, the reward of
                   the greedy or of the beam search's output, or nothing
    search         what is rewarded: `samples` outputs that are drawn, or the beam search's best one
    samples        outputs of a row; 1 where they are searched for
    top_k          samples are drawn among this many likeliest tokens; absent: among all
    temperature    of the samples; their gradient is that of log p at 1
    frequencies    document frequencies of CIDEr-D, as JSON or as a pickle of the original; absent:
                   those of the captions trained on
    iou_threshold  least overlap of a box that is right
    weight         of the policy gradient of boxes (lambda; captions have none)
    cross_entropy  boxes are also trained on the right bins, behind what was generated before each
    min_area, max_area  boxes above min_area or below max_area are rewarded, in square pixels of the
                   original picture; absent: all are
    medium         those between are instead: below min_area and above max_area

    Raises ValueError, naming the field, for a value or a combination that cannot be trained with.
    """

    reward: str = "cider_d"
    baseline: str = "mean_of_others"
    search: str = "sample"
    samples: int = 5
    top_k: int | None = None
    temperature: float = 1.0
    frequencies: str | None = None
    iou_threshold: float = 0.5
    weight: float = 5.0
    cross_entropy: bool = False
    min_area: float | None = None
    max_area: float | None = None
    medium: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("reward", tuple(METRICS)),
            ("baseline", BASELINES),
            ("search", SEARCHES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"scst.{name}={getattr(self, name)!r}; known: {', '.join(known)}")
        if self.samples < 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(
                "scst.samples and scst.top_k are at least 1, "
                f"got samples={self.samples}, top_k={self.top_k}"
            )
        for name in ("temperature", "weight"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"scst.{name} is a finite number above 0, got {getattr(self, name)}"
                )
        self._check_search()
        self._check_boxes()

    def _check_search(self) -> None:
        if self.search == "beam" and (self.samples != 1 or self.top_k or self.temperature != 1.0):
            raise ValueError(
                "scst.search=beam rewards the best output alone: wanted samples=1, no top_k and "
                f"temperature=1; got samples={self.samples}, top_k={self.top_k}, "
                f"temperature={self.temperature}"
            )
        if self.search == "beam" and self.baseline == "beam":
            raise ValueError("scst.baseline=beam with search=beam leaves no advantage")
        if self.baseline == "mean_of_others" and self.samples == 1:
            raise ValueError("scst.baseline=mean_of_others wants samples of at least 2, got 1")

    def _check_boxes(self) -> None:
        if not 0.0 < self.iou_threshold <= 1.0:
            raise ValueError(f"scst.iou_threshold lies in (0, 1], got {self.iou_threshold}")
        low, high = self.max_area, self.min_area
        if not all(limit is None or 0.0 < limit < math.inf for limit in (low, high)):
            raise ValueError(
                "scst.min_area and scst.max_area are finite numbers above 0, "
                f"got min_area={high}, max_area={low}"
            )
        if self.medium and low is None and high is None:
            raise ValueError("scst.medium wants min_area or max_area")
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"scst.max_area is below min_area, got max_area={low}, min_area={high}: boxes are "
                "rewarded below the one or above the other"
            )
        areas = low is not None or high is not None
        if self.reward != "iou" and (self.cross_entropy or areas):
            raise ValueError(
                f"scst.cross_entropy, min_area and max_area are for reward=iou, not {self.reward}"
            )
        if self.reward != "cider_d" and self.frequencies is not None:
            raise ValueError(f"scst.frequencies is for reward=cider_d, not {self.reward}")

    def rewards_area(self, area: float) -> bool:
        """Whether boxes of this area, in square pixels of the original picture, are rewarded."""
        if self.medium:
            above = self.max_area is None or area > self.max_area
            return above and (self.min_area is None or area < self.min_area)
        if self.min_area is None and self.max_area is None:
            return True
        small = self.max_area is not None and area < self.max_area
        return small or (self.min_area is not None and area > self.min_area)


@dataclass(frozen=True)
class Reference:
    """What a row is rewarded by.

    captions  all captions of the medium, as `Task.references` gives them
    box       in pixels of the original picture
    size      width and height of that picture
    """

    captions: Sequence[str] = ()
    box: Box | None = None
    size: tuple[int, int] | None = None


def scst_task(stage: Stage) -> str:
    """The task that a stage of self-critical training is about.

    Raises:
        ValueError: its mixtures do not all name one task, the same.
    """
    mixtures = [mix for micro in stage.micro_batches for mix in micro.mixture]
    named = {task for mix in mixtures for task in mix.tasks or ["any"]}
    if len(named) != 1 or named == {"any"}:
        raise ValueError(
            f"stage {stage.name!r}: scst wants every mixture's `tasks` to name one task, the same; "
            f"they name {', '.join(sorted(named)) or 'none'}"
        )
    return named.pop()


def check_stage(run: Run, stage: Stage, zero_stage: int) -> None:
    """Refuse what the policy gradient would be wrong with.

    Args:
        zero_stage: of the stage's ds_config.

    Raises:
        ValueError: names the stage and the field.
    """
    where = f"stage {stage.name!r}: scst"
    if zero_stage == 3:
        raise ValueError(
            f"{where} with ZeRO stage 3: outputs are generated from whole weights, and each rank "
            "holds a part of them; take deepspeed.zero_stage of 2 or less"
        )
    if run.compile != "off":
        raise ValueError(
            f"{where} with compile={run.compile}: generation has another shape at every token; "
            "take compile=off"
        )
    for name, off in (
        ("label_smoothing", 0.0),
        ("log_end", None),
        ("drop_worst_ratio", 0.0),
        ("constrain_answers", False),
        ("constraint_range", None),
    ):
        if getattr(stage, name) != off:
            raise ValueError(
                f"{where} with {name}={getattr(stage, name)}: a loss of that form has another "
                f"gradient than the rewards'; take {name}={off}"
            )


def check_search(
    options: Scst,
    task: Task,
    decoding: Decoding,
    media: MediaOptions,
    text_lengths: Sequence[int] | None,
) -> None:
    """Refuse outputs that the reward cannot measure, or that have no room in a batch.

    Raises:
        ValueError: names what does not fit.
    """
    if task.metric != METRICS[options.reward]:
        raise ValueError(
            f"scst.reward={options.reward} is for tasks measured by {METRICS[options.reward]}; "
            f"task {task.name!r} is by {task.metric}"
        )
    if decoding.constraint not in ("none", "bins") or decoding.decoder_prompt:
        raise ValueError(
            f"scst of task {task.name!r}: outputs are words or bins, not chosen from answers and "
            f"not behind a decoder prompt; got constraint={decoding.constraint}, "
            f"decoder_prompt={decoding.decoder_prompt}"
        )
    longest = decoding.max_length + 1
    if options.reward == "iou":
        longest = COORDINATES
        if decoding.min_length != COORDINATES or decoding.max_length != COORDINATES:
            raise ValueError(
                "scst.reward=iou wants outputs of the four bins of a box: min_length and "
                f"max_length of 4, got {decoding.min_length} and {decoding.max_length}"
            )
        if media.image_transform != "exact":
            raise ValueError(
                "scst.reward=iou wants image_transform=exact: boxes are compared in the original "
                f"picture, and {media.image_transform!r} shows another part of it at each turn"
            )
    if text_lengths is not None and longest > text_lengths[1]:
        raise ValueError(
            f"scst of task {task.name!r}: outputs have up to {longest} tokens; text_lengths leaves "
            f"{text_lengths[1]}"
        )


def document_frequencies(
    options: Scst, captions: Iterable[Sequence[str]]
) -> DocumentFrequencies | None:
    """What CIDEr-D weighs words by; None for another reward.

    Args:
        captions: of each medium that is trained on, as `Task.references` gives them; read only
            where the options name no file.

    Raises:
        ValueError: the file holds something else, or there are fewer than two media: every word
            would weigh nothing.
    """
    if options.reward != "cider_d":
        return None
    if options.frequencies is None:
        found = DocumentFrequencies.from_references(captions)
    elif options.frequencies.endswith(".json"):
        found = DocumentFrequencies.load(Path(options.frequencies))
    else:
        found = DocumentFrequencies.from_pickle(Path(options.frequencies))
    if found.documents < 2:
        raise ValueError("scst.reward=cider_d wants document frequencies of at least two media")
    return found


def step_generator(
    seed: int, stage: str, step: int, rank: int, device: torch.device
) -> torch.Generator:
    """What the samples of one step of one rank are drawn with; its passes share it, in order.

    The same numbers give the same samples, so that a run that goes on draws what it would have.
    """
    digest = hashlib.sha256(f"scst/{seed}/{stage}/{step}/{rank}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def mean_of_others(rewards: Tensor) -> Tensor:
    """[B, K] rewards of K > 1 samples to the mean [B, K] of the row's other K - 1."""
    return (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


class SelfCritical:
    """Turns a micro-batch of one task into one of the model's own outputs.

    Args:
        decoding: of the task in this stage: lengths of all outputs, and the search of those that
            are searched for.
        media: of the stage.
        text_lengths: of the run; absent: the longest row's.
        frequencies: of `document_frequencies`, for captions.

    Raises:
        ValueError: as `check_search`, or captions without frequencies.
    """

    def __init__(
        self,
        options: Scst,
        task: Task,
        vocabulary: Vocabulary,
        decoding: Decoding,
        media: MediaOptions,
        text_lengths: Sequence[int] | None = None,
        frequencies: DocumentFrequencies | None = None,
    ) -> None:
        check_search(options, task, decoding, media, text_lengths)
        if options.reward == "cider_d" and frequencies is None:
            raise ValueError("scst.reward=cider_d wants document frequencies")
        self.options, self.task, self.vocabulary = options, task, vocabulary
        self.decoding, self.image_size = decoding, media.image_size
        self.lengths = None if text_lengths is None else (text_lengths[0], text_lengths[1])
        self.frequencies = frequencies
        self.constraints = [BinConstraint()] if decoding.constraint == "bins" else []

    def rewrite(
        self,
        model: UnivalForConditionalGeneration,
        batch: Batch,
        references: Sequence[Reference],
        generator: torch.Generator,
    ) -> tuple[Batch, dict[str, float]]:
        """A batch of outputs whose mean loss over target tokens has the policy gradient.

        Each output is a row: a caption with its </s>, or the four tokens of a box. Its loss_weight
        is the advantage, times `weight` for boxes. With `cross_entropy` as many rows follow that
        want the right bins behind the same tokens; as they double the tokens that the engine
        divides by, all weights are doubled: the mean is over generated tokens. The rows share the
        media of the batch, which are not copied.

        Outputs are generated in eval mode without gradients; nothing is asked of other ranks.

        Args:
            model: with whole weights; every module is left in its mode.
            batch: its targets are the right ones.
            references: of each row of the batch.
            generator: of `step_generator`, on the model's device.

        Returns:
            The batch, and means over its outputs: reward, length in tokens and, of a baseline that
            is searched for, its reward.

        Raises:
            ValueError: rows of another task, or a reference that lacks what the reward needs.
        """
        self._check_rows(batch, references)
        with torch.inference_mode(), evaluating(model):
            encoder = model.encoder(**to_model(model, batch.tensors))
            outputs = self._outputs(model, encoder, generator)
            searched = self._searched_baseline(model, encoder)
        rewards = self.rewards(outputs, references)
        tokens = sum(len(ids) for row in outputs for ids in row)
        measured = {"reward": float(rewards.mean()), "length": tokens / rewards.numel()}
        advantages = rewards
        if searched is not None:
            baseline = self.rewards(searched, references)
            advantages = rewards - baseline
            measured["baseline"] = float(baseline.mean())
        elif self.options.baseline == "mean_of_others":
            advantages = rewards - mean_of_others(rewards)
        return self._batch(batch, outputs, advantages), measured

    def _check_rows(self, batch: Batch, references: Sequence[Reference]) -> None:
        if set(batch.tasks) != {self.task.name}:
            named = ", ".join(sorted(set(batch.tasks))) or "none"
            raise ValueError(f"scst of task {self.task.name!r}: rows are of {named}")
        if len(references) != len(batch.tasks):
            raise ValueError(f"{len(batch.tasks)} rows, {len(references)} references")
        for row, reference in enumerate(references):
            if self.options.reward == "iou" and (reference.box is None or reference.size is None):
                raise ValueError(f"row {row}: scst.reward=iou wants a box and the picture's size")
            if self.options.reward == "cider_d" and not any(map(str.split, reference.captions)):
                raise ValueError(f"row {row}: scst.reward=cider_d wants a caption with words")

    def _outputs(
        self,
        model: UnivalForConditionalGeneration,
        encoder: EncoderOutput,
        generator: torch.Generator,
    ) -> Outputs:
        """What is rewarded of each row."""
        if self.options.search == "beam":
            return self._search(model, encoder, self.decoding.beam_size)
        drawn = sample(
            model,
            encoder,
            samples=self.options.samples,
            max_length=self.decoding.max_length,
            min_length=self.decoding.min_length,
            top_k=self.options.top_k,
            temperature=self.options.temperature,
            constraints=self.constraints,
            generator=generator,
        ).tokens.tolist()
        return [[self._cut(tokens) for tokens in row] for row in drawn]

    def _searched_baseline(
        self, model: UnivalForConditionalGeneration, encoder: EncoderOutput
    ) -> Outputs | None:
        """The one output of each row that the rewards are compared with."""
        beams = {"greedy": 1, "beam": self.decoding.beam_size}.get(self.options.baseline)
        return None if beams is None else self._search(model, encoder, beams)

    def _search(
        self, model: UnivalForConditionalGeneration, encoder: EncoderOutput, beams: int
    ) -> Outputs:
        options = SearchOptions.of(self.decoding, beams, self.decoding.max_length)
        found = beam_search(model, encoder, options, self.constraints)
        return [[self._cut(best[0].tokens)] for best in found]

    def _cut(self, tokens: list[int]) -> list[int]:
        """The tokens that are trained on: with </s>, but for boxes."""
        end = tokens.index(EOS)
        return tokens[:end] if self.options.reward == "iou" else tokens[: end + 1]

    def rewards(self, outputs: Outputs, references: Sequence[Reference]) -> Tensor:
        """float64 [B, K] of K outputs of each row."""
        if self.options.reward == "iou":
            pairs = zip(outputs, references, strict=True)
            found = [[self._overlaps(ids, truth) for ids in row] for row, truth in pairs]
            return torch.tensor(found, dtype=torch.float64)
        assert self.frequencies is not None
        texts = [[self.task.answer(ids, self.vocabulary) for ids in row] for row in outputs]
        captions = [[c for c in truth.captions if c.split()] for truth in references]
        return torch.from_numpy(cider_d_scores(texts, captions, self.frequencies))

    def _overlaps(self, tokens: list[int], reference: Reference) -> float:
        """1 for a box that overlaps enough and whose reference is of a rewarded size, else 0."""
        assert reference.box is not None and reference.size is not None
        x0, y0, x1, y1 = reference.box
        box = ids_to_box(tokens, *reference.size, self.image_size)
        hit = is_hit(box, reference.box, self.options.iou_threshold)
        return float(hit and self.options.rewards_area((x1 - x0) * (y1 - y0)))

    def _batch(self, batch: Batch, outputs: Outputs, advantages: Tensor) -> Batch:
        """Rows of the outputs with their advantages, then those of the cross-entropy."""
        tensors = batch.tensors
        sources = [
            ids[real].tolist()
            for ids, real in zip(
                tensors["input_ids"], tensors["attention_mask"].bool(), strict=True
            )
        ]
        index = tensors["media_index"].tolist()
        factor = 2.0 if self.options.cross_entropy else 1.0
        share = factor * (self.options.weight if self.options.reward == "iou" else 1.0)
        rewarded, supervised = [], []
        for row, (drawn, weights) in enumerate(zip(outputs, advantages.tolist(), strict=True)):
            bins = tensors["labels"][row, :COORDINATES].tolist()
            for tokens, weight in zip(drawn, weights, strict=True):
                example = Example(sources[row], [BOS, *tokens[:-1]], tokens, share * weight)
                rewarded.append((example, index[row]))
                supervised.append((replace(example, target=bins, weight=factor), index[row]))
        rows = [*rewarded, *supervised] if self.options.cross_entropy else rewarded
        made = collate(rows, [], "text", lengths=self.lengths)
        media = {name: tensors[name] for name in MEDIUM_KEYS.values() if name in tensors}
        return replace(batch, tensors=made | media, tasks=[self.task.name] * len(rows))
