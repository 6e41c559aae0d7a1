"""Augmentation parameters as pure functions of (seed, epoch, sample id); of mixing, of (seed, data window).

They come from a counter-based generator, so that a sample of an epoch gets the same crop, flip and operations
on whichever rank, in whichever batch, before or after a restart. DALI is fed `Draws` and applies them
(pipeline/decoding.py); what comes after it is in pipeline/pixels.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep import counter_rng
from pipeline.data_config import AugmentSettings

ATTEMPTS = 10
"""Tries of a random rectangle before the fallback, as usual since the first published crops."""
# Every kind of draw has a stream of its own, so that adding one kind leaves the others as they were.
(
    _STREAM_CROP,
    _STREAM_FLIP,
    _STREAM_RANDAUGMENT,
    _STREAM_MIXUP,
    _STREAM_TRIVIALAUGMENT,
    _STREAM_THREE_AUGMENT,
    _STREAM_JITTER,
    _STREAM_ERASING,
    _STREAM_CUTMIX,
) = range(9)

OPERATIONS = 14
"""How many operations DALI's RandAugment and TrivialAugment have (checked where the decoding graph is built)."""
MAGNITUDES = 31
"""Strengths that TrivialAugment draws from, 0 to 30, as published; RandAugment's scale ends at 30 too."""

GRAY, SOLARISE, BLUR = range(3)
BLUR_SIGMA = (0.1, 2.0)
"""Pixels; from the released code of DeiT III."""


@dataclass(frozen=True)
class Draws:
    """What DALI does to the B images of a batch."""

    anchor: NDArray[np.int64]
    """[B, 2] top and left edge of the crop, pixels of the upright image."""
    shape: NDArray[np.int64]
    """[B, 2] height and width of the crop."""
    mirror: NDArray[np.int32]
    """[B] 1 mirrors left to right."""
    operations: NDArray[np.int32]
    """[B, L] indices into the operations of RandAugment or TrivialAugment."""
    magnitudes: NDArray[np.int32]
    """[B, L] their strengths, 0 to 30."""
    signs: NDArray[np.int32]
    """[B, L] 1 negates the operation's magnitude."""


@dataclass(frozen=True)
class ColorDraws:
    """What is done to the colours of B images (pipeline/pixels.py)."""

    three: NDArray[np.int64] | None
    """[B] GRAY, SOLARISE or BLUR of 3-Augment; None without it."""
    sigma: NDArray[np.float32]
    """[B] standard deviation of the blur, pixels."""
    jitter: NDArray[np.float32] | None
    """[B, 3] factors of brightness, contrast and saturation; None without colour jitter."""


@dataclass(frozen=True)
class Rectangle:
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Erasure:
    """A rectangle of one image that becomes noise."""

    row: int
    """Which image of the batch."""
    where: Rectangle
    noise: NDArray[np.uint8]
    """[3, height, width]."""


@dataclass(frozen=True)
class Mixing:
    """How the pairs of one optimizer step are mixed."""

    weight: float
    """Share of an image's own label."""
    box: Rectangle | None
    """What comes from the partner (cutmix); None blends the whole images (mixup)."""


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
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_CROP, 4 * ATTEMPTS)
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
    magnitudes = np.full((len(ids), layers), settings.randaugment_magnitude, np.int32)
    uniforms = np.zeros((len(ids), 0))
    if layers:
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_RANDAUGMENT, 2 * layers)
    elif settings.trivialaugment:
        layers = 1
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_TRIVIALAUGMENT, 3)
        magnitudes = (uniforms[:, 2:] * MAGNITUDES).astype(np.int32)
    operations = (uniforms[:, :layers] * OPERATIONS).astype(np.int32)
    signs = (uniforms[:, layers : 2 * layers] < 0.5).astype(np.int32)
    return Draws(anchor, shape, mirror, operations, magnitudes, signs)


def inception_crop(
    uniforms: NDArray[np.float64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Crops of random area and aspect ratio ("Going deeper with convolutions", arXiv 1409.4842).

    The area is uniform over `area` (shares of the image) and the logarithm of width over height uniform over
    `aspect`; the first of `ATTEMPTS` tries that fits is taken, and if none does, the largest centred crop
    whose aspect ratio is allowed.

    Args:
        uniforms: [B, 4 * ATTEMPTS] numbers in [0, 1).
        widths, heights: [B] pixels.

    Returns:
        [B, 2] top and left edge, and [B, 2] height and width, in pixels.
    """
    anchor, shape, fits = _rectangles(uniforms, widths, heights, area, aspect)
    none = ~fits
    if none.any():
        fallback_w = np.minimum(widths, np.rint(heights * aspect[1]))
        fallback_h = np.minimum(heights, np.rint(widths / aspect[0]))
        fallback = np.stack([fallback_h, fallback_w], 1).astype(np.int64)
        shape = np.where(none[:, None], fallback, shape)
        anchor = np.where(none[:, None], (np.stack([heights, widths], 1) - fallback) // 2, anchor)
    return anchor, shape


def _rectangles(
    uniforms: NDArray[np.float64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """The first of the tried rectangles that fits: [B, 2] top and left, [B, 2] height and width, [B] whether any did.

    `aspect` is width over height; the rest is as in `inception_crop`.
    """
    tries = uniforms.reshape(len(uniforms), ATTEMPTS, 4)
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
    anchor, shape = np.stack([top, left], 1).astype(np.int64), np.stack([crop_h, crop_w], 1).astype(np.int64)
    return anchor, shape, fits.any(axis=1)


def draw_colors(
    settings: AugmentSettings, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]
) -> ColorDraws | None:
    """Colour operations of B samples, or None if the settings have none.

    3-Augment (arXiv 2204.07118, section 3.3) takes one of its three with equal chance. The factors of colour jitter are
    uniform over [1 - s, 1 + s], s the setting.
    """
    three, jitter, sigma = None, None, np.zeros(len(ids), np.float32)
    if settings.three_augment:
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_THREE_AUGMENT, 2)
        three = (uniforms[:, 0] * 3).astype(np.int64)
        sigma = (BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * uniforms[:, 1]).astype(np.float32)
    if settings.color_jitter:
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_JITTER, 3)
        jitter = (1 + settings.color_jitter * (2 * uniforms - 1)).astype(np.float32)
    return None if three is None and jitter is None else ColorDraws(three, sigma, jitter)


def draw_erasures(
    settings: AugmentSettings, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], side: int
) -> list[Erasure]:
    """The rectangles that random erasing takes out of B images of side x side pixels.

    Area and place as in algorithm 1 of arXiv 1708.04896 with noise uniform over 0 to 255 (its RE-R, the best one); the
    logarithm of the aspect ratio is uniform, as in timm and torchvision, so that wide and tall are equally frequent.
    """
    if not settings.erasing:
        return []
    uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_ERASING, 4 * ATTEMPTS + 3)
    low, high = settings.erasing_aspect
    sides = np.full(len(ids), side)
    anchors, shapes, fits = _rectangles(uniforms[:, 3:], sides, sides, settings.erasing_area, (1 / high, 1 / low))
    erasures = []
    for row in np.flatnonzero(fits & (uniforms[:, 0] < settings.erasing)).tolist():
        where = Rectangle(*anchors[row].tolist(), *shapes[row].tolist())
        # The raw output of a bit generator, other than numpy's distributions, stays the same in all versions.
        words = _philox(uniforms[row, 1:3]).random_raw(-(-3 * where.height * where.width // 8))
        noise = words.astype("<u8").view(np.uint8)[: 3 * where.height * where.width]
        erasures.append(Erasure(row, where, noise.reshape(3, where.height, where.width)))
    return erasures


def draw_mixing(settings: AugmentSettings, seed: int, window: int, side: int) -> Mixing | None:
    """How the images of a data window (what one optimizer step reads) are mixed; None if the settings mix nothing.

    One choice, weight and box for all pairs of a step: big_vision and timm's default mode (DeiT, DeiT III) draw them
    once a batch too. With both kinds, each has a chance of one half (timm's `switch_prob`).
    Every rank and micro-batch of the step draws the same.

    Args:
        side: height and width of the images, pixels.
    """
    if not settings.mixes:
        return None
    uniforms = counter_rng.uniform(seed, 0, np.asarray([window], np.int64), _STREAM_CUTMIX, 5)[0]
    if settings.mixup and not (settings.cutmix and uniforms[0] < 0.5):
        return Mixing(mixup_weight(settings.mixup, seed, window), None)
    kept = float(np.random.Generator(_philox(uniforms[1:3])).beta(settings.cutmix, settings.cutmix))
    box = cutmix_box(kept, float(uniforms[3]), float(uniforms[4]), side)
    return Mixing(1 - box.height * box.width / side**2, box)


def mixup_weight(alpha: float, seed: int, window: int) -> float:
    """Mixup's weight for a data window: max(lambda, 1 - lambda), lambda from Beta(alpha, alpha).

    The larger of the two, as in big_vision; where pairs mix both ways it makes no other images, only orders them.
    """
    bits = counter_rng.uniform(seed, 0, np.asarray([window], np.int64), _STREAM_MIXUP, 2)[0]
    weight = float(np.random.Generator(_philox(bits)).beta(alpha, alpha))
    return max(weight, 1 - weight)


def cutmix_box(kept: float, x: float, y: float, side: int) -> Rectangle:
    """CutMix's box (arXiv 1905.04899, equation 2): the image's aspect ratio, a share 1 - kept of its area, its centre
    uniform over the image, cut off at the border. Its true area decides how labels mix.

    Args:
        kept: the weight drawn from Beta, 0 to 1.
        x, y: centre, each in [0, 1).
    """
    cut = int(side * np.sqrt(1 - kept))
    left, right = (int(np.clip(int(x * side) + way * (cut // 2), 0, side)) for way in (-1, 1))
    top, bottom = (int(np.clip(int(y * side) + way * (cut // 2), 0, side)) for way in (-1, 1))
    return Rectangle(top, left, bottom - top, right - left)


def _philox(uniforms: NDArray[np.float64]) -> np.random.Philox:
    """numpy's counter-based generator under a key made of two of our numbers."""
    return np.random.Philox(key=[int(value * 2**53) for value in uniforms])
