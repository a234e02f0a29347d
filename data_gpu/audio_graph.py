"""Sounds to log-mel spectrograms in batches through DALI, on a GPU or a CPU by one argument.

The same numbers as the model's own front end (`unival.model.audio_encoder.LogMel`) with the filter
bank that it builds for the sample rate: for stages that want the spectrogram made beside the step
instead of in it, and for tools. Released audio models carry another bank in their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

WINDOW = 1024
LOWEST, HIGHEST = 50.0, 14_000.0
FLOOR_DB = -100.0  # power below 1e-10 counts as 1e-10


def log_mel_graph(
    sample_rate: int,
    hop_size: int,
    mel_bins: int,
    device: str,
    batch_size: int,
    threads: int,
    device_id: int,
) -> Pipeline:
    """The graph from waveforms float32 [L] to decibels float32 [mel_bins, 1 + L // hop_size].

    Args:
        sample_rate: in Hz; of the waveforms and of the filter bank.
        hop_size: samples between two columns.
        mel_bins: rows.
        device: cpu or gpu.
        batch_size: sounds at most in one run.
        threads: of DALI.
        device_id: the GPU; -1 makes a graph that can be looked at (`serialize`) without one.
    """
    return _graph(
        sample_rate,
        hop_size,
        mel_bins,
        device,
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id if device == "gpu" and device_id >= 0 else None,
        prefetch_queue_depth=1,
    )


@pipeline_def
def _graph(sample_rate: int, hop_size: int, mel_bins: int, device: str) -> DataNode:
    waves = fn.external_source(name="wave", dtype=types.FLOAT, ndim=1)
    if device == "gpu":
        waves = waves.gpu()
    power = fn.spectrogram(
        waves,
        nfft=WINDOW,
        window_length=WINDOW,
        window_step=hop_size,
        window_fn=torch.hann_window(WINDOW, periodic=True).tolist(),
        center_windows=True,
        reflect_padding=True,
        power=2,
    )
    mel = fn.mel_filter_bank(
        power,
        sample_rate=sample_rate,
        nfilter=mel_bins,
        freq_low=LOWEST,
        freq_high=HIGHEST,
        mel_formula="slaney",
        normalize=True,
    )
    return fn.to_decibels(mel, multiplier=10.0, reference=1.0, cutoff_db=FLOOR_DB)


class LogMelMaker:
    """Makes log-mel spectrograms of waveforms of one length."""

    def __init__(
        self,
        sample_rate: int,
        hop_size: int,
        mel_bins: int = 64,
        device: str = "cpu",
        batch_size: int = 16,
        threads: int = 2,
        device_id: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self._pipeline = log_mel_graph(
            sample_rate, hop_size, mel_bins, device, batch_size, threads, device_id
        )
        self._pipeline.build()

    def make(self, waves: Sequence[np.ndarray]) -> Tensor:
        """float32 [R, 1 + L // hop_size, mel_bins] of R waveforms float32 [L]."""
        parts = [torch.empty(0)] if not waves else []
        for start in range(0, len(waves), self.batch_size):
            self._pipeline.feed_input("wave", list(waves[start : start + self.batch_size]))
            (output,) = self._pipeline.run()
            parts.append(torch.from_dlpack(output.as_tensor()).transpose(1, 2).contiguous())
        return torch.cat(parts)
