"""The audio encoder: log-mel spectrogram and PANN's CNN14 (keys of the public weights)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unival.model.batchnorm import BatchNorm2d

N_FFT = 1024
F_MIN, F_MAX = 50.0, 14000.0


def mel_filters(sample_rate: int, mel_bins: int) -> Tensor:
    """Slaney mel filter bank, area-normalised: float32 [N_FFT // 2 + 1, mel_bins].

    The mel scale is linear (200/3 Hz a mel) up to 1 kHz and logarithmic (6.4 in 27 steps) above.
    """
    step, knee, log_step = 200.0 / 3.0, 1000.0, np.log(6.4) / 27.0

    def to_mel(hertz: float) -> float:
        return hertz / step if hertz < knee else knee / step + np.log(hertz / knee) / log_step

    mels = np.linspace(to_mel(F_MIN), to_mel(F_MAX), mel_bins + 2)
    above = knee * np.exp(log_step * (mels - knee / step))
    edges = np.where(mels < knee / step, mels * step, above)
    frequencies = np.linspace(0.0, sample_rate / 2, N_FFT // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    bank = np.maximum(0.0, np.minimum(rising, falling))
    bank *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(bank.T.astype(np.float32))


class LogMel(nn.Module):
    """Waveform to decibels on the mel scale; stays in float32 whatever the model's dtype.

    `filters` is a buffer and part of the checkpoint: released audio models carry a bank made for
    32 kHz, which differs from the one built here for `sample_rate`.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, sample_rate: int, mel_bins: int, hop_size: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.mel_bins = mel_bins
        self.hop_size = hop_size
        self.register_buffer("filters", mel_filters(sample_rate, mel_bins))
        self.register_buffer("window", torch.hann_window(N_FFT, periodic=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogMel:
        """Follow moves between devices, not casts: bf16 filters would lose the spectrogram."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, waveform: Tensor) -> Tensor:
        """[B, L] to float32 [B, 1 + L // hop_size, mel_bins]."""
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform.float(),
                N_FFT,
                hop_length=self.hop_size,
                window=self.window,
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()
            mel = power.transpose(1, 2) @ self.filters
            return 10.0 * torch.log10(mel.clamp(min=1e-10))


def drop_stripes(x: Tensor, dim: int, max_width: int, stripes: int = 2) -> Tensor:
    """SpecAugment: per sample, set `stripes` bands of random width along `dim` to zero.

    x is [B, 1, time, mel]; the widths are uniform in [0, max_width).
    """
    total = x.shape[dim]
    position = torch.arange(total, device=x.device)
    for _ in range(stripes):
        width = torch.randint(0, max_width, (x.shape[0], 1), device=x.device)
        room = (total - width).clamp(min=1)
        begin = (torch.rand(x.shape[0], 1, device=x.device) * room).long()
        dropped = (position >= begin) & (position < begin + width)
        shape = [x.shape[0], 1, 1, 1]
        shape[dim] = total
        x = x.masked_fill(dropped.view(shape), 0.0)
    return x


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, then average pooling."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(out)
        self.bn2 = BatchNorm2d(out)

    def forward(self, x: Tensor, pool: int) -> Tensor:
        x = self.bn1(self.conv1(x), relu=True)
        x = self.bn2(self.conv2(x), relu=True)
        return F.avg_pool2d(x, pool) if pool > 1 else x


class AudioEncoder(nn.Module):
    """CNN14 without its classifier: stride 32 in time and frequency, mel_bins / 32 cells a step."""

    def __init__(
        self,
        channels: Sequence[int],
        mel_bins: int,
        hop_size: int,
        sample_rate: int,
        dropout: float = 0.2,
        spec_augment: bool = True,
    ) -> None:
        super().__init__()
        self.dropout, self.spec_augment = dropout, spec_augment
        self.logmel = LogMel(sample_rate, mel_bins, hop_size)
        self.bn0 = BatchNorm2d(mel_bins)
        width = 1
        for index, out in enumerate(channels, start=1):
            self.add_module(f"conv_block{index}", ConvBlock(width, out))
            width = out
        self.num_blocks = len(channels)
        self.out_channels = width

    def forward(self, sound: Tensor) -> Tensor:
        """[B, L] samples in [-1, 1], or [B, 1 + L // hop, mel_bins] decibels as LogMel makes them,
        to [B, C, (1 + L // hop) // 32, mel_bins // 32]."""
        x = self.logmel(sound) if sound.ndim == 2 else sound
        x = x.to(self.bn0.weight.dtype)
        # Normalise over mel bins: they are the channels of bn0.
        x = self.bn0(x.unsqueeze(1).transpose(1, 3)).transpose(1, 3)
        if self.training and self.spec_augment:
            x = drop_stripes(drop_stripes(x, dim=2, max_width=64), dim=3, max_width=8)
        x = x.to(memory_format=torch.channels_last)
        for index in range(1, self.num_blocks + 1):
            last = index == self.num_blocks
            x = getattr(self, f"conv_block{index}")(x, pool=1 if last else 2)
            if not last:
                x = F.dropout(x, self.dropout, self.training)
        return x
