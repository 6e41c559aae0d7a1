"""What happens to an image before inference: decoding, resizing, cropping, normalising.

This file imports torch, numpy and Pillow only: like vit.py, a copy of it travels inside every published model
package, so that a consumer's pixels are the ones that evaluation saw.
"""

import contextlib
import dataclasses
import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor

Pixels = npt.NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""


Decoding = Literal["pillow", "dali"]
"""Whose reading of orientation and colours counts; see `decode`."""

_ORIENTATION = 274
"""EXIF's tag."""
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

LARGEST = 1 << 14
"""Pixels of a side of what the model sees; a description with more is a mistake or an attack."""


class ImageError(ValueError):
    """Input that is no image this preprocessing can read; the message says why."""


_CHOICES = {
    "interpolation": ("bilinear", "bicubic"),
    "crop": ("exact", "torchvision"),
    "decoding": ("pillow", "dali"),
}


@dataclass(frozen=True)
class Preprocessing:
    """Encoded images or arrays -> float32 [B, 3, size, size].

    Resizing works on 8-bit pixels. Beyond its border an image counts as continued by its outermost pixels, as in DALI
    on every device. (Pillow, and so torchvision, leaves out what lies beyond: where the border itself is shown, the
    outermost ring differs.)

    Raises:
        ValueError: values that do not fit together; the message names the field.
    """

    size: int
    """Height and width of the result in pixels."""
    resize: Literal["squash", "shorter"] = "squash"
    """"squash": to size x size whatever the shape; "shorter": the shorter side to `resize_to`, then the centre."""
    resize_to: int | None = None
    """Length of the shorter side in pixels, at least `size`; with `resize="shorter"` only."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Bicubic is Keys' with a = -0.5, as Pillow, TensorFlow and DALI have it."""
    antialias: bool = True
    """Whether the filter is as wide as the reduction; false reads 2 x 2 or 4 x 4 pixels (TensorFlow's default)."""
    crop: Literal["exact", "torchvision"] = "exact"
    """With `resize="shorter"`: "torchvision" is its Resize and CenterCrop in whole pixels; "exact", which packages
    without this field mean, keeps the exact scale on both sides and has an odd pixel at the other end."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, of pixels scaled to 0..1. 0.5 is what Google's ViTs use."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, of pixels scaled to 0..1."""
    decoding: Decoding = "pillow"
    """How orientation and colours are read: see `decode`. Packages that do not say it were evaluated with "pillow"."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            _require(isinstance(getattr(self, name), (tuple, list)), f"{name} must be three numbers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        fits = type(self.size) is int and 1 <= self.size <= LARGEST
        _require(fits, f"size = {_short(self.size)} must be a whole number from 1 to {LARGEST}")
        _require(self.resize in ("squash", "shorter"), f"resize = {_short(self.resize)} must be 'squash' or 'shorter'")
        if self.resize == "squash":
            _require(self.resize_to is None, f"resize_to = {_short(self.resize_to)} goes with resize = 'shorter' only")
        else:
            fits = type(self.resize_to) is int and self.size <= self.resize_to <= 2 * LARGEST
            bounds = f"at least size = {self.size} and at most {2 * LARGEST}"
            _require(fits, f"resize_to = {_short(self.resize_to)} must be {bounds}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} = {_short(value)} must be {' or '.join(map(repr, choices))}")
        _require(type(self.antialias) is bool, f"antialias = {_short(self.antialias)} must be true or false")
        for name, values in (("mean", self.mean), ("std", self.std)):
            numbers = len(values) == 3 and all(type(v) in (int, float) and abs(v) < 1e30 for v in values)
            _require(numbers, f"{name} = {_short(values)} must be three numbers")
        _require(min(self.std) > 0, f"std = {_short(self.std)} must be above 0")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The preprocessing that `to_json` wrote.

        Raises:
            ValueError: an unknown field, or a value that does not fit; the message names it.
        """
        _require(isinstance(values, Mapping), f"a preprocessing is no {type(values).__name__}")
        unknown = sorted(set(map(str, values)) - {field.name for field in dataclasses.fields(cls)})
        _require(not unknown, f"unknown preprocessing field(s): {', '.join(name[:80] for name in unknown[:6])}")
        _require("size" in values, "preprocessing field missing: size")
        return cls(**values)

    def __call__(self, images: Sequence["bytes | npt.NDArray[Any] | Image.Image"]) -> Tensor:
        """Encoded images (bytes), arrays and Pillow's (see `decode`), also mixed -> float32 [B, 3, size, size].

        Raises:
            ImageError: an image that cannot be read; the message says which.
        """
        batch = np.empty((len(images), self.size, self.size, 3), np.uint8)
        for row, image in enumerate(images):
            try:
                batch[row] = self.resized(decode(image, self.decoding))
            except ImageError as error:
                raise ImageError(f"image {row} of {len(images)}: {error}") from error
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return pixels.sub_(255 * mean).div_(255 * std)

    def resized(self, pixels: Pixels) -> Pixels:
        """uint8 [H, W, 3] -> uint8 [size, size, 3]."""
        return _resize(pixels, *self.source_box(*pixels.shape[:2]), self.size, self.interpolation, self.antialias)

    def source_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an upright image that the result shows: top, left, height, width in its pixels.

        To resize this part alone is to resize the whole image and then to crop, without the image in between: that of
        20,000 x 2 pixels would take 2 GB.
        """
        if self.resize_to is None:
            return 0.0, 0.0, float(height), float(width)
        (top, tall), (left, wide) = (self._source_span(length, min(height, width)) for length in (height, width))
        return top, left, tall, wide

    def _source_span(self, length: int, shorter: int) -> tuple[float, float]:
        """Where, along a side of `length` pixels, the result comes from: start and extent in source pixels."""
        assert self.resize_to is not None
        if self.crop == "torchvision":
            # torchvision.transforms: Resize rounds the longer side down, CenterCrop a half to the even number.
            resized = int(self.resize_to * length / shorter)
            scale = resized / length
            return round((resized - self.size) / 2) / scale, self.size / scale
        # The exact scale although the longer side becomes a whole number of pixels: what rounding adds or takes is
        # shared by both ends (DALI's `subpixel_scale`). The crop's place is rounded down, as DALI does.
        scale = self.resize_to / shorter
        resized = _half_up(length * scale)
        crop = _half_up((resized - self.size) / 2)
        return length / 2 + (crop - resized / 2) / scale, self.size / scale


def decode(image: "bytes | npt.NDArray[Any] | Image.Image", decoding: Decoding = "dali") -> Pixels:
    """An image as uint8 [H, W, 3].

    Encoded images (JPEG, PNG, WebP and what else Pillow reads) are turned upright by their EXIF orientation; gray,
    palette and CMYK become RGB, 16 bits become 8, alpha is dropped. Arrays are uint8 [H, W, 3], [H, W, 4] (alpha
    is dropped), [H, W, 1] or [H, W] (gray), RGB and upright. Pillow's images are turned by the EXIF orientation that
    they still carry; of 16-bit colours Pillow has kept the upper bytes.

    Args:
        decoding: "dali": what training and evaluation do with NVIDIA DALI. The orientation is that of the EXIF block
            alone: the first entry of its first directory, and of that the first two bytes whatever type it says. JPEGs
            of four colours are inverted if they have Adobe's marker. "pillow": what packages of before this field do,
            as Pillow does it: XMP and text chunks of PNG count too, and all JPEGs of four colours are inverted.

    Raises:
        ImageError: no image, a broken one, or an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        return _decode_array(image)
    if not isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
        raise ImageError(f"bytes of an encoded image or a uint8 array are wanted, not {type(image).__name__}")
    try:
        if isinstance(image, Image.Image):
            return _pixels(_upright(image, decoding))
        return _decode_file(image, decoding)
    except UnidentifiedImageError as error:
        size = 0 if isinstance(image, Image.Image) else len(image)
        raise ImageError(f"{size} bytes that are no image Pillow knows") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ImageError(f"does not decode: {error}") from error


def _decode_file(data: "bytes | bytearray | memoryview", decoding: Decoding) -> Pixels:
    with Image.open(io.BytesIO(data)) as opened:
        kind = opened.tile[0].args if opened.format == "PNG" and opened.tile else None
        if decoding == "dali":
            opened.info.pop("xmp", None)  # by which Pillow turns a TIFF while it loads it
        upright = _upright(opened, decoding)
        if kind not in ("RGB;16B", "RGBA;16B"):
            return _pixels(upright)
    # Pillow has no image of 16-bit colours: it gives the upper bytes. Read again, the lower ones for the rounding.
    with Image.open(io.BytesIO(data)) as again:
        again.tile = [tile._replace(args=f"{kind[:-1]}L") for tile in again.tile]
        lower = np.asarray(_upright(again, decoding), np.float32)
    return _from_16_bits(np.asarray(upright, np.float32) * 256 + lower)


def _pixels(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image, np.float32))
    return np.asarray(image.convert("RGB"))


def _upright(image: Image.Image, decoding: Decoding) -> Image.Image:
    """An image, loaded, as a new one that is upright."""
    return _upright_as_dali(image) if decoding == "dali" else ImageOps.exif_transpose(image)


def _upright_as_dali(opened: Image.Image) -> Image.Image:
    """An opened image, loaded, with DALI's orientation and colours; still in its own mode."""
    opened.load()
    if opened.format in ("JPEG", "MPO") and opened.mode == "CMYK" and "adobe_transform" not in opened.info:
        opened = ImageChops.invert(opened)  # Pillow has inverted it already
    turn = None if opened.format == "TIFF" else _TURNS.get(_exif_orientation(opened))
    return opened.copy() if turn is None else opened.transpose(turn)


def _exif_orientation(opened: Image.Image) -> int:
    """1 to 8, or whatever else the first EXIF block says that says any; 1 without."""
    if opened.format in ("JPEG", "MPO"):  # whose blocks Pillow joins elsewhere
        segments = [content for kind, content in getattr(opened, "applist", []) if kind == "APP1"]
        blocks = [content[6:] for content in segments if content[:6] == b"Exif\0\0"]
    else:
        block = opened.info.get("exif", b"")
        # of WebP it is as it stands in the file
        blocks = [block if opened.format == "WEBP" else block.removeprefix(b"Exif\0\0")]
    for block in blocks:
        order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
        if order is None:
            continue
        with contextlib.suppress(struct.error):  # it ends before
            (start,) = struct.unpack_from(order + "I", block, 4)
            (count,) = struct.unpack_from(order + "H", block, start)
            for entry in range(start + 2, start + 2 + 12 * count, 12):
                tag, *_, value = struct.unpack_from(order + "HHIH", block, entry)
                if tag == _ORIENTATION:
                    return int(value)
    return 1


def _from_16_bits(values: npt.NDArray[np.float32]) -> Pixels:
    return _decode_array(np.rint(values / 257).astype(np.uint8))


def _decode_array(array: npt.NDArray[Any]) -> Pixels:
    shape = array.shape
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype}: uint8 with values 0 to 255 is wanted")
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        raise ImageError(f"an array of shape {list(shape)}: [height, width, 3] is wanted")
    if array.ndim == 2:
        array = array[:, :, None]
    return np.broadcast_to(array, (*shape[:2], 3)) if array.shape[2] == 1 else array[:, :, :3]


def _resize(
    pixels: Pixels, top: float, left: float, height: float, width: float, size: int, kind: str, antialias: bool
) -> Pixels:
    """The rectangle of the image that starts at (top, left) -> [size, size, 3].

    What the filter reads beyond the rectangle are the image's own pixels; beyond the image it is continued by its
    outermost pixels, as DALI has it.
    """
    sides = [(height, top, 0), (width, left, 1)]
    if not antialias:
        values: npt.NDArray[Any] = pixels
        for extent, start, axis in sorted(sides, reverse=True):  # the larger first: it leaves less for the other
            values = _interpolated(values, axis, start, extent, size, kind)
        return np.rint(values.clip(0, 255)).astype(np.uint8)
    # Pillow leaves out what lies beyond the border, so the image is extended first as far as the filter reaches.
    beyond = []
    for extent, start, axis in sides:
        reach = (1 if kind == "bilinear" else 2) * max(extent / size, 1)
        after = math.ceil(start + extent + reach - pixels.shape[axis])
        beyond.append((max(0, math.ceil(reach - start)), max(0, after)))
    image = Image.fromarray(np.pad(pixels, (*beyond, (0, 0)), mode="edge"))
    top, left = top + beyond[0][0], left + beyond[1][0]
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return np.asarray(image.resize((size, size), filters[kind], box=(left, top, left + width, top + height)))


def _interpolated(
    values: npt.NDArray[Any], axis: int, start: float, extent: float, size: int, kind: str
) -> npt.NDArray[np.float32]:
    """[start, start + extent) of an axis at `size` places, from the nearest 2 (bilinear) or 4 pixels (bicubic) each."""
    centers = start + (np.arange(size) + 0.5) * (extent / size) - 0.5
    first = np.floor(centers).astype(np.int64)
    shape = [1, 1, 1]
    shape[axis] = size
    result = np.zeros((), np.float32)
    for tap in (0, 1) if kind == "bilinear" else (-1, 0, 1, 2):
        distance = np.abs(centers - (first + tap))
        if kind == "bilinear":
            weights = 1 - distance
        else:  # Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 4
            near = (1.5 * distance - 2.5) * distance**2 + 1
            weights = np.where(distance <= 1, near, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2)
        places = np.clip(first + tap, 0, values.shape[axis] - 1)
        result = result + values.take(places, axis) * weights.astype(np.float32).reshape(shape)
    return result


def _short(value: Any) -> str:
    """A value for messages, of any length and type."""
    if type(value) is int and value.bit_length() > 200:  # Python writes no number of thousands of digits
        return "a huge number"
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
