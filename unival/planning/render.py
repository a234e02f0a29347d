"""A plan for people."""

from __future__ import annotations

from unival.planning.plan import GIB, Plan, StagePlan
from unival.planning.predict import Estimate


def text(plan: Plan) -> str:
    """A plan as a page of text; every time in it is predicted."""
    device = plan.ceilings
    lines = [
        f"{plan.gpus} x {device.name} ({device.memory / GIB:.1f} GiB each), {plan.precision}: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}"
    ]
    for stage in plan.stages:
        lines += ["", *_stage(stage, plan)]
    return "\n".join([*lines, "", "Assumptions", *(f"  - {line}" for line in plan.assumptions)])


def _stage(stage: StagePlan, plan: Plan) -> list[str]:
    trained, frozen = stage.parameters["trained"], stage.parameters["frozen"]
    lines = [
        f"Stage {stage.name}: {trained:,} trained and {frozen:,} frozen parameters",
        f"  predicted step        {_band(stage.step, 's', 3)}, {stage.examples:,.0f} samples",
        f"  predicted samples/s   {_band(stage.samples_per_second, '', 0)}",
    ]
    if stage.hours is None or stage.gpu_hours is None:
        lines.append(
            "  predicted hours       unknown: the stage has epochs, give its sources' rows"
        )
    else:
        lines.append(f"  predicted hours       {_band(stage.hours, 'h', 1)}, {stage.steps:,} steps")
        lines.append(f"  predicted GPU-hours   {_band(stage.gpu_hours, '', 1)}")
    if stage.cost is not None:
        lines.append(f"  predicted cost        {_band(stage.cost, '', 2)}")
    whole = stage.step.seconds
    shares = [f"{name} {seconds / whole:.0%}" for name, seconds in stage.parts.items()]
    lines.append(f"  predicted shares      {', '.join(shares)}")
    lines += ["", "  GiB a rank    parameters gradients optimizer activations others  total"]
    for row in stage.memory:
        cells = (row.parameters, row.gradients, row.optimizer, row.activations, row.others)
        sizes = "".join(f"{size / GIB:>{w}.2f}" for size, w in zip(cells, _WIDTHS, strict=True))
        own = "  <- this run" if row.zero_stage == stage.zero_stage else ""
        verdict = "fits" if row.total <= plan.ceilings.memory else "too much"
        verdict = "refused at this precision" if row.refused else verdict
        lines.append(
            f"  ZeRO stage {row.zero_stage}  {sizes}{row.total / GIB:7.2f}  {verdict}{own}"
        )
    if not stage.fits:
        lines.append(f"  does not fit by {stage.over / GIB:.1f} GiB; each of these alone:")
        lines += [f"    {knob}" for knob in stage.knobs]
    for micro in stage.micro_batches:
        lines.append(
            f"  {micro.medium}: {micro.media} a pass and rank ({micro.examples} examples), at most "
            f"{micro.largest} fit; {micro.per_second:,.1f}/s want {micro.cores:,.1f} cores"
        )
    enough = stage.cores_needed <= stage.cores_configured
    lines.append(
        f"  loading: {stage.cores_needed:,.1f} cores needed, {stage.cores_configured} configured "
        f"(threads + workers of all ranks): {'keeps up' if enough else 'DOES NOT KEEP UP'}"
    )
    return lines


_WIDTHS = (12, 10, 10, 12, 7)


def _band(estimate: Estimate, unit: str, digits: int) -> str:
    low, high = sorted((estimate.low, estimate.high))
    unit = f" {unit}" if unit else ""
    return f"{estimate.seconds:,.{digits}f}{unit} ({low:,.{digits}f} to {high:,.{digits}f})"
