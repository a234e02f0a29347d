"""Measure this processor's ceilings: a few seconds of small operators of each kind.

None of them is a model. Operators are timed and counted by the recorder that counts models, so that
`bytes` and `launches` mean the same here and there. The clock is the thread's own processor time:
what other programs take does not count, what they do to the caches does.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from unival.kernels.attention.op import attention
from unival.kernels.linear_cross_entropy.op import linear_cross_entropy
from unival.model.batchnorm import BatchNorm2d
from unival.model.convolution import Conv2d
from unival.planning.ceilings import EFFICIENCY, Ceilings, Reach, Share
from unival.planning.counts import Recorder, drop_gradient

FLUSH = STREAM = 2**24  # elements, more than the caches hold
FRESH = 3 * 2**24  # elements, more than the holes that a model leaves in the heap
SQUARE = 1024
FREE = Share(1e6, 1e6, 1e6)  # of a cost that the fit found to be none
SPREAD = 0.15  # of the band about what was measured
Row = tuple[float, float, float, float]  # operations, bytes, calls, seconds

# (rows, inputs, outputs); (channels, side); (tokens queried, tokens seen); tokens; elements
MAPS = ((12, 768, 768), (20, 640, 2560), (120, 768, 768), (200, 640, 2560))
CONVS = ((64, 52), (96, 40), (160, 20), (256, 14), (384, 10), (512, 6))
ATTENDED = ((10, 10), (10, 120), (90, 90), (180, 180))
TOKENS = (14, 20, 44)
VECTORS = (2**6, 2**12, 2**16, 2**18, 2**20)
VOCABULARY, WIDTH, HEADS = 50_000, 768, 12


def measure_ceilings(rounds: int = 6) -> Ceilings:
    """Ceilings of one core in float32 (torch's threads are one while it runs)."""
    calibration = Calibration()
    for _ in range(rounds):
        calibration.round()
    return calibration.ceilings()


class Calibration:
    """Rounds of all workloads, of each of which the fastest counts.

    On a machine that others use, rounds at different times meet it as idle as it gets.
    """

    def __init__(self) -> None:
        self.workloads = list(_workloads())
        self.best: dict[tuple[int, str, str], Row] = {}
        self.machine: dict[str, list[float]] = defaultdict(list)
        self.other = torch.zeros(FLUSH)

    def round(self) -> None:
        """Run everything once."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for number, run in enumerate(self.workloads):
                self._run(number, run)
            for name, seconds in _machine_seconds().items():
                self.machine[name].append(seconds)
        finally:
            torch.set_num_threads(threads)

    def _run(self, number: int, run: Callable[[], Tensor]) -> None:
        self.other += 1.0  # the weights of a model are not in the caches when their turn comes
        recorder = Recorder(time.thread_time)
        with recorder:
            recorder.backward(run())
        for (phase, kind), row in _by_kind(recorder).items():
            key = number, phase, kind
            self.best[key] = min(self.best.get(key, row), row, key=lambda found: found[3])

    def ceilings(self) -> Ceilings:
        """What the rounds so far tell.

        Raises:
            ValueError: there was no round.
        """
        if not self.best:
            raise ValueError("no round was run: there is nothing to make ceilings of")
        rows: dict[str, list[Row]] = defaultdict(list)
        for (_, _, kind), row in self.best.items():
            rows[kind].append(row)
        peak = 2 * SQUARE**3 / min(self.machine["product"])
        bandwidth = 8 * STREAM / min(self.machine["copy"])
        # Now and then new memory comes in huge pages and costs little: not the least, the median.
        new = statistics.median(self.machine["new"])
        more = max(new - min(self.machine["used"]), 1e-6)
        launch = max(_fit(rows["memory"], (0, 1, 1))[2], 1e-7)
        efficiency = dict(EFFICIENCY)
        for kind, found in rows.items():
            # The loss has one vocabulary here: its bytes and its calls are the same to the fit.
            used = (kind not in ("memory", "statistics"), 1, kind != "loss")
            efficiency[kind] = _reach(_fit(found, used), peak, bandwidth, launch)
        return Ceilings(
            names=("cpu_reference", "cpu"),
            source=f"one core, float32, torch {torch.__version__}, measured by calibrate.py",
            measured=True,
            memory=psutil.virtual_memory().total,
            peak={"fp32": peak},
            bandwidth=bandwidth,
            link=0.0,
            allocation=4 * FRESH / more,
            launch=launch,
            overlapped=False,
            efficiency=efficiency,
        )


def _reach(
    costs: tuple[float, float, float], peak: float, bandwidth: float, launch: float
) -> Reach:
    """Shares of the ceilings, of seconds of an operation, a byte and a call."""
    operation, byte, call = costs
    return Reach(
        _band(1.0 / (operation * peak)) if operation else FREE,
        _band(1.0 / (byte * bandwidth)) if byte else FREE,
        call / launch,
    )


def _band(share: float) -> Share:
    return Share(share * (1 - SPREAD), share, share * (1 + SPREAD))


def _by_kind(recorder: Recorder) -> dict[tuple[str, str], Row]:
    counted: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for operation in recorder.operations():
        row = counted[operation.phase, operation.kind]
        for place, value in enumerate((operation.flops, operation.bytes, 1)):
            row[place] += value * operation.calls
    return {
        (phase, kind): (*counted[phase, kind], seconds)  # type: ignore[misc]
        for (_, phase, kind), seconds in recorder.seconds.items()
    }


def _leaf(*shape: int, channels_last: bool = False) -> Tensor:
    """A tensor that wants a gradient, and keeps none.

    Its values are small, as weights are: probabilities of random logits would underflow to
    denormal numbers, which are slow.
    """
    values = 0.02 * torch.randn(shape)
    if channels_last:
        values = values.to(memory_format=torch.channels_last)
    values.requires_grad_().register_post_accumulate_grad_hook(drop_gradient)
    return values


def _workloads() -> Iterator[Callable[[], Tensor]]:
    """Functions of one kind of operator each, whose results can be differentiated."""
    for rows, inputs, outputs in MAPS:
        x, weight, bias = _leaf(rows, inputs), _leaf(outputs, inputs), _leaf(outputs)
        yield lambda x=x, w=weight, b=bias: F.linear(x, w, b).sum()  # type: ignore[misc]
    for channels, side in CONVS:
        x = _leaf(1, channels, side, side, channels_last=True)
        wide = _leaf(1, 4 * channels, side, side, channels_last=True)
        weight, point = _leaf(channels, channels, 3, 3), _leaf(channels, 4 * channels, 1, 1)
        # The encoders' modules, with weights whose gradients are dropped.
        square = Conv2d(channels, channels, 3, padding=1, bias=False)
        narrow, norm = Conv2d(4 * channels, channels, 1, bias=False), BatchNorm2d(4 * channels)
        yield lambda x=x, w=weight, c=square: c._conv_forward(x, w, None).sum()  # type: ignore
        yield lambda x=wide, w=point, c=narrow: c._conv_forward(x, w, None).sum()  # type: ignore
        yield lambda x=wide, n=norm: n(x).sum()  # type: ignore[misc]
    for channels in (64, 128):
        clip, weight = _leaf(1, channels, 2, 14, 14), _leaf(channels, channels // 32, 3, 3, 3)
        yield lambda x=clip, w=weight: F.conv3d(x, w, padding=1, groups=32).sum()  # type: ignore
    for queries, keys in ATTENDED:
        yield lambda q=queries, k=keys: _attend(q, k)  # type: ignore[misc]
    embedding = _leaf(VOCABULARY, WIDTH)
    for tokens in TOKENS:
        states, target = _leaf(tokens, WIDTH), torch.zeros(tokens, dtype=torch.int64)
        yield lambda s=states, t=target: linear_cross_entropy(s, embedding, t).loss  # type: ignore
    for elements in VECTORS:
        x, y = _leaf(elements), _leaf(elements)
        yield lambda x=x, y=y: ((x * y).relu() + x * 2.0).sum()  # type: ignore[misc]


def _attend(queries: int, keys: int) -> Tensor:
    width = WIDTH // HEADS
    q, pq = _leaf(1, HEADS, queries, width), _leaf(1, HEADS, queries, width)
    k, v, pk = (_leaf(1, HEADS, keys, width) for _ in range(3))
    return attention(q, k, v, position_query=pq, position_key=pk, head_scale=_leaf(HEADS)).sum()


def _fit(rows: list[Row], used: tuple[bool | int, ...]) -> tuple[float, float, float]:
    """Seconds of an operation, a byte and a call: least squares of relative errors, none below 0.

    `used` says which of the three there are.
    """
    columns = [place for place in range(3) if used[place]]
    while columns:
        matrix = torch.tensor([[row[c] / row[3] for c in columns] for row in rows]).double()
        scale = matrix.norm(dim=0).clamp(min=1e-300)
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        solved = (torch.linalg.pinv(matrix / scale) @ ones).flatten() / scale
        if bool((solved >= 0).all()):
            found = dict(zip(columns, solved.tolist(), strict=True))
            return found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0)
        columns.pop(int((solved * scale).argmin()))
    return 0.0, 0.0, 0.0


def _machine_seconds() -> dict[str, float]:
    """Seconds of a large product, a copy, and of writing to new memory and to memory in use."""
    a, b = torch.randn(2, SQUARE, SQUARE)
    source, goal = torch.zeros(2, STREAM)
    used = torch.zeros(FRESH)
    return {
        "product": _seconds(lambda: a @ b),
        "copy": _seconds(lambda: goal.copy_(source)),
        "new": _seconds(lambda: torch.empty(FRESH).fill_(1.0)),
        "used": _seconds(lambda: used.fill_(1.0)),
    }


def _seconds(function: Callable[[], object]) -> float:
    """The second call, in processor time."""
    function()
    start = time.thread_time()
    function()
    return time.thread_time() - start
