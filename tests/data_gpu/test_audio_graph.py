"""DALI's log-mel graph against spectra by numpy in float64."""

import numpy as np
import pytest

from unival.data_gpu.audio_graph import LogMelMaker, log_mel_graph


def slaney_mel(hertz):
    return np.where(
        hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4)
    )


def reference(wave, rate, hop, bins, high):
    """float64 [1 + L // hop, bins] decibels, straight from the definitions."""
    padded = np.pad(wave.astype(np.float64), 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    count = 1 + len(wave) // hop
    frames = np.stack([padded[i * hop : i * hop + 1024] * window for i in range(count)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    hertz = np.linspace(0, rate / 2, 513)
    edges_mel = np.linspace(slaney_mel(np.array(50.0)), slaney_mel(np.array(high)), bins + 2)
    grid = np.linspace(0, rate / 2, 2_000_001)
    edges = np.interp(edges_mel, slaney_mel(grid), grid)
    bank = np.zeros((513, bins))
    for b in range(bins):
        low, middle, end = edges[b : b + 3]
        rising, falling = (hertz - low) / (middle - low), (end - hertz) / (end - middle)
        bank[:, b] = np.clip(np.minimum(rising, falling), 0, None) * 2 / (end - low)
    return 10 * np.log10(np.maximum(power @ bank, 1e-10))


def test_decibels_equal_their_definition():
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(48_000).astype(np.float32) * scale for scale in (0.3, 0.001)]
    found = LogMelMaker(48_000, 200).make(waves).numpy()
    assert found.shape == (2, 241, 64)
    for wave, decibels in zip(waves, found, strict=True):
        assert np.abs(decibels - reference(wave, 48_000, 200, 64, 14_000.0)).max() < 5e-3


def test_a_tone_lights_its_band_and_silence_is_the_floor():
    time = np.arange(48_000) / 48_000
    tone = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    lit, silent = LogMelMaker(48_000, 480, batch_size=1).make([tone, np.zeros_like(tone)]).numpy()
    expected = reference(tone, 48_000, 480, 64, 14_000.0)[50].argmax()
    assert (lit[5:-5].argmax(axis=1) == expected).all()
    assert np.abs(silent + 100).max() < 1e-3


def test_no_sounds_are_no_work():
    assert LogMelMaker(48_000, 480).make([]).numel() == 0


def test_the_gpu_graph_is_wired_without_a_gpu():
    text = log_mel_graph(48_000, 200, 64, "gpu", 4, 2, device_id=-1).serialize()
    for name in (b"gpu", b"Spectrogram", b"MelFilterBank", b"ToDecibels"):
        assert name.lower() in text.lower()


@pytest.mark.gpu
def test_the_gpu_graph_gives_what_the_cpu_graph_gives():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    waves = [np.random.default_rng(0).standard_normal(48_000).astype(np.float32)]
    cpu, gpu = (LogMelMaker(48_000, 200, device=d).make(waves).cpu() for d in ("cpu", "gpu"))
    assert (cpu - gpu).abs().max() < 1e-2
