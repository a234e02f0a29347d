"""The structure of WAV, Ogg, MP3 and Matroska files, without decoding them.

libsndfile and FFmpeg read on over what is missing or damaged in them: lengths beyond the end of the
file, pages with a wrong checksum, frames that do not follow each other.
"""

from __future__ import annotations

import struct
import zlib
from mmap import mmap
from typing import BinaryIO

STREAMED = (0, 0xFFFFFFFF)  # lengths of a WAV whose writer could not know them
PCM = (1, 3, 0xFFFE)  # integers, floats and the extensible form of both
OGG_PAGE = struct.Struct("<4sBBqIIIB")
CONTINUED, BEGINS, ENDS = 1, 2, 4  # flags of a page
EBML_HEADER, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
MATROSKA_ELEMENTS = {
    *(EBML_HEADER, SEGMENT, CLUSTER),
    *(
        0x114D9B74,
        0x1549A966,
        0x1654AE6B,
        0x1C53BB6B,
    ),  # of a segment: seek head, info, tracks, cues
    *(0x1941A469, 0x1043A770, 0x1254C367),  # attachments, chapters, tags
    *(
        0xE7,
        0x5854,
        0xA7,
        0xAB,
        0xA3,
        0xA0,
        0xAF,
    ),  # of a cluster: its time, blocks and their groups
    *(0xEC, 0xBF),  # of both: nothing, checksum
}
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

# kbit/s by index, for MPEG 1 and for MPEG 2 and 2.5, layer III
MP3_RATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MP3_RATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
MP3_SAMPLE_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
MP3_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3")  # that may follow the sound


class Damage(ValueError):
    """What is wrong with the bytes."""


def is_mp3_frame(head: bytes) -> bool:
    """Whether a frame header of MPEG layer III stands at the beginning."""
    return len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and head[1] & 0x18 != 8


def check_wav(source: BinaryIO, size: int) -> None:
    """Compares the lengths in the headers with the file's; reads nothing else.

    Raises:
        Damage: with the reason.
    """
    name, length, _ = struct.unpack("<4sI4s", source.read(12))
    end = size if name == b"RF64" or length in STREAMED else 8 + length
    if end > size:
        raise Damage(f"truncated: {size} of {end} bytes")
    described = False
    at = 12
    while at + 8 <= end:
        source.seek(at)
        name, length = struct.unpack("<4sI", source.read(8))
        if name == b"fmt ":
            _check_wav_format(source.read(min(length, 40)))
            described = True
        if name == b"data":
            if not described:
                raise Damage("samples before their format")
            if length in STREAMED:
                return
        at += 8 + length
        if at > end:
            raise Damage(f"truncated: chunk {name!r} ends at byte {at} of {end}")
        at += length % 2
    if not described:
        raise Damage("no format")


def _check_wav_format(body: bytes) -> None:
    if len(body) < 16:
        raise Damage("a format that is too short")
    coding, channels, rate, second, block, bits = struct.unpack_from("<HHIIHH", body)
    if coding in PCM and (block != channels * ((bits + 7) // 8) or second != rate * block):
        raise Damage("a format that contradicts itself")


def check_matroska(data: bytes | mmap) -> None:
    """Elements follow each other to the end: those of the segment, which holds all, and those of
    its clusters, which hold the packets (RFC 9559). Lengths that are unknown, since the file was
    written to a pipe, are left alone.

    Raises:
        Damage: with the reason.
    """
    at, end = 0, len(data)
    while at < end:
        name, body = _ebml_number(data, at, keep_marker=True)
        size, body = _ebml_number(data, body, keep_marker=False)
        unknown = size == (1 << 7 * (body - at - _ebml_length(data, at))) - 1
        if name not in MATROSKA_ELEMENTS or (at == 0) != (name == EBML_HEADER):
            raise Damage(f"no Matroska element at byte {at}")
        if unknown and name not in (SEGMENT, CLUSTER):
            raise Damage(f"an element of unknown length at byte {at}")
        if not unknown and body + size > end:
            raise Damage(f"truncated: {end} of {body + size} bytes")
        if name == SEGMENT:
            end = end if unknown else body + size
        at = body if name in (SEGMENT, CLUSTER) else body + size


def _ebml_length(data: bytes | mmap, at: int) -> int:
    """Bytes of the number at `at`: the first bit set says so."""
    if at >= len(data) or data[at] == 0:
        raise Damage(f"truncated, or no Matroska element at byte {at}")
    return 9 - data[at].bit_length()


def _ebml_number(data: bytes | mmap, at: int, keep_marker: bool) -> tuple[int, int]:
    """A number, with the bit that marks its length where it is a name, and where it ends."""
    length = _ebml_length(data, at)
    number = int.from_bytes(data[at : at + length])
    return number if keep_marker else number & ((1 << 7 * length) - 1), at + length


def check_ogg(data: bytes) -> None:
    """Every page whole, with the right checksum and number; every stream ended (RFC 3533).

    Raises:
        Damage: with the reason.
    """
    next_page: dict[int, int] = {}  # by stream
    at = 0
    while at < len(data):
        page = data[at : at + OGG_PAGE.size]
        if len(page) < OGG_PAGE.size:
            raise Damage("truncated within a page")
        name, version, flags, _, stream, number, checksum, segments = OGG_PAGE.unpack(page)
        if name != b"OggS" or version != 0:
            raise Damage(f"no page at byte {at}")
        table = at + OGG_PAGE.size
        end = table + segments + sum(data[table : table + segments])
        if table + segments > len(data) or end > len(data):
            raise Damage("truncated within a page")
        if ogg_checksum(data[at : at + 22] + bytes(4) + data[at + 26 : end]) != checksum:
            raise Damage(f"wrong checksum of the page at byte {at}")
        if flags & BEGINS:
            next_page[stream] = number
        if next_page.get(stream) != number:
            raise Damage(f"a page is missing before byte {at}")
        next_page[stream] = number + 1
        if flags & ENDS:
            del next_page[stream]
        at = end
    if next_page:
        raise Damage("truncated: a stream without its last page")


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of polynomial 04C11DB7, highest bit first, from zero and not inverted.

    zlib has the same polynomial lowest bit first, so bits are turned before and after.
    """
    turned = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(turned.to_bytes(4, "little").translate(_REVERSED))


def check_mp3(data: bytes) -> None:
    """Frames of layer III follow each other from the tags at the beginning to those at the end, as
    many as the first one counts, if it does (Xing).

    Raises:
        Damage: with the reason.
    """
    at = skip_id3(data)
    start, frames, kind = at, 0, None
    while at < len(data):
        header = data[at : at + 4]
        if not is_mp3_frame(header):
            if frames and (data.startswith(MP3_TAGS, at) or not data[at:].strip(b"\0")):
                break
            raise Damage(f"no frame at byte {at}")
        length = _mp3_frame_length(header)
        if at + length > len(data):
            raise Damage("truncated within a frame")
        _check_mp3_sizes(data[at : at + length])
        if kind not in (None, (header[1] & 0xFE, header[2] & 0x0C)):
            raise Damage(f"a frame of another kind at byte {at}")
        kind = header[1] & 0xFE, header[2] & 0x0C
        frames += 1
        at += length
    if frames == 0:
        raise Damage("no frame")
    if frames < _mp3_frames_by_header(data, start):
        raise Damage(f"truncated: {frames} frames; its first says more")


def skip_id3(data: bytes) -> int:
    """Where the tags at the beginning end."""
    at = 0
    while data.startswith(b"ID3", at) and len(data) >= at + 10:
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    return at


def _mp3_frame_length(header: bytes) -> int:
    version, index = header[1] >> 3 & 3, header[2] >> 4
    sampling = header[2] >> 2 & 3
    if index in (0, 15) or sampling == 3:
        raise Damage("a frame with a free or a reserved bit or sample rate")
    kilobits = (MP3_RATES_1 if version == 3 else MP3_RATES_2)[index]
    scale = 144_000 if version == 3 else 72_000
    return scale * kilobits // MP3_SAMPLE_RATES[version][sampling] + (header[2] >> 1 & 1)


def _mp3_side(frame: bytes) -> tuple[int, int]:
    """Where the side information of a frame lies, which says how its main data are divided."""
    mono, full = frame[3] >> 6 == 3, frame[1] >> 3 & 3 == 3
    start = 4 if frame[1] & 1 else 6  # behind a checksum
    return start, start + (17 if mono == full else 32 if full else 9)


def _check_mp3_sizes(frame: bytes) -> None:
    """The main data of a frame are in it and in at most 511 or 255 bytes before."""
    start, end = _mp3_side(frame)
    if end > len(frame):
        raise Damage("a frame that is too short")
    channels, full = 1 if frame[3] >> 6 == 3 else 2, frame[1] >> 3 & 3 == 3
    bits = int.from_bytes(frame[start:end])
    if full:  # 9 bits: how far the main data begin before; private bits; 4 bits a channel
        parts, size, before = 2 * channels, 59, bits >> 8 * (end - start) - 9
    else:
        parts, size, before = channels, 63, bits >> 8 * (end - start) - 8
    used = 0
    for part in range(parts):
        numbers = bits >> size * part + size - 21 & 0x1FFFFF  # 12 bits: length; 9 bits: pairs
        used += numbers >> 9
        if numbers & 0x1FF > 288:
            raise Damage("a frame of more frequencies than there are")
    if used > 8 * (before + len(frame) - end):
        raise Damage("a frame with more data than there are")


def _mp3_frames_by_header(data: bytes, at: int) -> int:
    """0 where the first frame does not count them."""
    tag = at + _mp3_side(data[at : at + 4])[1]
    if data[tag : tag + 4] in (b"Xing", b"Info") and data[tag + 7] & 1:
        return int.from_bytes(data[tag + 8 : tag + 12])
    return 0
