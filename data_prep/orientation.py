"""The EXIF orientation of an image, by the one rule of training, evaluation and consumers (models/preprocess.py).

What counts is the block where a format has it (JPEG's APP1 segment `Exif\\0\\0`, PNG's eXIf, WebP's EXIF), in it the
first entry of IFD0 with tag 274, of its value the first two bytes whatever type it says: that is how DALI reads it.
XMP and text chunks of PNG do not count. Where DALI's own parts read a file differently (2.4: nvImageCodec makes room
for one orientation, OpenCV turns by another, and the process may crash) there is no right answer: they are refused.
"""

import struct
from collections.abc import Iterator

UPRIGHT = 1
TRANSPOSED = (5, 6, 7, 8)
"""Orientations that swap width and height."""
_TAG = 274
_START_OF_SCAN = 0xDA
_EXIF_FLAG = 8
"""In the first byte of WebP's VP8X chunk."""
_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298)
_RATIONALS = {0x011A: 1, 0x011B: 1, 0x013E: 2, 0x013F: 6, 0x0211: 3, 0x0214: 6}
"""Tags of which DALI's and OpenCV's parsers read a text, or so many rational numbers, elsewhere in the block. Is that
beyond its end one gives up on the block and the other keeps what it has read."""


_DAMAGED = "its EXIF is damaged and may ask for a turn: decoders disagree on that"


class ConflictingOrientation(ValueError):  # noqa: N818 - it says what the image has
    """A file whose orientation decoders do not agree on; the message says why."""


def read_orientation(data: bytes | memoryview, extension: str) -> int:
    """How an encoded image is stored, 1 to 8 as EXIF numbers them.

    TIFFs give 1: what decodes them turns them upright.

    Raises:
        ConflictingOrientation: it is said twice, differently, or in a block that is damaged.
    """
    blocks = {"jpg": _jpeg_blocks, "png": _png_blocks, "webp": _webp_blocks}.get(extension)
    if blocks is None:
        return UPRIGHT
    found = [_read_block(bytes(block)) for block in blocks(data)]
    # One without an orientation leaves it to the others in JPEG; in PNG the first counts for OpenCV all the same.
    said = {orientation or UPRIGHT for orientation, _ in found if orientation is not None or extension != "jpg"}
    if len(said) > 1:
        raise ConflictingOrientation("two EXIF blocks ask for different orientations")
    orientation = said.pop() if said else UPRIGHT
    # Photographs have damaged blocks: a single one that asks for no turn does no harm.
    if not all(whole for _, whole in found) and (orientation != UPRIGHT or len(found) > 1):
        raise ConflictingOrientation(_DAMAGED)
    return orientation


def _read_block(block: bytes) -> tuple[int | None, bool]:
    """The orientation that a block asks for, if it has one, and whether all of its IFD0 can be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:  # which DALI's parser does not look at as closely
        if (b"I" in block[:2] or b"M" in block[:2]) and (b"\x01\x12" in block or b"\x12\x01" in block):
            raise ConflictingOrientation(_DAMAGED)
        return None, True
    if len(block) < 10 or (start := struct.unpack_from(order + "I", block, 4)[0]) + 2 > len(block):
        return None, True
    (count,) = struct.unpack_from(order + "H", block, start)
    orientation, whole = None, start + 2 + 12 * count <= len(block)
    for at in range(start + 2, min(start + 2 + 12 * count, len(block) - 9), 12):
        tag, _, length, value = struct.unpack_from(order + "HHIH", block, at)
        if tag == _TAG and orientation is None:
            orientation = value if 1 <= value <= 8 else UPRIGHT
        elsewhere = 8 * _RATIONALS.get(tag, 0) or (length if tag in _TEXTS and length > 4 else 0)
        if elsewhere and at + 12 <= len(block):
            whole = whole and struct.unpack_from(order + "I", block, at + 8)[0] + elsewhere <= len(block)
    return orientation, whole


def jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """The marker segments up to the first scan: (marker, start of the content, end)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, end
        if marker == _START_OF_SCAN:
            return
        at = end


def _jpeg_blocks(data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    for marker, start, end in jpeg_segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            yield data[start + 6 : end]


def _png_blocks(data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    at = 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            yield data[at + 8 : end]
        at = end + 4


def _webp_blocks(data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    if data[12:16] != b"VP8X" or len(data) < 21 or not data[20] & _EXIF_FLAG:
        return
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            yield data[at + 8 : end]
        at = end + (end - at) % 2
