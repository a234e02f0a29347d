"""What the encoders of images and clips share: a stem, and stages of residual bottlenecks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unival.model.batchnorm import BatchNorm2d, BatchNorm3d
from unival.model.convolution import Conv2d, Conv3d
from unival.model.fused_bottleneck import Parameters, bottleneck

STEM_CHANNELS = 64
LEAST_PLACES = 2  # for each channel of a block's output


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (in 3-D 3x3x3); stride in the middle one."""

    convolution: type[Conv2d] | type[Conv3d]
    norm: type[BatchNorm2d] | type[BatchNorm3d]
    expansion: int
    always_projects: bool  # in the first block of a stage, also where no shape changes

    def __init__(self, channels: int, planes: int, stride: int, project: bool, groups: int) -> None:
        super().__init__()
        convolution, norm, out = self.convolution, self.norm, planes * self.expansion
        middle = {"stride": stride, "padding": 1, "groups": groups, "bias": False}
        self.conv1 = convolution(channels, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = convolution(planes, planes, 3, **middle)  # type: ignore[arg-type]
        self.bn2 = norm(planes)
        self.conv3 = convolution(planes, out, 1, bias=False)
        self.bn3 = norm(out)
        self.downsample = (
            nn.Sequential(convolution(channels, out, 1, stride=stride, bias=False), norm(out))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.is_one_function(x):
            return self._one_function(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        return self.bn3(self.conv3(y), shortcut, relu=True)

    def is_one_function(self, x: Tensor) -> bool:
        """Whether a CPU trains the block with statistics of this very batch, nobody waits for what
        is inside, and maps have so many places that covariances are small beside them.

        Without values ("meta") as on a CPU: such passes are counted for both (unival/planning).
        """
        inner = (self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3)
        places = len(x)
        for size, stride in zip(x.shape[2:], self.conv2.stride, strict=True):
            places *= math.ceil(size / stride)
        return (
            x.device.type in ("cpu", "meta")
            and x.dtype in (torch.float32, torch.float64)
            and x.dtype == self.conv1.weight.dtype
            and places >= LEAST_PLACES * self.bn3.num_features
            and not torch.compiler.is_compiling()
            and all(norm.norms_by_batch() for norm in (self.bn1, self.bn2, self.bn3))
            and not any(m._forward_hooks or m._forward_pre_hooks for m in inner)
        )

    def _one_function(self, x: Tensor) -> Tensor:
        shortcut = None if self.downsample is None else self.downsample(x)
        norms = (self.bn1, self.bn2, self.bn3)
        parameters = [
            tensor
            for conv, norm in zip((self.conv1, self.conv2, self.conv3), norms, strict=True)
            for tensor in (conv.weight, norm.weight, norm.bias)
        ]
        y, *found = bottleneck(x, shortcut, Parameters(*parameters), self.conv2, self.bn1.eps)
        for norm, mean, variance in zip(norms, found[::2], found[1::2], strict=True):
            norm.track(mean, variance)
        return y


class ResidualEncoder(nn.Module):
    """Stem, pooling and stages; returns the last feature map."""

    block: type[Bottleneck]
    layout: torch.memory_format
    pool: Callable[..., Tensor]

    def __init__(
        self, stem: nn.Module, layers: Sequence[int], channels: Sequence[int], groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = self.block.norm(STEM_CHANNELS)
        width = STEM_CHANNELS
        for stage, (depth, planes) in enumerate(zip(layers, channels, strict=False), start=1):
            blocks = []
            for index in range(depth):
                first, out = index == 0, planes * self.block.expansion
                stride = 2 if stage > 1 and first else 1
                changes = stride != 1 or width != out
                project = first and (changes or self.block.always_projects)
                blocks.append(self.block(width, planes, stride, project, groups))
                width = out
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.num_stages = len(layers)
        self.out_channels = width

    def forward(self, maps: Tensor) -> Tensor:
        x = self.bn1(self.conv1(maps.to(memory_format=self.layout)), relu=True)
        x = self.pool(x, kernel_size=3, stride=2, padding=1)
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x
