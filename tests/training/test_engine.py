"""The engine's arithmetic: the same step under every ZeRO stage, however its rows are split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from ranks import on_ranks

from unival.training.engine import learning_rate
from unival.training.options import DeepSpeedOptions, MicroBatch, Mixture, Stage

STEPS = 3


@pytest.fixture(scope="module")
def reference():
    """Losses, gradient norms and weights of plain PyTorch on all rows at once."""
    run = cases.small_run(Path("unused"))
    return cases.by_hand(run, [cases.rows_of_step(step) for step in range(1, STEPS + 1)])


def assert_same_training(found, reference, tolerance=1e-5):
    """Losses and weights to `tolerance`; norms, which are float32 sums of two million squares, to
    what torch's own two ways to add them differ by."""
    results, states = zip(*found, strict=True)
    losses, norms, weights = reference
    for rank in results:
        assert [r.loss for r in rank] == pytest.approx(losses, rel=tolerance)
        assert [r.grad_norm for r in rank] == pytest.approx(norms, rel=max(tolerance, 5e-5))
        assert all(r.finite for r in rank)
    trained = cases.whole(states)
    masters = {name for name in trained if name.startswith("master/")}
    assert masters == weights.keys()
    for name in masters:
        torch.testing.assert_close(
            trained[name], weights[name], rtol=tolerance, atol=tolerance / 100, msg=name
        )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_stage_trains_as_plain_pytorch_does(tmp_path, reference, stage, world):
    run = cases.stage_zero(cases.small_run(tmp_path), stage)
    found = on_ranks(tmp_path, world, cases.train_steps, run, STEPS)
    assert_same_training(found, reference)


@pytest.mark.parametrize("stage", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_a_step_in_passes_is_the_step_at_once(tmp_path, reference, stage):
    """Two ranks of two passes each, whose rows have targets of other lengths: a mean of the passes'
    means would be another loss."""
    run = cases.stage_zero(cases.small_run(tmp_path, {"accumulate": 2}), stage)
    found = on_ranks(tmp_path, 2, cases.train_steps, run, STEPS)
    assert_same_training(found, reference)


@pytest.fixture(scope="module")
def mixed():
    """Batches of two ranks that show other media in the same pass, and training on them by hand."""
    media = ["image", "video", "text"]
    stage = {"micro_batches": [MicroBatch(m, [Mixture("qa", 4)]) for m in media], "steps": 4}
    run = cases.small_run(Path("unused"), stage)
    given = [
        [[cases.noise("image", 2, 1)], [cases.noise("video", 1, 2)], [cases.noise("text", 2, 3)]],
        [[cases.noise("video", 3, 4)], [cases.noise("video", 2, 5)], [cases.noise("image", 1, 6)]],
    ]
    together = [[*first, *second] for first, second in zip(*given, strict=True)]
    return run, given, cases.by_hand(run, together)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_with_different_media_neither_hang_nor_differ(tmp_path, mixed, stage):
    run, given, expected = mixed
    found = on_ranks(tmp_path, 2, cases.train_on, cases.stage_zero(run, stage), given)
    assert_same_training(found, expected)


@pytest.mark.parametrize(
    ("stage", "world"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow), (3, 2)]
)
def test_bf16_follows_float32(tmp_path, reference, stage, world):
    run = cases.stage_zero(cases.small_run(tmp_path, precision="bf16"), stage)
    found = on_ranks(tmp_path, world, cases.train_steps, run, STEPS)
    losses, norms, weights = reference
    for results, _ in found:
        assert [r.loss for r in results] == pytest.approx(losses, rel=1e-2)
        assert [r.grad_norm for r in results] == pytest.approx(norms, rel=5e-2)
    trained = cases.whole([state for _, state in found])
    for name, values in trained.items():
        assert values.dtype == torch.float32
        # 3 updates of at most 1e-3 each; a master kept in bf16 would be off by 2**-9 of its size.
        assert float((values - weights[name]).abs().max()) < 6e-3, name
        if name.endswith("norm.weight"):
            assert not values.equal(values.bfloat16().float()), name


@pytest.mark.parametrize(
    ("stage", "world"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2), (3, 2)]
)
def test_an_offloaded_optimizer_computes_the_same(tmp_path, reference, stage, world):
    run = cases.small_run(tmp_path)
    run = replace(run, deepspeed=DeepSpeedOptions(zero_stage=stage, offload_optimizer=True))
    found = on_ranks(tmp_path, world, cases.train_steps, run, STEPS)
    assert_same_training(found, reference)


@pytest.mark.slow
def test_recomputation_computes_the_same(tmp_path, reference):
    run = cases.stage_zero(cases.small_run(tmp_path, recompute=True), 3)
    assert_same_training(on_ranks(tmp_path, 2, cases.train_steps, run, STEPS), reference)


@pytest.mark.parametrize(
    ("stage", "world"), [(0, 1), pytest.param(2, 2, marks=pytest.mark.slow), (3, 2)]
)
def test_the_average_is_that_of_the_weights_after_every_step(tmp_path, stage, world):
    run = cases.stage_zero(cases.small_run(tmp_path, {"ema_decay": 0.7}), stage)
    found = on_ranks(tmp_path, world, cases.train_and_record, run, 2)
    history = [cases.whole(list(states)) for states in zip(*found, strict=True)]
    for name in history[0]:
        if name.startswith("average/"):
            first, second, third = (h[name.replace("average", "master")].double() for h in history)
            expected = 0.7 * (0.7 * first + 0.3 * second) + 0.3 * third
            torch.testing.assert_close(
                history[2][name], expected.float(), rtol=1e-6, atol=1e-7, msg=name
            )
    assert any(name.startswith("average/") for name in history[0])


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_frozen_stays_as_it_is_and_costs_no_state(tmp_path, stage):
    rules = {"freeze": ["all_but_connections"]}
    run = cases.stage_zero(cases.small_run(tmp_path, rules), stage)
    (found,) = on_ranks(tmp_path, 1, cases.train_and_compare, run, 2)
    moved, pieces = found
    connections = {f"encoder.{m}_proj.{n}" for m in ("image", "video") for n in ("weight", "bias")}
    assert moved == connections == pieces


def rates(stage: Stage, steps: int) -> list[float]:
    return [learning_rate(stage, step) for step in range(1, steps + 1)]


def test_the_learning_rate_warms_up_and_decays_to_the_horizon():
    micro = [MicroBatch("image", [Mixture("qa", 1)])]
    stage = Stage("s", 10, micro, learning_rate=8.0, warmup_ratio=0.2)
    assert rates(stage, 10) == [4.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    longer = replace(stage, schedule_steps=20, warmup_ratio=0.0)
    assert rates(longer, 10)[-1] == pytest.approx(4.0)
