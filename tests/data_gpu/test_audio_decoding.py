"""Waveforms against numbers worked out by hand, and hostile files."""

import io
import math
import random
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from unival.data_gpu.audio import (
    decode_waveform,
    probe_audio,
    repeat_pad,
    through_int16,
    verify_audio,
)
from unival.data_gpu.errors import DecodeError, MediaInfo
from unival.data_gpu.limits import Limits
from unival.data_gpu.structure import ogg_checksum

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
    assert waveform.dtype == np.float32


def test_a_longer_sound_gives_its_middle_or_a_random_piece():
    data = wav(ramp(1000))
    whole = decode_waveform(data, 1000)
    assert np.array_equal(decode_waveform(data, 100), whole[450:550])
    assert np.array_equal(decode_waveform(data, 999), whole[:999])  # the odd sample stays behind
    starts = set()
    for seed in range(200):
        piece = decode_waveform(data, 990, rng=random.Random(seed))
        start = next(s for s in range(11) if np.array_equal(piece, whole[s : s + 990]))
        starts.add(start)
    assert starts == set(range(11))  # both ends included


def test_the_file_rate_is_kept_unless_another_is_asked_for():
    data = wav(ramp(100), rate=8_000)
    assert np.array_equal(decode_waveform(data, 100), decode_waveform(data, 100, 8_000))
    doubled = decode_waveform(data, 200, 16_000)
    expected = through_int16(resample_poly(ramp(100), 2, 1).astype(np.float32))
    assert doubled == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rate", "target"), [(16_000, 48_000), (44_100, 48_000), (48_000, 16_000)])
def test_a_piece_is_resampled_as_if_the_sound_began_with_it_and_went_on(rate, target):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000).astype(np.float32)
    part = decode_waveform(wav(noise, rate), 2_000, target)
    needed = math.ceil(2_000 * rate / target)
    common = np.gcd(rate, target)
    rest = noise[(20_000 - needed) // 2 :]
    expected = resample_poly(rest, target // common, rate // common).astype(np.float32)
    assert part == pytest.approx(through_int16(expected)[:2_000], abs=1.1 / 32767)


def test_a_tone_keeps_its_frequency_through_resampling():
    time = np.arange(16_000) / 16_000
    data = wav(np.sin(2 * np.pi * 440 * time).astype(np.float32))
    spectrum = np.abs(np.fft.rfft(decode_waveform(data, 48_000, 48_000)))
    assert spectrum.argmax() == 440  # one second: bins are hertz


def test_only_the_piece_is_read(monkeypatch):
    counts = []
    read = soundfile.SoundFile.read

    def spy(self, frames=-1, *args, **kwargs):
        counts.append(frames)
        return read(self, frames, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    decode_waveform(wav(np.zeros(100_000, dtype=np.float32)), 500, rng=random.Random(1))
    decode_waveform(wav(np.zeros(100_000, dtype=np.float32)), 500)
    assert counts == [500, 500]


def test_real_sounds_from_path_and_bytes_agree():
    waveform = decode_waveform(CHOIR, 480_000, 48_000)
    assert waveform.shape == (480_000,)
    assert np.abs(waveform).max() > 0.01
    assert np.array_equal(waveform, decode_waveform(CHOIR.read_bytes(), 480_000, 48_000))


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
    spectrum = np.abs(np.fft.rfft(decode_waveform(data, 16_000)))
    assert spectrum.argmax() == 440
    piece = decode_waveform(data, 4_800, 48_000, random.Random(0))
    assert 0.4 < np.abs(piece).max() < 0.6


def test_a_piece_from_the_middle_of_a_film_starts_there():
    class Late(random.Random):
        def randint(self, low, high):
            return 24_000

    time = np.arange(32_000) / 16_000
    tone = np.where(time < 1.25, 0.0, 0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    piece = decode_waveform(aac(tone), 3_200, rng=Late())
    assert np.abs(decode_waveform(aac(tone), 3_200)).max() < 0.05  # from the middle, 0.9 s
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


@pytest.mark.parametrize("rate", [10, 1_000_000_000])
def test_a_rate_that_only_a_hostile_header_says_is_refused(rate):
    with pytest.raises(DecodeError, match="sample rate"):
        decode_waveform(wav(ramp(10), rate=rate), 10, 48_000)


NOISE = np.random.default_rng(3).uniform(-0.5, 0.5, 9_600).astype(np.float32)
LIMITS = Limits()


def stream(samples, form, codec, rate, channels=1, seekable=True):
    """Sound encoded by FFmpeg; to a pipe if not seekable, so that no header is put right."""
    layout = "stereo" if channels == 2 else "mono"
    buffer = io.BytesIO()
    target = buffer if seekable else Pipe(buffer)
    with av.open(target, "w", format=form) as container:
        encoder = container.add_stream(codec, rate=rate, layout=layout)
        context = encoder.codec_context
        frame = av.AudioFrame.from_ndarray(
            np.stack([samples] * channels), format="fltp", layout=layout
        )
        frame.sample_rate = rate
        cut = av.AudioResampler(context.format, layout, rate, context.frame_size or 1024)
        for piece in [*cut.resample(frame), *cut.resample(None)]:
            container.mux(encoder.encode(piece))
        container.mux(encoder.encode())
    return buffer.getvalue()


class Pipe:
    def __init__(self, buffer):
        self.write = buffer.write


@pytest.mark.parametrize(
    ("data", "name", "channels", "rate"),
    [
        (wav(NOISE, subtype="PCM_16"), "wav/pcm_16", 1, 16_000),
        (wav(NOISE, subtype="PCM_24", form="RF64"), "rf64/pcm_24", 1, 16_000),
        (wav(np.stack([NOISE] * 2, 1), subtype="PCM_24", form="WAVEX"), "wavex/pcm_24", 2, 16_000),
        (wav(NOISE, subtype="ULAW"), "wav/ulaw", 1, 16_000),
        (wav(NOISE, subtype="IMA_ADPCM"), "wav/ima_adpcm", 1, 16_000),
        (wav(NOISE, subtype="PCM_S8", form="FLAC"), "flac/pcm_s8", 1, 16_000),
        (wav(np.stack([NOISE] * 2, 1), subtype="PCM_24", form="FLAC"), "flac/pcm_24", 2, 16_000),
        (wav(NOISE, subtype="VORBIS", form="OGG"), "ogg/vorbis", 1, 16_000),
        (wav(NOISE, subtype="OPUS", form="OGG"), "ogg/opus", 1, 16_000),
        (wav(NOISE, subtype=None, form="MP3"), "mp3/mpeg_layer_iii", 1, 16_000),
        (wav(NOISE, 44_100, subtype=None, form="MP3"), "mp3/mpeg_layer_iii", 1, 44_100),
        (wav(NOISE, 8_000, subtype=None, form="MP3"), "mp3/mpeg_layer_iii", 1, 8_000),
        (stream(NOISE, "mp3", "libmp3lame", 48_000, 2), "mp3/mpeg_layer_iii", 2, 48_000),
        (stream(NOISE, "mp3", "libmp3lame", 16_000, 1, False), "mp3/mpeg_layer_iii", 1, 16_000),
        (stream(NOISE, "ogg", "libopus", 48_000), "ogg/opus", 1, 48_000),
        (stream(NOISE, "mp4", "aac", 16_000), "mp4/aac", 1, 16_000),
        (stream(NOISE, "webm", "libopus", 48_000), "matroska/opus", 1, 48_000),
        (stream(NOISE, "matroska", "aac", 16_000, 1, False), "matroska/aac", 1, 16_000),
        (stream(NOISE, "flac", "flac", 16_000, 1, False), "flac/flac", 1, 16_000),
        (stream(NOISE, "wav", "pcm_s16le", 16_000, 1, False), "wav/pcm_16", 1, 16_000),
        (stream(NOISE, "adts", "aac", 16_000), "aac/aac", 1, 16_000),
        (stream(NOISE, "mpegts", "aac", 16_000), "mpegts/aac", 1, 16_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sounds_of_every_kind_pass_and_are_named(data, name, channels, rate):
    for look in (probe_audio, verify_audio):
        info = look(data, LIMITS)
        assert (info.kind, info.format, info.channels, info.rate) == ("audio", name, channels, rate)
        assert info.seconds == 0 or abs(info.seconds - 9_600 / rate) < 0.2
    waveform = decode_waveform(data, 9_600)
    assert 0.2 < np.sqrt(np.mean(waveform[2_000:8_000] ** 2)) < 0.4  # 0.5 / sqrt(3), and loss


def test_all_samples_pass_and_tell_their_length():
    for path in sorted((SAMPLES / "audio").iterdir()):
        samples, rate = soundfile.read(path)
        expected = MediaInfo(
            "audio", "ogg/vorbis", seconds=len(samples) / rate, channels=1, rate=rate
        )
        assert verify_audio(path, LIMITS) == probe_audio(path, LIMITS) == expected


def test_tags_and_padding_around_an_mp3_are_no_damage():
    mp3 = wav(NOISE, subtype=None, form="MP3")
    id3 = b"ID3\x04\0\0\0\0\x01\x00" + bytes(128)
    for data in (id3 + mp3, id3 * 2 + mp3, mp3 + b"TAG" + bytes(125), mp3 + bytes(300),
                 mp3 + b"APETAGEX" + bytes(60)):  # fmt: skip
        verify_audio(data, LIMITS)
        assert decode_waveform(data, 9_600).shape == (9_600,)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_each_turned_bit_of_an_ogg_file_is_found(subtype):
    data = wav(NOISE, subtype=subtype, form="OGG")
    rng = random.Random(0)
    for at in [*range(60), *(rng.randrange(len(data)) for _ in range(200))]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(DecodeError):
            decode_waveform(bytes(damaged), 10)


def test_ogg_checksums_are_those_of_the_definition():
    def slowly(page):
        crc = 0
        for byte in page:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1) ^ (0x104C11DB7 if crc >> 31 else 0)
        return crc

    for page in (b"", b"\0", b"\x01", b"OggS" + bytes(range(256))):
        assert ogg_checksum(page) == slowly(page)


def test_each_turned_bit_in_the_frames_of_a_flac_file_is_found():
    data = wav(NOISE, subtype="PCM_16", form="FLAC")
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data) // 8, len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(DecodeError):
            decode_waveform(bytes(damaged), 9_600)


def test_a_wav_must_hold_the_samples_it_promises_unless_it_was_streamed():
    data = wav(NOISE, subtype="PCM_16")
    at = data.index(b"data") + 4
    for length, riff in ((2**31 - 2, len(data) - 8), (2**31 - 2, 2**31 + 34), (len(data), 0)):
        claims = data[:4] + riff.to_bytes(4, "little") + data[8:at] + length.to_bytes(4, "little")
        with pytest.raises(DecodeError, match="truncated"):
            decode_waveform(claims + data[at + 4 :], 10)
    for unknown in (b"\xff" * 4, bytes(4)):
        streamed = data[:4] + unknown + data[8:at] + b"\xff" * 4 + data[at + 4 :]
        assert np.array_equal(decode_waveform(streamed, 9_600), decode_waveform(data, 9_600))
    listed = data[:12] + b"LIST\x03\0\0\0abc\0" + data[12:]  # an odd chunk is filled up
    listed = listed[:4] + (len(listed) - 8).to_bytes(4, "little") + listed[8:]
    assert np.array_equal(decode_waveform(listed + b"appended", 100), decode_waveform(data, 100))


def test_limits_of_length_and_channels_are_the_callers():
    data = wav(np.stack([NOISE] * 3, 1))
    for look in (verify_audio, probe_audio):
        assert look(data, Limits(channels=3, seconds=0.6)).channels == 3
        with pytest.raises(DecodeError, match="3 channels; 2 at most"):
            look(data, Limits(channels=2))
        with pytest.raises(DecodeError, match="at most"):
            look(data, Limits(seconds=0.59))
    with pytest.raises(DecodeError, match="3 channels; 2 at most"):
        decode_waveform(data, 10, limits=Limits(channels=2))
    unknown = stream(NOISE, "matroska", "aac", 16_000, 1, False)
    with pytest.raises(DecodeError, match="more than"):
        verify_audio(unknown, Limits(seconds=0.3))


def test_a_flac_whose_samples_are_not_those_of_its_sum_fails_the_verification_only():
    data = wav(NOISE, subtype="PCM_16", form="FLAC")
    other = data[:26] + bytes(range(16)) + data[42:]
    assert decode_waveform(other, 10).shape == (10,)
    with pytest.raises(DecodeError, match="MD5"):
        verify_audio(other, LIMITS)
    verify_audio(data[:26] + bytes(16) + data[42:], LIMITS)  # zeros: its writer did not know it


def test_damage_in_an_mp3_that_contradicts_itself_is_found():
    whole = stream(NOISE, "mp3", "libmp3lame", 48_000, 2)
    starts = [at for at in range(len(whole)) if whole.startswith(b"\xff\xfb", at)]
    frame = next(at for at in starts if at + 384 in starts)  # 128 kbit/s at 48 kHz: 384 bytes
    mp3 = bytearray(whole)
    # Side information: 9 + 3 + 8 bits, then 12 bits say how many bits a part has: now 4095.
    mp3[frame + 4] = 0  # begins in this frame
    mp3[frame + 6] |= 0x0F
    mp3[frame + 7] = 0xFF
    for granule in range(1, 4):  # the other parts, each 59 bits on
        start = 20 + 59 * granule
        for bit in range(start, start + 12):
            mp3[frame + 4 + bit // 8] |= 0x80 >> bit % 8
    with pytest.raises(DecodeError, match="more data than there are"):
        decode_waveform(bytes(mp3), 10)
