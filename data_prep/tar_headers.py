"""Tar headers read and written without the tarfile module, which is twenty times slower at it.

Reading hops from header to header (USTAR, GNU and pax), so that the members of a tar, or of a tar inside a tar, are
found by offset and nothing is unpacked. Writing makes plain USTAR.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

BLOCK = 512
ReadAt = Callable[[int, int], bytes]
"""(size, offset) -> bytes, as os.pread of a file: fewer than `size` at its end."""
MAX_NAME_BYTES = 1 << 20
"""Of a GNU long name or a pax header, which are read whole: paths have 4096, the rest is for attributes."""
MAX_MEMBER_SIZE = 8**11 - 1
"""Bytes, what eleven octal digits hold."""

_MTIME = b"%011o\0" % 946684800  # 2000-01-01, fixed so that equal content gives equal bytes
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2
_AFTER_CHECKSUM = (b"0" + b"\0" * 100 + b"ustar\0" + b"00").ljust(BLOCK - 156, b"\0")
_FIXED_SUM = sum(_BEFORE_SIZE) + sum(_MTIME) + sum(b" " * 8) + sum(_AFTER_CHECKSUM)


class TarError(ValueError):
    """A tar that is cut short, damaged or of a kind that cannot be read by offset."""


class Member(NamedTuple):
    """A file inside a tar."""

    name: bytes
    offset: int
    """Of its content, in bytes from the beginning of the (outermost) file."""
    size: int
    kind: bytes
    """The type flag: b"0" a regular file, b"5" a folder, b"1" and b"2" links."""


def padding(size: int) -> int:
    """Zero bytes after `size` bytes of content, up to the next block."""
    return -size % BLOCK


def make_header(name: str, size: int) -> bytes:
    """The USTAR header (512 bytes) of a regular file; `name` is ASCII of at most 100 characters."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100, name
    assert 0 <= size <= MAX_MEMBER_SIZE, (name, size)
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(encoded) + sum(digits))
    return encoded.ljust(100, b"\0") + _BEFORE_SIZE + digits + _MTIME + checksum + _AFTER_CHECKSUM


def iterate_members(file: int | ReadAt, start: int, end: int, where: str) -> Iterator[Member]:
    """The members of the tar that lies in bytes start..end of an open file.

    Args:
        file: its descriptor, read with pread only; or what reads it, asked for ascending offsets only.
        start, end: of the tar inside it, bytes.
        where: what to call the tar in messages.

    Raises:
        TarError: a header is damaged, a member or the tar's end is missing, or a member is sparse.
    """
    read_at: ReadAt = partial(os.pread, file) if isinstance(file, int) else file
    at = start
    long_name: bytes | None = None
    attributes: dict[bytes, bytes] = {}
    while at + BLOCK <= end:
        header = read_at(BLOCK, at)
        if len(header) < BLOCK:
            raise TarError(f"{where} is cut short at byte {at}")
        if not header[0] and not any(header):
            return  # the end of the archive
        size = _check_and_size(header, at, where)
        kind = header[156:157]
        content = at + BLOCK
        if kind in (b"x", b"L", b"K", b"g"):
            if content + size > end:
                raise TarError(f"{where} is cut short: the name at byte {at} ends beyond it")
            if size > MAX_NAME_BYTES and kind in (b"x", b"L"):
                raise TarError(f"{where} is damaged at byte {at}: a name of {size:,} bytes")
            if kind == b"L":
                long_name = read_at(size, content).rstrip(b"\0")
            elif kind == b"x":
                attributes = _pax(read_at(size, content), at, where)
        else:
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in attributes):
                raise TarError(f"{where} has a sparse member at byte {at}: make it without --sparse")
            if b"size" in attributes:
                size = _decimal(attributes[b"size"], at, where)
            name = attributes.get(b"path") or long_name or _ustar_name(header)
            if content + size > end:
                raise TarError(
                    f"{where} is cut short: member {os.fsdecode(name)!r} should end at byte {content + size}, "
                    f"the tar ends at {end}"
                )
            yield Member(name, content, size, b"0" if kind in (b"\0", b"7") else kind)
            long_name, attributes = None, {}
        at = content + size + padding(size)
    raise TarError(f"{where} is cut short: it stops at byte {end} without the zeros that end a tar")


def _check_and_size(header: bytes, at: int, where: str) -> int:
    try:
        expected = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        raise TarError(f"{where} is not a tar or is damaged at byte {at}") from None
    if size < 0:
        raise TarError(f"{where} is damaged at byte {at}: a member of {size} bytes")
    # The checksum is the sum of all bytes, those of its own field counted as spaces. Adler-32 has the sum in its lower
    # half, plus 1 and modulo 65521, and is ten times faster than sum().
    plain_sum = expected - 8 * 32 + sum(header[148:156])
    if zlib.adler32(header) & 0xFFFF != (plain_sum + 1) % 65521:
        raise TarError(f"{where} is not a tar or is damaged at byte {at}: wrong header checksum")
    return size


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base 256, for sizes of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _decimal(digits: bytes, at: int, where: str) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise TarError(f"{where} is damaged at byte {at}: its pax header gives a size of {digits[:40]!r}")
    return int(digits)


def _pax(records: bytes, at: int, where: str) -> dict[bytes, bytes]:
    """The attributes in a pax header: records of `length key=value newline`."""
    attributes = {}
    start = 0
    while start < len(records):
        space = records.find(b" ", start, start + 8)
        digits = records[start:space] if space > 0 else b""
        end = start + int(digits) if digits.isdigit() else 0
        if not space + 1 < end <= len(records):
            raise TarError(f"{where} is damaged at byte {at}: its pax header cannot be read")
        key, _, value = records[space + 1 : end - 1].partition(b"=")
        attributes[key] = value
        start = end
    return attributes
