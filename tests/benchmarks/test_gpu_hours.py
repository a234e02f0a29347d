"""The harness of device-hours: whose the time is, what an epoch takes, what the tables say."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script
from torch import Tensor, nn

from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    module = load_script("gpu_hours")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def test_a_mark_ends_the_part_before_it(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.5, 4.0, 4.25, 5.0, 6.0, 8.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    timeline = bench.Timeline(CPU)
    timeline.mark("forgotten")  # no step has begun, no clock is read
    timeline.begin()
    timeline.mark("decode_wait")  # 0 to 1
    with timeline.part("forward"):  # transfer: 1 to 1.5
        timeline.mark("lm_encoder")  # 1.5 to 4
    timeline.mark("decode_wait")  # other: 4 to 4.25; this 4.25 to 5
    timeline.begin()  # the first step ends at 5
    timeline.mark("loss")  # 6 to 8
    timeline.end()
    assert timeline.read() == [
        {"decode_wait": 1.75, "transfer": 0.5, "lm_encoder": 2.5, "other": 0.25},
        {"loss": 2.0},
    ]


class Slow(torch.autograd.Function):
    """The identity, whose backward pass turns a clock forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: list[float], seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock[0] += ctx.seconds
        return grad, None, None


def test_backward_time_goes_to_the_module_that_takes_it(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = UnivalConfig.from_yaml(ROOT / "configs/model/unival_tiny.yaml", vocab_size=300)
    model = UnivalForConditionalGeneration(config).train()
    timeline, clock = bench.Timeline(CPU), [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def slow(module: nn.Module, seconds: float) -> None:
        module.register_forward_hook(lambda _, __, out: Slow.apply(out, clock, seconds))

    encoder, decoder = model.encoder, model.decoder
    slow(encoder.image_encoder.bn1, 1.0)
    slow(encoder.image_encoder.layer4, 2.0)
    slow(encoder.image_proj, 4.0)
    slow(encoder.embed_tokens, 8.0)  # of the encoder's text and the decoder's
    slow(encoder.layers[1].ffn.fc1, 16.0)
    slow(decoder.layers[0].cross_attn.k_proj, 32.0)
    slow(decoder.layers[1].ffn.fc1, 64.0)
    bench.watch(model, timeline)
    ids = torch.randint(4, 300, (2, 6))
    timeline.begin()
    with timeline.part("forward"):
        out = model(ids, pixel_values=torch.randn(2, 3, 32, 32), decoder_input_ids=ids)
        loss = Slow.apply(out.logits, clock, 128.0).square().sum()
    with timeline.part("backward"):
        loss.backward()
        clock[0] += 256.0  # what an engine does after torch's pass
    timeline.end()
    [parts] = timeline.read()
    assert {name: seconds for name, seconds in parts.items() if seconds} == {
        "loss_backward": 128.0,
        "lm_decoder_backward": 64.0 + 32.0,
        "lm_encoder_backward": 16.0 + 8.0 + 4.0,
        "image_encoder_backward": 2.0 + 1.0,
        "gradients": 256.0,
    }
    assert {"image_encoder", "lm_encoder", "lm_decoder", "loss"} <= parts.keys()


def test_passes_are_those_of_the_recipes(bench: ModuleType) -> None:
    full, Work = bench.Scale(), sys.modules["hours_cases"].Work
    cases = bench.cases()

    def passes(name: str, scale: Any = full) -> list[tuple[int, Any]]:
        return bench.works(cases[name], bench.load_run(cases[name], scale), scale)

    # Released: 16 rows on each of 8 GPUs; 4 passes of 8 rows; 2 rows of each of three sources, two
    # examples each; 4 rows of pictures and 4 of clips, four times.
    assert passes("coco/ofa_base") == [(0, Work("image", (480, 480), 16, 16, 9, 14))]
    assert passes("refcocoplus/unival_base") == 4 * [(0, Work("image", (512, 512), 8, 8, 16, 5))]
    assert passes("stage1") == 4 * [(0, Work("image", (384, 384), 6, 12, 24, 12))]
    image, video = (384, 384), (8, 224, 224)
    both = [(0, Work("image", image, 4, 8, 24, 12))] * 4
    assert passes("table2/images") == both
    assert passes("table2/all") == both + [(1, Work("video", video, 4, 8, 24, 12))] * 4
    scaled = passes("stage2_highres", bench.Scale(batch=2, image=4))
    assert scaled[0] == (0, Work("image", (120, 120), 2, 4, 24, 12))
    assert scaled[-1] == (1, Work("video", (16, 96, 96), 2, 4, 24, 12))
    assert passes("vqav2/ofa_base", bench.Scale(batch=1000))[0][1].media == 1
    with pytest.raises(ValueError, match="factors are at least 1"):
        bench.Scale(batch=0)
    odd = dataclasses.replace(cases["coco/ofa_base"], gpus=7)
    with pytest.raises(ValueError, match="128 rows are not shared evenly by 7 passes"):
        bench.works(odd, bench.load_run(odd, full), full)


def test_summary_by_hand(bench: ModuleType) -> None:
    case = dataclasses.replace(bench.cases()["coco/ofa_base"], examples=7200)
    found = {
        "examples": 4,
        "steps": [
            {"lm_encoder": 1.0, "lm_encoder_backward": s - 1.0} for s in (2.0, 2.0, 2.0, 4.0)
        ],
        "flops": 30,
        "peak_flops": 60.0,
        "peak_bytes": 2**30,
    }
    told = bench.summarize(case, found)
    metrics = told["metrics"]
    # Steps of 2, 2, 2 and 4 s: p80 is 0.4 of the way from the third to the fourth, 2.8.
    assert metrics["step_seconds"]["p80"] == pytest.approx(2.8)
    assert told["spread"] == pytest.approx(0.4) and not told["reliable"]
    # 4 examples in 2 s; 7200 take 3600 s, or 5040 s at 4 in 2.8 s; 30 operations in 2 s of 60 a s.
    assert metrics["samples_per_second"] == pytest.approx({"p20": 4 / 2.8, "p50": 2.0, "p80": 2.0})
    assert metrics["device_hours"] == pytest.approx({"p20": 1.0, "p50": 1.0, "p80": 1.4})
    assert metrics["mfu"]["p50"] == pytest.approx(0.25)
    assert metrics["seconds.lm_encoder"]["p50"] == 1.0
    assert metrics["seconds.lm_encoder_both_ways"]["p50"] == 2.0


def test_prediction_is_of_the_whole_work(bench: ModuleType) -> None:
    case = bench.cases()["refcocoplus/unival_base"]
    told = bench.predict(case, "H100", "unival_tiny")
    rate, hours = told["samples_per_second"], told["device_hours"]
    assert rate["low"] < rate["likely"] < rate["high"]
    assert hours["low"] < hours["likely"] < hours["high"]
    # One GPU of 8 takes 8 rows in each of 4 passes of a step.
    assert rate["likely"] == pytest.approx(4 * 8 / told["step_seconds"]["likely"])
    assert hours["likely"] == pytest.approx(120_000 / rate["likely"] / 3600)
    parts = sum(x["likely"] for name, x in told.items() if name.startswith("seconds."))
    assert parts == pytest.approx(told["step_seconds"]["likely"])
    with pytest.raises(ValueError, match="unknown GPU 'H1000'"):
        bench.predict(case, "H1000")


def make_report(bench: ModuleType) -> dict[str, Any]:
    """Hand-made: OFA takes twice as long as UnIVAL measured, thrice predicted."""
    rows = []
    for name, measured, predicted in (
        ("coco/ofa_base", 4.0, 3.0),
        ("coco/unival_base", 2.0, 1.0),
        ("table2/images", 1.0, 0.5),
        ("table2/all", 2.0, 2.0),
    ):
        case = bench.cases()[name]
        metrics = {"device_hours": {"p20": measured, "p50": measured, "p80": measured}}
        metrics |= {"peak_bytes": {"p50": measured * 2**30}, "step_seconds": {"p50": 1.0}}
        metrics |= {"seconds.loss": {"p50": 0.25}, "seconds.optimizer": {"p50": 0.75}}
        row = {"case": name, "table": case.table, "model": case.model, "paper": case.paper}
        row |= {"gpus": 8, "examples": 100, "batch_factor": 8, "image_factor": 4}
        row["precision"] = "bf16"
        row["step_examples"] = 2048 * (1 + (name == "table2/all"))
        machine = {"others_cores": 0.3, "device": "cpu"}
        row["measured"] = {"metrics": metrics, "reliable": name != "table2/all", "spread": 0.02}
        row["measured"]["machine"] = machine
        row["predicted"] = {"H100": {"device_hours": {"likely": predicted, "low": 0, "high": 9}}}
        rows.append(row)
    options = {"batch_factor": 8, "image_factor": 4, "predict": ["H100"], "predict_only": False}
    options |= {"precision": "fp32", "steps": 3, "warmup": 1}
    return {"command": "python benchmarks/gpu_hours.py", "options": options, "rows": rows}


def cells(text: str, start: str) -> list[list[str]]:
    found = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_tables_put_the_papers_figures_beside_ours(bench: ModuleType) -> None:
    text = bench.markdown(make_report(bench))
    scaled = "measured (batch / 8, pixels / 4)"
    assert cells(text, "Method")[0] == ["Method", "COCO: paper", scaled, "*predicted*, H100"]
    assert cells(text, "OFA")[0] == ["OFA", "5.7", "4.00", "3.00"]
    assert cells(text, "UnIVAL")[0] == ["UnIVAL", "3.1", "2.00", "1.00"]
    assert cells(text, "OFA / UnIVAL")[0] == ["OFA / UnIVAL", "1.84", "2.00", "3.00"]
    # The curriculum: (1 + 2) / 2 of 2 measured, (0.5 + 2) / 2 of 2 predicted; the paper 102 / 124.
    table = dict(zip(cells(text, "Method")[1], cells(text, "MCL / one-stage")[0], strict=True))
    assert table["hours of an epoch: paper, all GPUs"] == "0.82"
    assert table[f"device-hours, {scaled}"] == "0.75"
    assert table["device-hours, *predicted*, H100"] == "0.62"
    assert table["average batch: paper"] == "0.75" and table["ours"] == "0.75"
    assert table["memory: paper, relative"] == "0.75" and table[f"GiB, {scaled}"] == "0.75"
    assert cells(text, "MCL")[0][1] == "1.70"  # 1 h 42 min
    assert cells(text, "loss")[0][1:] == ["250.0"] * 4
    assert cells(text, "table2/all")[0][7] == "unreliable"
    assert "other programs kept up to 0.3 cores busy" in text


def test_measured_and_predicted_share_no_column(bench: ModuleType, tmp_path: Path) -> None:
    bench.write(make_report(bench), tmp_path / "deep" / "hours.x")
    with (tmp_path / "deep" / "hours.x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * (5 + 1)
    for row in rows:
        assert bool(row["measured_p50"]) != bool(row["predicted"])
        assert (row["batch_factor"], row["image_factor"]) == (
            ("1", "1") if row["predicted"] else ("8", "4")
        )
        assert bool(row["predicted_for"]) == bool(row["predicted"])
        assert row["precision"] == ("bf16" if row["predicted"] else "fp32")
        assert row["others_cores"] == ("" if row["predicted"] else "0.3")
    hours = [r for r in rows if r["metric"] == "device_hours" and r["measured_p50"]]
    assert [r["paper"] for r in hours] == ["5.7", "3.1", "", ""]
    assert [r["unit"] for r in hours] == ["h"] * 4
    assert json.loads((tmp_path / "deep" / "hours.x.json").read_text())["rows"][0]["paper"] == 5.7
    for name in ("hours.x_ratios.png", "hours.x_parts.png"):
        assert (tmp_path / "deep" / name).read_bytes().startswith(b"\x89PNG")
    assert "5.7" in (tmp_path / "deep" / "hours.x.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cases", "coco"], "invalid choice: 'coco'"),
        (["--batch-factor", "0"], "--batch-factor must be at least 1"),
        (["--model", "../../etc/x"], "no such file in configs/model"),
    ],
)
def test_arguments_are_refused(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.parse(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_a_case_that_fails_is_told(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="coco/ofa_base: status 1"):
        bench.run_case(bench.cases()["coco/ofa_base"], [])


def test_a_case_is_measured(bench: ModuleType) -> None:
    argv = ["--model", "unival_tiny", "--cases", "vqav2/unival_base", "--batch-factor", "4"]
    argv += ["--image-factor", "7", "--steps", "2", "--warmup", "0", "--threads", "1"]
    report = bench.collect(bench.parse([*argv, "--predict"]), [*argv, "--predict"])
    [row] = report["rows"]
    assert row["model"] == "unival_tiny" and row["step_examples"] == 256
    metrics, measured = row["measured"]["metrics"], row["measured"]
    assert measured["passes"] == ["4 x image (68, 68)"]
    rate = 4 / metrics["step_seconds"]["p50"]
    assert metrics["samples_per_second"]["p50"] == pytest.approx(rate)
    assert metrics["device_hours"]["p50"] == pytest.approx(443_000 / rate / 3600)
    expected = {"image_encoder", "lm_encoder", "lm_decoder", "loss"}
    expected |= {f"{name}_backward" for name in expected}
    expected |= {"decode_wait", "transfer", "gradients", "optimizer", "communication", "other"}
    parts = {name for name in bench.PARTS if f"seconds.{name}" in metrics}
    assert parts == expected
    assert all(metrics[f"seconds.{name}"]["p50"] > 0 for name in parts)
    assert 0 < metrics["mfu"]["p50"] < 1
    assert metrics["peak_bytes"]["p50"] > 200 * 2**20
    assert {"load_before", "load_after", "others_cores", "torch"} <= measured["machine"].keys()
    assert "| vqav2 | unival_tiny |" in bench.markdown(report)
