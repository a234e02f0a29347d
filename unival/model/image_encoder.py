"""The image encoder: a ResNet without pooling and classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from unival.model.batchnorm import BatchNorm2d
from unival.model.convolution import Conv2d
from unival.model.residual import STEM_CHANNELS, Bottleneck, ResidualEncoder


class Bottleneck2d(Bottleneck):
    convolution, norm, expansion, always_projects = Conv2d, BatchNorm2d, 4, False


class ImageEncoder(ResidualEncoder):
    """ResNet-v1b (stride in the 3x3 convolution) that returns its last feature map.

    [B, 3, h, w] normalised pixels to [B, C, ceil(h / stride), ceil(w / stride)]. Four stages give
    stride 32 and 2,048 channels (UnIVAL), three give stride 16 and 1,024 (OFA). Keys equal those of
    timm's and torchvision's `resnet101`, without `fc`.
    """

    block, layout = Bottleneck2d, torch.channels_last
    pool = staticmethod(F.max_pool2d)

    def __init__(self, layers: Sequence[int], channels: Sequence[int]) -> None:
        stem = Conv2d(3, STEM_CHANNELS, 7, stride=2, padding=3, bias=False)
        super().__init__(stem, layers, channels)
