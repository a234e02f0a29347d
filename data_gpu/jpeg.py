"""The structure of a JPEG file, without decoding it (ITU-T T.81, annex B).

Everything that makes libjpeg give up stands in the segments between the scans or in the markers
inside them, and is checked. Damage within the coded pixels that leaves the markers alone makes no
decoder fail; it shows as wrong colours.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from unival.data_gpu.structure import Damage

SOI, EOI, SOS, DQT, DNL, DRI, DHT, DAC = 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xC4, 0xCC
APP0, APP14, COM = 0xE0, 0xEE, 0xFE
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), 0xC2
LOSSLESS, ARITHMETIC = 0xC3, (0xC9, 0xCA)
FRAMES = (*SEQUENTIAL, PROGRESSIVE, LOSSLESS, *ARITHMETIC)

# A hostile file may repeat segments or scans without end; large profiles take a few hundred
# segments, progressive encoders about ten scans.
MAX_SEGMENTS = 4096
MAX_SCANS = 100
MAX_BLOCKS_PER_MCU = 10
FULL_BAND = (0, 63, 0, 0)  # first, last, high, low of a sequential scan
# Sampling factors of the luma, with 1 x 1 for the chroma, that GPU decoders know: 4:4:4, 4:2:2,
# 4:4:0, 4:2:0 and 4:1:1.
PLAIN_LUMA = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))

_SCAN_END = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END_WITH_RESTARTS = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")


class Component(NamedTuple):
    name: int
    across: int  # sampling factors
    down: int
    table: int  # of quantisation


class Scan(NamedTuple):
    members: tuple[Component, ...]
    selectors: bytes  # for each member, its DC table * 16 + its AC table
    first: int  # coefficients
    last: int
    high: int  # bits of precision before and after
    low: int


class Frame(NamedTuple):
    process: int
    width: int
    height: int
    components: tuple[Component, ...]


@dataclass
class _Seen:
    """What the segments have defined so far."""

    frame: Frame | None = None
    quantisation: set[int] = field(default_factory=set)
    huffman: set[int] = field(default_factory=set)  # class * 16 + number; class 1 is AC
    interval: int = 0  # MCUs between restart markers
    scans: int = 0
    started: set[int] = field(default_factory=set)  # components with a first scan
    adobe: int | None = None  # Adobe's colour transform


def walk_jpeg(data: bytes) -> tuple[int, int, bool]:
    """(width, height, plain) of a JPEG file.

    Plain is what every decoder reads alike: 8 bits, Huffman coded, baseline, extended or
    progressive, grey or YCbCr in a usual sampling. Bytes after the end marker are left alone, as
    decoders do: telephones append films and second pictures.

    Raises:
        Damage: with the reason.
    """
    seen = _Seen()
    at = 2
    for _ in range(MAX_SEGMENTS):
        marker, at = _next_marker(data, at)
        if marker == EOI:
            return _result(seen)
        length = int.from_bytes(data[at : at + 2])
        end = at + length
        if length < 2 or end > len(data):
            raise Damage(f"truncated, or a wrong length of segment {marker:02X} at byte {at}")
        body = data[at + 2 : end]
        if marker == SOS:
            scan = _scan_header(seen, body)
            assert seen.frame is not None  # _scan_header has asked
            end = _coded_end(seen, seen.frame, scan, data, end)
        else:
            _segment(seen, marker, body)
        at = end
    raise Damage(f"more than {MAX_SEGMENTS} segments")


def _next_marker(data: bytes, at: int) -> tuple[int, int]:
    """The marker and the position behind it; bytes FF may fill up before it."""
    if at + 1 >= len(data):
        raise Damage("truncated: no end marker")
    if data[at] != 0xFF:
        raise Damage(f"no marker at byte {at}")
    while data[at] == 0xFF:
        at += 1
        if at == len(data):
            raise Damage("truncated: no end marker")
    return data[at], at + 1


def _segment(seen: _Seen, marker: int, body: bytes) -> None:
    if marker == DQT:
        _quantisation_tables(seen, body)
    elif marker == DHT:
        _huffman_tables(seen, body)
    elif marker in FRAMES:
        if seen.frame is not None:
            raise Damage("two frame headers")
        seen.frame = _frame(marker, body)
    elif marker == DRI:
        if len(body) != 2:
            raise Damage("a restart interval of a wrong length")
        seen.interval = int.from_bytes(body)
    elif marker == APP0 and body.startswith(b"JFIF") and len(body) < 14:
        raise Damage("a JFIF header that is too short")
    elif marker == APP14 and body.startswith(b"Adobe") and len(body) >= 12:
        seen.adobe = body[11]
    elif marker == DAC:
        if seen.frame is None or seen.frame.process not in ARITHMETIC:
            raise Damage("conditions of arithmetic coding in a Huffman coded file")
    elif not (APP0 <= marker <= 0xEF or marker in (COM, DNL)):
        raise Damage(f"segment {marker:02X}, which no decoder knows")


def _quantisation_tables(seen: _Seen, body: bytes) -> None:
    while body:
        precision, number = body[0] >> 4, body[0] & 15
        length = 1 + 64 * (precision + 1)
        if precision > 1 or number > 3 or len(body) < length:
            raise Damage("a damaged quantisation table")
        seen.quantisation.add(number)
        body = body[length:]


def _huffman_tables(seen: _Seen, body: bytes) -> None:
    while body:
        counts = body[1:17]
        values = body[17 : 17 + sum(counts)]
        if (
            body[0] & 0xEF > 3
            or len(counts) < 16
            or len(values) != sum(counts)
            or sum(counts) > 256
        ):
            raise Damage("a damaged Huffman table")
        # Kraft's inequality, in units of 2^-16; the code of ones only must stay free.
        if sum(count << (15 - i) for i, count in enumerate(counts)) >= 1 << 16:
            raise Damage("a Huffman table with more codes than there are")
        if body[0] < 16 and values and max(values) > 15:
            raise Damage("a Huffman table with a wrong DC category")
        seen.huffman.add(body[0])
        body = body[17 + sum(counts) :]


def _frame(process: int, body: bytes) -> Frame:
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise Damage("a frame header of a wrong length")
    precision, height, width, count = struct.unpack_from(">BHHB", body)
    components = tuple(
        Component(name, factors >> 4, factors & 15, table)
        for name, factors, table in struct.iter_unpack(">BBB", body[6:])
    )
    if precision != 8:
        raise Damage(f"{precision} bits a colour; 8 are read")
    if width == 0 or height == 0:
        raise Damage(f"a size of {width} x {height}")
    if count not in (1, 3, 4):
        raise Damage(f"{count} colour components; 1, 3 or 4 are read")
    if len({component.name for component in components}) < count:
        raise Damage("two colour components of one name")
    for component in components:
        if not (1 <= component.across <= 4 and 1 <= component.down <= 4 and component.table <= 3):
            raise Damage("a wrong sampling factor or table number")
    across, down = _largest_factors(components)
    if any(across % component.across or down % component.down for component in components):
        raise Damage("a fractional sampling, which no decoder knows")
    return Frame(process, width, height, components)


def _largest_factors(components: tuple[Component, ...]) -> tuple[int, int]:
    across = max(component.across for component in components)
    return across, max(component.down for component in components)


def _scan_header(seen: _Seen, body: bytes) -> Scan:
    """A scan's header, checked against the frame and the tables so far."""
    frame = seen.frame
    if frame is None:
        raise Damage("a scan before the frame header")
    if not body or not 1 <= body[0] <= 4 or len(body) != 4 + 2 * body[0]:
        raise Damage("a scan header of a wrong length")
    by_name = {component.name: component for component in frame.components}
    names = body[1:-3:2]
    if not set(names) <= set(by_name) or len(set(names)) < len(names):
        raise Damage("a scan of components that the frame lacks, or of one twice")
    members = tuple(by_name[name] for name in names)
    scan = Scan(members, body[2:-3:2], body[-3], body[-2], body[-1] >> 4, body[-1] & 15)
    if len(members) > 1 and sum(c.across * c.down for c in members) > MAX_BLOCKS_PER_MCU:
        raise Damage("more blocks in a unit than decoders take")
    if frame.process == PROGRESSIVE:
        _check_progression(scan)
    elif frame.process in SEQUENTIAL and (scan.first, scan.last, scan.high, scan.low) != FULL_BAND:
        raise Damage("a sequential scan with a part of the coefficients")
    _check_tables(seen, frame, scan)
    _check_order(seen, frame, scan)
    return scan


def _check_progression(scan: Scan) -> None:
    if scan.first == 0:
        band = scan.last == 0
    else:
        band = scan.first <= scan.last <= 63 and len(scan.members) == 1
    if not band or scan.low > 13 or (scan.high and scan.low != scan.high - 1):
        raise Damage("a wrong band of coefficients in a progressive scan")


def _check_order(seen: _Seen, frame: Frame, scan: Scan) -> None:
    seen.scans += 1
    if seen.scans > MAX_SCANS:
        raise Damage(f"more than {MAX_SCANS} scans")
    names = {component.name for component in scan.members}
    if frame.process == PROGRESSIVE and (scan.first or scan.high):
        if not names <= seen.started:
            raise Damage("a progressive scan before the component's first")
    elif names & seen.started:
        raise Damage("two first scans of one component")
    seen.started |= names


def _check_tables(seen: _Seen, frame: Frame, scan: Scan) -> None:
    if frame.process != LOSSLESS:
        for component in scan.members:
            if component.table not in seen.quantisation:
                raise Damage(f"quantisation table {component.table} is missing")
    if frame.process in ARITHMETIC:
        return
    needed: set[int] = set()
    for selector in scan.selectors:
        if frame.process in SEQUENTIAL or (frame.process == PROGRESSIVE and scan.first):
            needed.add(16 + (selector & 15))
        if frame.process != PROGRESSIVE or (scan.first == 0 and scan.high == 0):
            needed.add(selector >> 4)
    for table in needed - seen.huffman:
        raise Damage(f"Huffman table {'AC' if table & 16 else 'DC'} {table & 15} is missing")


def _coded_end(seen: _Seen, frame: Frame, scan: Scan, data: bytes, start: int) -> int:
    """Where the coded pixels that begin at `start` end; checks their length and restarts."""
    pattern = _SCAN_END_WITH_RESTARTS if seen.interval else _SCAN_END
    found = pattern.search(data, start)
    if found is None:
        raise Damage("truncated: no end marker")
    end = found.start()
    if data.find(b"\xff\xff\x00", start, end) >= 0:
        raise Damage("a wrong byte in the coded pixels")
    units, blocks = _units(frame, scan.members)
    # A block takes a code for DC and one for the end; of a band of AC, many blocks share one.
    bits = (
        2 if frame.process in SEQUENTIAL else int(frame.process == PROGRESSIVE and not scan.first)
    )
    if blocks * bits > 8 * (end - start):
        raise Damage(f"truncated: {end - start} bytes of coded pixels for {blocks} blocks")
    if seen.interval:
        _check_restarts(data[start:end], math.ceil(units / seen.interval) - 1)
    return end


def _check_restarts(coded: bytes, expected: int) -> None:
    markers = b"".join(_RESTART.findall(coded))
    if len(markers) != expected:
        raise Damage(f"{len(markers)} restart markers; {expected} expected")
    if markers != (bytes(range(0xD0, 0xD8)) * (expected // 8 + 1))[:expected]:
        raise Damage("restart markers in a wrong order")


def _units(frame: Frame, members: tuple[Component, ...]) -> tuple[int, int]:
    """MCUs and blocks (pixels where lossless) of a scan."""
    across, down = _largest_factors(frame.components)
    side = 1 if frame.process == LOSSLESS else 8
    if len(members) > 1:
        units = math.ceil(frame.width / (side * across)) * math.ceil(frame.height / (side * down))
        return units, units * sum(c.across * c.down for c in members)
    only = members[0]
    columns = math.ceil(math.ceil(frame.width * only.across / across) / side)
    rows = math.ceil(math.ceil(frame.height * only.down / down) / side)
    return columns * rows, columns * rows


def _result(seen: _Seen) -> tuple[int, int, bool]:
    frame = seen.frame
    if frame is None or not seen.scans:
        raise Damage("no picture before the end marker")
    if seen.started != {component.name for component in frame.components}:
        raise Damage("a colour component without a scan")
    names = bytes(component.name for component in frame.components)
    luma, *chroma = [(c.across, c.down) for c in frame.components]
    plain = (
        frame.process in (*SEQUENTIAL, PROGRESSIVE)
        and len(names) in (1, 3)
        and luma in PLAIN_LUMA
        and all(factors == (1, 1) for factors in chroma)
        and not (len(names) == 3 and (seen.adobe == 0 or names == b"RGB"))
    )
    return frame.width, frame.height, plain
