"""Broken files of every format that is read, made from the samples; the same on every run.

Each is broken by its format's own rules: a decoder that reads it to the end makes something up.
Where other bits merely make other pixels or samples (BMP, lossy WebP, WAV), turned ones go into
headers only.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
from broken_tars import PICKLE, broken_tars
from PIL import Image

SAMPLES = Path(__file__).parents[2] / "samples"
SIZE = (97, 53)  # of the pictures; odd, so that swapped sides do not fit
FRAME = (96, 54)
FRAMES = 16
STEP = 64  # bytes for each turned bit
EXACT = {"fflags": "+bitexact"}  # no random numbers, no dates

HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>gone</body></html>\n"


@dataclass(frozen=True)
class Broken:
    """A broken file; `kind` (image, video, audio or tar) is what it is offered as."""

    path: Path
    kind: str
    what: str


class Source(NamedTuple):
    """An unbroken file. `fragile` bytes from its beginning break it if bits of them turn."""

    kind: str
    suffix: str
    data: bytes
    fragile: int | None = None


Made = tuple[str, str, str, bytes]  # kind, suffix, what, content


def broken_files(folder: Path) -> list[Broken]:
    """Writes all broken files into `folder`."""
    sources = unbroken()
    makers = (
        truncations(sources),
        turned_bits(sources),
        other_contents(sources),
        broken_jpegs(sources),
        broken_pngs(sources),
        broken_pictures(sources),
        broken_sounds(sources),
        broken_films(sources),
        broken_tars(sources["jpeg"].data),
    )
    found = []
    for number, (kind, suffix, what, data) in enumerate(made for maker in makers for made in maker):
        path = folder / f"{number:04d}{suffix}"
        path.write_bytes(data)
        found.append(Broken(path, kind, what))
    return found


def unbroken() -> dict[str, Source]:
    """A file of each format."""
    with Image.open(SAMPLES / "images" / "cat.jpg") as opened:
        picture = opened.convert("RGB").resize(SIZE)
    sound, rate = soundfile.read(SAMPLES / "audio" / "sp_drum_cowbell.ogg", dtype="float32")
    long, _ = soundfile.read(SAMPLES / "audio" / "sp_loop_tabla.ogg", 64_000, dtype="float32")
    images = {
        "jpeg": (".jpg", "JPEG", {}),
        "progressive": (".jpg", "JPEG", {"progressive": True}),
        "restarts": (".jpg", "JPEG", {"restart_marker_blocks": 2}),
        "png": (".png", "PNG", {}),
        "webp": (".webp", "WEBP", {}),
        "lossless": (".webp", "WEBP", {"lossless": True}),
        "gif": (".gif", "GIF", {}),
        "bmp": (".bmp", "BMP", {}),
        "tiff": (".tif", "TIFF", {"compression": "tiff_lzw"}),
    }
    sources = {
        name: Source("image", suffix, encode_picture(picture, form, **options))
        for name, (suffix, form, options) in images.items()
    }
    sources["bmp"] = sources["bmp"]._replace(fragile=32)
    sources["webp"] = sources["webp"]._replace(fragile=30)
    for name, form, subtype in (
        ("wav", "WAV", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("vorbis", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
        ("mp3", "MP3", None),
    ):
        suffix = ".ogg" if form == "OGG" else f".{name}"
        # Of MP3 only some bits can be told to be wrong: a long one holds enough of them.
        samples = long if form == "MP3" else sound
        sources[name] = Source("audio", suffix, encode_sound(samples, rate, form, subtype))
    sources["wav"] = sources["wav"]._replace(fragile=44)
    sources["aac"] = Source("audio", ".m4a", encode_stream(sound, rate, "ipod", "aac"))
    sources["weba"] = Source("audio", ".webm", encode_stream(sound, 16_000, "webm", "libopus"))
    frames = film_frames()
    for name, suffix, form, codec, pixels in (
        ("h264", ".mp4", "mp4", "libx264", "yuv420p"),
        ("mpeg4", ".mp4", "mp4", "mpeg4", "yuv420p"),
        ("vp9", ".webm", "webm", "libvpx-vp9", "yuv420p"),
        ("mjpeg", ".avi", "avi", "mjpeg", "yuvj420p"),
    ):
        sources[name] = Source("video", suffix, encode_film(frames, form, codec, pixels))
    return sources


def encode_picture(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def encode_sound(samples: np.ndarray, rate: int, form: str, subtype: str | None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    peak = buffer.getvalue().find(b"PEAK")
    if peak > 0:  # a WAV of floats says when it was written
        return replaced(buffer.getvalue(), peak + 12, bytes(4))
    if form != "OGG":
        return buffer.getvalue()
    pages = (replaced(page, 14, bytes(4)) for page in ogg_pages(buffer.getvalue()))
    return b"".join(with_crc(page) for page in pages)  # the number of the stream was random


def encode_stream(samples: np.ndarray, rate: int, form: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=EXACT) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        context = stream.codec_context
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(context.format, "mono", rate, context.frame_size or 960)
        for piece in resampler.resample(frame):
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    return buffer.getvalue()


def film_frames() -> list[av.VideoFrame]:
    with av.open(str(SAMPLES / "video" / "bbb_00.mp4")) as container:
        frames = [frame for frame, _ in zip(container.decode(video=0), range(FRAMES), strict=False)]
    return [frame.reformat(*FRAME, format="yuv420p") for frame in frames]


def encode_film(frames: list[av.VideoFrame], form: str, codec: str, pixels: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=EXACT) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = *FRAME, pixels
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        stream.codec_context.gop_size = 6
        stream.bit_rate = 400_000
        for number, frame in enumerate(frames):
            copy = frame.reformat(format=pixels)
            copy.pts, copy.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(copy))
        container.mux(stream.encode())
    return buffer.getvalue()


def truncations(sources: dict[str, Source]) -> Iterator[Made]:
    for name, source in sources.items():
        for tenth in range(1, 10):
            data = source.data[: len(source.data) * tenth // 10]
            yield source.kind, source.suffix, f"{name} truncated at {tenth}/10", data


def turned_bits(sources: dict[str, Source]) -> Iterator[Made]:
    for name, source in sources.items():
        for seed in range(4):
            rng = random.Random(f"{name} {seed}")
            data = bytearray(source.data)
            end = len(data) if source.fragile is None else source.fragile
            step = STEP if source.fragile is None else 4
            for start in range(0, end, step):
                data[rng.randrange(start, min(start + step, end))] ^= 1 << rng.randrange(8)
            yield source.kind, source.suffix, f"{name}, a bit in {step} turned, {seed}", bytes(data)


def other_contents(sources: dict[str, Source]) -> Iterator[Made]:
    """What is offered under a name that promises something else."""
    suffixes = {"image": (".jpg", ".png"), "video": (".mp4", ".webm"), "audio": (".wav", ".ogg")}
    rng = np.random.default_rng(0)
    contents = {
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(4096),
        "random bytes": rng.bytes(4096),
        "HTML": HTML,
        "text": b"error: quota exceeded, try again later\n" * 9,
        "a pickle": PICKLE,
        "a zip archive": b"PK\x03\x04" + rng.bytes(500),
        "a program": b"\x7fELF\x02\x01\x01" + rng.bytes(500),
        "a playlist": b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
    }
    for kind, (first, second) in suffixes.items():
        for what, data in contents.items():
            yield kind, first, f"{what} as {first}", data
        yield kind, second, f"HTML as {second}", HTML
        for name in ("jpeg", "gif", "vorbis", "wav", "h264", "vp9"):
            if sources[name].kind != kind:
                yield kind, first, f"{name} as {first}", sources[name].data
    for name, source in sources.items():
        data = source.data[:16] + rng.bytes(4096)
        yield source.kind, source.suffix, f"{name}: its beginning, then random bytes", data


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def segments(data: bytes) -> list[bytes]:
    """The segments of a JPEG up to its first scan; the rest is the last item."""
    parts, at = [data[:2]], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:]]


def broken_jpegs(sources: dict[str, Source]) -> Iterator[Made]:
    jpeg, restarts = sources["jpeg"].data, sources["restarts"].data
    parts = segments(jpeg)
    for marker, name in ((0xDB, "quantisation"), (0xC4, "Huffman tables"), (0xC0, "frame header")):
        kept = b"".join(part for part in parts if part[1] != marker)
        yield "image", ".jpg", f"jpeg without {name}", kept
    frame, tables, scan = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xc4"), jpeg.index(b"\xff\xda")
    turns = [
        at
        for at in range(len(restarts) - 1)
        if restarts[at] == 255 and 207 < restarts[at + 1] < 216
    ]
    for what, data in {
        "promises 65,500 x 65,500": replaced(jpeg, frame + 5, struct.pack(">HH", 65_500, 65_500)),
        "promises 65,000 rows": replaced(jpeg, frame + 5, struct.pack(">H", 65_000)),
        "of no width": replaced(jpeg, frame + 7, bytes(2)),
        "of no height": replaced(jpeg, frame + 5, bytes(2)),
        "of 12 bits": replaced(jpeg, frame + 4, b"\x0c"),
        "of two components": replaced(jpeg, frame + 9, b"\2"),
        "of a hierarchical process": replaced(jpeg, frame + 1, b"\xc5"),
        "with sampling factor 0": replaced(jpeg, frame + 11, b"\x02"),
        "with quantisation table 7": replaced(jpeg, frame + 12, b"\7"),
        "with two frame headers": jpeg[:frame]
        + parts[[p[1] for p in parts].index(0xC0)]
        + jpeg[frame:],
        "with too many Huffman codes": replaced(jpeg, tables + 5, b"\x03"),
        "with a scan of another component": replaced(jpeg, scan + 5, b"\x09"),
        "with a scan of half of the coefficients": replaced(jpeg, scan + 12, b"\x20"),
        "with a segment beyond the end": replaced(jpeg, tables + 2, b"\xff\xff"),
        "with bytes between segments": jpeg[:tables] + b"lost" + jpeg[tables:],
        "without its scan": jpeg[:scan] + b"\xff\xd9",
        "without its end": jpeg[:-2],
        "of its end only": jpeg[:2] + jpeg[-2:],
        "with an empty scan": jpeg[: scan + 14] + b"\xff\xd9",
        "with a marker in the pixels": replaced(jpeg, len(jpeg) - 200, b"\xff\xc8"),
    }.items():
        yield "image", ".jpg", f"jpeg {what}", data
    for what, data in {
        "without one": restarts[: turns[1]] + restarts[turns[1] + 2 :],
        "in a wrong order": replaced(restarts, turns[1] + 1, b"\xd7"),
        "at a distance that is not theirs": replaced(
            restarts, restarts.index(b"\xff\xdd") + 4, b"\0\3"
        ),
        "without their distance": replaced(restarts, restarts.index(b"\xff\xdd") + 4, b"\0\0"),
    }.items():
        yield "image", ".jpg", f"jpeg with restart markers, {what}", data


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, pixels: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def broken_pngs(sources: dict[str, Source]) -> Iterator[Made]:
    whole = sources["png"].data
    rows = np.zeros((53, 1 + 97 * 3), dtype=np.uint8)
    packed = zlib.compress(rows.tobytes())
    rows[20, 0] = 9
    ends = whole.index(b"IEND") - 4
    for what, data in {
        "promises 100,000 x 100,000": png(100_000, 100_000, zlib.compress(bytes(3_000_000))),
        "promises 9,000 x 9,000": png(9_000, 9_000, zlib.compress(bytes(100_000))),
        "promises 2^31 rows": png(1, 2**31 - 1, packed),
        "of no width": png(0, 53, packed),
        "with its sides swapped": png(53, 97, packed),
        "with its sides swapped and a wrong checksum": replaced(
            whole, 16, struct.pack(">II", 53, 97)
        ),
        "of 3 bits": png(97, 53, packed, depth=3),
        "of a palette that is missing": png(97, 53, packed, colour=3),
        "with a row of filter 9": png(97, 53, zlib.compress(rows.tobytes())),
        "with pixels that are not packed": png(97, 53, bytes(500)),
        "with pixels that end early": png(97, 53, packed[: len(packed) // 2]),
        "with too many pixels": png(97, 53, zlib.compress(bytes(20_000))),
        "with a wrong checksum of the pixels": replaced(whole, ends - 4, bytes(4)),
        "without its end": whole[:ends],
        "without pixels": whole[:33] + whole[ends:],
        "with two headers": whole[:33] + whole[8:],
        "with an unknown chunk that it needs": whole[:33] + png_chunk(b"NEWS", b"x") + whole[33:],
        "with a chunk beyond the end": replaced(whole, 33, b"\x7f\xff\xff\xff"),
    }.items():
        yield "image", ".png", f"png {what}", data


def broken_pictures(sources: dict[str, Source]) -> Iterator[Made]:
    gif, webp, lossless = (sources[name].data for name in ("gif", "webp", "lossless"))
    first = gif.index(b"\x2c\0\0\0\0")  # its picture
    for what, data in {
        "promises 65,535 x 65,535": replaced(replaced(gif, 6, b"\xff" * 4), first + 5, b"\xff" * 4),
        "of no width": replaced(gif, 6, bytes(2)),
        "without its end": gif[:-1],
        "with a picture outside the screen": replaced(gif, first + 1, b"\xff\x0f"),
        "with codes of 12 bits": replaced(gif, first + 10, b"\x0c"),
        "without pictures": gif[:first] + b";",
        "with an unknown block": replaced(gif, first, b"\x55"),
    }.items():
        yield "image", ".gif", f"gif {what}", data
    for what, data in {
        "promises 16,383 x 16,383": replaced(webp, 26, b"\xff\x3f\xff\x3f"),
        "of no width": replaced(webp, 26, bytes(2)),
        "longer than the file": replaced(webp, 4, struct.pack("<I", len(webp))),
        "with a chunk longer than the file": replaced(webp, 16, struct.pack("<I", len(webp))),
        "without its start code": replaced(webp, 23, bytes(3)),
        "with a first part longer than it": replaced(webp, 21, b"\xff\xff"),
        "without a picture": b"RIFF\x04\0\0\0WEBP",
        "lossless, promises 16,384 x 16,384": replaced(lossless, 21, b"\xff\xff\xff\x0f"),
        "lossless of version 7": replaced(lossless, 24, b"\xf0"),
    }.items():
        yield "image", ".webp", f"webp {what}", data
    bmp, tiff = sources["bmp"].data, sources["tiff"].data
    for what, data in {
        "promises 30,000 x 30,000": replaced(bmp, 18, struct.pack("<ii", 30_000, 30_000)),
        "promises 5,000 x 5,000": replaced(bmp, 18, struct.pack("<ii", 5_000, 5_000)),
        "of no width": replaced(bmp, 18, bytes(4)),
        "of a negative width": replaced(bmp, 18, struct.pack("<i", -97)),
        "with its sides swapped": replaced(bmp, 18, struct.pack("<ii", 53, 97)),
        "of no planes": replaced(bmp, 26, bytes(2)),
        "of 7 bits": replaced(bmp, 28, b"\7"),
        "with pixels beyond the end": replaced(bmp, 10, struct.pack("<I", len(bmp))),
        "with pixels in its header": replaced(bmp, 10, struct.pack("<I", 20)),
    }.items():
        yield "image", ".bmp", f"bmp {what}", data
    for what, data in {
        "promises 100,000 x 100,000": tiff_with(tiff, {256: 100_000, 257: 100_000}),
        "of no width": tiff_with(tiff, {256: 0}),
        "with pixels beyond the end": tiff_with(tiff, {279: 0x7FFFFFF0}),
        "with its directory beyond the end": replaced(tiff, 4, struct.pack("<I", 1 << 30)),
        "with 60,000 tags": replaced(tiff, int.from_bytes(tiff[4:8], "little"), b"\x60\xea"),
        "of an unknown packing": tiff_with(tiff, {259: 777}),
    }.items():
        yield "image", ".tif", f"tiff {what}", data


def tiff_with(data: bytes, values: dict[int, int]) -> bytes:
    """Replaces values of the directory of a little-endian TIFF by single numbers of 32 bits."""
    start = int.from_bytes(data[4:8], "little")
    for at in range(
        start + 2, start + 2 + 12 * int.from_bytes(data[start : start + 2], "little"), 12
    ):
        tag = int.from_bytes(data[at : at + 2], "little")
        if tag in values:
            data = replaced(data, at + 2, struct.pack("<HII", 4, 1, values[tag]))
    return data


def ogg_pages(data: bytes) -> list[bytes]:
    starts = [at for at in range(len(data)) if data.startswith(b"OggS\0", at)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def with_crc(page: bytes) -> bytes:
    """An Ogg page with its checksum put right; by the definition, bit by bit."""
    page = replaced(page, 22, bytes(4))
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x104C11DB7 if crc & 0x80000000 else 0)
    return replaced(page, 22, struct.pack("<I", crc))


def broken_sounds(sources: dict[str, Source]) -> Iterator[Made]:
    wav, flac, mp3 = (sources[name].data for name in ("wav", "flac", "mp3"))
    nan = encode_sound(np.array([0, np.nan], np.float32), 16_000, "WAV", "FLOAT")
    for what, data in {
        "promises 2^31 samples": replaced(
            replaced(wav, 4, struct.pack("<I", 2**32 - 4)), 40, struct.pack("<I", 2**32 - 40)
        ),
        "promises samples beyond the end": replaced(wav, 40, struct.pack("<I", len(wav))),
        "of 60,000 channels": replaced(wav, 22, struct.pack("<H", 60_000)),
        "of 60,000 channels that agrees with itself": replaced(
            wav, 22, struct.pack("<HIIH", 60_000, 16_000, 16_000 * 54_464, 54_464)
        ),
        "of no channels": replaced(wav, 22, bytes(2)),
        "of 4 GHz": replaced(wav, 24, struct.pack("<II", 2_000_000_000, 4_000_000_000)),
        "of 0 Hz": replaced(wav, 24, bytes(8)),
        "of an unknown coding": replaced(wav, 20, b"\x99\x99"),
        "without a format": replaced(wav, 12, b"junk"),
        "without samples": wav[:36] + b"junk" + wav[40:],
        "with no sample": wav[:4] + struct.pack("<I", 36) + wav[8:40] + bytes(4),
        "with a sample that is not a number": nan,
    }.items():
        yield "audio", ".wav", f"wav {what}", data
    for what, data in {
        "promises 2^35 samples": replaced(flac, 21, bytes([flac[21] | 15]) + b"\xff" * 4),
        "with a header beyond the end": replaced(flac, 5, b"\xff\xff\xff"),
        "of 0 Hz": replaced(flac, 18, bytes(2) + bytes([flac[20] & 15])),
        "without its last frame": flac[:-300],
        "with a turned bit": replaced(flac, len(flac) // 2, bytes([flac[len(flac) // 2] ^ 1])),
    }.items():
        yield "audio", ".flac", f"flac {what}", data
    for name in ("vorbis", "opus"):
        pages = ogg_pages(sources[name].data)
        turned = bytearray(b"".join(pages))
        turned[-20] ^= 1
        wide = with_crc(replaced(pages[0], 39 if name == "vorbis" else 37, b"\xff"))
        for what, parts in {
            "with a turned bit": [bytes(turned)],
            "without its headers": pages[2:],
            "without its second page": [pages[0], *pages[2:]],
            "without its last page": pages[:-1],
            "with its last page twice": [*pages, pages[-1]],
            "with bytes between pages": [*pages[:2], b"lost", *pages[2:]],
            "with a page that its header lengthens": [replaced(pages[0], 27, b"\xff"), *pages[1:]],
            "of 255 channels": [wide, *pages[1:]],
        }.items():
            yield "audio", ".ogg", f"{name} {what}", b"".join(parts)
    for what, data in {
        "with a tag beyond the end": b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + mp3,
        "without a piece": mp3[:1500] + mp3[1600:],
        "cut within its last frame": mp3[:-30],
        "with bytes at its end": mp3 + b"some other file" * 20,
        "of one frame header": mp3[:4],
    }.items():
        yield "audio", ".mp3", f"mp3 {what}", data


def broken_films(sources: dict[str, Source]) -> Iterator[Made]:
    for name in ("h264", "mpeg4"):
        data = sources[name].data
        moov, mdat, sizes = (data.index(box) for box in (b"moov", b"mdat", b"stsz"))
        length = int.from_bytes(data[mdat - 4 : mdat])
        for what, made in {
            "without moov": replaced(data, moov, b"junk"),
            "cut before moov": data[: moov - 4],
            "without its first 16 bytes": data[16:],
            "without mdat": data[: mdat - 4] + data[mdat - 4 + length :],
            "with zeros for frames": replaced(data, mdat + 4, bytes(length - 8)),
            "promises 2^31 frames": replaced(data, sizes + 12, b"\x7f\xff\xff\xff"),
            "promises frames of 2 GB": replaced(data, sizes + 16, b"\x7f\xff\xff\xff"),
            "without its sample description": replaced(data, data.index(b"stsd"), b"free"),
        }.items():
            yield "video", ".mp4", f"{name} {what}", made
    avi = sources["mjpeg"].data
    header, form = avi.index(b"avih") + 8, avi.index(b"strf") + 8
    sides = struct.pack(">HH", FRAME[1], FRAME[0])
    film = avi.index(b"movi")
    for what, made in {
        "of frames that promise 65,500 x 65,500": avi.replace(sides, b"\xff\xdc" * 2),
        "promises 2^31 frames": replaced(
            replaced(avi, header + 16, struct.pack("<I", 2**31 - 1)),
            avi.index(b"strh") + 8 + 32,
            struct.pack("<I", 2**31 - 1),
        ),
        "without its format": replaced(avi, form - 8, b"junk"),
        "with zeros for frames": replaced(avi, film + 4, bytes(len(avi) - film - 4)),
        "cut in its headers": avi[: form + 10],
    }.items():
        yield "video", ".avi", f"mjpeg {what}", made
    webm = sources["vp9"].data
    tracks = webm.rindex(b"\x16\x54\xae\x6b")  # behind the index that names it
    width = webm.index(b"\xb0\x81\x60", tracks)  # 96 in one byte
    for what, made in {
        "without its tracks": replaced(webm, tracks, b"\x12\x54\xc3\x67"),
        "without its first 8 bytes": webm[8:],
        "of no width": replaced(webm, width + 2, b"\0"),
        "with zeros for frames": webm[: len(webm) // 2] + bytes(len(webm) - len(webm) // 2),
    }.items():
        yield "video", ".webm", f"vp9 {what}", made
