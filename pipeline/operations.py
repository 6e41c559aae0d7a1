"""The operations of RandAugment and TrivialAugment on 8-bit images, in torch, on the rank's device.

Exactly those of Pillow or of TensorFlow (pipeline/spaces.py says which): almost all in whole numbers, the rest element
by element, so that an image becomes the same, bit for bit, on a CPU and a GPU and wherever in whichever batch it
stands. An operation is a table of 256 levels for each channel, a warp, or a blend of the image with something poorer.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.spaces import Space

_ONE = 1 << 16
"""A pixel in the fixed-point coordinates of warps, as in Pillow."""
_WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def apply(
    images: torch.Tensor,
    space: Space,
    operations: NDArray[np.int32],
    parameters: NDArray[np.float64],
    centres: NDArray[np.float64],
) -> torch.Tensor:
    """One layer: an operation on each of B images.

    Args:
        images: uint8 [B, 3, S, S].
        operations: [B] indices into the space's.
        parameters: [B] theirs (`Space.parameters`).
        centres: [B, 2] of Cutout, down and across, shares of the side.

    Returns:
        uint8 [B, 3, S, S]; may be `images`, changed.
    """
    for number in np.unique(operations).tolist():
        name, chosen = space.operations[number].name, operations == number
        if name == "Identity":
            continue
        if chosen.all():
            images = _apply(name, images, space, parameters, centres)
        else:
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
            images[rows] = _apply(name, images[rows], space, parameters[chosen], centres[chosen])
    return images


def _apply(
    name: str, images: torch.Tensor, space: Space, values: NDArray[np.float64], centres: NDArray[np.float64]
) -> torch.Tensor:
    if name in _WARPS:
        origin = 0.5 if space.library == "pillow" else 0.0
        matrices = [_matrix(name, value, images.shape[-1], origin) for value in values.tolist()]
        return _warp(images, np.array(matrices), space)
    if name == "Cutout":
        return _cutout(images, values, centres, space.fill)
    factors = torch.from_numpy(values.astype(np.float32)).to(images.device).view(-1, 1, 1, 1)
    if name == "Color":
        level = gray(images) if space.library == "pillow" else _tensorflow_gray(images)
        return blend(level, images, factors)
    if name == "Sharpness":
        return blend(_smooth(images, rounds=space.library == "pillow"), images, factors)
    return _look_up(images, _TABLES[name](images, factors.view(-1, 1, 1), space))


def blend(poorer: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """poorer + factor (image - poorer), cut off at 0 and 255 and behind the point, as in Pillow and big_vision.

    Args:
        poorer, images: [B, C, H, W] whole numbers from 0 to 255, of shapes that broadcast.
        factors: float32 [B, 1, 1, 1].

    Returns:
        Of the type of `images`.
    """
    start = poorer.to(torch.float32)
    return ((images - start) * factors + start).clamp_(0, 255).floor_().to(images.dtype)


def gray(images: torch.Tensor) -> torch.Tensor:
    """Pillow's gray (ITU-R BT.601 in 16 bits after the point, rounded): [B, 3, H, W] -> int32 [B, 1, H, W].

    Args:
        images: whole numbers from 0 to 255.
    """
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + (1 << 15)) >> 16


def gray_mean(images: torch.Tensor) -> torch.Tensor:
    """Pillow's centre of contrast, the mean gray as a whole number: [B, 3, H, W] -> int64 [B, 1, 1, 1]."""
    level = gray(images)
    pixels = level[0].numel()
    return (2 * level.sum((1, 2, 3), keepdim=True, dtype=torch.int64) + pixels) // (2 * pixels)


def _tensorflow_gray(images: torch.Tensor) -> torch.Tensor:
    """`tf.image.rgb_to_grayscale`: in shares of 255, times 255.5, cut off. [B, 3, H, W] -> int32 [B, 1, H, W]."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (red * 2989 + green * 5870 + blue * 1140) * 511 // 5100000


def _smooth(images: torch.Tensor, rounds: bool) -> torch.Tensor:
    """The mean of 3 x 3 pixels with 5 times the centre's weight, rounded or cut off; the outermost ring as it is."""
    levels = images.to(torch.int32)
    across = levels[..., :-2] + levels[..., 1:-1] + levels[..., 2:]
    inner = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * levels[..., 1:-1, 1:-1]
    levels[..., 1:-1, 1:-1] = (2 * inner + 13) // 26 if rounds else inner // 13
    return levels


def _look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replace every level by the table's: uint8 [B, 3, H, W], and [B, 1 or 3, 256] -> uint8 [B, 3, H, W]."""
    tables = tables.to(torch.uint8).expand(len(images), 3, 256)
    return tables.gather(2, images.flatten(2).to(torch.int64)).view(images.shape)


def _levels(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, device=images.device).view(1, 1, 256)


def _auto_contrast(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    flat = images.flatten(2)
    low, high = (level.to(torch.float64)[..., None] for level in (flat.amin(2), flat.amax(2)))
    # A tensor is divided, as torch makes of `255.0 / x` a product with 1 / x, whose last bit is another at times.
    scale = torch.full_like(high, 255.0) / (high - low).clamp_(min=1)
    stretched = (_levels(images) * scale + -low * scale).clamp_(0, 255).floor_()
    return torch.where(high > low, stretched, _levels(images).to(torch.float64))


def _equalize(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    """Pillow's ImageOps.equalize, which big_vision follows."""
    channels = images.shape[0] * 3
    # A histogram for each channel: their levels are numbered through.
    numbered = images.flatten(0, 1).flatten(1).to(torch.int64)
    numbered += 256 * torch.arange(channels, device=images.device)[:, None]
    counts = torch.bincount(numbered.flatten(), minlength=256 * channels).view(channels, 256)
    brightest = 255 - (counts > 0).flip(1).to(torch.int8).argmax(1)
    pixels = images[0, 0].numel()
    step = (pixels - counts.gather(1, brightest[:, None])) // 255
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table, _levels(images)[0]).view(-1, 3, 256)


def _invert(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    return 255 - _levels(images)


def _posterize(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    shift = 8 - values.to(torch.int64)
    return (_levels(images) >> shift) << shift


def _solarize(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    levels = _levels(images)
    return torch.where(levels < values, levels, 255 - levels)


def _solarize_add(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    levels = _levels(images)
    return torch.where(levels < 128, (levels + values.to(torch.int64)).clamp_(max=255), levels)


def _brightness(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    return blend(torch.zeros_like(_levels(images)), _levels(images), values)


def _contrast(images: torch.Tensor, values: torch.Tensor, space: Space) -> torch.Tensor:
    if space.library == "pillow":
        centre = gray_mean(images).view(-1, 1, 1)
    else:
        # What big_vision calls the mean is the number of pixels over 256, at most 255: 196 at 224 pixels.
        centre = torch.full_like(values, min(images[0, 0].numel() // 256, 255))
    return blend(centre, _levels(images), values)


_TABLES: dict[str, Callable[[torch.Tensor, torch.Tensor, Space], torch.Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Brightness": _brightness,
    "Contrast": _contrast,
}
"""By name: images uint8 [B, 3, S, S] and parameters float32 [B, 1, 1] -> levels [B, 1 or 3, 256]."""


def _cutout(images: torch.Tensor, halves: NDArray[np.float64], centres: NDArray[np.float64], fill: int) -> torch.Tensor:
    """A square of 2 x half pixels around a centre, cut off at the border, becomes `fill`."""
    at = torch.arange(images.shape[-1], device=images.device)
    middles = np.floor(centres * images.shape[-1])
    first, end = (
        torch.from_numpy(edges.astype(np.int64)).to(images.device)[:, :, None]
        for edges in (middles - halves[:, None], middles + halves[:, None])
    )
    inside = (at >= first) & (at < end)
    down, across = inside[:, 0, :, None], inside[:, 1, None, :]
    return torch.where((down & across)[:, None], fill, images)


def _matrix(name: str, value: float, side: int, origin: float) -> tuple[float, ...]:
    """Where pixel (x, y) of the result comes from: (a x + b y + c, d x + e y + f).

    Args:
        value: degrees, shear or pixels; positive moves to the right or down, or turns anticlockwise.
        origin: the fixed point of a shear is so many pixels above and left of the first pixel's centre.
    """
    match name:
        case "ShearX":
            return 1, -value, -value * origin, 0, 1, 0
        case "ShearY":
            return 1, 0, 0, -value, 1, -value * origin
        case "TranslateX":
            return 1, 0, -value, 0, 1, 0
        case "TranslateY":
            return 1, 0, 0, 0, 1, -value
    sin, cos, middle = math.sin(math.radians(value)), math.cos(math.radians(value)), (side - 1) / 2
    return cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - cos - sin)


def _warp(images: torch.Tensor, matrices: NDArray[np.float64], space: Space) -> torch.Tensor:
    """[B, 3, S, S] images and [B, 6] matrices; coordinates are whole numbers of 1/65536 pixel, the same everywhere."""
    side = images.shape[-1]
    fixed = torch.from_numpy(np.floor(matrices * _ONE + 0.5).astype(np.int64)).to(images.device)
    a, b, c, d, e, f = fixed[:, :, None, None].unbind(1)
    at = torch.arange(side, device=images.device)
    x, y = a * at + b * at[:, None] + c, d * at + e * at[:, None] + f
    if not space.bilinear:
        # Half-way between two pixels TensorFlow takes the further one; what a matrix loses behind the point must not
        # decide that.
        half = _ONE // 2 + (64 if space.library == "tensorflow" else 0)
        return _pixels_at(images, (x + half) >> 16, (y + half) >> 16, space.fill)
    total = torch.zeros_like(images, dtype=torch.int32)
    left, top = x >> 16, y >> 16
    # 8 bits of the weights are enough for 8-bit pixels, and keep the sum of products exact.
    right_share, lower_share = (((at & (_ONE - 1)) >> 8).to(torch.int32) for at in (x, y))
    for down, lower in ((0, 256 - lower_share), (1, lower_share)):
        for across, right in ((0, 256 - right_share), (1, right_share)):
            total += (lower * right)[:, None] * _pixels_at(images, left + across, top + down, space.fill)
    return ((total + _ONE // 2) >> 16).to(torch.uint8)


def _pixels_at(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor, fill: int) -> torch.Tensor:
    """uint8 [B, 3, S, S] at columns x and rows y, int64 [B, S, S]; `fill` outside."""
    side = images.shape[-1]
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    places = torch.where(inside, y * side + x, 0).flatten(1)[:, None].expand(-1, 3, -1)
    return torch.where(inside[:, None], images.flatten(2).gather(2, places).view(images.shape), fill)
