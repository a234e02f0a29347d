"""Sounds: mono waveforms of a fixed length."""

from __future__ import annotations

import hashlib
import io
import math
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import soundfile
from scipy.signal import resample_poly

from unival.data_gpu.errors import DecodeError, Media, MediaInfo, require_content
from unival.data_gpu.limits import Limits
from unival.data_gpu.structure import (
    Damage,
    check_matroska,
    check_mp3,
    check_ogg,
    check_wav,
    is_mp3_frame,
    skip_id3,
)
from unival.data_gpu.video_scan import FAMILIES, open_container

RATES = (1_000, 768_000)  # a rate sizes the buffers, and it comes from a header
FULL_SCALE = 32767.0
UNKNOWN = 2**63 - 1  # frames of a FLAC that was written to a pipe
BLOCK = 1 << 16  # samples that are verified at a time


class Piece(NamedTuple):
    """float32 [samples] in mono, at `rate` Hz."""

    samples: np.ndarray
    rate: int


def decode_waveform(
    media: Media,
    num_samples: int,
    sample_rate: int | None = None,
    rng: random.Random | None = None,
    limits: Limits | None = None,
) -> np.ndarray:
    """The mono waveform of a sound (3.3).

    The mean of the channels, at `sample_rate`, clipped to [-1, 1] and brought to 16 bits and back
    (cut, not rounded, as in the original). A longer sound gives a random piece with `rng` and its
    middle without; where no header tells the length, its beginning. A shorter one is repeated whole
    as often as it fits, then zeros follow. Only the piece is decoded where the format can be
    entered in the middle, but the whole file's structure is checked.

    Args:
        media: the encoded sound (or a film with sound).
        num_samples: samples wanted.
        sample_rate: in Hz; None keeps the file's own, as the released code does.
        rng: draws the piece.
        limits: what the sound may cost; the default ones if None.

    Returns:
        float32 [num_samples].

    Raises:
        DecodeError: missing, truncated, damaged, no sound, beyond the limits.
    """
    limits = limits or Limits()
    with _open_sound(media, limits) as sound:
        if sound is None:
            piece = _read_container(media, num_samples, sample_rate, rng, limits)
        else:
            piece = _read_sound(media, sound, num_samples, sample_rate, rng)
    if len(piece.samples) == 0:
        raise DecodeError(media, "no samples")
    samples = _resample(piece, sample_rate)[:num_samples]
    if not np.isfinite(samples).all():
        raise DecodeError(media, "samples that are not finite")
    return repeat_pad(through_int16(samples), num_samples)


def probe_audio(media: Media, limits: Limits) -> MediaInfo:
    """What the headers say of a sound. `seconds` is 0 where they do not tell.

    Raises:
        DecodeError: no sound, or a header beyond the limits.
    """
    with _open_sound(media, limits, whole=False) as sound:
        if sound is not None:
            return _sound_info(sound)
    with open_container(media, limits) as container:
        return _container_info(container, _audio_stream(container, media, limits))


def verify_audio(media: Media, limits: Limits) -> MediaInfo:
    """Decode all of a sound and compare it with what its file says of it: the number of samples,
    the checksums of Ogg pages and of FLAC.

    Some damage remains unseen, since plain samples, MP3 and AAC hold no checksums.

    Raises:
        DecodeError: missing, truncated, damaged, no sound, beyond the limits.
    """
    with _open_sound(media, limits) as sound:
        if sound is not None:
            _verify_sound(media, sound, limits)
            return _sound_info(sound)
    return _verify_container(media, limits)


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

    Up to the count, some more follow than are needed, so that the resampling filter (10 periods of
    the lower rate on each side) sees at the end what it would see in the whole sound. The file may
    end before.
    """
    target = sample_rate or rate
    needed = math.ceil(num_samples * rate / target)
    spare = max(length - needed, 0)
    start = rng.randint(0, spare) if rng is not None and spare else spare // 2
    margin = 0 if target == rate else math.ceil(10 * max(1.0, rate / target)) + 2
    return start, needed + margin


def _check_header(media: Media, rate: int, channels: int, seconds: float, limits: Limits) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise DecodeError(media, f"sample rate {rate}; {RATES[0]} to {RATES[1]} Hz are read")
    if not 1 <= channels <= limits.channels:
        raise DecodeError(media, f"{channels} channels; {limits.channels} at most")
    if seconds > limits.seconds:
        raise DecodeError(media, f"{seconds:.0f} seconds; {limits.seconds:.0f} at most")


def _check_length(media: Media, samples: int, rate: int, limits: Limits) -> None:
    if samples > limits.seconds * rate:
        raise DecodeError(media, f"more than {limits.seconds:.0f} seconds")


@contextmanager
def _open_sound(
    media: Media, limits: Limits, whole: bool = True
) -> Iterator[soundfile.SoundFile | None]:
    """A sound for libsndfile, None where it does not know the format. Headers are compared with the
    limits, and the structure is checked, of what is not WAV only if `whole`. libsndfile's errors
    become DecodeErrors."""
    size = require_content(media, limits)
    try:
        with media.open("rb") if isinstance(media, Path) else io.BytesIO(media) as source:
            head = source.read(12)
            source.seek(0)
            _check_structure(source, head, size, whole)
            source.seek(0)
            sound = None
            try:
                sound = soundfile.SoundFile(source)
            except TypeError:  # a name ending in .raw
                pass
            except soundfile.LibsndfileError:
                if head.startswith(b"fLaC"):  # FFmpeg would read a damaged one
                    raise
            if sound is None or sound.frames == UNKNOWN:  # which libsndfile cannot read to the end
                yield None
                return
            with sound:
                seconds = sound.frames / max(sound.samplerate, 1)
                _check_header(media, sound.samplerate, sound.channels, seconds, limits)
                yield sound
    except Damage as damage:
        raise DecodeError(media, f"damaged sound: {damage}") from damage
    except (soundfile.LibsndfileError, struct.error, OSError) as error:
        raise DecodeError(media, f"damaged sound: {error}") from error


def _check_structure(source: BinaryIO, head: bytes, size: int, whole: bool) -> None:
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        check_wav(source, size)
    elif whole and head.startswith(b"\x1a\x45\xdf\xa3"):
        check_matroska(source.read())
    elif whole and head.startswith(b"OggS"):
        check_ogg(source.read())
    elif whole and (head.startswith(b"ID3") or is_mp3_frame(head)):
        data = source.read()
        if not data.startswith(b"fLaC", skip_id3(data)):
            check_mp3(data)


def _sound_info(sound: soundfile.SoundFile) -> MediaInfo:
    return MediaInfo(
        "audio",
        f"{sound.format}/{sound.subtype}".lower(),
        seconds=sound.frames / sound.samplerate,
        channels=sound.channels,
        rate=sound.samplerate,
    )


def _read_sound(
    media: Media,
    sound: soundfile.SoundFile,
    num_samples: int,
    sample_rate: int | None,
    rng: random.Random | None,
) -> Piece:
    rate, length = sound.samplerate, sound.frames
    start, count = _native_span(length, rate, num_samples, sample_rate, rng)
    sound.seek(start)
    samples = sound.read(count, dtype="float32", always_2d=True)
    # The length of an MP3 is an estimate; every other header counts its samples.
    expected = min(count, length - start)
    if len(samples) < expected and sound.format != "MP3":
        raise DecodeError(media, f"truncated: {len(samples)} of {expected} samples")
    return Piece(samples.mean(axis=1), rate)


def _verify_sound(media: Media, sound: soundfile.SoundFile, limits: Limits) -> None:
    """Reads all samples; those of FLAC are compared with the MD5 sum in its header."""
    digest = _FlacDigest(media) if sound.format == "FLAC" else None
    count = 0
    while len(block := sound.read(BLOCK, dtype="int32" if digest else "float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise DecodeError(media, "samples that are not finite")
        if digest:
            digest.update(block)
        count += len(block)
        _check_length(media, count, sound.samplerate, limits)
    if count == 0:
        raise DecodeError(media, "no samples")
    if count < sound.frames and sound.format != "MP3":
        raise DecodeError(media, f"truncated: {count} of {sound.frames} samples")
    if digest and not digest.matches():
        raise DecodeError(media, "damaged sound: its MD5 sum is wrong")


class _FlacDigest:
    """The MD5 sum that the header of a FLAC file holds, zeros if its writer did not know it, is of
    the interleaved samples in as many bytes as their bits take."""

    def __init__(self, media: Media) -> None:
        if isinstance(media, Path):
            with media.open("rb") as source:
                head = source.read(42)
        else:
            head = media[:42]
        self.bits = (int.from_bytes(head[20:22]) >> 4 & 31) + 1
        self.expected = head[26:42]
        self.md5 = hashlib.md5(usedforsecurity=False)

    def update(self, block: np.ndarray) -> None:
        """int32 [samples, channels], shifted to the highest bits."""
        size = (self.bits + 7) // 8
        samples = (block >> (32 - self.bits)).astype("<i4").view(np.uint8).reshape(-1, 4)
        self.md5.update(samples[:, :size].tobytes())

    def matches(self) -> bool:
        return self.expected in (bytes(16), self.md5.digest())


def _audio_stream(
    container: av.container.InputContainer, media: Media, limits: Limits
) -> av.audio.stream.AudioStream:
    """The first audio stream, its decoder set up and its header compared with the limits."""
    if not container.streams.audio:
        raise DecodeError(media, "no audio stream")
    stream = container.streams.audio[0]
    context = stream.codec_context
    if context is None:
        raise DecodeError(media, "no decoder for its audio stream")
    seconds = _seconds_by_header(container, stream)
    _check_header(media, context.sample_rate, context.channels, seconds, limits)
    context.thread_count = 1  # the loader's processes are the parallelism
    return stream


def _seconds_by_header(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream
) -> float:
    """0 where it does not say."""
    if stream.duration and stream.time_base:
        return max(float(stream.duration * stream.time_base), 0.0)
    return max((container.duration or 0) / av.time_base, 0.0)


def _container_info(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream
) -> MediaInfo:
    context = stream.codec_context
    family = FAMILIES.get(container.format.name, container.format.name.split(",")[0])
    return MediaInfo(
        "audio",
        f"{family}/{context.codec.canonical_name}",
        seconds=_seconds_by_header(container, stream),
        channels=context.channels,
        rate=context.sample_rate,
    )


def _read_container(
    media: Media,
    num_samples: int,
    sample_rate: int | None,
    rng: random.Random | None,
    limits: Limits,
) -> Piece:
    """By FFmpeg: decoded from the start to the end of the piece; what lies before it is dropped."""
    with open_container(media, limits) as container:
        stream = _audio_stream(container, media, limits)
        rate = stream.codec_context.sample_rate
        length = int(_seconds_by_header(container, stream) * rate)
        start, count = _native_span(length, rate, num_samples, sample_rate, rng)
        return Piece(_decode_span(media, container, stream, start, count), rate)


def _decode_span(
    media: Media,
    container: av.container.InputContainer,
    stream: av.audio.stream.AudioStream,
    start: int,
    count: int,
) -> np.ndarray:
    """float32: up to `count` mono samples from `start`."""
    parts: list[np.ndarray] = []
    position = kept = 0
    for packet in _packets(media, container, stream):
        for mono in packet:
            first = max(start - position, 0)
            position += len(mono)
            parts.append(mono[first : first + count - kept])
            kept += len(parts[-1])
        if kept >= count:
            break
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _packets(
    media: Media, container: av.container.InputContainer, stream: av.audio.stream.AudioStream
) -> Iterator[list[np.ndarray]]:
    """What each packet decodes to: float32, mono."""
    resampler = av.AudioResampler(format="fltp")
    for number, packet in enumerate(container.demux(stream)):
        if packet.is_corrupt:
            raise DecodeError(media, f"damaged or truncated at packet {number}")
        frames = [planar for frame in packet.decode() for planar in resampler.resample(frame)]
        yield [planar.to_ndarray().mean(axis=0) for planar in frames]


def _verify_container(media: Media, limits: Limits) -> MediaInfo:
    """Decodes all by FFmpeg, and counts the packets of MP4, which says how many there are."""
    packets = samples = 0
    with open_container(media, limits) as container:
        stream = _audio_stream(container, media, limits)
        info = _container_info(container, stream)
        for packet in _packets(media, container, stream):
            if not all(np.isfinite(mono).all() for mono in packet):
                raise DecodeError(media, "samples that are not finite")
            packets += 1
            samples += sum(map(len, packet))
            _check_length(media, samples, int(info.rate), limits)
        promised = len(stream.index_entries) if info.format.startswith("mp4/") else 0
    if samples == 0:
        raise DecodeError(media, "no samples")
    if packets - 1 < promised:  # the last one is FFmpeg's, to end the stream
        raise DecodeError(media, f"truncated: {packets - 1} of {promised} packets")
    return info
