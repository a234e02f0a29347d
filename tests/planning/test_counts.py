"""Operations, bytes and memory of a pass against hand counts and a second way of counting."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from unival.model import flops
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.planning.counts import (
    Recorder,
    Training,
    Work,
    count,
    make_batch,
    parameter_counts,
    run_pass,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def config(name: str, **changed: object) -> UnivalConfig:
    return UnivalConfig.from_yaml(CONFIGS / f"{name}.yaml", **changed)


def tiny(**changed: object) -> UnivalConfig:
    """Small, with an image encoder alone."""
    usual = {"vocab_size": 1000, "video_layers": None, "audio_channels": None}
    return config("unival_tiny", **(usual | changed))


@pytest.mark.parametrize(
    ("name", "side", "cells"), [("unival_base", 32, 225), ("ofa_base", 16, 900)]
)
def test_base_models_at_480_pixels_are_counted_in_seconds(name: str, side: int, cells: int) -> None:
    start = time.process_time()
    found = count(config(name, video_layers=None), Work("image", (480, 480), 16, 16, 24, 16))
    assert time.process_time() - start < 30
    rows, length = 16, cells + 24
    # Encoder: 6 layers of four maps of 768 x 768 and two of 768 x 3072, 2 operations for each
    # multiply-add; scores of content and position and the sum of values, 3 products of width 768;
    # two maps of the positions, which all rows share.
    maps = 2 * rows * length * (4 * 768 * 768 + 2 * 768 * 3072)
    attention = 3 * 2 * rows * length * length * 768
    positions = 2 * 2 * length * 768 * 768
    encoder = 6 * (maps + attention) + positions
    assert found.total("flops", part="lm_encoder", phase="forward") == encoder
    # Its backward: each map has two gradients. Attention makes its two score products again, dp,
    # dv, dq, dk, dpq and dpk: 8 products of width 768 for 3.
    backward = 2 * 6 * maps + 6 * attention // 3 * 8 + 2 * positions
    assert found.total("flops", part="lm_encoder", phase="backward") == backward
    # Projection of 2,048 channels, or 1,024 after the third stage; two gradients.
    channels = {32: 2048, 16: 1024}[side]
    one = 2 * rows * cells * channels * 768
    assert found.total("flops", part="projection", phase="forward") == one
    assert found.total("flops", part="projection", phase="backward") == 2 * one
    # Logits of 16 x 16 tokens; backward makes them again, and two gradients.
    logits = 2 * 16 * 16 * 768 * 59457
    assert found.total("flops", part="loss", phase="forward") == logits
    assert found.total("flops", part="loss", phase="backward") == 3 * logits


@pytest.mark.parametrize(
    ("medium", "size"), [("image", (96, 64)), ("video", (4, 64, 96)), ("audio", (101, 64))]
)
def test_encoders_agree_with_the_arithmetic_of_flops(medium: str, size: tuple[int, ...]) -> None:
    shape = config("unival_tiny")
    found = count(shape, Work(medium, size, 3, 3, 5, 7))
    given = (48_000,) if medium == "audio" else size  # a hop of 480: 101 frames
    expected = flops.forward(shape, medium, given, 3, 5, 7)
    if medium == "audio":  # the mel filters of 513 frequencies are not counted
        expected["audio_encoder"] -= 3 * 2 * 101 * 513 * 64
    own = found.total("flops", part=f"{medium}_encoder", phase="forward")
    assert own == expected[f"{medium}_encoder"]
    projected = found.total("flops", part="projection", phase="forward")
    encoder = found.total("flops", part="lm_encoder", phase="forward")
    assert projected + encoder == expected["lm_encoder"]
    assert found.total("flops", part="lm_decoder", phase="forward") == expected["lm_decoder"]


def test_media_that_rows_share_are_encoded_once() -> None:
    shared = count(tiny(), Work("image", (64, 64), 2, 4, 5, 7))
    own = count(tiny(), Work("image", (64, 64), 4, 4, 5, 7))
    one, two = (c.total("flops", part="image_encoder", phase="forward") for c in (shared, own))
    assert 2 * one == two > 0
    decoders = [c.total("flops", part="lm_decoder") for c in (shared, own)]
    assert decoders[0] == decoders[1] > 0


def test_bytes_of_a_linear_map_are_inputs_and_outputs_once() -> None:
    recorder = Recorder()
    with torch.device("meta"):
        x, weight = torch.empty(5, 8), torch.empty(3, 8)
        with recorder:
            F.linear(x, weight)
    found = [o for o in recorder.operations() if o.kind == "matmul"]
    # float32: 5 x 8 and 3 x 8 are read, 5 x 3 written; 2 * 5 * 8 * 3 operations.
    assert [(o.bytes, o.flops) for o in found] == [(4 * (40 + 24 + 15), 240)]


def test_a_lookup_reads_its_rows_and_not_the_table() -> None:
    recorder = Recorder()
    with torch.device("meta"):
        table, ids = torch.empty(1000, 8), torch.empty(6, dtype=torch.int64)
        with recorder:
            F.embedding(ids, table)
    # 6 rows of 8 float32 read and written, 6 ids of 8 bytes read.
    assert [o.bytes for o in recorder.operations()] == [2 * 6 * 8 * 4 + 6 * 8]


def test_gradients_of_a_grouped_convolution_cost_a_group_each() -> None:
    with torch.device("meta"):
        x = torch.empty(2, 8, 6, 6, requires_grad=True)
        weight = torch.empty(12, 2, 3, 3, requires_grad=True)
        recorder = Recorder()
        with recorder:
            recorder.backward(F.conv2d(x, weight, padding=1, groups=4).sum())
    found = {o.phase: o for o in recorder.operations() if o.kind == "grouped_conv"}
    # 2 samples x 36 places x 12 channels, each of 2 x 9 multiply-adds; two gradients.
    assert found["forward"].flops == 2 * (2 * 36 * 12 * 18) == 31104
    assert found["backward"].flops == 2 * 31104


def test_most_bytes_that_live_at_once() -> None:
    with torch.device("meta"):
        x = torch.empty(1000)
        recorder = Recorder()
        with recorder:
            a = x * 2  # 4,000 bytes
            b = a * 2  # 8,000
            del a
            c = b * 2  # 8,000
            del b, c
            d = x * 2
    assert recorder.peak == 8000
    assert recorder.live == 4000
    del d
    assert recorder.live == 0


def test_activations_are_at_least_what_autograd_saves() -> None:
    shape, work = tiny(), Work("image", (64, 64), 4, 8, 12, 9)
    with torch.device("meta"):
        model = UnivalForConditionalGeneration(shape).train()
        weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        kept: dict[int, int] = {}
        held = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                held.append(tensor)
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run_pass(model, make_batch(work, torch.float32, "meta"))
    saved = sum(kept.values())
    assert loss.ndim == 0
    found = count(shape, work, Training("fp32", fused=False)).activations
    assert saved <= found < 1.5 * saved


def test_recomputation_takes_less_memory_and_more_operations() -> None:
    shape = tiny(image_layers=None, encoder_layers=6)
    work = Work("text", (), 8, 8, 200, 100)
    plain = count(shape, work, Training())
    again = count(shape, work, Training(recompute=True))
    assert again.activations < 0.7 * plain.activations
    # The maps are made again (8 x 200 tokens, four of 64 x 64 and two of 64 x 256, 6 layers), the
    # products of attention are not.
    more = again.total("flops", part="lm_encoder") - plain.total("flops", part="lm_encoder")
    assert more == 6 * 2 * 1600 * (4 * 64 * 64 + 2 * 64 * 256)
    assert again.total("flops", phase="forward") == plain.total("flops", phase="forward")


def test_half_precision_halves_bytes() -> None:
    work = Work("video", (4, 64, 64), 2, 2, 8, 8)
    shape = config("unival_tiny", audio_channels=None, image_layers=None)
    full, half = (count(shape, work, Training(p)) for p in ("fp32", "bf16"))
    assert half.activations == pytest.approx(full.activations / 2, rel=0.15)
    grouped = (counts.total("bytes", kind="grouped_conv") for counts in (full, half))
    assert next(grouped) == 2 * next(grouped) > 0


def test_the_recorder_counts_a_real_pass_as_it_counts_a_pass_without_values() -> None:
    torch.manual_seed(0)
    shape, work = tiny(), Work("image", (64, 64), 2, 2, 12, 9)
    model = UnivalForConditionalGeneration(shape).train()
    recorder = Recorder(time.thread_time)
    recorder.watch(model)
    with recorder:
        recorder.backward(run_pass(model, make_batch(work, torch.float32, "cpu")))
    recorder.release()
    found = count(shape, work, Training("fp32", fused=False))
    for part in ("image_encoder", "projection", "lm_encoder", "lm_decoder", "loss"):
        for phase in ("forward", "backward"):
            wanted = {"part": part, "phase": phase}
            own = sum(
                o.flops * o.calls
                for o in recorder.operations()
                if (o.part, o.phase) == (part, phase)
            )
            assert own == found.total("flops", **wanted) > 0, wanted
    assert all(seconds >= 0 for seconds in recorder.seconds.values())
    assert not model.encoder._forward_hooks


def test_frozen_parts_have_no_backward() -> None:
    work = Work("image", (64, 64), 2, 2, 12, 9)
    rules = ("image_encoder",)
    found = count(tiny(), work, Training(freeze=rules))
    assert found.total("flops", part="image_encoder", phase="backward") == 0
    numbers = parameter_counts(tiny(), ["image"], rules)
    whole = sum(p.numel() for p in UnivalForConditionalGeneration(tiny()).parameters())
    assert sum(numbers.values()) == whole
    assert found.parameters == numbers


def test_parameters_of_the_published_model() -> None:
    # 250,489,072 with the original's unused classifier of 2,049,000 (2,048 x 1,000 + 1,000).
    found = parameter_counts(config("unival_base"), ["image", "video"])
    assert found == {"trained": 250_489_072 - 2_049_000, "frozen": 0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("smell", (3,), 1, 1, 1, 1), "medium 'smell'"),
        (("image", (64, 64), 0, 0, 1, 1), "at least 1"),
        (("image", (64, -1), 1, 1, 1, 1), "at least 1"),
        (("image", (64, 64), 2, 3, 1, 1), "share"),
    ],
)
def test_bad_work_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Work(*arguments)


def test_a_medium_without_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="no video encoder"):
        count(tiny(), Work("video", (4, 64, 64), 1, 1, 2, 2))
    with pytest.raises(ValueError, match="precision 'fp8'"):
        Training("fp8")


def test_norms_are_single_operators_on_a_gpu() -> None:
    work = Work("image", (64, 64), 2, 2, 12, 9)
    fused, plain = (count(tiny(), work, Training(fused=flag)) for flag in (True, False))
    for part in ("projection", "lm_encoder", "lm_decoder", "loss"):
        assert fused.total("flops", part=part) == plain.total("flops", part=part) > 0
    # A bottleneck of a CPU has products with the covariance of what its last convolution takes.
    more = [counts.total("flops", part="image_encoder") for counts in (plain, fused)]
    assert 1.0 < more[0] / more[1] < 1.5
    assert fused.total("calls") < 0.6 * plain.total("calls")
    assert fused.total("bytes") < plain.total("bytes")
