"""What an image looks like, in 64 bits to search by and 255 numbers to confirm with.

The hash is the DCT hash (pHash: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010)
with two changes: bits are the signs of the 64 lowest frequencies in zigzag order, not their comparison with the median,
and the picture is reduced by an antialiasing filter. With signs, mirroring an image flips known bits, so that mirrored
copies are found by a second search for hash ^ MIRROR. They count as duplicates: training mirrors half of its images, so
that an evaluation image's mirrored copy in the training set is seen as that image itself.

Images that differ by less than 8 of 64 bits are not always copies: among 50,000 images of tiny-imagenet half of such
pairs show different things (an insect in the middle of a white page looks like any other). So a pair counts only if
the shapes agree too: the correlation of the lowest 16 x 16 frequencies, whitened, without brightness and contrast. The
figures that the limits rest on are in tests/bench_duplicates.py.
"""

from collections.abc import Sequence

import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray
from PIL import Image

from data_prep.decoder_process import refuse_deadly
from data_prep.image_check import FOUR_COLOURS, MAX_PIXELS, UnusableImage, check_image
from data_prep.image_pixels import open_upright, read_jpeg_header
from data_prep.orientation import UPRIGHT, ConflictingOrientation, read_orientation

VERSION = 4
"""Of all in this module that decides a descriptor: kept hashes of another version are not used."""

_SIDE = 32
"""Pixels of the reduced picture."""
_FREQUENCIES = 16
_DECODED = 64
"""Pixels that the shorter side is decoded with at least; the decoder reduces by eighths for nearly no time."""
_FLAT = 2.0
"""Gray levels (root mean square) that the lowest frequencies must have: copies of what is flatter differ by their noise
(no image of tiny-imagenet, CIFAR or ImageNet looked at has less than 2.9)."""

SIMILAR = 0.7
"""Correlation of shapes from which two images with near hashes are copies of each other."""

DESCRIPTOR = np.dtype(
    [
        ("content", "<u8", (2,)),  # xxh3_128 of the encoded image; zeros: there is none, UNSEEN: it could not be had
        ("hash", "<u8"),
        ("pictured", "?"),  # False: flat, or not decoded; such an image has only exact duplicates
        ("shape", "i1", (_FREQUENCIES**2 - 1,)),  # whitened coefficients, scaled to a norm of 127
    ]
)
"""What is known of an image, 280 bytes."""
UNSEEN = np.iinfo(np.uint64).max
"""In place of both halves of the checksum of an image that could not be had, and may be had another time."""


def _zigzag() -> NDArray[np.int64]:
    """Places (vertical, horizontal) of the frequencies but the constant one, the lowest first."""
    places = [(a, b) for a in range(_FREQUENCIES) for b in range(_FREQUENCIES) if a or b]
    return np.array(sorted(places, key=lambda place: (sum(place), max(place), place)))


def _dct() -> NDArray[np.float32]:
    """The orthonormal DCT-II of _SIDE values, its lowest frequencies: [_FREQUENCIES, _SIDE]."""
    k, x = np.arange(_FREQUENCIES)[:, None], np.arange(_SIDE)[None]
    matrix = np.cos(np.pi * (2 * x + 1) * k / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


_PLACES = _zigzag()
_DCT = _dct()
_WHITENING = _PLACES.sum(1).astype(np.float32)
"""The spectrum of photographs falls with the frequency; times the frequency all count alike."""
_ODD = _PLACES[:, 1] % 2 == 1
"""Which coefficients change their sign when the image is mirrored."""

MIRROR = np.uint64(sum(1 << int(bit) for bit in np.flatnonzero(_ODD[:64])))
"""The hash of the mirrored image is the hash with these bits flipped."""


def describe_images(images: Sequence[bytes | memoryview]) -> NDArray[np.void]:
    """Descriptors of encoded images, DESCRIPTOR [N]; those that sharding cannot use have their checksum only."""
    descriptors = np.zeros(len(images), DESCRIPTOR)
    pixels = np.zeros((len(images), _SIDE, _SIDE), np.float32)
    for row, image in enumerate(images):
        checksum = xxhash.xxh3_128_intdigest(image)
        descriptors["content"][row] = checksum >> 64, checksum & (2**64 - 1)
        reduced = _reduced(image)
        if reduced is not None:
            pixels[row] = reduced
    coefficients = (_DCT @ pixels @ _DCT.T)[:, _PLACES[:, 0], _PLACES[:, 1]]
    strength = np.linalg.norm(coefficients[:, :64], axis=1) / _SIDE
    descriptors["pictured"] = strength >= _FLAT
    bits = np.packbits(coefficients[:, :64] > 0, axis=1, bitorder="little")
    descriptors["hash"] = np.ascontiguousarray(bits).view("<u8")[:, 0]
    white = coefficients * _WHITENING
    white *= 127 / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-6)
    descriptors["shape"] = np.rint(white)
    for column in ("hash", "shape"):
        descriptors[column][~descriptors["pictured"]] = 0
    return descriptors


def similarity(a: NDArray[np.int8], b: NDArray[np.int8], mirrored: bool) -> NDArray[np.float32]:
    """Correlation of shapes (int8 [N, 255] each), float32 [N]; `mirrored`: of a with the mirrored b."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    if mirrored:
        y[:, _ODD] *= -1
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    correlation: NDArray[np.float32] = np.einsum("nk,nk->n", x, y) / np.maximum(norms, 1)
    return correlation


def _reduced(data: bytes | memoryview) -> NDArray[np.float32] | None:
    """The brightness of an image at _SIDE x _SIDE pixels, or None if sharding cannot use the image."""
    try:
        refuse_deadly(data)
    except UnusableImage:
        return None
    if bytes(data[:3]) == b"\xff\xd8\xff" and _is_upright(data):
        try:
            return _reduced_jpeg(data)
        except ValueError:
            pass  # four colours, or harmless oddities that Pillow does not mind
    try:
        check_image(data)  # Pillow decodes what sharding leaves out
        # by way of RGB: palettes and sixteen bits become what training sees
        gray = open_upright(data, shrink_to=2 * _DECODED).convert("RGB").convert("L")
    except Exception:  # whatever Pillow's plugins run into
        return None
    return _resized(gray, gray.width, gray.height)


def _is_upright(jpeg: bytes | memoryview) -> bool:
    try:
        return read_orientation(jpeg, "jpg") == UPRIGHT
    except ConflictingOrientation:
        return False


def _reduced_jpeg(data: bytes | memoryview) -> NDArray[np.float32]:
    height, width, colours, _ = read_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise ValueError("sharding leaves it out")
    if colours in FOUR_COLOURS:
        raise ValueError("without Adobe's marker libjpeg-turbo's gray is not that of the colours shown")
    gray = simplejpeg.decode_jpeg(data, "GRAY", min_height=_DECODED, min_width=_DECODED, min_factor=1)[:, :, 0]
    # Reduced by n/8 the decoder rounds up, and the last row and column stand for less than a pixel: leave that out
    eighths = next(n for n in range(8, 0, -1) if gray.shape == (-(-height * n // 8), -(-width * n // 8)))
    return _resized(Image.fromarray(gray), width * eighths / 8, height * eighths / 8)


def _resized(gray: Image.Image, width: float, height: float) -> NDArray[np.float32]:
    reduced = gray.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=(0, 0, width, height))
    return np.asarray(reduced, np.float32)
