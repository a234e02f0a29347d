"""Waveforms against numbers worked out by hand, and hostile files."""

import io
import random
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample_poly

from unival.data_gpu import audio
from unival.data_gpu.audio import decode_waveform, repeat_pad, through_int16
from unival.data_gpu.errors import DecodeError

SAMPLES = Path(__file__).parents[2] / "samples"
CHOIR = SAMPLES / "audio" / "sp_ambi_choir.ogg"  # 16 kHz


def wav(samples, rate=16_000, subtype="FLOAT", form="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=form)
    return buffer.getvalue()


def ramp(length):
    """Sample i is i / 32767: its 16-bit value is i, or i - 1 where the product falls short."""
    return (np.arange(length) / 32767).astype(np.float32)


def test_repeat_pad_repeats_whole_and_then_pads():
    short = np.array([1, 2, 3], dtype=np.float32)
    assert repeat_pad(short, 8).tolist() == [1, 2, 3, 1, 2, 3, 0, 0]
    assert repeat_pad(short, 4).tolist() == [1, 2, 3, 0]
    assert repeat_pad(short, 6).tolist() == [1, 2, 3, 1, 2, 3]
    assert repeat_pad(short, 3).tolist() == [1, 2, 3]


def test_samples_are_clipped_and_cut_to_16_bits():
    given = np.array([2.0, -3.0, 0.5, -0.5, 1e-5, -1e-5, 4e-5], dtype=np.float32)
    # 0.5 * 32767 = 16383.5 is cut to 16383 on both sides of zero; 4e-5 * 32767 = 1.3 to 1.
    expected = np.array([32767, -32767, 16383, -16383, 0, 0, 1]) / 32767
    assert through_int16(given) == pytest.approx(expected, abs=1e-7)
    assert through_int16(given).dtype == np.float32


def test_channels_are_averaged_and_short_sounds_repeated():
    stereo = np.array([[1.0, 0.0], [0.5, 0.5], [-1.0, 0.0]], dtype=np.float32)
    waveform = decode_waveform(wav(stereo), 7)
    one = [16383 / 32767, 16383 / 32767, -16383 / 32767]
    assert waveform.tolist() == pytest.approx([*one, *one, 0.0])
    assert waveform.dtype == torch.float32


def test_a_longer_sound_gives_its_beginning_or_a_random_piece():
    data = wav(ramp(1000))
    whole = decode_waveform(data, 1000)
    assert torch.equal(decode_waveform(data, 100), whole[:100])
    starts = set()
    for seed in range(200):
        piece = decode_waveform(data, 990, rng=random.Random(seed))
        start = next(s for s in range(11) if torch.equal(piece, whole[s : s + 990]))
        starts.add(start)
    assert starts == set(range(11))  # both ends included


def test_the_file_rate_is_kept_unless_another_is_asked_for():
    data = wav(ramp(100), rate=8_000)
    assert torch.equal(decode_waveform(data, 100), decode_waveform(data, 100, 8_000))
    doubled = decode_waveform(data, 200, 16_000)
    expected = through_int16(resample_poly(ramp(100), 2, 1).astype(np.float32))
    assert doubled.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rate", "target"), [(16_000, 48_000), (44_100, 48_000), (48_000, 16_000)])
def test_the_beginning_equals_the_beginning_of_the_whole_resampled(rate, target):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000).astype(np.float32)
    part = decode_waveform(wav(noise, rate), 2_000, target).numpy()
    common = np.gcd(rate, target)
    whole = resample_poly(noise, target // common, rate // common).astype(np.float32)
    assert part == pytest.approx(through_int16(whole)[:2_000], abs=1.1 / 32767)


def test_a_tone_keeps_its_frequency_through_resampling():
    time = np.arange(16_000) / 16_000
    data = wav(np.sin(2 * np.pi * 440 * time).astype(np.float32))
    spectrum = np.abs(np.fft.rfft(decode_waveform(data, 48_000, 48_000).numpy()))
    assert spectrum.argmax() == 440  # one second: bins are hertz


def test_only_the_piece_is_read(monkeypatch):
    counts = []
    read = soundfile.SoundFile.read

    def spy(self, frames=-1, *args, **kwargs):
        counts.append(frames)
        return read(self, frames, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    decode_waveform(wav(np.zeros(100_000, dtype=np.float32)), 500, rng=random.Random(1))
    assert counts == [500]


def test_real_sounds_from_path_and_bytes_agree():
    waveform = decode_waveform(CHOIR, 480_000, 48_000)
    assert waveform.shape == (480_000,)
    assert waveform.abs().max() > 0.01
    assert torch.equal(waveform, decode_waveform(CHOIR.read_bytes(), 480_000, 48_000))


def aac(samples, rate=16_000):
    """An MP4 with sound, which libsndfile cannot read."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_the_sound_of_a_film_is_read_by_ffmpeg():
    time = np.arange(32_000) / 16_000
    data = aac((0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32))
    spectrum = np.abs(np.fft.rfft(decode_waveform(data, 16_000).numpy()))
    assert spectrum.argmax() == 440
    piece = decode_waveform(data, 4_800, 48_000, random.Random(0))
    assert 0.4 < piece.abs().max() < 0.6


def test_a_piece_from_the_middle_of_a_film_starts_there():
    class Late(random.Random):
        def randint(self, low, high):
            return 24_000

    time = np.arange(32_000) / 16_000
    tone = np.where(time < 1.25, 0.0, 0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    piece = decode_waveform(aac(tone), 3_200, rng=Late()).numpy()
    assert np.abs(decode_waveform(aac(tone), 3_200).numpy()).max() < 0.05
    assert np.abs(piece[:1_600]).max() > 0.4
    assert np.abs(piece[1_600:]).max() > 0.4


def test_damaged_and_missing_sounds_are_refused(tmp_path):
    with pytest.raises(DecodeError, match="no such file"):
        decode_waveform(tmp_path / "none.ogg", 10)
    for data in (b"", b"RIFF", b"garbage" * 99, CHOIR.read_bytes()[:200]):
        with pytest.raises(DecodeError):
            decode_waveform(data, 10)
    with pytest.raises(DecodeError, match="no audio stream"):
        decode_waveform(SAMPLES / "video" / "bbb_00.mp4", 10)
    raw = tmp_path / "sound.raw"
    raw.write_bytes(b"garbage" * 99)
    with pytest.raises(DecodeError):
        decode_waveform(raw, 10)


def test_a_truncated_flac_is_refused():
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 50_000)
    data = wav(noise, subtype="PCM_16", form="FLAC")
    with pytest.raises(DecodeError):
        decode_waveform(data[: len(data) // 2], 50_000)


def test_a_sound_that_ends_before_its_header_says_is_refused_but_for_mp3(monkeypatch):
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n, **options: read(self, n, **options)[: n // 2]
    )
    with pytest.raises(DecodeError, match="truncated: 50 of 100"):
        decode_waveform(wav(ramp(100)), 100)
    mp3 = wav(ramp(5_000), subtype=None, form="MP3")  # its length may be an estimate
    assert decode_waveform(mp3, 5_000)[4_999] != 0  # what there was, repeated


def test_an_empty_sound_and_one_that_is_not_finite_are_refused():
    with pytest.raises(DecodeError, match="no samples"):
        decode_waveform(wav(np.zeros(0, dtype=np.float32)), 10)
    with pytest.raises(DecodeError, match="finite"):
        decode_waveform(wav(np.array([0, np.nan], dtype=np.float32)), 10)


@pytest.mark.parametrize("rate", [10, 2_000_000_000])
def test_a_rate_that_only_a_hostile_header_says_is_refused(rate):
    with pytest.raises(DecodeError, match="sample rate"):
        decode_waveform(wav(ramp(10), rate=rate), 10, 48_000)


def test_a_header_that_claims_more_samples_allocates_nothing_for_them():
    data = bytearray(wav(ramp(10), subtype="PCM_16"))
    at = data.index(b"data") + 4
    data[at : at + 4] = (2**31 - 2).to_bytes(4, "little")
    assert audio.decode_waveform(bytes(data), 10).shape == (10,)
