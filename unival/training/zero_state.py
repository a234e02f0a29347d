"""The state of training as DeepSpeed spreads it: each rank's pieces by the parameters' names.

Under every ZeRO stage a trained parameter has a float32 master copy and the optimizer's moments,
of which a rank holds one run of elements of the flattened parameter (all of it at stage 0).
Checkpoints and the average of the weights work on these runs, so neither depends on how they are
laid out in DeepSpeed's flat buffers, nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Elements start..start+n of a flattened parameter.

    master   float32 [n], a view: what is written into it is what training goes on with
    flat     the tensor of the base optimizer that holds `master`
    offset   of `master` in `flat`
    """

    name: str
    start: int
    master: Tensor
    flat: Tensor
    offset: int

    def of_state(self, value: Tensor) -> Tensor:
        """This piece [n] of a moment that is laid out as `flat`."""
        return value.view(-1).narrow(0, self.offset, self.master.numel())


def zero_stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer below DeepSpeed's own, whose state is keyed by flat tensors."""
    return engine.optimizer if zero_stage(engine) == 0 else engine.optimizer.optimizer


def pieces(engine: Any, names: dict[nn.Parameter, str]) -> list[Piece]:
    """This rank's pieces of the trained parameters, in the order of `names`.

    Args:
        engine: a DeepSpeed engine.
        names: the name of every parameter.
    """
    trained = ((name, p) for p, name in names.items() if p.requires_grad)
    stage = zero_stage(engine)
    if stage == 0:
        return [Piece(name, 0, p.data.view(-1), p, 0) for name, p in trained]
    found = _of_partitions(engine) if stage == 3 else _of_groups(engine)
    return [piece for name, p in trained for piece in found(name, p)]


def _of_groups(engine: Any) -> Any:
    """Stages 1 and 2: consecutive runs of all parameters of a group, one after the other."""
    optimizer = engine.optimizer
    # DeepSpeed has two classes for this, with another name for the same list.
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if flats is None:
        flats = optimizer.fp32_groups_flat_partition

    def of(name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        mapping = parameter._hp_mapping
        if mapping is not None:
            flat = flats[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
            yield Piece(
                name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach(), flat, offset
            )

    return of


def _of_partitions(engine: Any) -> Any:
    """Stage 3: every parameter is cut into as many runs as there are ranks, the last one padded."""
    optimizer, rank = engine.optimizer, dist.get_rank()

    def of(name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * length
        count = min(length, parameter.ds_numel - start)
        if count > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Piece(name, start, flat.data.narrow(0, offset, count), flat, offset)

    return of


def moments(engine: Any, piece: Piece) -> dict[str, Tensor]:
    """The optimizer's state of a piece by name (exp_avg, exp_avg_sq); empty before a first step."""
    state = base_optimizer(engine).state.get(piece.flat, {})
    return {
        key: piece.of_state(value)
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == piece.flat.shape
    }


def optimizer_step(engine: Any) -> float:
    """Updates that the optimizer counts; 0 before the first."""
    optimizer = base_optimizer(engine)
    counts = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
    counts += [float(g["step"]) for g in optimizer.param_groups if "step" in g]
    return max(counts, default=0.0)


def create_moments(engine: Any, found: list[Piece], keys: list[str], step: float) -> None:
    """Give the optimizer the state it would have after `step` updates, with moments of zeros."""
    optimizer = base_optimizer(engine)
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = int(step)
    for flat in {id(piece.flat): piece.flat for piece in found}.values():
        state = optimizer.state[flat]
        for key in keys:
            state[key] = torch.zeros_like(flat, dtype=torch.float32, requires_grad=False)
        # torch counts in a tensor that its fused kernels want beside the parameters.
        if isinstance(optimizer, torch.optim.Adam):
            fused = optimizer.param_groups[0].get("fused")
            device = flat.device if fused else torch.device("cpu")
            state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
        elif not any("step" in group for group in optimizer.param_groups):
            state["step"] = int(step)


def masters_changed(engine: Any) -> None:
    """Copy the masters into the weights that the model computes with, on every rank."""
    stage, optimizer = zero_stage(engine), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
