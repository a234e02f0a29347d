"""Sounds: mono waveforms of a fixed length."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor

from unival.data_gpu.errors import DecodeError, Media, require_content
from unival.data_gpu.video import open_container

RATES = (1_000, 768_000)  # a rate sizes the buffers, and it comes from a header
MAX_CHANNELS = 32
MAX_SECONDS = 4 * 3600  # of a sound that must be decoded from its start
FULL_SCALE = 32767.0


class Piece(NamedTuple):
    """float32 [samples] in mono, at `rate` Hz."""

    samples: np.ndarray
    rate: int


def decode_waveform(
    media: Media,
    num_samples: int,
    sample_rate: int | None = None,
    rng: random.Random | None = None,
) -> Tensor:
    """The mono waveform of a sound (3.3).

    The mean of the channels, at `sample_rate`, clipped to [-1, 1] and brought to 16 bits and back
    (cut, not rounded, as in the original). A longer sound gives a random piece with `rng` and its
    beginning without; a shorter one is repeated whole as often as it fits, then zeros follow. Only
    the piece is decoded where the format can be entered in the middle.

    Args:
        media: the encoded sound (or a film with sound).
        num_samples: samples wanted.
        sample_rate: in Hz; None keeps the file's own, as the released code does.
        rng: draws the piece.

    Returns:
        float32 [num_samples].

    Raises:
        DecodeError: missing, truncated, no sound.
    """
    require_content(media)
    piece = _read_soundfile(media, num_samples, sample_rate, rng)
    if piece is None:
        piece = _read_container(media, num_samples, sample_rate, rng)
    if len(piece.samples) == 0:
        raise DecodeError(media, "no samples")
    samples = _resample(piece, sample_rate)[:num_samples]
    if not np.isfinite(samples).all():
        raise DecodeError(media, "samples that are not finite")
    return torch.from_numpy(repeat_pad(through_int16(samples), num_samples))


def through_int16(samples: np.ndarray) -> np.ndarray:
    """float32 [n] clipped to [-1, 1], times 32767, cut to int16, divided by 32767."""
    integers = (np.clip(samples, -1.0, 1.0) * FULL_SCALE).astype(np.int16)
    return integers.astype(np.float32) / np.float32(FULL_SCALE)


def repeat_pad(samples: np.ndarray, num_samples: int) -> np.ndarray:
    """float32 [n] with 0 < n <= num_samples, repeated floor(num_samples / n) times, then zeros."""
    repeated = np.tile(samples, num_samples // len(samples))
    return np.pad(repeated, (0, num_samples - len(repeated)))


def _resample(piece: Piece, sample_rate: int | None) -> np.ndarray:
    if sample_rate is None or piece.rate == sample_rate:
        return piece.samples
    common = math.gcd(piece.rate, sample_rate)
    up, down = sample_rate // common, piece.rate // common
    return resample_poly(piece.samples, up, down).astype(np.float32, copy=False)


def _native_span(
    length: int, rate: int, num_samples: int, sample_rate: int | None, rng: random.Random | None
) -> tuple[int, int]:
    """(start, count) of the file's own samples that make num_samples at sample_rate.

    Some more follow where there are more, so that the resampling filter (10 periods of the lower
    rate on each side) sees at the end what it would see in the whole sound.
    """
    target = sample_rate or rate
    needed = math.ceil(num_samples * rate / target)
    start = rng.randint(0, length - needed) if rng is not None and length > needed else 0
    margin = 0 if target == rate else math.ceil(10 * max(1.0, rate / target)) + 2
    return start, min(needed + margin, length - start)


def _check_header(media: Media, rate: int, channels: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise DecodeError(media, f"sample rate {rate}; {RATES[0]} to {RATES[1]} Hz are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise DecodeError(media, f"{channels} channels; {MAX_CHANNELS} at most")


def _read_soundfile(
    media: Media, num_samples: int, sample_rate: int | None, rng: random.Random | None
) -> Piece | None:
    """None where libsndfile does not know the format."""
    try:
        opened = media.open("rb") if isinstance(media, Path) else io.BytesIO(media)
        with opened as source, soundfile.SoundFile(source) as sound:
            _check_header(media, sound.samplerate, sound.channels)
            start, count = _native_span(
                sound.frames, sound.samplerate, num_samples, sample_rate, rng
            )
            sound.seek(start)
            samples = sound.read(count, dtype="float32", always_2d=True)
            # The length of an MP3 is an estimate; every other header counts its samples.
            if len(samples) < count and sound.format != "MP3":
                raise DecodeError(media, f"truncated: {len(samples)} of {count} samples")
            return Piece(samples.mean(axis=1), sound.samplerate)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: a name ending in .raw
        return None
    except OSError as error:
        raise DecodeError(media, str(error)) from error


def _read_container(
    media: Media, num_samples: int, sample_rate: int | None, rng: random.Random | None
) -> Piece:
    """By FFmpeg: decoded from the start to the end of the piece; what lies before it is dropped."""
    with open_container(media) as container:
        if not container.streams.audio:
            raise DecodeError(media, "no audio stream")
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context is None:
            raise DecodeError(media, "no decoder for its audio stream")
        rate = context.sample_rate
        _check_header(media, rate, context.channels)
        context.thread_count = 1  # the loader's processes are the parallelism
        longest = MAX_SECONDS * rate
        length = min(_estimated_length(container, stream, rate), longest)
        start, _ = _native_span(length, rate, num_samples, sample_rate, rng)
        _, count = _native_span(longest, rate, num_samples, sample_rate, None)
        return Piece(_decode_span(media, container, stream, start, count), rate)


def _estimated_length(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream, rate: int
) -> int:
    """Samples by the header; 0 where it does not say, so that the piece is the beginning."""
    if stream.duration and stream.time_base:
        return max(int(stream.duration * stream.time_base * rate), 0)
    return max((container.duration or 0) * rate // av.time_base, 0)


def _decode_span(
    media: Media,
    container: av.container.InputContainer,
    stream: av.audio.stream.AudioStream,
    start: int,
    count: int,
) -> np.ndarray:
    """float32: up to `count` mono samples from `start`."""
    resampler = av.AudioResampler(format="fltp")
    parts: list[np.ndarray] = []
    position = kept = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DecodeError(media, f"damaged or truncated at sample {position}")
        for frame in packet.decode():
            for planar in resampler.resample(frame):
                mono = planar.to_ndarray().mean(axis=0)
                first = max(start - position, 0)
                position += len(mono)
                parts.append(mono[first : first + count - kept])
                kept += len(parts[-1])
                if kept >= count:
                    return np.concatenate(parts)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
