"""Changes to images that are asked for: shrinking large ones, and making baseline JPEGs of those that are not.

Off unless asked for: images keep their bytes. Both decode and encode again, which loses a little: a transcoder that
keeps the coefficients (jpegtran) is in none of the libraries used here. The same image and settings give the same bytes
under the same versions of simplejpeg and Pillow, which the manifest names.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.image_check import ImageFacts, UnusableImage
from data_prep.image_pixels import JPEG_FRAMES, open_upright, read_jpeg_header
from data_prep.orientation import TRANSPOSED, jpeg_segments, read_orientation

BY_CHOICE = "left out: "
"""Begins the reason of an image that is whole, but not wanted."""

Ending = Literal["own", "jpg"]
_SUBSAMPLINGS = ("444", "422", "420", "440", "411")
_BASELINE = 0xC0


@dataclass(frozen=True)
class Conversion:
    """What is done to images; nothing by default."""

    min_side: int = 0
    """Images with a shorter side than this are left out; pixels."""
    max_side: int = 0
    """Images with a longer side than this are shrunk to it; 0 for none."""
    baseline: bool = False
    """Make baseline RGB or grey JPEGs of progressive, arithmetic-coded and CMYK ones."""
    jpeg_quality: int = 95
    """Of what is encoded again."""
    ending: Ending = "own"
    """Of the members of tars that hold images: that of its format for each, or jpg for all."""

    def name_ending(self, extension: str) -> str:
        """The ending under which an image of a format (jpg, png, ...) is stored; readers decode by content."""
        return extension if self.ending == "own" else self.ending

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it: only what differs from leaving images as they are."""
        said: dict[str, Any] = {}
        if self.min_side:
            said["min_side"] = self.min_side
        if self.max_side:
            said["max_side"] = self.max_side
        if self.baseline:
            said["baseline"] = True
        if self.max_side or self.baseline:
            said["jpeg_quality"] = self.jpeg_quality
        if self.ending != "own":
            said["ending"] = self.ending
        return said


def convert(
    image: bytes | memoryview, facts: ImageFacts, conversion: Conversion
) -> tuple[bytes | memoryview, ImageFacts]:
    """An image as it is to be stored, with what is then known of it; the same object where nothing is to be done.

    Raises:
        UnusableImage: it is not wanted, or cannot be encoded again.
    """
    if min(facts.width, facts.height) < conversion.min_side:
        raise UnusableImage(f"{BY_CHOICE}a side below min_side={conversion.min_side} pixels")
    shrinks = conversion.max_side and max(facts.width, facts.height) > conversion.max_side
    if not shrinks and not (conversion.baseline and facts.extension == "jpg" and not _is_baseline(image)):
        return image, facts
    try:
        pixels, subsampling = _decode(image, facts.extension)
    except Exception as error:  # Pillow raises whatever its parsing runs into; the image did decode before
        raise UnusableImage(f"cannot be encoded again: {error}") from error
    if shrinks:
        scale = conversion.max_side / max(pixels.size)
        size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
        pixels = pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    array = np.asarray(pixels)
    grey = pixels.mode == "L"
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(array[..., None] if grey else array), conversion.jpeg_quality,
        "GRAY" if grey else "RGB", "Gray" if grey else subsampling, fastdct=False,
    )  # fmt: skip
    return encoded, ImageFacts("jpg", pixels.width, pixels.height)


def _is_baseline(image: bytes | memoryview) -> bool:
    """Whether a JPEG is what a hardware decoder takes: sequential, Huffman-coded, 8 bits, not four colours."""
    for marker, start, _ in jpeg_segments(image):
        if marker in JPEG_FRAMES:
            return marker == _BASELINE and image[start] == 8 and image[start + 5] != 4
    return False


def _decode(image: bytes | memoryview, extension: str) -> tuple[Image.Image, str]:
    """The upright pixels as grey or RGB, and the subsampling of the colours to keep."""
    subsampling = "420"
    if extension == "jpg":
        subsampling = read_jpeg_header(image)[3]
    pixels = open_upright(image)
    turned = read_orientation(image, extension) in TRANSPOSED
    if subsampling not in _SUBSAMPLINGS or turned:
        subsampling = "444" if subsampling == "444" else "420"
    return pixels, subsampling
