"""How large the images of a corpus are: exact counts in bounded memory, for any number of images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus import Corpus

_ROWS_AT_ONCE = 1 << 20
_FEW_VALUES = 10
"""Up to so many different values each gets a bar of its own."""


class Bar(NamedTuple):
    """A bar of a histogram: the images with low <= value < high."""

    low: float
    high: float
    """Equal to `low` for a bar of one value; infinite for the last one if it takes all that is larger."""
    images: int


@dataclass(frozen=True)
class Distribution:
    """How many images have which value of one quantity."""

    name: str
    unit: str
    step: float
    """What one place of `counts` stands for."""
    counts: NDArray[np.int64]
    """counts[k]: images with a value from k * step to (k + 1) * step."""

    def quantile(self, share: float) -> float:
        """The value below or at which this share of the images (0 to 1) lies."""
        ends = np.cumsum(self.counts)
        return float(np.searchsorted(ends, max(share * ends[-1], 1))) * self.step

    def bar_width(self, most: int = 12) -> float:
        """What a bar of `bars(most)` spans, on the axis of values; the outermost ones may hold more."""
        low, high = self._middle()
        return max(_round_up((high - low) / (most - 2)), self.step)

    def _middle(self) -> tuple[float, float]:
        """Where bars lie. The outermost hundredths go into the first and the last bar: a single giant image would leave
        one bar otherwise."""
        return self.quantile(0.01), self.quantile(0.99)

    def bars(self, most: int = 12) -> list[Bar]:
        """A histogram of at most about this many bars on round numbers; single values where there are few."""
        values = np.flatnonzero(self.counts)
        if len(values) <= _FEW_VALUES:
            return [Bar(value * self.step, value * self.step, int(self.counts[value])) for value in values]
        low, high, width = *self._middle(), self.bar_width(most)
        edges = np.arange(math.floor(low / width), math.floor(high / width) + 2) * width
        places = np.minimum(np.round(edges[1:] / self.step).astype(np.int64), len(self.counts))
        ends = np.concatenate([[0], np.cumsum(self.counts)])[places]
        ends[-1] = self.counts.sum()
        inner = np.diff(ends, prepend=0)
        lows, highs = edges[:-1].tolist(), edges[1:].tolist()
        if values[0] * self.step < lows[0]:
            lows[0] = 0.0
        if (values[-1] + 1) * self.step > highs[-1]:
            highs[-1] = math.inf
        return [Bar(*bar) for bar in zip(lows, highs, inner.tolist(), strict=True)]


def measure(corpus: Corpus) -> list[Distribution]:
    """Encoded size, shorter side and aspect ratio (at most 10) of the images, in one pass over the index."""
    quantities: list[tuple[str, str, float, Callable[[Any], NDArray[np.int64]]]] = [
        ("encoded size", "kB", 0.1, lambda rows: rows["length"].astype(np.int64) // 100),
        ("shorter side", "pixels", 1, lambda rows: np.minimum(rows["width"], rows["height"]).astype(np.int64)),
        (
            "width / height", "", 0.01,
            lambda rows: np.minimum(np.floor(100.0 * rows["width"] / rows["height"]), 1000).astype(np.int64),
        ),
    ]  # fmt: skip
    totals = [np.zeros(1, np.int64) for _ in quantities]
    for start in range(0, corpus.num_samples, _ROWS_AT_ONCE):
        rows = corpus.index[start : start + _ROWS_AT_ONCE]
        for place, (_, _, _, value_of) in enumerate(quantities):
            found = np.bincount(value_of(rows), minlength=len(totals[place]))
            found[: len(totals[place])] += totals[place]
            totals[place] = found
    return [
        Distribution(name, unit, step, counts) for (name, unit, step, _), counts in zip(quantities, totals, strict=True)
    ]


def _round_up(value: float) -> float:
    """The next number of the form 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 0
    power = 10.0 ** math.floor(math.log10(value))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9)))
