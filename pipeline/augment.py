"""Augmentation parameters as pure functions of (seed, epoch, sample id); of mixing, of (seed, data window).

They come from a counter-based generator, so that a sample of an epoch gets the same crop, flip and operations
on whichever rank, in whichever batch, before or after a restart. DALI is fed `Draws` and applies them
(pipeline/decoding.py); what comes after it is in pipeline/pixels.py.

`rules` is data.rules: 2, or 1 for what runs drew that began under the old ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep import counter_rng
from pipeline.crops import ATTEMPTS, draw_tensorflow_crop, inception_crop, rectangles
from pipeline.data_config import AugmentSettings
from pipeline.spaces import MAGNITUDES, space_of

RULES = 2
"""Of what begins now."""
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
    operations: "OperationDraws | None"
    """Those that DALI carries out: under the old rules."""


@dataclass(frozen=True)
class OperationDraws:
    """RandAugment's or TrivialAugment's L operations on each of B images (pipeline/spaces.py)."""

    operations: NDArray[np.int32]
    """[B, L] indices into the space's operations."""
    magnitudes: NDArray[np.int32]
    """[B, L] on the space's scale."""
    signs: NDArray[np.int32]
    """[B, L] 1 negates the parameter of an operation that has a direction."""
    centres: NDArray[np.float64]
    """[B, L, 2] of Cutout, down and across, shares of the side in [0, 1)."""

    def __getitem__(self, rows: slice) -> "OperationDraws":
        return OperationDraws(self.operations[rows], self.magnitudes[rows], self.signs[rows], self.centres[rows])


@dataclass(frozen=True)
class ColorDraws:
    """What is done to the colours of B images (pipeline/pixels.py)."""

    three: NDArray[np.int64] | None
    """[B] GRAY, SOLARISE or BLUR of 3-Augment; None without it."""
    sigma: NDArray[np.float32]
    """[B] standard deviation of the blur, pixels."""
    jitter: NDArray[np.float32] | None
    """[B, 3] factors of brightness, contrast and saturation; None without colour jitter."""
    order: NDArray[np.int64] | None
    """[B, 3] which of these three comes first, second, third; None under the old rules, which do all three at once."""


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
    rules: int = RULES,
) -> Draws:
    """Augmentation parameters of B samples; every argument from `epochs` to `heights` is an array of length B."""
    if settings.crop == "tensorflow":
        bounds = {"area": settings.crop_area, "aspect": settings.crop_aspect}
        anchor, shape = draw_tensorflow_crop(seed, epochs, ids, _STREAM_CROP, widths, heights, **bounds)
    elif settings.crop in ("torchvision", "inception"):
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
    operations = draw_operations(settings, seed, epochs, ids) if dali_operates(settings, rules) else None
    return Draws(anchor, shape, mirror, operations)


def dali_operates(settings: AugmentSettings, rules: int) -> bool:
    """Whether RandAugment's or TrivialAugment's operations are DALI's, not those of pipeline/operations.py."""
    return rules == 1 and (settings.randaugment_layers > 0 or settings.trivialaugment)


def draw_operations(
    settings: AugmentSettings, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]
) -> OperationDraws | None:
    """Operations of B samples, or None if the settings have none."""
    space = space_of(settings, side=1)
    if space is None:
        return None
    if settings.trivialaugment:
        layers = 1
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_TRIVIALAUGMENT, 3)
        magnitudes = (uniforms[:, 2:] * MAGNITUDES).astype(np.int32)
        centres = np.zeros((len(ids), layers, 2))
    else:
        chosen = settings.randaugment
        layers, magnitude = settings.randaugment_layers, settings.randaugment_magnitude
        if chosen.kind != "none":
            layers, magnitude = chosen.layers, chosen.magnitude
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_RANDAUGMENT, 4 * layers)
        magnitudes = np.full((len(ids), layers), magnitude, np.int32)
        centres = uniforms[:, 2 * layers :].reshape(-1, layers, 2)
    operations = (uniforms[:, :layers] * len(space.operations)).astype(np.int32)
    signs = (uniforms[:, layers : 2 * layers] < 0.5).astype(np.int32)
    return OperationDraws(operations, magnitudes, signs, centres)


def draw_colors(
    settings: AugmentSettings, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], rules: int = RULES
) -> ColorDraws | None:
    """Colour operations of B samples, or None if the settings have none.

    3-Augment (arXiv 2204.07118, section 3.3) takes one of its three with equal chance. The factors of colour jitter are
    uniform over [1 - s, 1 + s], s the setting, and their order is random, as in torchvision's ColorJitter.
    """
    three, jitter, order, sigma = None, None, None, np.zeros(len(ids), np.float32)
    if settings.three_augment:
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_THREE_AUGMENT, 2)
        three = (uniforms[:, 0] * 3).astype(np.int64)
        sigma = (BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * uniforms[:, 1]).astype(np.float32)
    if settings.color_jitter:
        uniforms = counter_rng.uniform(seed, epochs, ids, _STREAM_JITTER, 6)
        jitter = (1 + settings.color_jitter * (2 * uniforms[:, :3] - 1)).astype(np.float32)
        order = np.argsort(uniforms[:, 3:], axis=1, kind="stable") if rules > 1 else None
    return None if three is None and jitter is None else ColorDraws(three, sigma, jitter, order)


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
    anchors, shapes, fits = rectangles(uniforms[:, 3:], sides, sides, settings.erasing_area, (1 / high, 1 / low))
    erasures = []
    for row in np.flatnonzero(fits & (uniforms[:, 0] < settings.erasing)).tolist():
        where = Rectangle(*anchors[row].tolist(), *shapes[row].tolist())
        # The raw output of a bit generator, other than numpy's distributions, stays the same in all versions.
        words = _philox(uniforms[row, 1:3]).random_raw(-(-3 * where.height * where.width // 8))
        noise = words.astype("<u8").view(np.uint8)[: 3 * where.height * where.width]
        erasures.append(Erasure(row, where, noise.reshape(3, where.height, where.width)))
    return erasures


def draw_mixing(settings: AugmentSettings, seed: int, window: int, side: int, rules: int = RULES) -> Mixing | None:
    """How the images of a data window (what one optimizer step reads) are mixed; None if the settings mix nothing.

    One choice, weight and box for all pairs of a step: big_vision and timm's default mode (DeiT, DeiT III) draw them
    once a batch too. With both kinds, each has a chance of one half (timm's `switch_prob`).
    Every rank and micro-batch of the step draws the same.

    Args:
        side: height and width of the images, pixels.
    """
    if not settings.mixes:
        return None
    uniforms = counter_rng.uniform(seed, 0, np.asarray([window], np.int64), _STREAM_CUTMIX, 5 + counter_rng.FOR_BETA)[0]
    if settings.mixup and not (settings.cutmix and uniforms[0] < 0.5):
        return Mixing(mixup_weight(settings.mixup, seed, window, rules), None)
    if rules > 1:
        kept = counter_rng.beta(settings.cutmix, uniforms[5:])
    else:
        kept = float(np.random.Generator(_philox(uniforms[1:3])).beta(settings.cutmix, settings.cutmix))
    box = cutmix_box(kept, float(uniforms[3]), float(uniforms[4]), side)
    return Mixing(1 - box.height * box.width / side**2, box)


def mixup_weight(alpha: float, seed: int, window: int, rules: int = RULES) -> float:
    """Mixup's weight for a data window: max(lambda, 1 - lambda), lambda from Beta(alpha, alpha).

    The larger of the two, as in big_vision; where pairs mix both ways it makes no other images, only orders them.
    """
    uniforms = counter_rng.uniform(seed, 0, np.asarray([window], np.int64), _STREAM_MIXUP, counter_rng.FOR_BETA)[0]
    if rules > 1:
        weight = counter_rng.beta(alpha, uniforms)
    else:  # other versions of numpy may draw other numbers: NEP 19 keeps no distribution of Generator as it is
        weight = float(np.random.Generator(_philox(uniforms[:2])).beta(alpha, alpha))
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
