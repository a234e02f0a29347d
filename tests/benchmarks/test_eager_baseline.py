"""The released code's formulation computes what ours does, and its measurement tells the truth."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import golden_adapter
import pytest
import torch
from scripts import load_script
from torch import Tensor, nn

from unival.data.batch import MEDIUM_KEYS
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.vocabulary import IGNORE, PAD

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SHAPES = {"image": (3, 64, 96), "video": (3, 4, 64, 32), "audio": (48000,)}
TINY = ["--config", "unival_tiny", "--batch", "2", "--image", "64", "--threads", "1"]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    module = load_script("eager_baseline")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def make_model(name: str, **changed: object) -> UnivalForConditionalGeneration:
    """A model in training without anything random, whose norms and head scales are not 1."""
    still = {"dropout": 0.0, "encoder_drop_path": 0.0, "decoder_drop_path": 0.0}
    config = UnivalConfig.from_yaml(ROOT / f"configs/model/{name}.yaml", **(still | changed))
    # With seeds 0 and 3 rounding decides the sign of a value before a ReLU, in the eager model too.
    torch.manual_seed(2)
    model = UnivalForConditionalGeneration(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.rand_like(parameter)
    return model


def make_batch(medium: str, rows: int = 4, media: int = 2, **sizes: object) -> dict[str, Tensor]:
    """Rows of several lengths, of which two share a medium."""
    torch.manual_seed(1)
    text, labels = torch.randint(4, 2000, (rows, 7)), torch.randint(4, 2000, (rows, 5))
    text[1, 4:] = PAD
    labels[-2, 3:] = IGNORE
    decoder = labels.roll(1, 1).masked_fill(labels == IGNORE, PAD)
    decoder[:, 0] = 0
    batch = {"input_ids": text, "attention_mask": text != PAD}
    batch |= {"decoder_input_ids": decoder, "labels": labels}
    if medium != "text":
        shape = sizes.get("shape", SHAPES[medium])
        batch[MEDIUM_KEYS[medium]] = torch.rand(media, *shape) * 2 - 1
        batch["media_index"] = torch.arange(rows) // (rows // media)
    return batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = model.named_parameters()
    return {name: p.grad.double() for name, p in found if p.grad is not None}


def results(bench: ModuleType, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits at the places that are no padding, loss and gradients, of either formulation."""
    random.seed(0)
    eager = isinstance(model, bench.EagerModel)
    if eager:
        logits = model(batch)
        loss = bench.eager_loss(logits, batch["labels"], bench.SMOOTHING)
    else:
        with torch.no_grad():
            logits = copy.deepcopy(model)(
                **{n: x for n, x in batch.items() if n != "labels"}
            ).logits
        random.seed(0)
        loss = bench.ours_loss(model, batch)
    loss.backward()
    real = batch["decoder_input_ids"] != PAD
    found = {"logits": logits[real].detach().double(), "loss": loss.detach().double()}
    return found | gradients(model.model if eager else model)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def check_equal(
    bench: ModuleType, model: UnivalForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    """Both in float32 against the eager formulation in float64: ours is as exact as torch is."""
    eager = bench.EagerModel(copy.deepcopy(model))
    exact_batch = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
    exact = results(bench, copy.deepcopy(eager).double(), exact_batch)
    own, other = results(bench, model, batch), results(bench, eager, batch)
    assert own.keys() == other.keys() == exact.keys()
    largest = max(float(x.norm()) for name, x in exact.items() if name not in ("loss", "logits"))
    checked = 0
    for name, value in exact.items():
        # A softmax does not see a key's bias: what is found as its gradient is rounding.
        if float(value.norm()) < 1e-5 * largest and name not in ("loss", "logits"):
            continue
        bound = 3 * relative(other[name], value) + 2e-6
        assert relative(other[name], value) < 5e-3, name
        assert relative(own[name], value) < bound, (name, relative(own[name], value), bound)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize("medium", ["image", "video", "audio", "text"])
def test_eager_equals_ours(bench: ModuleType, medium: str) -> None:
    check_equal(bench, make_model("unival_tiny", vocab_size=2010), make_batch(medium))


def test_eager_equals_ours_with_a_random_subset_of_the_tokens(bench: ModuleType) -> None:
    model = make_model("unival_tiny", vocab_size=2010, sample_patch_num=4)
    check_equal(bench, model, make_batch("image"))


@pytest.mark.parametrize("name", ["unival_base", "ofa_base"])
def test_eager_equals_ours_at_full_width(bench: ModuleType, name: str) -> None:
    # A few blocks of every stage: in all 33 batch statistics of so few places amplify rounding.
    layers = [1, 1, 2, 1] if name == "unival_base" else [1, 1, 2]
    shallow = {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 2010}
    model = make_model(name, image_layers=layers, video_layers=None, **shallow)
    check_equal(bench, model, make_batch("image", rows=2, shape=(3, 64, 64)))


@pytest.mark.parametrize("case_id", ["tiny__image_text_64"])
def test_eager_gives_what_the_original_gave(bench: ModuleType, case_id: str) -> None:
    path = golden_adapter.GOLDEN / "public" / "manifest.json"
    if not path.exists():
        pytest.skip("no recorded values of the original code at ../shared/golden")
    import check
    import numpy as np

    recorded = json.loads(path.read_text(encoding="utf-8"))
    cases = [case for case in recorded["cases"] if case["id"] == case_id]
    assert {case["model"] for case in cases} == {"unival", "ofa"}
    for case in cases:
        config = recorded["configs"][f"{case['model']}/{case['config']}"]
        model = copy.deepcopy(golden_adapter.load(json.dumps(config)))
        eager, inputs = bench.EagerModel(model).eval(), check.load_inputs(case)
        batch = golden_adapter.model_inputs(inputs)
        batch["attention_mask"] = batch["input_ids"] != PAD
        batch["decoder_input_ids"] = torch.from_numpy(inputs["prev_output_tokens"])
        with torch.no_grad():
            logits = eager(batch)
        padded = (batch["decoder_input_ids"] == PAD)[..., None]
        with np.load(golden_adapter.GOLDEN / case["file"]) as stored:
            result = {"logits": logits.masked_fill(padded, 0.0).numpy()}
            compared = check.compare(case, stored, result)
        assert compared and all(passed for *_, passed in compared), compared


def test_the_baseline_makes_what_it_says(bench: ModuleType) -> None:
    model = make_model("unival_tiny")
    eager = bench.EagerModel(model)
    kinds = {type(module) for module in eager.modules()}
    assert kinds >= {bench.PlainBatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.Conv2d}
    assert issubclass(bench.PlainBatchNorm2d, nn.BatchNorm2d)
    assert not kinds & {bench.LayerNorm, bench.BatchNorm2d, bench.BatchNorm3d, bench.Conv2d}
    layouts: list[bool] = []
    convolution = model.encoder.image_encoder.layer1[0].conv2
    convolution.register_forward_hook(lambda *a: layouts.append(a[2].is_contiguous()))
    scores: list[torch.Size] = []
    softmax = torch.softmax

    def spy(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        scores.append(x.shape)
        return softmax(x, dim=dim, dtype=dtype)

    batch = make_batch("image", media=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "softmax", spy)
        logits = eager(batch)
    assert layouts == [True]  # NCHW
    # Two layers of each stack; 2 x 3 image tokens and 7 of text, 5 of the decoder.
    assert scores == [(4, 4, 13, 13)] * 2 + [(4, 4, 5, 5), (4, 4, 5, 13)] * 2
    assert logits.shape == (4, 5, model.config.vocab_size)


def test_stochastic_depth_drops_whole_rows_and_scales_the_others(bench: ModuleType) -> None:
    layer = make_model("unival_tiny", vocab_size=300).encoder.layers[0]
    layer.drop_path_rate = 0.75
    torch.manual_seed(0)
    x, branch = torch.randn(200, 3, 4), torch.randn(200, 3, 4)
    kept = (bench.add(layer, x, branch) - x) / branch
    rows = kept[:, 0, 0].round()
    torch.testing.assert_close(kept, rows[:, None, None].expand_as(kept), rtol=0, atol=1e-2)
    assert set(rows.tolist()) == {0.0, 4.0}  # survivors are divided by 1 - 0.75
    # Of 200 rows 50 survive on average, with a deviation of sqrt(200 / 4 * 3 / 4) = 6.1.
    assert 25 < int((rows > 0).sum()) < 75
    torch.testing.assert_close(bench.add(layer.eval(), x, branch), x + branch)


def test_loss_by_hand(bench: ModuleType) -> None:
    # One token counts: logits ln 1, ln 2, ln 5 have probabilities 1/8, 2/8, 5/8; the target is the
    # last. eps = 0.2, spread = 0.2 / 2 = 0.1: loss = 0.7 ln(8/5) + 0.1 (ln 8 + ln 4 + ln 8/5).
    logits = torch.tensor([[[1.0, 2.0, 5.0], [9.0, 1.0, 1.0]]]).log()
    loss = bench.eager_loss(logits, torch.tensor([[2, IGNORE]]), 0.2)
    expected = 0.7 * 0.4700036 + 0.1 * (2.0794415 + 1.3862944 + 0.4700036)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_quantiles_and_spread(bench: ModuleType) -> None:
    # Of 0..10 in tenths the quantiles are the values themselves: 2, 5, 8; (8 - 2) / 5.
    told = bench.quantiles([float(x) for x in (3, 1, 0, 2, 7, 5, 4, 6, 10, 8, 9)])
    assert told == {"p20": 2.0, "p50": 5.0, "p80": 8.0, "spread": pytest.approx(1.2)}
    assert bench.is_reliable([1.0, 1.0, 1.05]) and not bench.is_reliable([1.0, 1.0, 1.3])
    assert not bench.is_reliable([1.0, 1.0])
    assert bench.quantiles([4.0]) == {"p20": 4.0, "p50": 4.0, "p80": 4.0, "spread": 0.0}


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_another_result_is_refused(bench: ModuleType, wrong: float) -> None:
    found = {"eager-fp32": {"loss": 2.0, "a": 1.0}, "ours-fp32": {"loss": 2.0, "a": wrong}}
    with pytest.raises(ValueError, match=r"ours-fp32 does not compute what eager-fp32 does: a is"):
        bench.check_same(found)
    found["ours-fp32"] = {"loss": 2.0002, "a": 1.0}
    assert bench.check_same(found)["ours-fp32"] == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="not the same parts have gradients: a"):
        bench.check_same(found | {"ours-bf16": {"loss": 2.0}})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--variants", "eager-fp32", "their-fp32"], "variant 'their-fp32'; wanted eager or ours"),
        (["--variants", "ours-fp32"], "eager-fp32 is what the others are compared with"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--image", "31"], "--image must be at least 32"),
    ],
)
def test_arguments_are_refused(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.parse(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_a_variant_that_dies_is_told(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    worker = bench.Worker(TINY, "ours-fp32")
    with pytest.raises(RuntimeError, match="ours-fp32 ended with status 1"):
        worker.ask("check")


def test_variants_are_measured_in_processes_of_their_own(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [*TINY, "--steps", "2", "--warmup", "0", "--variants", "eager-fp32", "ours-fp32"]
    report = bench.compare(bench.parse(argv), argv)
    json.dumps(report)
    said = capsys.readouterr().err
    assert "[1 of 4] pass: eager-fp32 " in said and "[4 of 4] step: ours-fp32 " in said
    assert "about 0:00 to go" in said.splitlines()[-1]
    assert report["differences"]["ours-fp32"] < 1e-3
    assert [(row["phase"], row["variant"]) for row in report["rows"]] == [
        ("pass", "eager-fp32"),
        ("pass", "ours-fp32"),
        ("step", "eager-fp32"),
        ("step", "ours-fp32"),
    ]
    for row in report["rows"]:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert not row["reliable"]  # two measurements are too few
        # A model of 5.6 M parameters in float32 with gradients, and torch itself.
        assert row["peak_bytes"] > 150 * 2**20
        base = next(
            x for x in report["rows"] if (x["phase"], x["variant"]) == (row["phase"], "eager-fp32")
        )
        assert row["faster"] == pytest.approx(base["p50"] / row["p50"])
    assert report["machine"]["threads"] == 1
    assert {"load_before", "load_after", "others_cores"} <= report["machine"].keys()
    text = bench.table(report)
    assert report["command"] in text and text.count("| ours-fp32 |") == 2
