"""The image encoder: timm's ResNet without pooling and classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor

from unival.model.batchnorm import BatchNorm2d


class ImageEncoder(ResNet):
    """ResNet-v1b (stride in the 3x3 convolution) that returns its last feature map.

    Four stages give stride 32 and 2,048 channels (UnIVAL), three give stride 16 and 1,024 (OFA).
    Keys equal timm's `resnet101`, without `fc`.
    """

    def __init__(self, layers: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__(
            Bottleneck,
            layers=tuple(layers),
            channels=tuple(channels)[: len(layers)],
            num_classes=0,
            norm_layer=BatchNorm2d,
        )
        self.num_stages = len(layers)
        self.out_channels = channels[len(layers) - 1] * Bottleneck.expansion

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] normalised pixels to [B, C, ceil(h / stride), ceil(w / stride)]."""
        x = pixels.to(memory_format=torch.channels_last)
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x
