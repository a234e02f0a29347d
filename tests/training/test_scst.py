"""Self-critical training against REINFORCE written by hand in float64."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from typing import Any

import engine_cases as cases
import pytest
import torch
from omegaconf import OmegaConf
from ranks import on_ranks
from torch import Tensor
from torch.nn import functional as F

from unival.data.batch import collate
from unival.data.media import MediaOptions
from unival.evaluation.cider_d import DocumentFrequencies, cider_d_scores
from unival.generation.generate import search_answers
from unival.generation.sampling import sample
from unival.kernels.linear_cross_entropy.op import linear_cross_entropy
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.norm import LayerNorm
from unival.tasks import TASKS
from unival.tasks.base import Example
from unival.training.batches import Batch
from unival.training.engine import TrainingModel
from unival.training.losses import Criterion
from unival.training.options import MicroBatch, Mixture, Run, Stage
from unival.training.scst import (
    Reference,
    Scst,
    SelfCritical,
    check_search,
    check_stage,
    document_frequencies,
    evaluating,
    mean_of_others,
    scst_task,
    step_generator,
)
from unival.vocabulary import BOS, EOS, FIRST_BIN, IGNORE, VOCABULARY_SIZE

CPU = torch.device("cpu")
CAPTION, GROUNDING = TASKS["image_caption"], TASKS["grounding"]
MEDIA = MediaOptions(image_size=32)
# Two sentences, the second shorter: its padding must change nothing.
SOURCES = [[0, 5, 6, 7, 2], [0, 9, 2]]
SMALL = {"d_model": 32, "ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 4}
BOXES = Scst("iou", "none", "beam", 1, cross_entropy=True)
FOUR = replace(GROUNDING.decoding, constraint="bins")  # a model without training says no bins


class Words:
    """A vocabulary in which each id from 4 on is a word of its own."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids if i > 3)


def small_model(symbols: int = 12, seed: int = 0, **fields: Any) -> UnivalForConditionalGeneration:
    """In training mode and without media; weights spread enough for outputs to differ."""
    torch.manual_seed(seed)
    options = {"image_layers": None, "video_layers": None, "dropout": 0.0}
    options |= {"encoder_drop_path": 0.0, "decoder_drop_path": 0.0}
    config = UnivalConfig(vocab_size=symbols, **(SMALL | options | fields))
    model = UnivalForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.2)
    return model.train()


class PlainNorm(LayerNorm):
    """The norm in PyTorch's own operations, which take float64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def of_gelu(self, x: Tensor) -> Tensor:
        return self(F.gelu(x))

    def of_sum(self, residual: Tensor, branch: Tensor, *_: float) -> tuple[Tensor, Tensor]:
        return residual + branch, self(residual + branch)


def in_float64(model: UnivalForConditionalGeneration) -> UnivalForConditionalGeneration:
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if isinstance(module, LayerNorm):
            module.__class__ = PlainNorm
    return double


def batch_of(task: str, targets: list[list[int]], **fields: Any) -> Batch:
    """Rows about nothing but words; their targets end with </s>."""
    rows = [
        (Example(source, [BOS, *target], [*target, EOS]), row)
        for row, (source, target) in enumerate(zip(SOURCES, targets, strict=True))
    ]
    return Batch(collate(rows, [], "text"), [task] * len(rows), 1.0, "text", **fields)


CAPTIONS = [("w5 w9 w7 w4", "w9 w7"), ("w8 w11 w6",)]
REFERENCES = [Reference(captions) for captions in CAPTIONS]
FREQUENCIES = DocumentFrequencies.from_references([*CAPTIONS, ("w5 w6 w10",)])


def caption_rows() -> Batch:
    return batch_of("image_caption", [[5, 9], [8, 11]])


def captions(**options: Any) -> SelfCritical:
    decoding = replace(CAPTION.decoding, max_length=5)
    return SelfCritical(Scst(**options), CAPTION, Words(), decoding, MEDIA, None, FREQUENCIES)


def drawn(model, seed: int, **options: Any) -> list[list[list[int]]]:
    """What the sampler draws with a seed in eval mode: tokens with </s>."""
    model = copy.deepcopy(model).eval()
    tensors = caption_rows().tensors
    encoder = model.encoder(tensors["input_ids"], tensors["attention_mask"])
    generator = torch.Generator().manual_seed(seed)
    tokens = sample(model, encoder, max_length=5, generator=generator, **options).tokens.tolist()
    return [[ids[: ids.index(EOS) + 1] for ids in row] for row in tokens]


def scores(outputs: list[list[list[int]]]) -> Tensor:
    texts = [[Words().decode(ids).strip() for ids in row] for row in outputs]
    return torch.from_numpy(cider_d_scores(texts, CAPTIONS, FREQUENCIES))


def log_p(model, row: int, prefix: list[int], targets: list[int]) -> Tensor:
    """Sum of the log-probabilities of targets[i] behind <s> prefix[:i], without any padding."""
    logits = model(
        input_ids=torch.tensor([SOURCES[row]]),
        decoder_input_ids=torch.tensor([[BOS, *prefix[: len(targets) - 1]]]),
    ).logits[0]
    return logits.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None]).sum()


def engine_gradient(model, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a step: summed loss over target tokens."""
    model.zero_grad()
    loss, _ = TrainingModel(model, Criterion())(batch.tensors, 1)
    loss = loss / Criterion().kept(batch.tensors["labels"], 1)
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def gradients_of(model) -> dict[str, Tensor]:
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 1e-3
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 2e-5 * float(size), name


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_gradient_of_captions_is_that_of_reinforce(top_k):
    model = small_model()
    double = in_float64(model)
    generator = torch.Generator().manual_seed(3)
    batch, measured = captions(top_k=top_k).rewrite(model, caption_rows(), REFERENCES, generator)

    outputs = drawn(model, 3, samples=5, top_k=top_k)
    rewards = scores(outputs)
    assert rewards.std() > 0.3  # else nothing would be tested
    total, tokens = torch.zeros(()), 0
    for row in range(2):
        for k in range(5):
            others = [float(rewards[row, other]) for other in range(5) if other != k]
            advantage = float(rewards[row, k]) - sum(others) / 4
            ids = outputs[row][k]
            total = total - advantage * log_p(double, row, ids, ids)
            tokens += len(ids)
    (total / tokens).backward()

    loss, found = engine_gradient(model, batch)
    assert loss == pytest.approx(float(total.detach() / tokens), rel=1e-5, abs=1e-6)
    assert_same_gradients(found, gradients_of(double))
    assert measured == pytest.approx({"reward": float(rewards.mean()), "length": tokens / 10})


def test_negative_rewards_of_a_row_push_its_output_away():
    """The sign itself, without a formula of the loss: a step down the gradient makes the outputs
    that are better than the others likelier, and the worse ones less likely."""
    model = small_model()
    generator = torch.Generator().manual_seed(3)
    batch, _ = captions(samples=2).rewrite(model, caption_rows(), REFERENCES, generator)
    weights, labels = batch.tensors["loss_weight"].tolist(), batch.tensors["labels"].tolist()
    outputs = [[token for token in ids if token != IGNORE] for ids in labels]

    def likelihoods() -> list[float]:
        with torch.no_grad():
            return [float(log_p(model, row // 2, ids, ids)) for row, ids in enumerate(outputs)]

    before = likelihoods()
    engine_gradient(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    ahead = [after - old for after, old in zip(likelihoods(), before, strict=True)]
    for first in (0, 2):
        assert weights[first] == pytest.approx(-weights[first + 1]) and weights[first] != 0.0
        better = first if weights[first] > 0 else first + 1
        worse = 2 * first + 1 - better
        assert ahead[better] > ahead[worse]


@pytest.fixture(scope="module")
def box_model() -> UnivalForConditionalGeneration:
    return small_model(VOCABULARY_SIZE, 8, decoder_layers=1)


RIGHT_BINS = [[40, 50, 900, 800], [1, 2, 3, 4]]


def box_rows(**fields: Any) -> Batch:
    bins = [[FIRST_BIN + number for number in row] for row in RIGHT_BINS]
    return batch_of("grounding", bins, **fields)


def generated_boxes(model) -> list[list[int]]:
    """The four tokens that the beam search finds best for each row."""
    tensors = dict(box_rows().tensors)
    tensors["decoder_input_ids"] = torch.full((2, 1), BOS)
    with evaluating(model):
        found = search_answers(model, GROUNDING, tensors, decoding=FOUR)
    assert all(best.tokens[4:] == [EOS] for best in found)
    return [best.tokens[:4] for best in found]


def in_picture(tokens: list[int]) -> tuple[float, float, float, float]:
    """A box of four tokens in a picture of 64 x 32 pixels that the model saw as 32 x 32."""
    x0, y0, x1, y1 = (512 * (token - FIRST_BIN) / 999 for token in tokens)
    return 2 * x0, y0, 2 * x1, y1


def boxes_of(model) -> list[Reference]:
    """The first row's box is right, the second's is not."""
    found = in_picture(generated_boxes(model)[0])
    return [Reference(box=found, size=(64, 32)), Reference(box=(0.0, 0.0, 9.0, 9.0), size=(64, 32))]


def grounding(options: Scst = BOXES, **fields: Any) -> SelfCritical:
    return SelfCritical(options, GROUNDING, Words(), FOUR, MEDIA, **fields)


@pytest.mark.parametrize("cross_entropy", [True, False])
def test_the_gradient_of_boxes_is_that_of_the_published_loss(box_model, cross_entropy):
    """(sum of CE of the right bins behind the generated ones + 5 sum of -R log p) / (4 B)."""
    model, double = box_model, in_float64(box_model)
    generated = generated_boxes(model)
    assert generated[0] != [FIRST_BIN + number for number in RIGHT_BINS[0]]
    options = replace(BOXES, cross_entropy=cross_entropy)
    batch, measured = grounding(options).rewrite(
        model, box_rows(), boxes_of(model), torch.Generator()
    )
    assert measured == {"reward": 0.5, "length": 4.0}

    total = -5.0 * log_p(double, 0, generated[0], generated[0])  # R is 1 and 0
    if cross_entropy:
        for row in range(2):
            right = [FIRST_BIN + number for number in RIGHT_BINS[row]]
            total = total - log_p(double, row, generated[row], right)
    (total / 8).backward()

    loss, found = engine_gradient(model, batch)
    assert loss == pytest.approx(float(total.detach() / 8), rel=1e-5)
    assert_same_gradients(found, gradients_of(double))


def test_rows_of_boxes_hold_no_end_and_the_right_bins_behind_generated_ones(box_model):
    generated = generated_boxes(box_model)
    batch, _ = grounding(replace(BOXES, weight=3.0)).rewrite(
        box_model, box_rows(), boxes_of(box_model), torch.Generator()
    )
    tensors = batch.tensors
    right = [[FIRST_BIN + number for number in row] for row in RIGHT_BINS]
    assert tensors["labels"].tolist() == [*generated, *right]
    assert tensors["decoder_input_ids"].tolist() == 2 * [[BOS, *row[:3]] for row in generated]
    assert tensors["loss_weight"].tolist() == [6.0, 0.0, 2.0, 2.0]  # 2 * 3 * R, then 2
    assert tensors["input_ids"].tolist() == 2 * [SOURCES[0], [*SOURCES[1], 1, 1]]
    assert tensors["attention_mask"].sum(dim=1).tolist() == [5, 3, 5, 3]
    assert batch.tasks == ["grounding"] * 4


def test_a_right_box_outside_the_area_class_has_no_reward(box_model):
    """The first row's box covers 832 x 416 pixels or so, which is large."""
    references, generator = boxes_of(box_model), torch.Generator()
    for fields, reward in (
        ({"min_area": 100_000.0}, 0.5),
        ({"max_area": 30_000.0}, 0.0),
        ({"min_area": 100_000.0, "max_area": 30_000.0, "medium": True}, 0.0),
    ):
        made = grounding(replace(BOXES, **fields))
        batch, measured = made.rewrite(box_model, box_rows(), references, generator)
        assert measured["reward"] == reward
        # 2 * 5 * R of the first row; the cross-entropy of both rows stays.
        assert batch.tensors["loss_weight"].tolist() == [20.0 * reward, 0.0, 2.0, 2.0]


def test_a_box_is_compared_in_the_original_picture():
    """Bins 0 0 499 499 reach to 255.7 of the 512 pixels that bins cover, in a picture shown at
    32 / 64 of its width: 511.5 x 255.7 pixels. (0, 0, 255, 255) is half of that, and less."""
    tokens = [[[FIRST_BIN, FIRST_BIN, FIRST_BIN + 499, FIRST_BIN + 499]]]
    for width, threshold, reward in ((64, 0.5, 0.0), (64, 0.49, 1.0), (32, 0.5, 1.0)):
        made = grounding(replace(BOXES, iou_threshold=threshold))
        reference = Reference(box=(0.0, 0.0, 255.0, 255.0), size=(width, 32))
        assert made.rewards(tokens, [reference]).tolist() == [[reward]]
    words = [[[5, 6, 7, 8]], [[FIRST_BIN, FIRST_BIN, FIRST_BIN + 499, 8]]]
    assert grounding().rewards(words, [reference, reference]).tolist() == [[0.0], [0.0]]


# Below 30,000, at it, between, at 100,000 and above: the six published reward models.
AREAS = (29_999.0, 30_000.0, 30_001.0, 99_999.0, 100_000.0, 100_001.0)
LOW, HIGH = {"max_area": 30_000.0}, {"min_area": 100_000.0}


@pytest.mark.parametrize(
    ("fields", "rewarded"),
    [
        pytest.param(LOW, "x.....", id="small"),
        pytest.param(LOW | HIGH | {"medium": True}, "..xx..", id="medium"),
        pytest.param(HIGH, ".....x", id="large"),
        pytest.param(LOW | {"medium": True}, "..xxxx", id="medium and large"),
        pytest.param(HIGH | {"medium": True}, "xxxx..", id="medium and small"),
        pytest.param(LOW | HIGH, "x....x", id="small and large"),
        pytest.param({}, "xxxxxx", id="all"),
    ],
)
def test_area_classes(fields, rewarded):
    options = replace(BOXES, **fields)
    assert "".join("x" if options.rewards_area(area) else "." for area in AREAS) == rewarded


def test_rewards_of_captions_by_hand(vocabulary):
    """Two media: "a" is in both and weighs nothing, every other n-gram ln 2.

    The reference itself: cosine 1 for each n, 10 in all. "cat": for n = 1 the cosine with cat, on,
    mat is 1 / sqrt 3; no bigrams against 4 make exp(-4^2 / 72) = 0.80074; 10 / 4 times both is
    1.15577. Marks and the outer blank are no part of the words.
    """
    references = [Reference(["a cat on a mat", " "]), Reference(["a dog runs"])]
    frequencies = DocumentFrequencies.from_references([["a cat on a mat"], ["a dog runs"]])
    made = SelfCritical(
        Scst(), CAPTION, vocabulary, CAPTION.decoding, MEDIA, frequencies=frequencies
    )
    texts = [[" a cat, on a mat!", " cat"], [" a cat on a mat", " a dog runs."]]
    outputs = [[[*vocabulary.encode_text(text), EOS] for text in row] for row in texts]
    expected = [[10.0, 10 / 4 / 3**0.5 * 0.800737], [0.0, 7.5]]  # three words have no 4-gram
    torch.testing.assert_close(
        made.rewards(outputs, references), torch.tensor(expected).double(), rtol=1e-5, atol=1e-9
    )


def test_the_mean_of_the_others():
    """Of 1, 2, 6: (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; the advantages of a row add up to 0."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    found = mean_of_others(rewards)
    assert found.tolist() == [[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]
    assert (rewards - found).sum(dim=1).tolist() == [0.0, 0.0]


def greedy(model, row: int) -> list[int]:
    """The likeliest token at each place, up to 5, then </s>; never padding, nor </s> at once."""
    tokens: list[int] = []
    while len(tokens) < 5:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([SOURCES[row]]),
                decoder_input_ids=torch.tensor([[BOS, *tokens]]),
            ).logits[0, -1]
        logits[1] = -torch.inf
        if not tokens:
            logits[EOS] = -torch.inf
        before = [BOS, *tokens]
        for at in range(2, len(before)):  # no three tokens twice
            if before[at - 2 : at] == before[-2:]:
                logits[before[at]] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            return tokens
    return [*tokens, EOS]


@pytest.mark.parametrize("baseline", ["none", "greedy", "beam"])
def test_a_baseline_is_what_is_taken_from_each_reward(baseline):
    model = small_model()
    sampled = drawn(model, 5, samples=3)
    generator = torch.Generator().manual_seed(5)
    made = captions(baseline=baseline, samples=3)
    batch, measured = made.rewrite(model, caption_rows(), REFERENCES, generator)

    rewards, taken = scores(sampled), torch.zeros(2, 1, dtype=torch.float64)
    if baseline == "greedy":
        taken = scores([[greedy(model, row)] for row in range(2)])
    elif baseline == "beam":
        tensors = {**caption_rows().tensors, "decoder_input_ids": torch.full((2, 1), BOS)}
        found = search_answers(model, CAPTION, tensors, decoding=made.decoding)
        taken = scores([[best.tokens] for best in found])
    if baseline != "none":
        assert taken.abs().sum() > 0.1
        assert measured["baseline"] == pytest.approx(float(taken.mean()))
    expected = (rewards - taken).flatten()
    torch.testing.assert_close(batch.tensors["loss_weight"], expected.float())
    assert measured["reward"] == pytest.approx(float(rewards.mean()))


def test_samples_of_boxes_each_get_rows_and_the_mean_of_the_others(box_model):
    options = Scst("iou", samples=3, cross_entropy=True, iou_threshold=1e-9)
    reference = Reference(box=(0.0, 0.0, 1024.0, 512.0), size=(64, 32))
    batch, measured = grounding(options).rewrite(
        box_model, box_rows(), [reference] * 2, torch.Generator().manual_seed(1)
    )
    weights = batch.tensors["loss_weight"].view(2, 2, 3)
    hits = round(6 * measured["reward"])
    assert 0 < hits < 6
    # 2 * 5 * (R - mean of two others): 10 or 5 or 0 of a hit, their opposites of a miss.
    assert set(weights[0].flatten().tolist()) <= {10.0, 5.0, 0.0, -5.0, -10.0}
    assert weights[0].sum(dim=1).tolist() == [0.0, 0.0] and weights[0].abs().sum() > 0
    assert weights[1].unique().tolist() == [2.0]
    tokens = batch.tensors["labels"].view(2, 6, 4)
    assert tokens[1].tolist() == 3 * [tokens[1, 0].tolist()] + 3 * [tokens[1, 3].tolist()]
    inputs = batch.tensors["decoder_input_ids"].view(2, 6, 4)
    assert inputs[0].equal(inputs[1]) and inputs[0, :, 1:].equal(tokens[0, :, :3])


def test_the_same_numbers_draw_the_same_and_others_other_samples():
    model, made = small_model(), captions()

    def labels(*numbers: Any) -> list:
        generator = step_generator(*numbers, CPU)
        batch, _ = made.rewrite(model, caption_rows(), REFERENCES, generator)
        return batch.tensors["labels"].tolist()

    torch.manual_seed(1)
    first, state = labels(7, "scst", 3, 0), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)  # nothing else was drawn from
    torch.manual_seed(2)
    assert labels(7, "scst", 3, 0) == first
    others = [(8, "scst", 3, 0), (7, "other", 3, 0), (7, "scst", 4, 0), (7, "scst", 3, 1)]
    different = [labels(*numbers) for numbers in others]
    assert all(other != first for other in different) and different[0] != different[3]


def test_outputs_are_made_in_eval_mode_and_every_mode_is_restored():
    model = small_model(dropout=0.5)
    model.decoder.eval()
    model.decoder.layers[1].train()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    weights = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(4)
    batch, _ = captions().rewrite(model, caption_rows(), REFERENCES, generator)
    outputs = [ids for row in drawn(model, 4, samples=5) for ids in row]
    labels = batch.tensors["labels"].tolist()
    assert [[token for token in ids if token != IGNORE] for ids in labels] == outputs
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


def test_outputs_of_a_row_share_its_medium():
    layers = {"image_layers": [1, 1, 1, 1], "image_channels": [4, 8, 8, 8]}
    model = small_model(**layers)
    rows = caption_rows()
    pixels = torch.randn(2, 3, 32, 32)
    # The second row is about the first picture.
    tensors = {**rows.tensors, "pixel_values": pixels, "media_index": torch.tensor([1, 0])}
    generator = torch.Generator().manual_seed(3)
    rows = replace(
        rows, tensors=tensors, medium="image", weight=0.5, group=2, samples=[{"id": "7"}]
    )
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    batch, _ = captions(samples=3).rewrite(model, rows, REFERENCES, generator)
    assert all(b.equal(statistics[n]) for n, b in model.named_buffers() if "running" in n)
    assert batch.tensors["pixel_values"] is pixels
    assert batch.tensors["media_index"].tolist() == [1, 1, 1, 0, 0, 0]
    assert (batch.weight, batch.group, batch.medium, batch.samples) == (
        0.5,
        2,
        "image",
        [{"id": "7"}],
    )
    _, found = engine_gradient(model, batch)  # what generation kept must not be in the way
    assert float(found["encoder.image_proj.weight"].norm()) > 0.0


def test_outputs_are_padded_to_the_lengths_of_the_run(box_model):
    made = grounding(text_lengths=[9, 6])
    batch, _ = made.rewrite(box_model, box_rows(), boxes_of(box_model), torch.Generator())
    assert batch.tensors["input_ids"].shape == (4, 9)
    assert batch.tensors["labels"].shape == batch.tensors["decoder_input_ids"].shape == (4, 6)
    assert batch.tensors["labels"][:, 4:].unique().tolist() == [IGNORE]


def test_bad_rows_are_refused(box_model):
    model, generator = small_model(), torch.Generator()
    mixed = replace(caption_rows(), tasks=["image_caption", "vqa"])
    with pytest.raises(ValueError, match="'image_caption': rows are of image_caption, vqa"):
        captions().rewrite(model, mixed, REFERENCES, generator)
    with pytest.raises(ValueError, match="2 rows, 1 references"):
        captions().rewrite(model, caption_rows(), REFERENCES[:1], generator)
    with pytest.raises(ValueError, match=r"row 1: .* a caption with words"):
        silent = [REFERENCES[0], Reference([" ", ""])]
        captions().rewrite(model, caption_rows(), silent, generator)
    for wanting in (Reference(size=(64, 32)), Reference(box=(0.0, 0.0, 1.0, 1.0))):
        with pytest.raises(ValueError, match=r"row 1: .* a box and the picture's size"):
            given = [boxes_of(box_model)[0], wanting]
            grounding().rewrite(box_model, box_rows(), given, generator)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": "bleu"}, "scst.reward='bleu'; known: cider_d, iou"),
        ({"baseline": "mean"}, "scst.baseline='mean'; known: mean_of_others"),
        ({"search": "nucleus"}, "scst.search='nucleus'; known: sample, beam"),
        ({"samples": 0}, "samples=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"temperature": 0.0}, "scst.temperature .* 0.0"),
        ({"weight": float("nan")}, "scst.weight .* nan"),
        ({"samples": 1}, "mean_of_others wants samples of at least 2, got 1"),
        ({"search": "beam", "baseline": "greedy"}, "search=beam .* samples=5"),
        ({"search": "beam", "samples": 1, "baseline": "none", "top_k": 3}, "top_k=3"),
        ({"search": "beam", "samples": 1, "baseline": "beam"}, "leaves no advantage"),
        ({"cross_entropy": True}, "cross_entropy, min_area and max_area are for reward=iou"),
        ({"max_area": 1.0}, "cross_entropy, min_area and max_area are for reward=iou"),
        ({"reward": "iou", "frequencies": "f.json"}, "frequencies is for reward=cider_d"),
        ({"reward": "iou", "iou_threshold": 0.0}, "iou_threshold lies in .* 0.0"),
        ({"reward": "iou", "max_area": -1.0}, "max_area=-1.0"),
        ({"reward": "iou", "min_area": float("inf")}, "min_area=inf"),
        ({"reward": "iou", "medium": True}, "medium wants min_area or max_area"),
        ({"reward": "iou", "min_area": 2.0, "max_area": 2.0}, "max_area is below min_area"),
    ],
)
def test_options_that_cannot_be_trained_with_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Scst(**fields)


def test_the_options_are_those_of_a_config_file():
    text = "{reward: iou, baseline: none, search: beam, samples: 1, cross_entropy: true}"
    merged = OmegaConf.merge(OmegaConf.structured(Scst), OmegaConf.create(text))
    assert OmegaConf.to_object(merged) == BOXES


def stage(*tasks: list[str], **fields: Any) -> Stage:
    micro = [MicroBatch("image", [Mixture("a", 2, names)]) for names in tasks]
    return Stage("reward", 1, micro, **fields)


def test_a_stage_is_about_one_task():
    assert scst_task(stage(["grounding"], ["grounding"])) == "grounding"
    for tasks in ([["grounding"], ["vqa"]], [["grounding", "vqa"]], [[]], []):
        with pytest.raises(ValueError, match=r"stage 'reward': scst wants .* one task"):
            scst_task(stage(*tasks))


def test_losses_that_are_no_policy_gradient_are_refused():
    run = Run("out", {}, [])
    for zero_stage in (0, 1, 2):
        check_stage(run, stage(["grounding"]), zero_stage)
    with pytest.raises(ValueError, match="stage 'reward': scst with ZeRO stage 3"):
        check_stage(run, stage(["grounding"]), 3)
    with pytest.raises(ValueError, match="compile=default"):
        check_stage(replace(run, compile="default"), stage(["grounding"]), 1)
    for name, value in (
        ("label_smoothing", 0.1),
        ("log_end", 0.75),
        ("drop_worst_ratio", 0.05),
        ("constrain_answers", True),
        ("constraint_range", [4, 9]),
    ):
        with pytest.raises(ValueError, match=re.escape(f"scst with {name}={value}")):
            check_stage(run, stage(["grounding"], **{name: value}), 1)


def test_outputs_that_cannot_be_measured_are_refused():
    def check(options, task, decoding=None, media=MEDIA, lengths=None):
        check_search(options, task, decoding or task.decoding, media, lengths)

    check(BOXES, GROUNDING, lengths=[80, 4])
    check(Scst(), CAPTION, lengths=[80, 23])
    with pytest.raises(ValueError, match="'grounding' is by grounding"):
        check(Scst(), GROUNDING)
    with pytest.raises(ValueError, match="'vqa' is by accuracy"):
        check(Scst(), TASKS["vqa"])
    with pytest.raises(ValueError, match="decoder_prompt=True"):
        check(Scst(), CAPTION, replace(CAPTION.decoding, decoder_prompt=True))
    with pytest.raises(ValueError, match="constraint=answers"):
        check(Scst(), CAPTION, replace(CAPTION.decoding, constraint="answers"))
    with pytest.raises(ValueError, match="max_length of 4, got 4 and 5"):
        check(BOXES, GROUNDING, replace(GROUNDING.decoding, max_length=5))
    with pytest.raises(ValueError, match="image_transform=exact"):
        check(BOXES, GROUNDING, media=MediaOptions(image_transform="pretrain"))
    with pytest.raises(ValueError, match="up to 23 tokens; text_lengths leaves 22"):
        check(Scst(), CAPTION, lengths=[80, 22])
    with pytest.raises(ValueError, match="up to 4 tokens; text_lengths leaves 3"):
        check(BOXES, GROUNDING, lengths=[80, 3])
    with pytest.raises(ValueError, match="wants document frequencies"):
        SelfCritical(Scst(), CAPTION, Words(), CAPTION.decoding, MEDIA)


def test_document_frequencies_come_from_a_file_or_from_the_captions(tmp_path):
    captions = [["a cat", "cat"], ["a dog"]]
    counted = document_frequencies(Scst(), iter(captions))
    assert counted.documents == 2
    assert counted.counts == {("a",): 2, ("cat",): 1, ("dog",): 1, ("a", "cat"): 1, ("a", "dog"): 1}
    json, original = tmp_path / "words.json", tmp_path / "words.p"
    counted.save(json)
    content = {"document_frequency": {("a",): 3.0}, "ref_len": 9.0}
    original.write_bytes(pickle.dumps(content))
    assert document_frequencies(Scst(frequencies=str(json)), []) == counted
    found = document_frequencies(Scst(frequencies=str(original)), [])
    assert found == DocumentFrequencies(9, {("a",): 3})
    assert document_frequencies(BOXES, []) is None
    with pytest.raises(ValueError, match="at least two media"):
        document_frequencies(Scst(), captions[:1])
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        document_frequencies(Scst(frequencies=str(tmp_path / "none.json")), [])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_takes_weights_of_any_sign(backend):
    """Losses and gradients against torch's own cross-entropy in float64."""
    torch.manual_seed(0)
    hidden, embedding = torch.randn(7, 16), torch.randn(50, 16)
    target = torch.tensor([3, 49, IGNORE, 0, 7, 7, 21])
    weight = torch.tensor([-2.5, 1.5, -9.0, 0.0, -0.25, 4.0, -1e-3])
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    inputs = [t.to(device, copy=True).requires_grad_() for t in (hidden, embedding)]
    sums = linear_cross_entropy(
        *inputs, target.to(device), weight=weight.to(device), backend=backend
    )
    sums.loss.backward()

    exact = [t.double().requires_grad_() for t in (hidden, embedding)]
    each = F.cross_entropy(exact[0] @ exact[1].T, target, reduction="none", ignore_index=IGNORE)
    (each * weight.double()).sum().backward()
    assert float(sums.loss.detach()) == pytest.approx(
        float((each.detach() * weight).sum()), rel=1e-5
    )
    for found, expected in zip(inputs, exact, strict=True):
        torch.testing.assert_close(found.grad.cpu().double(), expected.grad, rtol=1e-4, atol=1e-5)


def rewritten_step(run: Run) -> tuple[float, float, int]:
    """A rank's step on its own outputs: the loss told, its sum by hand, and its tokens."""
    engine = cases.build(run)
    model, rank = engine.model, engine.world.rank
    generator = step_generator(run.seed, "one", 1, rank, engine.device)
    made = captions(samples=2 + rank)
    batch, _ = made.rewrite(model, caption_rows(), REFERENCES, generator)
    labels = batch.tensors["labels"].tolist()
    outputs = [[token for token in ids if token != IGNORE] for ids in labels]
    with evaluating(model), torch.no_grad():
        total = sum(
            -weight * float(log_p(model, row // (2 + rank), ids, ids))
            for row, (weight, ids) in enumerate(
                zip(batch.tensors["loss_weight"].tolist(), outputs, strict=True)
            )
        )
    return engine.step([batch], 1).loss, total, sum(map(len, outputs))


@pytest.mark.slow
def test_the_mean_is_over_the_generated_tokens_of_all_ranks(tmp_path):
    """Two ranks of unequal numbers of outputs, under ZeRO 1."""
    micro = {"micro_batches": [MicroBatch("text", [Mixture("qa", 2)])]}
    run = cases.stage_zero(cases.small_run(tmp_path, micro), 1)
    overrides = {"vocab_size": 12, "initializer_range": 0.2}
    run = replace(run, model=replace(run.model, overrides=run.model.overrides | overrides))
    (loss, first, few), (same, second, many) = on_ranks(tmp_path, 2, rewritten_step, run)
    assert few < many and abs(first) > 0.1 and abs(second) > 0.1
    assert loss == same == pytest.approx((first + second) / (few + many), rel=1e-4)


def test_training_raises_the_mean_reward():
    """From outputs that are nearly uniform over twelve symbols to the captions wanted."""
    model = small_model()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    made, rewards = captions(samples=16), []
    for step in range(60):
        generator = step_generator(0, "toy", step, 0, CPU)
        batch, measured = made.rewrite(model, caption_rows(), REFERENCES, generator)
        engine_gradient(model, batch)
        optimizer.step()
        rewards.append(measured["reward"])
    first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
    assert last > 1.7 * first, (first, last)
