"""Writes image files of the kinds that no library here writes: chunks, segments and tags byte by byte."""

import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

WIDTH, HEIGHT = 90, 62
"""Of most pictures."""
ORIENTATION = 0x0112
BYTE, ASCII, SHORT, LONG, SSHORT, SLONG = 1, 2, 3, 4, 8, 9
_TYPES = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "I", SSHORT: "h", SLONG: "i"}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column, step of rows and of columns of each pass of an interlaced PNG."""


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something like one, RGB: smooth areas, edges and texture, up to the border, unlike its own turns."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int32)
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 4, left : left + width // 5] = rng.integers(0, 256, 3)
    pixels += rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    """By Pillow."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def exif(
    orientation: int = 6,
    *,
    endian: str = "<",
    kind: int = SHORT,
    count: int = 1,
    before: Sequence[tuple[int, int]] = (),
    after: Sequence[tuple[int, int]] = (),
    thumbnail: int | None = None,
) -> bytes:
    """A TIFF block with an orientation of one type, and SHORTs (tag, value) around it.

    Args:
        thumbnail: orientation in IFD1; with orientation 0 there is none in IFD0.
    """

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        content = struct.pack(endian + _TYPES[kind], value).ljust(4, b"\0")
        return struct.pack(endian + "HHI", tag, kind, count) + content

    def directory(entries: list[bytes], following: int) -> bytes:
        return struct.pack(endian + "H", len(entries)) + b"".join(entries) + struct.pack(endian + "I", following)

    shorts = [[entry(tag, SHORT, 1, value) for tag, value in some] for some in (before, after)]
    first = shorts[0] + ([entry(ORIENTATION, kind, count, orientation)] if orientation else []) + shorts[1]
    second = b"" if thumbnail is None else directory([entry(ORIENTATION, SHORT, 1, thumbnail)], 0)
    length = 8 + 2 + 12 * len(first) + 4
    order = b"II*\0" if endian == "<" else b"MM\0*"
    return order + struct.pack(endian + "I", 8) + directory(first, length if second else 0) + second


def xmp(orientation: int = 6) -> bytes:
    """An XMP packet."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


PICTURE = photograph(HEIGHT, WIDTH, 3)
ODD = photograph(61, 89, 4)
ALPHA = PICTURE.convert("RGBA")
ALPHA.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
Kinds = Iterator[tuple[str, bytes]]
"""Name and file."""


# ------------------------------------------------------------------------------------------------------- JPEG


def segment(marker: int, content: bytes) -> bytes:
    """A marker segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def app1(content: bytes) -> bytes:
    """An APP1 segment with EXIF."""
    return segment(0xE1, b"Exif\0\0" + content)


def xmp_segment(orientation: int) -> bytes:
    """An APP1 segment with XMP."""
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation))


def adobe(transform: int) -> bytes:
    """Adobe's APP14 segment."""
    return segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))


def jpeg_parts(jpeg: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The (marker, content) segments before the first scan, and the rest from its marker on."""
    parts, at = [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        parts.append((jpeg[at + 1], jpeg[at + 4 : end]))
        at = end
    return parts, jpeg[at:]


def jpeg_with(jpeg: bytes, *front: bytes, without: Iterable[int] = (), back: bytes = b"") -> bytes:
    """A JPEG with other segments: `front` at the beginning (after JFIF's), `back` before the first scan."""
    parts, rest = jpeg_parts(jpeg)
    kept = [segment(marker, content) for marker, content in parts if marker not in without]
    first = 1 if parts[0][0] == 0xE0 and 0xE0 not in without else 0
    return b"".join([b"\xff\xd8", *kept[:first], *front, *kept[first:], back, rest])


def jpeg_components(jpeg: bytes, *, ids: bytes = b"", sampling: bytes = b"") -> bytes:
    """A JPEG whose components have other ids or sampling factors."""
    parts, rest = jpeg_parts(jpeg)
    result, scan = [b"\xff\xd8"], bytearray(rest)
    for marker, content in parts:
        frame = bytearray(content)
        if 0xC0 <= marker <= 0xC2:
            for number in range(frame[5]):
                if ids:
                    frame[6 + 3 * number] = scan[5 + 2 * number] = ids[number]
                if sampling:
                    frame[7 + 3 * number] = sampling[number]
        result.append(segment(marker, bytes(frame)))
    return b"".join([*result, bytes(scan)])


# -------------------------------------------------------------------------------------------------------- PNG


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG."""
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(
    pixels: NDArray[Any], colour_type: int, depth: int, *, before: bytes = b"", after: bytes = b"",
    interlaced: bool = False, pieces: int = 1,
) -> bytes:  # fmt: skip
    """A PNG of [H, W, channels], values below 2^depth; chunks `before` and `after` the pixels, these in `pieces`."""

    def rows(part: NDArray[Any]) -> bytes:
        values = part.reshape(len(part), -1)
        if depth == 16:
            lines = [row.astype(">u2").tobytes() for row in values]
        else:
            bits = np.unpackbits(values.astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - depth :]
            lines = [row.tobytes() for row in np.packbits(bits.reshape(len(part), -1), axis=1)]
        return b"".join(b"\0" + line for line in lines)

    passes = [pixels[top::down, left::right] for top, left, down, right in _ADAM7] if interlaced else [pixels]
    data = zlib.compress(b"".join(rows(part) for part in passes if part.size))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour_type, 0, 0, interlaced)
    length = -(-len(data) // pieces)
    image = b"".join(chunk(b"IDAT", data[at : at + length]) for at in range(0, len(data), length))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + image + after + chunk(b"IEND", b"")


def png_with(image: bytes, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with more chunks: before its pixels, and after them."""
    at = image.index(b"IDAT") - 4
    return image[:at] + before + image[at:-12] + after + image[-12:]


def raw_profile(content: bytes, kind: bytes = b"exif") -> bytes:
    """EXIF as ImageMagick writes it into PNG's text chunks."""
    return b"\n" + kind + b"\n%8d\n" % len(content) + content.hex().encode() + b"\n"


# ------------------------------------------------------------------------------------------------------- WebP


def webp_with(image: bytes, *chunks: tuple[bytes, bytes], flags: int, front: int = 0) -> bytes:
    """An extended WebP of the chunks of a WebP and more, of which `front` come before the pixels."""
    parts, at = [], 12
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
    while at < len(image):
        kind, length = image[at : at + 4], int.from_bytes(image[at + 4 : at + 8], "little")
        if kind != b"VP8X":
            parts.append((kind, image[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    parts = [(b"VP8X", bytes([flags, 0, 0, 0]) + sides), *chunks[:front], *parts, *chunks[front:]]
    body = b"".join(kind + struct.pack("<I", len(it)) + it + b"\0" * (len(it) % 2) for kind, it in parts)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


# -------------------------------------------------------------------------------------------------------- BMP


def bmp(
    width: int, height: int, bits: int, data: bytes, *, compression: int = 0, header: int = 40, palette: bytes = b"",
    masks: Sequence[int] = (),
) -> bytes:  # fmt: skip
    """A BMP; `header` is 12 (OS/2), 40, 108 or 124 bytes long; a negative height begins at the top."""
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
        colours = b"".join(struct.pack("<I", mask) for mask in masks)
        info += colours if header == 40 else colours.ljust(16, b"\0").ljust(header - 40, b"\0")
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + palette + data


# ------------------------------------------------------------------------------------------------------- TIFF


def tiff(
    width: int, height: int, tags: Sequence[tuple[int, int, Sequence[int]]], strips: Sequence[bytes], *,
    endian: str = "<", tiles: bool = False,
) -> bytes:  # fmt: skip
    """A TIFF of strips or tiles and tags (tag, type, values)."""
    entries = [(256, SHORT, [width]), (257, SHORT, [height]), *tags]
    at, places = 8, []
    for strip in strips:
        places.append(at)
        at += len(strip) + len(strip) % 2
    entries += [(324 if tiles else 273, LONG, places), (325 if tiles else 279, LONG, [len(strip) for strip in strips])]
    body = b"".join(strip + b"\0" * (len(strip) % 2) for strip in strips)
    extra_at = at + 2 + 12 * len(entries) + 4
    directory, extra = struct.pack(endian + "H", len(entries)), b""
    for tag, kind, values in sorted(entries):
        content = b"".join(struct.pack(endian + _TYPES[kind], value) for value in values)
        if len(content) > 4:
            content, extra = struct.pack(endian + "I", extra_at + len(extra)), extra + content
        directory += struct.pack(endian + "HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    order = b"II*\0" if endian == "<" else b"MM\0*"
    return order + struct.pack(endian + "I", at) + body + directory + struct.pack(endian + "I", 0) + extra
