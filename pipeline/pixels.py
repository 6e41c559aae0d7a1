"""What is done to images after DALI, on the rank's device: operations, colours, erasing, mixing.

These are element by element on whole batches, or by exact sums: an image becomes the same, bit for bit, wherever in
whichever batch it stands. On a CPU 3-Augment with colour jitter costs 1.1 CPU-ms an image this way at 224 pixels; of
DALI's operators the blur alone takes 2.0 and saturation 1.1, and on a GPU contrast could not use the image's mean.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline import augment, operations
from pipeline.data_config import AugmentSettings, DataSettings
from pipeline.operations import blend, gray_mean
from pipeline.operations import gray as whole_gray
from pipeline.spaces import space_of

_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601), as Pillow has them."""


def finish(
    images: torch.Tensor, settings: DataSettings, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]
) -> torch.Tensor:
    """Apply the settings' RandAugment or TrivialAugment, colour operations and random erasing, in place.

    Args:
        images: float32 [B, 3, S, S]; whole numbers from 0 to 255 if `changes_levels`, else normalised.
        epochs, ids: [B].

    Returns:
        `images`, normalised.
    """
    assert settings.mean is not None, "the stage fills these in"
    assert settings.std is not None
    chosen, side, rules = settings.augment, images.shape[-1], settings.rules
    layers = None if augment.dali_operates(chosen, rules) else augment.draw_operations(chosen, seed, epochs, ids)
    colors = augment.draw_colors(chosen, seed, epochs, ids, rules)
    erasures = augment.draw_erasures(chosen, seed, epochs, ids, side)
    if not changes_levels(settings) and not erasures:
        return images
    mean, std = (
        torch.tensor([255 * value for value in values], dtype=torch.float32).view(3, 1, 1).to(images.device)
        for values in (settings.mean, settings.std)
    )
    if changes_levels(settings):
        # A GPU wants whole batches, a CPU what its cache holds.
        each = 1 if images.device.type == "cpu" else len(images)
        for rows in (slice(first, first + each) for first in range(0, len(images), each)):
            if layers is not None:
                operate(images[rows], layers[rows], chosen)
            if colors is not None:
                _color(images[rows], colors, rows)
            images[rows].sub_(mean).div_(std)
    for erasure in erasures:
        at = erasure.where
        noise = torch.from_numpy(erasure.noise).to(images.device, torch.float32)
        images[erasure.row, :, at.top : at.top + at.height, at.left : at.left + at.width] = noise.sub_(mean).div_(std)
    return images


def changes_levels(settings: DataSettings) -> bool:
    """Whether `finish` works on levels from 0 to 255, so that DALI has to leave the normalising to it."""
    operates = space_of(settings.augment, settings.image_size) is not None
    return settings.augment.changes_colors or (operates and not augment.dali_operates(settings.augment, settings.rules))


def operate(images: torch.Tensor, draws: augment.OperationDraws, settings: AugmentSettings) -> None:
    """RandAugment's or TrivialAugment's layers, in place.

    Args:
        images: float32 [B, 3, S, S], whole numbers from 0 to 255.
    """
    space = space_of(settings, images.shape[-1])
    assert space is not None
    parameters = space.parameters(draws.operations, draws.magnitudes, draws.signs)
    levels = images.to(torch.uint8)
    for layer in range(parameters.shape[1]):
        levels = operations.apply(
            levels, space, draws.operations[:, layer], parameters[:, layer], draws.centres[:, layer]
        )
    images.copy_(levels)


def _color(images: torch.Tensor, draws: augment.ColorDraws, rows: slice) -> None:
    """3-Augment and colour jitter of `rows` of the batch that was drawn for, in place."""
    if draws.three is not None:
        three_augment(images, draws.three[rows], draws.sigma[rows])
    if draws.jitter is not None and draws.order is not None:
        color_jitter(images, draws.jitter[rows], draws.order[rows])
    elif draws.jitter is not None:
        color_jitter_at_once(images, draws.jitter[rows])


def three_augment(images: torch.Tensor, which: NDArray[np.int64], sigma: NDArray[np.float32]) -> None:
    """3-Augment, in place: gray, inverted from 128 upwards, or blurred (arXiv 2204.07118; operations of Pillow).

    Args:
        images: float32 [B, 3, S, S], whole numbers from 0 to 255.
        which: [B] augment.GRAY, SOLARISE or BLUR.
        sigma: [B] of the blur, pixels.
    """
    for kind in (augment.GRAY, augment.SOLARISE, augment.BLUR):
        chosen = which == kind
        if not chosen.any():
            continue
        rows: Any = slice(None) if chosen.all() else torch.from_numpy(chosen).to(images.device)
        some = images[rows]
        if kind == augment.GRAY:
            images[rows] = gray(some).expand_as(some)
        elif kind == augment.SOLARISE:
            # Of whole numbers, 127.5 - |x - 127.5| is x below 128 and 255 - x from there.
            images[rows] = some.sub_(127.5).abs_().neg_().add_(127.5)
        else:
            images[rows] = gaussian_blur(some, sigma[chosen])


def color_jitter(images: torch.Tensor, factors: NDArray[np.float32], order: NDArray[np.int64]) -> None:
    """Brightness, contrast and saturation in a given order, in place: Pillow's ImageEnhance, as in torchvision's
    ColorJitter on its images. Each of the three ends in whole numbers from 0 to 255.

    Args:
        images: float32 [B, 3, S, S], 0 to 255; rounded first.
        factors: [B, 3] of brightness, contrast, saturation.
        order: [B, 3] indices into these.
    """
    images.round_()
    for turn in range(3):
        for kind, poorer in enumerate((_black, gray_mean, whole_gray)):
            chosen = order[:, turn] == kind
            if not chosen.any():
                continue
            at: Any = slice(None) if chosen.all() else torch.from_numpy(chosen).to(images.device)
            some = images[at]
            factor = torch.from_numpy(factors[chosen, kind]).to(images.device).view(-1, 1, 1, 1)
            images[at] = blend(poorer(some), some, factor)


def _black(images: torch.Tensor) -> torch.Tensor:
    return images.new_zeros(1)


def color_jitter_at_once(images: torch.Tensor, factors: NDArray[np.float32]) -> None:
    """Brightness b, contrast c and saturation s in place: x -> b (c (s x + (1 - s) g) + (1 - c) m), kept in 0 to 255.

    Of runs under the old rules. g is the pixel's gray and m the image's mean gray; but for rounding and clipping in
    between, every order of Pillow's three enhancements gives this same map.

    Args:
        images: float32 [B, 3, S, S], 0 to 255.
        factors: [B, 3] b, c, s.
    """
    bright, contrast, saturation = torch.from_numpy(factors).to(images.device)[:, :, None, None, None].unbind(1)
    level = gray(images)
    # An exact sum: one of floats would depend on how many images a kernel adds up at once.
    total = level.round().to(torch.int32).sum((1, 2, 3), dtype=torch.int64)
    mean = (total.to(torch.float32) / level[0].numel()).view(-1, 1, 1, 1)
    level.mul_(bright * contrast * (1 - saturation)).add_(bright * (1 - contrast) * mean)
    images.mul_(bright * contrast * saturation).add_(level).clamp_(0, 255)


def gray(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def gaussian_blur(images: torch.Tensor, sigma: NDArray[np.float32]) -> torch.Tensor:
    """Gaussian blur, the image continued by its border pixels, the kernel by three standard deviations.

    Args:
        images: float32 [B, C, H, W].
        sigma: [B] standard deviation in pixels, above 0.
    """
    kernels = [_half_kernel(width) for width in sigma.tolist()]
    reach = max(len(kernel) for kernel in kernels) - 1
    # A narrower kernel is continued by zeros, which change nothing.
    padded_kernels = np.array([kernel + [0.0] * (reach + 1 - len(kernel)) for kernel in kernels], np.float32)
    weights = torch.from_numpy(padded_kernels).to(images.device)[:, :, None, None, None].unbind(1)
    for dim in (2, 3):
        size = images.shape[dim]
        padding = (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach)
        padded = F.pad(images, padding, mode="replicate")
        images = padded.narrow(dim, reach, size) * weights[0]
        for distance in range(1, reach + 1):
            both = padded.narrow(dim, reach - distance, size) + padded.narrow(dim, reach + distance, size)
            images += both.mul_(weights[distance])
    return images


def _half_kernel(sigma: float) -> list[float]:
    """A Gaussian from its centre outwards; with the other side it sums to 1."""
    # Not by an array's exp: that of a vector unit may differ in the last bit from that of a remainder.
    weights = [math.exp(-0.5 * (at / sigma) ** 2) for at in range(math.ceil(3 * sigma) + 1)]
    total = 2 * sum(weights) - weights[0]
    return [weight / total for weight in weights]


def mix(images: torch.Tensor, targets: torch.Tensor, mixing: augment.Mixing) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix neighbours, row 2i with row 2i+1 and the other way round.

    Partners are neighbours in the global order (position p with p xor 1), so that they are the same pairs for every
    world size and micro-batch.

    Args:
        images: [B, 3, S, S] with an even B.
        targets: [B, C].
    """
    if mixing.box is None:
        return _blend(images, mixing.weight), _blend(targets, mixing.weight)
    at = mixing.box
    down, across = slice(at.top, at.top + at.height), slice(at.left, at.left + at.width)
    mixed = images.clone()
    mixed[..., down, across] = _pairs(images)[..., down, across].flip(1).flatten(0, 1)
    return mixed, _blend(targets, mixing.weight)


def _blend(values: torch.Tensor, weight: float) -> torch.Tensor:
    pairs = _pairs(values)
    return (weight * pairs + (1 - weight) * pairs.flip(1)).reshape(values.shape)


def _pairs(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(len(values) // 2, 2, *values.shape[1:])
