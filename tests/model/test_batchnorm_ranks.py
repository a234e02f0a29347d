"""Batch norm shared by ranks, against one process that holds the batches of all of them.

Run as a script, this file is one of the ranks: RANK FOLDER.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unival.model.batchnorm import (
    BatchNorm2d,
    set_batchnorm_contribution,
    set_batchnorm_statistics,
)

SIZES = [(3, 4), (1, 7)]  # rows and side of each rank's maps
CASES = ("unequal", "stand-in", "compiled")


def inputs() -> tuple[list[Tensor], list[Tensor]]:
    """Maps of each rank and gradients of what is made of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 6, side, side) for rows, side in SIZES]
    maps = [
        torch.randn(shape, generator=generator) * (1 + rank) + 3 * rank
        for rank, shape in enumerate(shapes)
    ]
    return maps, [torch.randn(shape, generator=generator) for shape in shapes]


def norm_of(kind: type[nn.Module]) -> nn.Module:
    norm = kind(6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 6))
        norm.bias.copy_(torch.linspace(-1.0, 1.0, 6))
    return norm


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    maps, gradients = inputs()
    found = {}
    for case in CASES:
        norm = norm_of(BatchNorm2d)
        set_batchnorm_statistics(norm, "sync")
        set_batchnorm_contribution(norm, case != "stand-in" or rank == 0)
        if case == "compiled":
            norm.compile(backend="aot_eager")
        x = maps[rank].requires_grad_()
        y = norm(x)
        dx, dw, db = torch.autograd.grad(y, [x, norm.weight, norm.bias], gradients[rank])
        found[case] = {"y": y.detach(), "dx": dx, "dw": dw, "db": db, **dict(norm.named_buffers())}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_as_exact(found: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    for a, b, c in zip(found, theirs, exact, strict=True):
        error, allowed = (a - c).abs().max(), 2 * (b - c).abs().max() + 1e-6
        assert error <= allowed, (float(error), float(allowed))


def one_process(dtype: torch.dtype) -> list[Tensor]:
    """Output, gradients and running statistics of torch's norm of all elements as one batch.

    The ranks' maps differ in size, so that they are laid side by side as one row of pixels.
    """

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1)[None, ..., None]

    maps, gradients = inputs()
    norm = norm_of(nn.BatchNorm2d).to(dtype)
    x = joined(maps).to(dtype).requires_grad_()
    y = norm(x)
    y.backward(joined(gradients).to(dtype))
    pixels = [y.detach(), x.grad]
    return [*pixels, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("case", ["unequal", "compiled"])
def test_ranks_with_unequal_counts_are_as_exact_as_one_batch(ranks, case):
    found = [rank[case] for rank in ranks]

    def pixels(name: str) -> Tensor:
        parts = [rank[name].transpose(0, 1).flatten(1) for rank in found]
        return torch.cat(parts, 1)[None, ..., None]

    ours = [pixels("y"), pixels("dx"), *(found[0][n] + found[1][n] for n in ("dw", "db"))]
    ours += [found[0]["running_mean"], found[0]["running_var"]]
    assert_as_exact(ours, one_process(torch.float32), one_process(torch.float64))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[0][name], found[1][name])
    assert int(found[0]["num_batches_tracked"]) == 1


def with_stand_in(dtype: torch.dtype) -> list[list[Tensor]]:
    """Per rank y, dx, dw, db by autograd, where rank 1 is normed by rank 0's statistics."""
    maps, gradients = inputs()
    xs = [x.to(dtype).requires_grad_() for x in maps]
    mean = xs[0].mean((0, 2, 3), keepdim=True)
    variance = (xs[0] - mean).square().mean((0, 2, 3), keepdim=True)
    norms = [norm_of(nn.BatchNorm2d).to(dtype) for _ in xs]
    ys = [
        (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(1, -1, 1, 1)
        + norm.bias.view(1, -1, 1, 1)
        for x, norm in zip(xs, norms, strict=True)
    ]
    torch.autograd.backward(ys, [grad.to(dtype) for grad in gradients])
    return [
        [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
        for y, x, norm in zip(ys, xs, norms, strict=True)
    ]


def test_a_stand_in_is_normed_by_the_others_and_counts_for_nothing(ranks):
    expected = zip(with_stand_in(torch.float32), with_stand_in(torch.float64), strict=True)
    alone = norm_of(nn.BatchNorm2d)
    alone(inputs()[0][0])
    for rank, (theirs, exact) in zip(ranks, expected, strict=True):
        found = rank["stand-in"]
        assert_as_exact([found[name] for name in ("y", "dx", "dw", "db")], theirs, exact)
        torch.testing.assert_close(found["running_mean"], alone.running_mean)
        torch.testing.assert_close(found["running_var"], alone.running_var)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
