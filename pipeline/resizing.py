"""Resizing of training crops on the CPU, in torch: 0.3 CPU-ms an image where DALI's own operator takes 1.0."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Interpolation = Literal["bilinear", "bicubic"]


def is_ours(interpolation: Interpolation, antialias: bool) -> bool:
    """Whether `Resizer` has it: torch's bicubic without antialias is another one (a = -0.75) than everybody's."""
    return antialias or interpolation == "bilinear"


class Resizer:
    """Resizes a batch of crops, on 8-bit pixels: within one level of 255 of Pillow, and nearer to it than DALI.

    Args:
        batch: largest number of crops.
        side: height and width of the result, pixels.
        extend: beyond its border a crop counts as continued by its outermost pixels, as DALI and models/preprocess.py
            have it; false leaves out what lies beyond, as runs of the old rules did.
    """

    def __init__(
        self, batch: int, side: int, threads: int, interpolation: Interpolation, antialias: bool, extend: bool
    ) -> None:
        assert is_ours(interpolation, antialias)
        # Not made anew each time: fresh memory costs as much as filling it. DALI copies it before the next call.
        self._pixels = torch.empty((batch, side, side, 3), dtype=torch.uint8)
        self._threads, self._interpolation, self._antialias = threads, interpolation, antialias
        self._extend = extend and antialias  # the filter without antialias has no more than torch's clamping does
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vitforge-resize")

    def __call__(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """uint8 [H, W, 3], of any sizes -> uint8 [side, side, 3]."""
        # A list for each thread: handing over single images costs more than some of them.
        parts = [range(first, len(images), self._threads) for first in range(self._threads)]
        list(self._pool.map(lambda part: self._resize_some(images, part), parts))
        return list(self._pixels.numpy()[: len(images)])

    def _resize_some(self, images: list[NDArray[np.uint8]], rows: Iterable[int]) -> None:
        for row in rows:
            target = self._pixels[row]
            target.copy_(self._scaled(images[row], *target.shape[:2]))
            if self._extend:
                self._extend_border(images[row], target.numpy())

    def _scaled(self, pixels: NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        scaled = F.interpolate(image, size=[height, width], mode=self._interpolation, antialias=self._antialias)
        return scaled[0].permute(1, 2, 0)

    def _extend_border(self, pixels: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Make of `target`, whose weights torch has scaled to sum 1 inside the image, what the extended image gives.

        The weights that lie beyond a border go to its outermost pixel: along each axis the result is
        (1 - before - after) torch's + before first + after last, where first and last are the image's outermost lines,
        resized along the other axis.
        """
        # In NumPy: on so few numbers an operation of torch costs three times as much.
        height, width = pixels.shape[:2]
        side = len(target)
        rows, columns = (_beyond(length, side, self._interpolation) for length in (height, width))
        if columns is not None:
            left_right = self._scaled(np.ascontiguousarray(pixels[:, [0, -1]]), side, 2).numpy()
            _add_border(target.swapaxes(0, 1), left_right.swapaxes(0, 1), columns)
        if rows is not None:
            edges = self._scaled(pixels[[0, -1]], 2, side).numpy()
            if columns is not None:
                _add_border(edges.swapaxes(0, 1), pixels[[0, -1]][:, [0, -1]].swapaxes(0, 1), columns)
            _add_border(target, edges, rows)


_Border = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def _add_border(target: NDArray[np.uint8], edges: NDArray[np.uint8], border: _Border) -> None:
    """Along the first axis of `target`, [S, ...], what lies beyond its ends is `edges`, [2, ...]."""
    places, *shares = border
    inside, before, after = (share[:, None, None] for share in shares)
    extended = target[places] * inside
    extended += edges[0] * before
    extended += edges[1] * after
    target[places] = np.rint(extended, out=extended).clip(0, 255, out=extended)


@lru_cache(65536)
def _beyond(length: int, side: int, interpolation: Interpolation) -> _Border | None:
    """Where an antialiased filter that makes `side` of `length` pixels reads beyond them; None where it does not.

    Returns:
        Four arrays [K]: places from 0 to side - 1; shares of the filter inside, before the first pixel, after the last.
    """
    scale = length / side
    if interpolation == "bilinear" and scale <= 1:
        return None  # there is one pixel inside, with all of the weight
    stretch, radius = max(scale, 1.0), 1 if interpolation == "bilinear" else 2
    reach = int(np.ceil(radius * stretch)) + 1
    centers = (np.arange(side) + 0.5) * scale
    places = np.flatnonzero((centers < reach) | (centers > length - reach))
    pixels = np.arange(-reach, length + reach)
    # Only those near either end: a wide image has many in between.
    pixels = pixels[(pixels < 2 * reach) | (pixels >= length - 2 * reach)]
    distance = np.abs(pixels[None, :] + 0.5 - centers[places, None]) / stretch
    if interpolation == "bilinear":
        weights = np.maximum(1 - distance, 0)
    else:  # Keys' cubic, a = -0.5
        outer = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = np.where(distance < 1, (1.5 * distance - 2.5) * distance**2 + 1, np.where(distance < 2, outer, 0))
    weights /= weights.sum(axis=1, keepdims=True)
    before, after = weights[:, pixels < 0].sum(axis=1), weights[:, pixels >= length].sum(axis=1)
    touched = (before != 0) | (after != 0)
    if not touched.any():
        return None
    low, high = before[touched].astype(np.float32), after[touched].astype(np.float32)
    return places[touched], 1 - low - high, low, high
