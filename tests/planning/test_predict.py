"""Predicted seconds and bytes against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unival.planning.ceilings import EFFICIENCY, Ceilings, Reach, Share
from unival.planning.counts import Counts, Operation
from unival.planning.memory import largest, zero_state
from unival.planning.predict import (
    communication_seconds,
    pass_seconds,
    total,
    update_seconds,
)

HALF = Share(0.25, 0.5, 1.0)
GPU = Ceilings(
    names=("GPU",),
    source="a test",
    measured=False,
    memory=10**10,
    peak={"bf16": 100.0},
    bandwidth=10.0,
    link=5.0,
    allocation=0.0,
    launch=0.5,
    overlapped=True,
    efficiency=EFFICIENCY | {kind: Reach(HALF, HALF) for kind in ("matmul", "memory")},
)
# Half of 100 operations/s and of 10 bytes/s: 200 operations take 4 s, 10 bytes 2 s.
PRODUCT = Operation("lm_encoder", "forward", "matmul", "mm", 200, 10)
COPY = Operation("lm_encoder", "forward", "memory", "copy_", 0, 30)


def seconds(ceilings: Ceilings, *operations: Operation) -> tuple[float, float, float]:
    found = total(pass_seconds(Counts(operations, {}, 0), ceilings, "bf16"))
    return found.low, found.seconds, found.high


def test_a_gpu_takes_the_longer_of_operations_and_bytes() -> None:
    assert seconds(GPU, PRODUCT) == (2.0, 4.0, 8.0)
    assert seconds(GPU, COPY) == (3.0, 6.0, 12.0)
    assert seconds(GPU, PRODUCT, replace(COPY, calls=2)) == (8.0, 16.0, 32.0)


def test_many_launches_bound_a_part_and_not_the_others() -> None:
    small = Operation("loss", "forward", "memory", "add", 0, 1, calls=100)  # 20 s of work
    assert seconds(GPU, small)[1] == 50.0  # 100 launches of 0.5 s
    assert seconds(GPU, small, PRODUCT)[1] == 54.0


def test_a_processor_adds_operations_bytes_new_memory_and_launches() -> None:
    cpu = replace(GPU, overlapped=False, allocation=4.0)
    assert seconds(cpu, PRODUCT)[1] == 4.0 + 2.0 + 0.5
    assert seconds(cpu, replace(COPY, fresh=8))[1] == 6.0 + 2.0 + 0.5


def test_a_precision_without_peak_is_refused() -> None:
    with pytest.raises(ValueError, match="no peak for fp32; its ceilings have bf16"):
        pass_seconds(Counts((PRODUCT,), {}, 0), GPU, "fp32")


def test_communication_by_zero_stage() -> None:
    def seconds(stage: int, ranks: int = 4) -> float:
        return communication_seconds(10, 3, ranks, stage, GPU, "bf16").seconds

    # 10 parameters of 2 bytes, 3/4 of them sent a round, 5 bytes/s: 3 s a round.
    assert [seconds(stage) for stage in range(4)] == [6.0, 6.0, 12.0, 27.0]
    assert seconds(2, ranks=1) == 0.0
    with pytest.raises(ValueError, match="link_gbs is 0"):
        communication_seconds(10, 1, 2, 0, replace(GPU, link=0.0), "bf16")


def test_an_update_moves_weights_moments_and_gradients() -> None:
    # fp32, 1 pass, 10 parameters: 8 bytes to add a gradient, 32 for the update; 5 bytes/s.
    one = update_seconds(10, 1, 1, 0, GPU, "fp32").seconds
    assert one == 10 * (8 + 32) / 5.0
    # bf16, 2 passes, stage 1 on 2 ranks: 2 x (8 + 2) and half of 34.
    half = update_seconds(10, 2, 2, 1, GPU, "bf16").seconds
    assert half == 10 * (20 + 17) / 5.0


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        # Rajbhandari et al. (2020), 8 ranks, 80 parameters, of which gradients are in float32.
        ("fp32", 0, (320, 320, 640)),
        ("fp32", 1, (320, 320, 120)),
        ("bf16", 1, (160, 320, 120)),
        ("bf16", 2, (160, 40, 120)),
        ("fp16", 3, (20, 40, 120)),
    ],
)
def test_state_by_zero_stage(precision: str, stage: int, expected: tuple[int, ...]) -> None:
    found = zero_state(80, precision, stage, 8)
    assert (found.parameters, found.gradients, found.optimizer) == expected
    assert found.total == sum(expected)


def test_frozen_parameters_have_weights_alone() -> None:
    assert zero_state(80, "bf16", 1, 8, frozen=100).total == 2 * 180 + 320 + 120


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((1, "fp32", 4, 1), "zero_stage=4"), ((1, "int8", 1, 1), "int8"), ((1, "fp32", 1, 0), "rank")],
)
def test_bad_states_are_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        zero_state(*arguments)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 4095, 4096, 9000])
@pytest.mark.parametrize("start", [1, 5, 64, 4096])
def test_the_largest_that_fits(limit: int, start: int) -> None:
    assert largest(lambda n: n <= limit, start) == min(limit, 4096)
