"""The video encoder: 3-D ResNeXt (keys of the public Kinetics weights)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from unival.model.batchnorm import BatchNorm3d
from unival.model.convolution import Conv3d
from unival.model.residual import STEM_CHANNELS, Bottleneck, ResidualEncoder


class Bottleneck3d(Bottleneck):
    convolution, norm, expansion, always_projects = Conv3d, BatchNorm3d, 2, True


class VideoEncoder(ResidualEncoder):
    """3-D ResNeXt that returns its last feature map (stride 16 in time, 32 in space).

    [B, 3, F, h, w] normalised pixels to [B, C, ceil(F/16), ceil(h/32), ceil(w/32)].
    """

    block, layout = Bottleneck3d, torch.channels_last_3d
    pool = staticmethod(F.max_pool3d)

    def __init__(self, layers: Sequence[int], channels: Sequence[int], cardinality: int) -> None:
        stem = Conv3d(3, STEM_CHANNELS, 7, stride=(1, 2, 2), padding=3, bias=False)
        super().__init__(stem, layers, channels, cardinality)

    @staticmethod
    def init_std(conv: nn.Conv3d) -> float:
        """The original's initial deviation; the temporal extent of the kernel is not counted in
        it."""
        return math.sqrt(2.0 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))
