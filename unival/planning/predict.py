"""Predicted seconds of a training step, from counted work and a device's ceilings.

An operator takes its operations over what its kind reaches of the peak, and its bytes over what its
kind reaches of the bandwidth. A part takes the sum over its operators and what launching them
costs. A device that launches ahead (a GPU) does the three beside each other: there the longest
counts, of operations and bytes in each operator, and of work and launches in each part. Nothing is
fitted to steps. The band is the same sum with every kind at its worst and at its best.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from unival.planning.ceilings import Ceilings, Share
from unival.planning.counts import Counts, Operation
from unival.planning.memory import WEIGHT_BYTES

# Bytes of a trained parameter that an update reads and writes: float32 weight, gradient and two
# moments are read, all but the gradient are written; clipping reads the gradient once more.
UPDATE_BYTES = 4 * (4 + 3 + 1)
ADDED_BYTES = 4 * 2  # a pass adds its gradient to the step's sum in float32: read, written


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds: likely, and the ends of the band."""

    seconds: float
    low: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Estimate:
        """As often, or as long."""
        return Estimate(self.seconds * factor, self.low * factor, self.high * factor)


ZERO = Estimate(0.0, 0.0, 0.0)


def operation_seconds(operation: Operation, ceilings: Ceilings, precision: str, at: str) -> float:
    """One call on the device, without its launch; `at` is a field of Share."""
    reach = ceilings.efficiency[operation.kind]
    moving = operation.bytes / (ceilings.bandwidth * getattr(reach.bandwidth, at))
    computing = operation.flops / (ceilings.peak[precision] * getattr(reach.peak, at))
    if ceilings.allocation:
        moving += operation.fresh / ceilings.allocation
    return max(moving, computing) if ceilings.overlapped else moving + computing


def pass_seconds(
    counts: Counts, ceilings: Ceilings, precision: str
) -> dict[tuple[str, str], Estimate]:
    """Predicted seconds of a pass by part and phase.

    Raises:
        ValueError: the ceilings lack the precision.
    """
    if precision not in ceilings.peak:
        known = ", ".join(ceilings.peak)
        raise ValueError(f"{ceilings.name}: no peak for {precision}; its ceilings have {known}")
    found: dict[str, dict[tuple[str, str], float]] = {}
    for at in Share._fields:
        device: dict[tuple[str, str], float] = defaultdict(float)
        launches: dict[tuple[str, str], float] = defaultdict(float)
        for operation in counts.operations:
            key = operation.part, operation.phase
            one = operation_seconds(operation, ceilings, precision, at)
            device[key] += operation.calls * one
            reach = ceilings.efficiency[operation.kind]
            launches[key] += operation.calls * reach.launches * ceilings.launch
        found[at] = {
            key: max(seconds, launches[key]) if ceilings.overlapped else seconds + launches[key]
            for key, seconds in device.items()
        }
    return {
        key: Estimate(seconds, found["high"][key], found["low"][key])
        for key, seconds in found["likely"].items()
    }


def update_seconds(
    parameters: int, passes: int, ranks: int, zero_stage: int, ceilings: Ceilings, precision: str
) -> Estimate:
    """Predicted seconds of adding up the gradients of a step's passes, clipping and AdamW."""
    shares = ranks if zero_stage >= 1 else 1
    half = WEIGHT_BYTES[precision] if precision != "fp32" else 0  # of the pass, and of the weight
    moved = parameters * (passes * (ADDED_BYTES + half) + (UPDATE_BYTES + half) / shares)
    share = ceilings.efficiency["memory"].bandwidth
    one = moved / ceilings.bandwidth
    return Estimate(one / share.likely, one / share.high, one / share.low)


def communication_seconds(
    parameters: int, passes: int, ranks: int, zero_stage: int, ceilings: Ceilings, precision: str
) -> Estimate:
    """Predicted seconds of collectives, none of which is hidden behind the backward pass.

    A ring moves (n - 1) / n of the parameters' bytes for a reduce-scatter or an all-gather: both
    once a step up to stage 1, the gradients' one every pass from stage 2, and at stage 3 weights
    are gathered in each forward and backward pass. At best all of it is hidden; at worst the link
    gives half of its rate.
    """
    if ranks == 1:
        return ZERO
    if ceilings.link <= 0:
        raise ValueError(f"{ceilings.name}: link_gbs is 0, but {ranks} of them must communicate")
    rounds = {0: 2, 1: 2, 2: 1 + passes, 3: 3 * passes}[zero_stage]
    moved = rounds * parameters * WEIGHT_BYTES[precision] * (ranks - 1) / ranks
    return Estimate(moved / ceilings.link, 0.0, 2 * moved / ceilings.link)


def total(estimates: Mapping[tuple[str, str], Estimate]) -> Estimate:
    """The sum over parts."""
    return sum(estimates.values(), ZERO)
