"""Whether an image decodes from its first byte to its last, judged by its content and not by its name.

Every image passes here once, when it is sharded, so that training never meets one that cannot be decoded, or that a
consumer of the model would see other pixels of. JPEGs go through libjpeg-turbo with its warnings as errors: damage in
the middle of a scan is only a warning to libjpeg, which invents the missing pixels, and Pillow does not report it at
all. All others, and JPEGs that are turned or have four colours, are decoded by Pillow (what consumers use) and by DALI
(what training uses): each lets damage pass that the other finds, and their pixels must agree. CPU-ms an image at
500 x 375 pixels: plain JPEG 0.5, turned 3.2, four colours 6.7, PNG 5.9, lossy WebP 6.4, TIFF (LZW) 3.9, BMP 0.8; by
Pillow alone a PNG takes 2.4.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, TiffImagePlugin

from data_prep.image_pixels import has_deep_colours, largest_difference, read_jpeg_header, upright
from data_prep.orientation import TRANSPOSED, UPRIGHT, ConflictingOrientation, jpeg_segments, read_orientation
from data_prep.reasons import repeatable
from data_prep.training_decoder import UndecodableError, decode_as_training

MAX_SIDE = 65535
"""Pixels that a side may have: what the index can hold, and JPEG's own limit."""
MAX_PIXELS = 2 * (1 << 30) // 4 // 3
"""Of an image: Pillow's limit against images that take all memory. Half a gigabyte of RGB wherever one is decoded."""
MAX_DECODED_PIXELS = 45_000_000
"""Of an image that is decoded whole by both decoders here, and by DALI in training for any crop of it: all but JPEGs of
three colours. It takes a gigabyte (8192 x 8192 took 1.4 to 2.0), and half a megabyte of PNG can ask for it."""
MAX_BYTES = 1 << 29
"""Of an encoded image: what nearly all within MAX_PIXELS need as bare pixels. (The index could hold 4 GiB.)"""
TOO_MANY_BYTES = f"more than {MAX_BYTES >> 20} MiB: no image"

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)
_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF"}
MAX_DIFFERENCE = 0.5
"""Difference of DALI's and Pillow's pixels, levels of 255 in any 16 rows, above which an image is refused. Whatever is
taken was seen to agree in every bit."""
_BITS_PER_SAMPLE, _EXTRA_SAMPLES = 258, 338
_PREMULTIPLIED = 1
_COMMON_TIFFS = {
    ("1", (1,)),
    ("L", (8,)),
    ("I;16", (16,)),
    ("I;16B", (16,)),
    ("RGB", (8, 8, 8)),
    ("RGBA", (8, 8, 8, 8)),
}
"""Pillow's mode and the bits a sample of the TIFFs that DALI (training) and Pillow (consumers) decode alike."""
_START_OF_SCAN = 0xDA
FOUR_COLOURS = ("CMYK", "YCCK")
"""What simplejpeg calls the colours of JPEGs of four."""
_USUAL_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of Huffman-coded JPEGs, sequential or progressive; others (arithmetic coding) are not in every libjpeg."""
_RARE_LAYOUTS: dict[tuple[str, Any], str] = {
    ("zip", "LA;16B"): "16-bit gray with alpha",
    ("raw", "BGR;15"): "16-bit colours",
    ("raw", "BGR;16"): "16-bit colours",
    ("bmp_rle", "P;4"): "4 bits, run-length encoded",
}
"""Pillow's codec and layout of the PNGs and BMPs that DALI does not decode, or to other pixels."""


class UnusableImage(ValueError):  # noqa: N818 - it says what the image is
    """An image that training could not decode; the message is the reason, for the quarantine list.

    Attributes:
        may_pass: whether it could be had another time: it was not there to be looked at.
    """

    def __init__(self, reason: str, *, may_pass: bool = False) -> None:
        super().__init__(repeatable(reason))
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of an image that decodes: its format as a file extension, and its size as it is seen."""

    extension: str
    width: int
    """Pixels, after EXIF orientation."""
    height: int


def check_image(data: bytes | memoryview) -> ImageFacts:
    """Decode an encoded image completely.

    Raises:
        UnusableImage: empty, not an image, of a format that training does not decode, cut short, or damaged.
    """
    extension = _format_of(bytes(data[:512]))
    width, height = _check_jpeg(data) if extension == "jpg" else _check_by_both(data, extension)
    if max(width, height) > MAX_SIDE:
        raise UnusableImage(f"{width}x{height} pixels: a side may have at most {MAX_SIDE}")
    return ImageFacts(extension, width, height)


def _format_of(beginning: bytes) -> str:
    for signature, extension in _SIGNATURES:
        if beginning.startswith(signature):
            return extension
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":
        return "webp"
    if not beginning:
        raise UnusableImage("empty file")
    if beginning[:4] == b"GIF8":
        raise UnusableImage("GIF images are not supported: convert to PNG")
    if beginning[4:8] in (b"ftyp", b"jP  "):
        raise UnusableImage("AVIF, HEIC and JPEG 2000 images are not supported: convert to JPEG or PNG")
    if not any(beginning):
        raise UnusableImage("no image: begins with zeros")
    text = beginning[:24].decode("ascii", "replace").replace("\ufffd", "?")
    raise UnusableImage(f"no JPEG, PNG, WebP, BMP or TIFF: begins with {text!r}")


def _check_jpeg(data: bytes | memoryview) -> tuple[int, int]:
    try:
        height, width, colours = _decode_jpeg(data)
    except UnusableImage:
        raise
    except ValueError as error:
        tidy = _without_harmless_oddities(data)
        if tidy == data:
            raise UnusableImage(f"damaged JPEG: {_readable(error)}") from error
        try:
            height, width, colours = _decode_jpeg(tidy)
        except ValueError as still:
            raise UnusableImage(f"damaged JPEG: {_readable(still)}") from still
    usual = any(marker in _USUAL_FRAMES for marker, _, _ in jpeg_segments(data))
    if not usual or colours in FOUR_COLOURS or _orientation(data, "jpg") != UPRIGHT:
        return _check_by_both(data, "jpg")
    with _opened(data, "jpg"):  # what consumers read is the header
        return width, height


def _decode_jpeg(data: bytes | memoryview) -> tuple[int, int, str]:
    """Decode every bit of the entropy-coded data; returns height, width and what its colours are.

    Pixels at an eighth of the size, without colour, find the same damage as whole ones (that shows in the bit stream)
    in 60 % of the time.
    """
    height, width, colours, _ = read_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise UnusableImage(f"too large: {width}x{height} pixels, more than {MAX_PIXELS:,}")
    target = "CMYK" if colours in FOUR_COLOURS else "GRAY"
    simplejpeg.decode_jpeg(data, target, min_factor=8, min_height=1, min_width=1)
    return height, width, colours


def _readable(error: ValueError) -> str:
    text = re.sub(r"^(Corrupt JPEG data|Warning|Error|tj\w+\(\)): ", "", str(error))
    return text[:1].lower() + text[1:]


def _without_harmless_oddities(data: bytes | memoryview) -> bytes:
    """A copy without what libjpeg warns of though every pixel is there: an unknown JFIF version, progressive
    parameters in the scan header of a sequential image, zeros as padding before the end marker."""
    tidy = bytearray(data)
    sequential = False
    for marker, start, end in jpeg_segments(data):
        if marker == 0xE0 and data[start : start + 5] == b"JFIF\0":
            tidy[start + 5 : start + 7] = b"\x01\x01"
        elif marker in (0xC0, 0xC1):
            sequential = True
        elif marker == _START_OF_SCAN and sequential:
            tidy[end - 3 : end] = b"\x00\x3f\x00"
    last = tidy.rfind(b"\xff\xd9")
    if last > 0:
        tidy[:last] = tidy[:last].rstrip(b"\0")
    return bytes(tidy)


def _orientation(data: bytes | memoryview, extension: str) -> int:
    try:
        return read_orientation(data, extension)
    except ConflictingOrientation as conflict:
        raise UnusableImage(str(conflict)) from conflict


@contextmanager
def _opened(data: bytes | memoryview, extension: str) -> Iterator[ImageFile.ImageFile]:
    """An image in Pillow; whatever it raises inside the block is the image's damage."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    name = _PILLOW_FORMATS[extension]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata; pixels that cannot be decoded raise
            with Image.open(io.BytesIO(data), formats=[name]) as image:
                yield image
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage(f"too large: {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsing runs into
        raise UnusableImage(f"damaged {name}: {repeatable(str(error)) or type(error).__name__}") from error


def _check_by_both(data: bytes | memoryview, extension: str) -> tuple[int, int]:
    """Decode an image as consumers and as training do; returns width and height, upright."""
    with _opened(data, extension) as image:
        _refuse_ambiguous(image)
        if image.width * image.height > MAX_DECODED_PIXELS and (extension != "jpg" or image.mode == "CMYK"):
            sides = f"{image.width}x{image.height}"
            raise UnusableImage(
                f"too large: {sides} pixels, more than {MAX_DECODED_PIXELS:,}: shrink it, or make it a JPEG"
            )
        orientation = _orientation(data, extension)
        deep = has_deep_colours(image)
        image.info.pop("xmp", None)  # by which Pillow turns a TIFF when it is loaded
        image.load()
        shown = image if deep else upright(image, orientation)
        size = shown.size[::-1] if deep and orientation in TRANSPOSED else shown.size
    try:
        trained = decode_as_training(data)
    except UndecodableError as error:
        raise UnusableImage(str(error)) from error
    height, width = trained.shape[:2]
    if (width, height) != size:
        raise UnusableImage(f"DALI sees {width}x{height} pixels, and Pillow {size[0]}x{size[1]}")
    if not deep:
        consumed = np.asarray(shown)
        expected = trained[:, :, 0] if consumed.ndim == 2 else trained
        if largest_difference(consumed, expected) > MAX_DIFFERENCE:
            raise UnusableImage("training (DALI) and consumers (Pillow) would see different pixels of it: convert it")
    return width, height


def _refuse_ambiguous(image: ImageFile.ImageFile) -> None:
    """Refuse what training could not decode, or would see other pixels of than a consumer of the model.

    All other kinds were seen to give the same pixels in both, bit for bit.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = tuple(image.tag_v2.get(_BITS_PER_SAMPLE, ()))
        premultiplied = _PREMULTIPLIED in tuple(image.tag_v2.get(_EXTRA_SAMPLES, ()))
        if (image.mode, bits) not in _COMMON_TIFFS or premultiplied:
            depth = " + ".join(map(str, bits)) or "an unknown number of"
            alpha = " with premultiplied alpha" if premultiplied else ""
            raise UnusableImage(f"TIFF of a rare kind ({image.mode}, {depth} bits{alpha}): convert to PNG")
        return
    for tile in image.tile:
        layout = tile.args[0] if isinstance(tile.args, tuple) else tile.args
        if (tile.codec_name, layout) in _RARE_LAYOUTS:
            raise UnusableImage(f"{image.format} of a rare kind ({_RARE_LAYOUTS[tile.codec_name, layout]}): convert it")
