"""The video encoder: 3-D ResNeXt (keys of the public Kinetics weights)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unival.model.batchnorm import BatchNorm3d
from unival.model.convolution import Conv3d


class Bottleneck3d(nn.Module):
    """1x1x1, grouped 3x3x3 and 1x1x1 convolutions around a shortcut; expansion 2."""

    expansion = 2

    def __init__(self, channels: int, planes: int, groups: int, stride: int, project: bool) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = Conv3d(channels, planes, 1, bias=False)
        self.bn1 = BatchNorm3d(planes)
        self.conv2 = Conv3d(planes, planes, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = BatchNorm3d(planes)
        self.conv3 = Conv3d(planes, out, 1, bias=False)
        self.bn3 = BatchNorm3d(out)
        self.downsample = (
            nn.Sequential(Conv3d(channels, out, 1, stride=stride, bias=False), BatchNorm3d(out))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        return self.bn3(self.conv3(y), shortcut, relu=True)


class VideoEncoder(nn.Module):
    """3-D ResNeXt that returns its last feature map (stride 16 in time, 32 in space)."""

    def __init__(self, layers: Sequence[int], channels: Sequence[int], cardinality: int) -> None:
        super().__init__()
        self.conv1 = Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = BatchNorm3d(64)
        width = 64
        for stage, (depth, planes) in enumerate(zip(layers, channels, strict=False), start=1):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(Bottleneck3d(width, planes, cardinality, stride, project=index == 0))
                width = planes * Bottleneck3d.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.num_stages = len(layers)
        self.out_channels = width

    @staticmethod
    def init_std(conv: nn.Conv3d) -> float:
        """The original's initial deviation; the temporal extent of the kernel is not counted in
        it."""
        return math.sqrt(2.0 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, F, h, w] normalised pixels to [B, C, ceil(F/16), ceil(h/32), ceil(w/32)]."""
        x = self.bn1(self.conv1(frames.to(memory_format=torch.channels_last_3d)), relu=True)
        x = F.max_pool3d(x, kernel_size=3, stride=2, padding=1)
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x
