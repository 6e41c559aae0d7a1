"""Random rectangles: the training crops of TensorFlow and of torchvision, as functions of uniform numbers."""

import numpy as np
from numpy.typing import NDArray

from data_prep import counter_rng

ATTEMPTS = 10
"""Tries of a random rectangle before the fallback, as usual since the first published crops."""
_TENSORFLOW_ATTEMPTS = 100
"""`max_attempts` of `tf.image.sample_distorted_bounding_box`, by default and in the sources of our recipes."""

Boxes = tuple[NDArray[np.int64], NDArray[np.int64]]
"""[B, 2] top and left edge, and [B, 2] height and width, pixels."""


def inception_crop(
    uniforms: NDArray[np.float64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Boxes:
    """Crops of random area and aspect ratio, with the density of torchvision's RandomResizedCrop.

    The area is uniform over `area` (shares of the image) and the logarithm of width over height uniform over
    `aspect`; the first of `ATTEMPTS` tries that fits is taken, and if none does, the largest centred crop
    whose aspect ratio is allowed. ("Going deeper with convolutions", arXiv 1409.4842, gives the idea, not the density.)

    Args:
        uniforms: [B, 4 * ATTEMPTS] numbers in [0, 1).
        widths, heights: [B] pixels.
    """
    anchor, shape, fits = rectangles(uniforms, widths, heights, area, aspect)
    none = ~fits
    if none.any():
        fallback_w = np.minimum(widths, np.rint(heights * aspect[1]))
        fallback_h = np.minimum(heights, np.rint(widths / aspect[0]))
        fallback = np.stack([fallback_h, fallback_w], 1).astype(np.int64)
        shape = np.where(none[:, None], fallback, shape)
        anchor = np.where(none[:, None], (np.stack([heights, widths], 1) - fallback) // 2, anchor)
    return anchor, shape


def rectangles(
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


def draw_tensorflow_crop(
    seed: int,
    epochs: NDArray[np.int64],
    ids: NDArray[np.int64],
    stream: int,
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Boxes:
    """Crops of B samples as `tf.image.sample_distorted_bounding_box` takes them, the whole image its only box and
    `min_object_covered` 0: what the released ViT code and big_vision call the inception crop.

    A try takes four numbers of the sample's stream, so that its n-th try uses the same ones however many it needs.
    After `_TENSORFLOW_ATTEMPTS` of them it is the whole image.

    Args:
        epochs, ids, widths, heights: [B].
        area: least and most, shares of the image.
        aspect: least and most, width over height.
    """
    shape = np.stack([heights, widths], 1).astype(np.int64)
    anchor = np.zeros_like(shape)
    # Nearly every image is done at its first try, and numbers for a hundred would cost more than its crop.
    left = np.arange(len(ids))
    for attempts in (1, _TENSORFLOW_ATTEMPTS):
        if not len(left):
            break
        uniforms = counter_rng.uniform(seed, epochs[left], ids[left], stream, 4 * attempts)
        tried_anchor, tried_shape, fits = tensorflow_rectangles(uniforms, widths[left], heights[left], area, aspect)
        anchor[left[fits]], shape[left[fits]] = tried_anchor[fits], tried_shape[fits]
        left = left[~fits]
    return anchor, shape


def tensorflow_rectangles(
    uniforms: NDArray[np.float64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """`GenerateRandomCrop` of TensorFlow's sample_distorted_bounding_box_op.cc, the first of the tries that fits.

    The aspect ratio is uniform; so is the height, over those whole numbers that keep the area's bounds and fit into the
    image. The area's density therefore falls as 1/sqrt(area). A box that could move never reaches the last row or
    column of places: TensorFlow draws below `height - crop height`.

    Args:
        uniforms: [B, 4 * tries] numbers in [0, 1): aspect ratio, height, top, left of each try.

    Returns:
        [B, 2] top and left, [B, 2] height and width, [B] whether any try fitted.
    """
    tries = uniforms.reshape(len(uniforms), -1, 4)
    wide, high = widths[:, None].astype(np.float64), heights[:, None].astype(np.float64)
    ratios = aspect[0] + (aspect[1] - aspect[0]) * tries[..., 0]
    least, most = area[0] * wide * high, area[1] * wide * high
    low, up = np.rint(np.sqrt(least / ratios)), np.rint(np.sqrt(most / ratios))
    # The largest height whose rounded width fits.
    widest = np.trunc((wide + 0.5 - 1e-7) / ratios)
    widest -= np.rint(widest * ratios) > wide
    up = np.minimum(np.where(np.rint(up * ratios) > wide, widest, up), high)
    low = np.minimum(low, up)
    crop_h = low + np.floor(tries[..., 1] * (up - low + 1))
    # Rounding may miss the bounds by a pixel: one more, then one less, as there.
    crop_h += np.rint(crop_h * ratios) * crop_h < least
    crop_h -= np.rint(crop_h * ratios) * crop_h > most
    crop_w = np.rint(crop_h * ratios)
    size = crop_w * crop_h
    fits = (size >= least) & (size <= most) & (crop_w > 0) & (crop_h > 0) & (crop_w <= wide) & (crop_h <= high)
    rows, first = np.arange(len(fits)), np.argmax(fits, axis=1)
    crop_w, crop_h = crop_w[rows, first], crop_h[rows, first]
    top, left = (
        np.floor(tries[rows, first, 2] * (heights - crop_h)),
        np.floor(tries[rows, first, 3] * (widths - crop_w)),
    )
    anchor, shape = np.stack([top, left], 1).astype(np.int64), np.stack([crop_h, crop_w], 1).astype(np.int64)
    return anchor, shape, fits.any(axis=1)
