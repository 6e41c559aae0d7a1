"""Damages images of all kinds at random: what sharding takes of them, training and consumers must decode alike.

    python -m tests.image_damage [COUNT] [SEED]

prints what was taken though it should not have been, and exits 1 then.
"""

import random
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

from data_prep.image_check import ImageFacts
from tests.image_files import ORIENTATION, app1, chunk, exif, jpeg_with, png_with, webp_with
from tests.image_kinds import Row, all_kinds, table

WHOLE = (
    "jpeg 420, even sides", "jpeg 444, odd sides", "jpeg Gray, even sides", "jpeg progressive", "jpeg CMYK",
    "jpeg YCCK",
    "jpeg CMYK without Adobe's marker", "jpeg with restarts", "jpeg RGB with Adobe's marker", "jpeg orientation 6",
    "jpeg orientation 3, MM", "jpeg two EXIF, none then 6", "jpeg with an sRGB profile",
    "png RGB 8", "png RGBA 8, interlaced", "png gray 1", "png gray 16", "png palette 4 with tRNS", "png RGB 16",
    "png eXIf 6", "png in many pieces", "png exif in zTXt", "apng, default image in the animation",
    "webp lossy RGB", "webp lossless RGB", "webp lossy RGBA", "webp lossless RGBA", "webp XMP 6, EXIF 3",
    "webp lossy RGB, EXIF 6 of even length", "webp with a profile, EXIF 6", "webp animated",
    "bmp 24", "bmp palette 8", "bmp palette 4", "bmp run-length 8", "bmp 32 with masks, header 108", "bmp 24, OS/2",
    "tiff RGB", "tiff RGB tiff_lzw", "tiff RGBA tiff_adobe_deflate", "tiff L packbits", "tiff 1 group4",
    "tiff RGB jpeg", "tiff gray 16 >", "tiff RGB in tiles", "tiff RGB in strips", "tiff L orientation 6",
)  # fmt: skip
"""Kinds that are damaged."""


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([rng.randrange(1, len(data)), len(data) - rng.randrange(1, 20)])]


def _flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 5])):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _edit_header(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2])):
        damaged[rng.randrange(4, min(len(data), 250))] = rng.choice([0, 1, 2, 6, 255, rng.randrange(256)])
    return bytes(damaged)


def _blank(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    length = min(rng.choice([1, 20, 500]), len(data) - at)
    return data[:at] + bytes([rng.choice([0, 255])]) * length + data[at + length :]


def _drop(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice([1, 2, 50]) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice([1, 2, 50])) + data[at:]


def _rearrange(data: bytes, rng: random.Random) -> bytes:
    """Removes, repeats or moves a whole part: a segment, a chunk, an entry. Checksums of what is edited are right."""
    parts = _parts(data)
    if len(parts) < 2:
        return _drop(data, rng)
    at = rng.randrange(1, len(parts))
    part = parts[at]
    how = rng.randrange(4)
    if how == 0:
        del parts[at]
    elif how == 1:
        parts.insert(rng.randrange(1, len(parts)), part)
    elif how == 2:
        parts.insert(rng.randrange(1, len(parts)), parts.pop(at))
    elif len(part) > 12:
        edited = bytearray(part)
        edited[rng.randrange(8, len(part) - 4)] = rng.choice([0, 1, 6, 255])
        if data[1:4] == b"PNG":
            edited[-4:] = struct.pack(">I", zlib.crc32(edited[4:-4]))
        parts[at] = bytes(edited)
    return b"".join(parts)


def _add_exif(data: bytes, rng: random.Random) -> bytes:
    """Adds an EXIF block that may be damaged, also beside another one."""
    tags = (0x010F, 0x011A, 0x0128, 0x013E, 0x0211, 0x8769, ORIENTATION)
    around = [[(rng.choice(tags), rng.choice([0, 1, 6, 60_000])) for _ in range(rng.randrange(2))] for _ in range(2)]
    block = bytearray(
        exif(rng.choice([1, 3, 6, 8]), endian=rng.choice("<>"), before=around[0], after=around[1], thumbnail=5)
    )
    for _ in range(rng.choice([0, 1, 2])):
        block[rng.randrange(len(block))] = rng.choice([0, 1, 2, 6, 255])
    damaged = bytes(block[: rng.choice([len(block), rng.randrange(len(block))])])
    if data[:2] == b"\xff\xd8":
        return jpeg_with(data, app1(damaged))
    if data[1:4] == b"PNG":
        return png_with(data, before=chunk(b"eXIf", damaged))
    if data[12:15] == b"VP8":
        return webp_with(data, (b"EXIF", damaged), flags=8)
    return _edit_header(data, rng)


def _parts(data: bytes) -> list[bytes]:
    """A file's beginning, and its segments or chunks."""
    ends = []
    if data[1:4] == b"PNG":
        at = 8
        while at + 12 <= len(data):
            ends.append(at)
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif data[:4] == b"RIFF":
        at = 12
        while at + 8 <= len(data):
            ends.append(at)
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + length + length % 2
    elif data[:2] == b"\xff\xd8":
        at = 2
        while at + 4 <= len(data) and data[at + 1] != 0xDA:
            ends.append(at)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        ends.append(at)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut, _flip, _edit_header, _blank, _drop, _insert, _rearrange, _add_exif,
)  # fmt: skip


def damaged(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and files."""
    kinds = all_kinds()
    rng = random.Random(seed)
    for number in range(count):
        kind, damage = WHOLE[number % len(WHOLE)], rng.choice(_DAMAGES)
        yield f"{number} {kind}: {damage.__name__[1:]}", damage(kinds[kind], rng)


def wrongly_taken(rows: list[Row]) -> list[Row]:
    """Those that sharding takes and DALI does not decode, or to other pixels than consumers see."""
    return [row for row in rows if not row.holds]


def main() -> None:
    """See above."""
    count, seed = map(int, [*sys.argv[1:], *("1440", "0")[len(sys.argv) - 1 :]])
    rows = table(dict(damaged(count, seed)))
    wrong = wrongly_taken(rows)
    print(*wrong, sep="\n")
    taken = Counter(isinstance(row.facts, ImageFacts) for row in rows)
    print(f"{count} damages: {taken[False]} left out, {taken[True]} taken, {len(wrong)} of these wrongly")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
