"""Tar files that a reader of shards must refuse, or must refuse members of."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator

BLOCK = 512
# A program that would write a file if it were unpickled.
PICKLE = b"\x80\x04cos\nsystem\n\x8c\x0ctouch pwned1\x85R."


def archive(
    *members: tarfile.TarInfo | tuple[str, bytes], form: int = tarfile.USTAR_FORMAT
) -> bytes:
    """A tar of (name, content) and of headers without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def with_checksum(header: bytes) -> bytes:
    """A header block with its checksum put right."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + f"{sum(blank):06o}".encode() + b"\0 " + blank[156:]


def broken_tars(picture: bytes) -> Iterator[tuple[str, str, str, bytes]]:
    """(kind, suffix, what, content). All but the bad member is a pair of picture and caption."""
    good = (("0.jpg", picture), ("0.txt", b"a cat"))
    whole = archive(*good)
    data_end = BLOCK + len(picture)
    pax = special("pax", tarfile.XHDTYPE, size=1 << 40).tobuf(tarfile.GNU_FORMAT)
    longname = special("@", tarfile.GNUTYPE_LONGNAME, size=1 << 33).tobuf(tarfile.GNU_FORMAT)
    header = whole[:BLOCK]
    for what, data in {
        "with an absolute name": archive(*good, ("/tmp/1.jpg", picture)),
        "with a name that leads out": archive(*good, ("../1.jpg", picture)),
        "with a name that leads out on the way": archive(*good, ("a/../../1.jpg", picture)),
        "with a symbolic link": archive(*good, special("1.jpg", tarfile.SYMTYPE, "/etc/passwd")),
        "with a hard link": archive(*good, special("1.jpg", tarfile.LNKTYPE, "0.jpg")),
        "with a character device": archive(*good, special("1.jpg", tarfile.CHRTYPE)),
        "with a block device": archive(*good, special("1.jpg", tarfile.BLKTYPE)),
        "with a pipe": archive(*good, special("1.jpg", tarfile.FIFOTYPE)),
        "with a member of an unknown type": archive(*good, special("1.jpg", b"Z")),
        "with a key twice": archive(*good, ("1.jpg", picture), ("1.txt", b"b"), *good),
        "with a member twice": archive(*good, good[0]),
        "with a pickle": archive(*good, ("1.jpg", picture), ("1.pkl", PICKLE)),
        "with a pickle that is a tensor": archive(*good, ("1.jpg", picture), ("1.pth", PICKLE)),
        "with a wrong checksum": whole[:150] + b"7" + whole[151:],
        "truncated in a header": whole[:300],
        "truncated in a member": whole[: BLOCK + len(picture) // 2],
        "truncated at the end of a member": whole[:data_end],
        "truncated in its second header": whole[: -(-data_end // BLOCK) * BLOCK + 100],
        "with a pax header of 1 TB": pax + whole,
        "with a name of 8 GB": longname + whole,
        "with a member of 8 GB": with_checksum(header[:124] + b"77777777777\0" + header[136:])
        + whole[BLOCK:],
        "with a member of a size that is no number": with_checksum(
            header[:124] + b"12x45678901\0" + header[136:]
        )
        + whole[BLOCK:],
        "with a member of a negative size": with_checksum(
            header[:124] + b"\xff" * 12 + header[136:]
        )
        + whole[BLOCK:],
        "with a sparse member": archive(*good, special("1.jpg", tarfile.GNUTYPE_SPARSE)),
        "of random bytes behind its first member": whole[: -(-data_end // BLOCK) * BLOCK]
        + bytes(range(1, 256)) * 20,
        "packed by gzip": gzip.compress(whole, mtime=0),
        "of HTML": b"<!DOCTYPE html><html><body>404</body></html>" * 40,
        "of a single zero block less than a header": bytes(100),
    }.items():
        yield "tar", ".tar", f"tar {what}", data
