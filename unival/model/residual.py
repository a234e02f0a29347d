"""What the encoders of images and clips share: a stem, and stages of residual bottlenecks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unival.model.batchnorm import BatchNorm2d, BatchNorm3d
from unival.model.convolution import Conv2d, Conv3d

STEM_CHANNELS = 64


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
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        return self.bn3(self.conv3(y), shortcut, relu=True)


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
