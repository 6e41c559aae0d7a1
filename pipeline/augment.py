"""Augmentation parameters as pure functions of (seed, epoch, sample id).

They come from a counter-based generator, so that a sample of an epoch gets the same crop, flip and operations
on whichever rank, in whichever batch, before or after a restart. DALI is fed the numbers and applies them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep import counter_rng
from pipeline.config import AugmentSettings

CROP_ATTEMPTS = 10
# Every kind of draw has a stream of its own, so that adding one kind leaves the others as they were.
_STREAM_CROP, _STREAM_FLIP, _STREAM_RANDAUGMENT, _STREAM_MIXUP = range(4)

RANDAUGMENT_OPERATIONS = 14
"""How many operations DALI's RandAugment suite has (checked where the decoding graph is built)."""


@dataclass(frozen=True)
class Draws:
    """What is done to the B images of a batch."""

    anchor: NDArray[np.int64]
    """[B, 2] top and left edge of the crop, pixels of the upright image."""
    shape: NDArray[np.int64]
    """[B, 2] height and width of the crop."""
    mirror: NDArray[np.int32]
    """[B] 1 mirrors left to right."""
    operations: NDArray[np.int32]
    """[B, L] indices into RandAugment's operations."""
    signs: NDArray[np.int32]
    """[B, L] 1 negates the operation's magnitude."""


def draw(
    settings: AugmentSettings,
    seed: int,
    epochs: NDArray[np.int64],
    ids: NDArray[np.int64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
) -> Draws:
    """Augmentation parameters of B samples; every argument after `seed` is an array of length B."""
    if settings.crop == "inception":
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_CROP, 4 * CROP_ATTEMPTS)
        anchor, shape = inception_crop(uniforms, widths, heights, settings.crop_area, settings.crop_aspect)
    elif settings.crop == "center":
        side = np.minimum(widths, heights)
        shape = np.stack([side, side], 1)
        anchor = (np.stack([heights, widths], 1) - shape) // 2
    else:
        shape = np.stack([heights, widths], 1)
        anchor = np.zeros_like(shape)
    mirror = np.zeros(len(ids), np.int32)
    if settings.flip:
        mirror = (counter_rng.uniform(seed, epochs, ids, _STREAM_FLIP, 1)[:, 0] < 0.5).astype(np.int32)
    layers = settings.randaugment_layers
    uniforms = (
        counter_rng.uniform(seed, epochs, ids, _STREAM_RANDAUGMENT, 2 * layers) if layers else np.zeros((len(ids), 0))
    )
    operations = (uniforms[:, :layers] * RANDAUGMENT_OPERATIONS).astype(np.int32)
    signs = (uniforms[:, layers:] < 0.5).astype(np.int32)
    return Draws(anchor, shape, mirror, operations, signs)


def inception_crop(
    uniforms: NDArray[np.float64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Crops of random area and aspect ratio ("Going deeper with convolutions", arXiv 1409.4842).

    The area is uniform over `area` (shares of the image) and the logarithm of width over height uniform over
    `aspect`; the first of `CROP_ATTEMPTS` tries that fits is taken, and if none does, the largest centred crop
    whose aspect ratio is allowed.

    Args:
        uniforms: [B, 4 * CROP_ATTEMPTS] numbers in [0, 1).
        widths, heights: [B] pixels.

    Returns:
        [B, 2] top and left edge, and [B, 2] height and width, in pixels.
    """
    tries = uniforms.reshape(len(uniforms), CROP_ATTEMPTS, 4)
    wide, high = widths[:, None].astype(np.float64), heights[:, None].astype(np.float64)
    areas = wide * high * (area[0] + (area[1] - area[0]) * tries[..., 0])
    low, up = np.log(aspect[0]), np.log(aspect[1])
    ratios = np.exp(low + (up - low) * tries[..., 1])
    crop_w, crop_h = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (crop_w >= 1) & (crop_h >= 1) & (crop_w <= wide) & (crop_h <= high)
    rows, first = np.arange(len(fits)), np.argmax(fits, axis=1)
    crop_w, crop_h = crop_w[rows, first], crop_h[rows, first]
    left = np.floor(tries[rows, first, 2] * (widths - crop_w + 1))
    top = np.floor(tries[rows, first, 3] * (heights - crop_h + 1))

    none = ~fits.any(axis=1)
    if none.any():
        fallback_w = np.minimum(widths, np.rint(heights * aspect[1]))
        fallback_h = np.minimum(heights, np.rint(widths / aspect[0]))
        crop_w, crop_h = np.where(none, fallback_w, crop_w), np.where(none, fallback_h, crop_h)
        left = np.where(none, (widths - crop_w) // 2, left)
        top = np.where(none, (heights - crop_h) // 2, top)
    return np.stack([top, left], 1).astype(np.int64), np.stack([crop_h, crop_w], 1).astype(np.int64)


def mixup_weight(alpha: float, seed: int, step: int) -> float:
    """The mixing weight of an optimizer step: one lambda a batch, max(lambda, 1 - lambda) of Beta(alpha, alpha).

    Every rank and micro-batch of the step draws the same one.
    """
    key = np.asarray([step], np.int64)
    bits = counter_rng.uniform(seed, np.zeros(1, np.int64), key, _STREAM_MIXUP, 2)[0]
    generator = np.random.Generator(np.random.Philox(key=[int(bits[0] * 2**53), int(bits[1] * 2**53)]))
    weight = float(generator.beta(alpha, alpha))
    return max(weight, 1 - weight)
