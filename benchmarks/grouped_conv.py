"""Forms of the grouped 3-D convolutions of the video encoder, side by side.

    python benchmarks/grouped_conv.py --threads 2

For every middle convolution of the ResNeXt (3x3x3, 32 groups) at the size of a clip: `conv3d` over
maps as they lie in memory by default and with channels last; `conv2d`, each frame's neighbours in
time beside it as channels, so that one 2-D convolution does the third axis; `unfold`, what every
place sees in memory and one product of matrices for each group; and `ours`, what the model calls:
conv3d with channels last, of which one frame between padding needs the middle weights alone.
Forward and backward passes take turns; p50 in milliseconds. All forms' outputs are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from eager_baseline import LoadMeter
from torch import Tensor
from torch.nn import functional as F
from train_step import ROOT, describe_machine

from unival.model.configuration import UnivalConfig
from unival.model.convolution import Conv3d
from unival.model.video_encoder import VideoEncoder

Form = Callable[[Tensor, Conv3d], Tensor]
SAME = 1e-4  # relative difference of outputs that roundings make


def conv3d(x: Tensor, module: Conv3d) -> Tensor:
    """PyTorch's own."""
    return F.conv3d(x, module.weight, None, module.stride, 1, 1, module.groups)


def conv2d(x: Tensor, module: Conv3d) -> Tensor:
    """Frames before and after as channels of the same group, then one 2-D convolution."""
    batch, channels, _, height, width = x.shape
    groups, each = module.groups, channels // module.groups
    seen = F.pad(x, (0, 0, 0, 0, 1, 1)).unfold(2, 3, module.stride[0])
    frames = seen.shape[2]
    seen = seen.unflatten(1, (groups, each)).permute(0, 3, 1, 6, 2, 4, 5)
    stacked = seen.reshape(batch * frames, 3 * channels, height, width)
    weight = module.weight.transpose(1, 2).flatten(1, 2)
    y = F.conv2d(stacked, weight, None, module.stride[1:], 1, 1, groups)
    return y.unflatten(0, (batch, frames)).transpose(1, 2)


def unfold(x: Tensor, module: Conv3d) -> Tensor:
    """What every place sees, [G, N, 27 C / G], times [G, 27 C / G, K / G]."""
    groups, each = module.groups, x.shape[1] // module.groups
    seen = F.pad(x, (1,) * 6)
    for axis, stride in enumerate(module.stride, start=2):
        seen = seen.unfold(axis, 3, stride)
    batch, _, *places = seen.shape[:5]
    seen = seen.unflatten(1, (groups, each)).permute(1, 0, 3, 4, 5, 2, 6, 7, 8)
    columns = seen.reshape(groups, -1, 27 * each)
    weight = module.weight.flatten(1).unflatten(0, (groups, -1)).transpose(1, 2)
    y = torch.bmm(columns, weight).unflatten(1, (batch, *places))
    return y.permute(1, 0, 5, 2, 3, 4).flatten(1, 2)


def ours(x: Tensor, module: Conv3d) -> Tensor:
    """What the model calls."""
    return module(x)


# Each with the layout of the maps that it is given.
FORMS: dict[str, tuple[Form, torch.memory_format]] = {
    "conv3d": (conv3d, torch.contiguous_format),
    "conv3d, channels last": (conv3d, torch.channels_last_3d),
    "conv2d": (conv2d, torch.contiguous_format),
    "conv2d, channels last": (conv2d, torch.channels_last_3d),
    "unfold": (unfold, torch.channels_last_3d),
    "ours": (ours, torch.channels_last_3d),
}


def shapes(config: UnivalConfig, clip: tuple[int, ...]) -> dict[tuple, tuple[int, Conv3d]]:
    """Every different middle convolution: shape of its input, how many there are, and one."""
    encoder = VideoEncoder(config.video_layers, config.video_channels, config.video_cardinality)
    found: dict[tuple, tuple[int, Conv3d]] = {}

    def saw(module: Conv3d, inputs: tuple[Tensor], _: Tensor) -> None:
        key = (tuple(inputs[0].shape[1:]), module.stride)
        found[key] = (found.get(key, (0, module))[0] + 1, module)

    middle = [module for name, module in encoder.named_modules() if name.endswith("conv2")]
    hooks = [module.register_forward_hook(saw) for module in middle]
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, *clip))
    for hook in hooks:
        hook.remove()
    return found


def measure(x: Tensor, module: Conv3d, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of each form, forward and backward.

    Raises:
        ArithmeticError: a form's output differs.
    """
    wanted = conv3d(x, module).detach()
    grad = torch.randn_like(wanted)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for turn in range(repeats + 1):
        for name, (form, layout) in FORMS.items():
            given = x.contiguous(memory_format=layout).requires_grad_()
            begin = time.perf_counter()
            y = form(given, module)
            middle = time.perf_counter()
            torch.autograd.grad(y, [given, module.weight], grad)
            end = time.perf_counter()
            if turn:
                seconds[name].append((middle - begin, end - middle))
            elif float((y - wanted).abs().max()) > SAME * float(wanted.abs().max()):
                raise ArithmeticError(f"{name} differs from conv3d at {list(x.shape)}")
    return {
        name: (statistics.median(a for a, _ in found), statistics.median(b for _, b in found))
        for name, found in seconds.items()
    }


def table(found: dict[str, dict[str, tuple[float, float]]], calls: dict[str, int]) -> list[str]:
    """Markdown: a row for each shape, and the sum over all convolutions of an encoder."""
    lines = [f"| forward + backward, ms | {' | '.join(FORMS)} |", "|---" * (len(FORMS) + 1) + "|"]
    for shape, seconds in found.items():
        cells = [f"{1e3 * a:.1f} + {1e3 * b:.1f}" for a, b in seconds.values()]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    sums = [sum(calls[shape] * sum(one[name]) for shape, one in found.items()) for name in FORMS]
    cells = [f"{1e3 * value:.0f}" for value in sums]
    return [*lines, f"| all {sum(calls.values())} | {' | '.join(cells)} |"]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
    parser.add_argument("--config", default="unival_base", choices=names)
    parser.add_argument("--batch", type=int, default=2, help="clips (2)")
    parser.add_argument("--frames", type=int, default=8, help="of a clip (8)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (224)")
    parser.add_argument("--repeats", type=int, default=5, help="after one that is not counted (5)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it takes by itself")
    args = parser.parse_args()
    if min(args.batch, args.frames, args.size, args.repeats) < 1 or args.threads < 0:
        parser.error("sizes and repeats are at least 1, threads at least 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = UnivalConfig.from_yaml(ROOT / "configs" / "model" / f"{args.config}.yaml")
    if config.video_layers is None:
        parser.error(f"--config {args.config}: it has no video encoder")
    meter, found, calls = LoadMeter(), {}, {}
    meter.begin()
    own = time.process_time()
    for (shape, stride), (count, module) in shapes(
        config, (3, args.frames, args.size, args.size)
    ).items():
        name = f"{count} x {list(shape)}, stride {stride[0]}"
        found[name] = measure(torch.randn(args.batch, *shape), module, args.repeats)
        calls[name] = count
        print(name, file=sys.stderr, flush=True)
    meter.end(time.process_time() - own)
    machine = describe_machine(torch.device("cpu")) | meter.read()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), "\n")
    print("\n".join(table(found, calls)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
