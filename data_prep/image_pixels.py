"""An image's pixels as training and consumers see them, where the data half looks at them itself."""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageChops

from data_prep.orientation import jpeg_segments, read_orientation
from data_prep.training_decoder import decode_as_training

JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of the segments that say a JPEG's size and components."""
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright that is stored in an EXIF orientation."""


def read_jpeg_header(data: bytes | memoryview) -> tuple[int, int, str, str]:
    """A JPEG's height and width as stored, what its colours are, and their subsampling, as simplejpeg names them.

    Raises:
        ValueError: it has no header that libjpeg-turbo can read.
    """
    try:
        height, width, colours, subsampling = simplejpeg.decode_jpeg_header(data)
    except KeyError:  # simplejpeg (1.9.0) has no name for 4:4:1, which a turn makes of 4:1:1, and decodes it
        for marker, start, _ in jpeg_segments(data):
            if marker in JPEG_FRAMES:
                height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 1, start + 3))
                return height, width, "CMYK" if data[start + 5] == 4 else "YCbCr", "441"
        raise ValueError("no frame header before the first scan") from None
    return int(height), int(width), str(colours), str(subsampling)


def open_upright(data: bytes | memoryview, shrink_to: int | None = None) -> Image.Image:
    """An image that `check_image` took, upright: L where it is stored as 8 or 16 bits gray, else RGB.

    Args:
        shrink_to: a JPEG may be decoded at a fraction of its size, down to this many pixels a side.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata
        with Image.open(io.BytesIO(data)) as image:
            if has_deep_colours(image):
                return Image.fromarray(decode_as_training(data))
            if shrink_to is not None:
                image.draft("RGB", (shrink_to, shrink_to))
            return upright(image, read_orientation(data, _EXTENSIONS.get(image.format or "", "")))


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an opened image, not loaded yet, has colours of 16 bits, of which Pillow gives the upper 8."""
    tiles = getattr(image, "tile", [])
    return bool(image.format == "PNG" and tiles and str(tiles[0].args).startswith("RGB") and "16" in tiles[0].args)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """An opened image as L or RGB of 8 bits, turned; a TIFF is turned by Pillow when it is loaded.

    The colours of four-coloured JPEGs are those of libjpeg-turbo and DALI: inverted if Adobe's marker is there. Pillow
    takes all for inverted.
    """
    image.info.pop("xmp", None)  # by which Pillow turns a TIFF when it is loaded
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe_transform" not in image.info:
        image = ImageChops.invert(image)
    if image.mode.startswith("I"):  # which Pillow's own conversion clips
        image = Image.fromarray(np.rint(np.asarray(image, np.float32) / 257).astype(np.uint8))
    pixels = image if image.mode == "L" else image.convert("RGB")
    if orientation in _TURNS:
        return pixels.transpose(_TURNS[orientation])
    return pixels.copy() if pixels is image else pixels


def largest_difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Mean absolute difference of two images of the same shape in those 16 rows where it is largest, levels."""
    if np.array_equal(one, other):
        return 0.0
    largest = 0.0
    for start in range(0, len(one), 16):
        a, b = one[start : start + 16], other[start : start + 16]
        largest = max(largest, float((np.maximum(a, b) - np.minimum(a, b)).mean()))
    return largest
