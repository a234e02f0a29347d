"""What a medium is by its first bytes, and whether a picture's structure is whole.

`inspect_image` stands before NVIDIA DALI, which loses a whole batch by one picture that it cannot
decode: what it lets through as plain decodes in DALI and in Pillow. Bytes behind the end that a
format marks are left alone, as decoders do.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from unival.data_gpu.errors import DecodeError, Media, MediaInfo, require_content
from unival.data_gpu.image import decode_image
from unival.data_gpu.jpeg import walk_jpeg
from unival.data_gpu.limits import Limits
from unival.data_gpu.structure import Damage, is_mp3_frame

READ = "JPEG, PNG, WEBP, GIF, BMP and TIFF are read"
HEAD = 512  # bytes that tell the kind
AAC_FRAMES = (b"\xff\xf0", b"\xff\xf1", b"\xff\xf8", b"\xff\xf9")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
DEFLATE_RATIO = 1032  # deflate makes at most so many bytes of one
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
BMP_DEPTHS = (1, 2, 4, 8, 16, 24, 32)
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 16: 8}  # bytes of a value, by type


@dataclass(frozen=True)
class ImageInfo:
    """`plain` pictures hold 8 bits of grey or RGB and no alpha, in a coding that all decoders read
    alike; the others are left to Pillow."""

    format: str
    width: int
    height: int
    plain: bool


def media_kind(media: Media) -> str | None:
    """image, video or audio by the first bytes; None where they tell nothing.

    A container of films counts as video whatever streams it holds, Ogg as audio.
    """
    head = _head(media)
    if _image_format(head) is not None:
        return "image"
    if head[4:8] == b"ftyp":
        if head[8:11] in (b"M4A", b"M4B"):
            return "audio"
        return None if head[8:12] in (b"avif", b"avis", b"heic", b"mif1", b"jxl ") else "video"
    riff = head[:4] in (b"RIFF", b"RF64")
    if head.startswith((b"OggS", b"fLaC", b"ID3", b".snd")) or (riff and head[8:12] == b"WAVE"):
        return "audio"
    if head.startswith(b"FORM") and head[8:12] in (b"AIFF", b"AIFC"):
        return "audio"
    if is_mp3_frame(head) or head.startswith(AAC_FRAMES):
        return "audio"  # a frame of MPEG layer III or of AAC
    if head.startswith((b"\x1a\x45\xdf\xa3", b"FLV", b"\0\0\1\xba", b"\0\0\1\xb3")):
        return "video"
    if head[4:8] in (b"moov", b"mdat", b"wide") or (riff and head[8:12] == b"AVI "):
        return "video"
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:  # an MPEG transport stream
        return "video"
    return None


def inspect_image(media: Media, limits: Limits) -> ImageInfo:
    """Format and size of a picture whose structure is whole.

    Headers, lengths, order and checksums are read; no pixel is decoded, except that the bytes of a
    plain PNG are inflated, since a valid checksum says nothing of them. What a header claims is
    compared with `limits` and with the bytes there are, and never allocated.

    Raises:
        DecodeError: missing, no picture of a known format, damaged or beyond the limits.
    """
    require_content(media, limits)
    data = _read(media)
    form = _image_format(data[:HEAD])
    if form is None:
        raise DecodeError(media, f"no picture, {_looks_like(media, data)}; {READ}")
    try:
        width, height, plain = _WALKS[form](data, limits)
        _check_size(width, height, limits)
    except Damage as damage:
        raise DecodeError(media, f"{form}: {damage}") from damage
    except (struct.error, IndexError) as error:
        raise DecodeError(media, f"{form}: truncated") from error
    return ImageInfo(form, width, height, plain)


def verify_image(media: Media, limits: Limits) -> MediaInfo:
    """Inspects and decodes all of a picture; a JPEG by FFmpeg too, which stops at codes that the
    tables lack where libjpeg goes on.

    Some damage remains unseen: of single bits turned in the coded pixels of a JPEG, FFmpeg finds
    one in eight where it is baseline and four in ten where it is progressive.

    Raises:
        DecodeError: missing, no picture, damaged or beyond the limits.
    """
    info = inspect_image(media, limits)
    size = decode_image(media, limits).size
    if size != (info.width, info.height):
        raise DecodeError(media, f"decodes to {size}; its header says {info.width} x {info.height}")
    if info.format == "JPEG" and info.plain:
        _decode_strictly(media)
    return MediaInfo("image", info.format, info.width, info.height)


def _decode_strictly(media: Media) -> None:
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    decoder.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    try:
        frames = [*decoder.decode(av.Packet(_read(media))), *decoder.decode(None)]
    except av.error.FFmpegError as error:
        raise DecodeError(media, f"JPEG: damaged pixels: {error}") from error
    if not frames:
        raise DecodeError(media, "JPEG: damaged pixels")


def _read(media: Media) -> bytes:
    try:
        return media.read_bytes() if isinstance(media, Path) else media
    except OSError as error:
        raise DecodeError(media, str(error)) from error


def _head(media: Media) -> bytes:
    if not isinstance(media, Path):
        return media[:HEAD]
    try:
        with media.open("rb") as source:
            return source.read(HEAD)
    except OSError as error:
        raise DecodeError(media, str(error)) from error


def _image_format(head: bytes) -> str | None:
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(PNG_SIGNATURE):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"BM") and head[14:18] in [n.to_bytes(4, "little") for n in BMP_HEADERS]:
        return "BMP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    return None


def _looks_like(media: Media, data: bytes) -> str:
    """What else the bytes are, for the error's text."""
    kind = media_kind(media)
    head = data[:HEAD]
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if kind is not None:
        return f"looks like {'a film' if kind == 'video' else 'sound'}"
    for start, name in (
        (b"PK\x03\x04", "a zip archive"),
        (b"\x7fELF", "a program"),
        (b"MZ", "a program"),
        (b"\x1f\x8b", "gzip"),
        (b"%PDF", "PDF"),
        (b"%!PS", "PostScript"),
        (b"\x00\x00\x00\x0cJXL", "JPEG XL"),
        (b"\x00\x00\x00\x0cjP", "JPEG 2000"),
    ):
        if head.startswith(start):
            return f"looks like {name}"
    if head[4:8] == b"ftyp":
        return "looks like AVIF or HEIF"
    if head[257:262] == b"ustar":
        return "looks like a tar archive"
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5 and data.endswith(b"."):
        return "looks like a pickle"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "looks like HTML"
    if text.startswith((b"<?xml", b"<svg")):
        return "looks like XML"
    if not data.strip(b"\0"):
        return "only zeros"
    if not re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", head):
        return "looks like text"
    return "of an unknown format"


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width <= 0 or height <= 0:
        raise Damage(f"a size of {width} x {height}")
    if width * height > limits.pixels:
        raise Damage(f"{width} x {height} pixels; {limits.pixels} at most")


def _jpeg(data: bytes, limits: Limits) -> tuple[int, int, bool]:
    return walk_jpeg(data)


def _png(data: bytes, limits: Limits) -> tuple[int, int, bool]:
    width = height = depth = colour = interlaced = 0
    names: list[bytes] = []
    pixels: list[bytes] = []
    for name, body in _png_chunks(data):
        if (name == b"IHDR") != (not names):
            raise Damage("the header chunk is not the first, or there are two")
        if name == b"IHDR":
            width, height, depth, colour, *rest, interlaced = struct.unpack(">IIBBBBB", body)
            if depth not in PNG_DEPTHS.get(colour, ()) or rest != [0, 0] or interlaced > 1:
                raise Damage("a header that no decoder knows")
            _check_size(width, height, limits)
        elif name == b"IDAT":
            if pixels and names[-1] != b"IDAT":
                raise Damage("other chunks between the pixels")
            pixels.append(body)
        elif name == b"PLTE" and (pixels or not body or len(body) % 3 or len(body) > 768):
            raise Damage("a wrong palette")
        elif name[:1].isupper() and name not in PNG_CRITICAL:
            raise Damage(f"chunk {name!r}, which no decoder knows")
        names.append(name)
    if not pixels or (colour == 3 and b"PLTE" not in names):
        raise Damage("no pixels or no palette")
    least = (width * PNG_CHANNELS[colour] * depth + 7) // 8 * height
    if least > DEFLATE_RATIO * sum(map(len, pixels)):
        raise Damage(f"{sum(map(len, pixels))} bytes cannot hold {width} x {height} pixels")
    plain = depth == 8 and colour in (0, 2) and not interlaced
    plain = plain and not {b"tRNS", b"acTL"} & set(names)
    if plain:
        _check_inflated(b"".join(pixels), 1 + width * PNG_CHANNELS[colour], height)
    return width, height, plain


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk to the end, its checksum compared."""
    at = len(PNG_SIGNATURE)
    name = b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise Damage(f"truncated in chunk {name!r}")
        if not name.isalpha():
            raise Damage(f"no chunk at byte {at}")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise Damage(f"wrong checksum of chunk {name!r}")
        yield name, data[at + 8 : end]
        at = end + 4


def _check_inflated(packed: bytes, stride: int, height: int) -> None:
    """Rows of `stride` bytes, of which the first names the row's filter (0 to 4)."""
    inflater = zlib.decompressobj()
    try:
        rows = inflater.decompress(packed, stride * height + 1)
    except zlib.error as error:
        raise Damage(f"damaged pixels: {error}") from error
    if len(rows) != stride * height or not inflater.eof:
        raise Damage("more or fewer pixels than the header says")
    if np.frombuffer(rows, np.uint8)[::stride].max() > 4:
        raise Damage("a wrong filter of a row")


def _webp(data: bytes, limits: Limits) -> tuple[int, int, bool]:
    """Never plain: what a turned bit does to its coded pixels can stop the decoder."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise Damage(f"truncated: {len(data)} of {end} bytes")
    size: tuple[int, int] | None = None
    pictures = 0
    at = 12
    while at + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if at + 8 + length > end:
            raise Damage(f"chunk {name!r} ends outside the file")
        if name == b"VP8X" and at == 12:
            across, down = struct.unpack_from("<3s3s", body, 4)
            size = 1 + int.from_bytes(across, "little"), 1 + int.from_bytes(down, "little")
        elif name == b"ANMF":
            pictures += 1
        elif name in (b"VP8 ", b"VP8L"):
            found = _vp8_size(body) if name == b"VP8 " else _vp8l_size(body)
            if size not in (None, found):
                raise Damage(f"a picture of {found} on a canvas of {size}")
            size = found
            pictures += 1
        at += 8 + length + length % 2
    if size is None or not pictures:
        raise Damage("no picture")
    return size[0], size[1], False


def _vp8_size(body: bytes) -> tuple[int, int]:
    """RFC 6386, 9.1."""
    tag = int.from_bytes(body[:3], "little")
    width, height = struct.unpack_from("<HH", body, 6)
    if tag & 1 or body[3:6] != b"\x9d\x01\x2a" or 10 + (tag >> 5) > len(body):
        raise Damage("a damaged key frame")
    return width & 0x3FFF, height & 0x3FFF


def _vp8l_size(body: bytes) -> tuple[int, int]:
    bits = int.from_bytes(body[1:5], "little")
    if len(body) < 5 or body[0] != 0x2F or bits >> 29:
        raise Damage("a damaged lossless header")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)


def _gif(data: bytes, limits: Limits) -> tuple[int, int, bool]:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _gif_palette(flags)
    pictures = 0
    while data[at] != 0x3B:  # the trailer
        if data[at] == 0x21:  # an extension
            at = _gif_blocks(data, at + 2)
            continue
        if data[at] != 0x2C:  # a picture
            raise Damage(f"no block at byte {at}")
        left, top, across, down, flags = struct.unpack_from("<HHHHB", data, at + 1)
        if across == 0 or down == 0 or left + across > width or top + down > height:
            raise Damage("a picture outside the screen")
        at += 10 + _gif_palette(flags)
        if not 1 <= data[at] <= 8:
            raise Damage(f"codes of {data[at]} bits")
        at = _gif_blocks(data, at + 1)
        pictures += 1
    if not pictures:
        raise Damage("no picture")
    return width, height, False


def _gif_palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += 1 + data[at]
    return at + 1


def _bmp(data: bytes, limits: Limits) -> tuple[int, int, bool]:
    start, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, planes, depth = struct.unpack_from("<HHHH", data, 18)
        packing = 0
    else:
        width, height, planes, depth, packing, length = struct.unpack_from("<iiHHII", data, 18)
    if planes != 1 or depth not in BMP_DEPTHS or packing not in (0, 1, 2, 3):
        raise Damage("a header that no decoder knows")
    if packing in (1, 2) and depth != {1: 8, 2: 4}[packing]:
        raise Damage("a packing of another depth")
    if start < 14 + header:
        raise Damage("pixels within the header")
    _check_size(width, abs(height), limits)
    needed = length if packing in (1, 2) else (width * depth + 31) // 32 * 4 * abs(height)
    if start + needed > len(data):
        raise Damage(f"truncated: {len(data)} of {start + needed} bytes")
    return width, abs(height), depth == 24 and packing == 0 and header == 40 and height > 0


class _Tags:
    """The first directory of a TIFF file. Numbers come as int64 [n]."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<" if data[:2] == b"II" else ">"
        big = data[2:4] in (b"+\0", b"\0+")
        self.inline = 8 if big else 4
        start = self._number(8 if big else 4, self.inline)
        counter = 8 if big else 2
        count = self._number(start, counter)
        size = 20 if big else 12
        if start + counter + count * size > len(data):
            raise Damage("its directory ends outside the file")
        entries = [start + counter + index * size for index in range(count)]
        self.places = {self._number(at, 2): at for at in entries}

    def _number(self, at: int, size: int) -> int:
        field = self.data[at : at + size]
        if len(field) < size:
            raise Damage("truncated within the directory")
        return int.from_bytes(field, "little" if self.order == "<" else "big")

    def values(self, tag: int) -> np.ndarray:
        if tag not in self.places:
            return np.zeros(0, dtype=np.int64)
        at = self.places[tag]
        size = TIFF_SIZES.get(self._number(at + 2, 2), 0)
        count = self._number(at + 4, self.inline)
        place = at + 4 + self.inline
        if size * count > self.inline:
            place = self._number(place, self.inline)
        if size == 0 or place + size * count > len(self.data):
            raise Damage(f"tag {tag} lies outside the file")
        return np.frombuffer(self.data, f"{self.order}u{size}", count, place).astype(np.int64)


def _tiff(data: bytes, limits: Limits) -> tuple[int, int, bool]:
    tags = _Tags(data)
    width, height = tags.values(256), tags.values(257)
    if len(width) != 1 or len(height) != 1:
        raise Damage("no size")
    _check_size(int(width[0]), int(height[0]), limits)
    tiled = len(tags.values(324)) > 0
    starts, lengths = tags.values(324 if tiled else 273), tags.values(325 if tiled else 279)
    if len(starts) == 0 or len(lengths) not in (0, len(starts)):
        raise Damage("no pixels")
    ends = starts + lengths if len(lengths) else starts
    if starts.min() < 0 or ends.min() < 0 or ends.max() > len(data):
        raise Damage(f"truncated: pixels up to byte {ends.max()} of {len(data)}")
    return int(width[0]), int(height[0]), False


_WALKS: dict[str, Callable[[bytes, Limits], tuple[int, int, bool]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
}
