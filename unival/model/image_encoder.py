"""The image encoder: a ResNet without pooling and classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unival.model.batchnorm import BatchNorm2d
from unival.model.convolution import Conv2d


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; expansion 4, stride in the 3x3."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, project: bool) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = Conv2d(channels, planes, 1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.conv3 = Conv2d(planes, out, 1, bias=False)
        self.bn3 = BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(Conv2d(channels, out, 1, stride=stride, bias=False), BatchNorm2d(out))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        return self.bn3(self.conv3(y), shortcut, relu=True)


class ImageEncoder(nn.Module):
    """ResNet-v1b (stride in the 3x3 convolution) that returns its last feature map.

    Four stages give stride 32 and 2,048 channels (UnIVAL), three give stride 16 and 1,024 (OFA).
    Keys equal those of timm's and torchvision's `resnet101`, without `fc`.
    """

    def __init__(self, layers: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(64)
        width = 64
        for stage, (depth, planes) in enumerate(zip(layers, channels, strict=False), start=1):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                out = planes * Bottleneck.expansion
                project = stride != 1 or width != out
                blocks.append(Bottleneck(width, planes, stride, project))
                width = out
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.num_stages = len(layers)
        self.out_channels = width

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] normalised pixels to [B, C, ceil(h / stride), ceil(w / stride)]."""
        x = self.bn1(self.conv1(pixels.to(memory_format=torch.channels_last)), relu=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x
