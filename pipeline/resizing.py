"""Resizing of training crops on the CPU, in torch: 0.6 CPU-ms an image where DALI's own operator takes 1.0."""

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
            pixels, target = (values.permute(2, 0, 1) for values in (torch.from_numpy(images[row]), self._pixels[row]))
            target.copy_(self._scaled(pixels, *target.shape[1:]))
            if self._extend:
                self._extend_border(pixels, target)

    def _scaled(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return F.interpolate(pixels[None], size=[height, width], mode=self._interpolation, antialias=self._antialias)[0]

    def _extend_border(self, pixels: torch.Tensor, target: torch.Tensor) -> None:
        """Make of `target`, whose weights torch has scaled to sum 1 inside the image, what the extended image gives.

        The weights that lie beyond a border go to its outermost pixel: along each axis the result is
        (1 - before - after) torch's + before first + after last, where first and last are the image's outermost lines,
        resized along the other axis.
        """
        height, width = pixels.shape[1:]
        side = target.shape[-1]
        rows, columns = (_beyond(length, side, self._interpolation) for length in (height, width))
        if columns is not None:
            _add_border(target, self._scaled(_outermost(pixels, 2), side, 2), columns, 2)
        if rows is not None:
            edges = self._scaled(_outermost(pixels, 1), 2, side)
            if columns is not None:
                _add_border(edges, _outermost(_outermost(pixels, 1), 2), columns, 2)
            _add_border(target, edges, rows, 1)


def _outermost(pixels: torch.Tensor, axis: int) -> torch.Tensor:
    """The first and the last line along an axis."""
    length = pixels.shape[axis]
    return torch.cat([pixels.narrow(axis, 0, 1), pixels.narrow(axis, length - 1, 1)], axis)


_Border = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _add_border(target: torch.Tensor, edges: torch.Tensor, border: _Border, axis: int) -> None:
    places, before, after = border
    shape = [1, 1, 1]
    shape[axis] = -1
    low, high = before.view(shape), after.view(shape)
    inner = target.index_select(axis, places).float()
    extended = (1 - low - high) * inner + low * edges.narrow(axis, 0, 1) + high * edges.narrow(axis, 1, 1)
    target.index_copy_(axis, places, extended.round_().clamp_(0, 255).to(torch.uint8))


@lru_cache(65536)
def _beyond(length: int, side: int, interpolation: Interpolation) -> _Border | None:
    """Where an antialiased filter that makes `side` of `length` pixels reads beyond them; None where it does not.

    Returns:
        Three tensors [K]: places from 0 to side - 1, shares of the filter before the first pixel and after the last.
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
    places, before, after = places[touched], before[touched], after[touched]
    return torch.from_numpy(places), torch.from_numpy(before).float(), torch.from_numpy(after).float()
