"""What a run trains on: one corpus, or several mixed by weight.

Which part stands at which global position follows from the weights alone, by cumulative quota in whole numbers:
among the first n positions a part has its weight's share of n, to within less than one for two parts and less than
`Schedule.bound` for more. The k-th of a part's positions shows the k-th sample of that part's own order
(data_prep/order.py), so that every part is gone through in permutations without gap or repetition, each at its own
pace. No state is kept: any rank finds any position at once.

An epoch of a mixture is as many images as its parts hold together: in it a part of weight w that holds n of the N
images is gone through w * N / n times.

Samples of a mixture are numbered through: those of the first part, then those of the second, and so on.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError
from data_prep.order import SampleOrder, seed_of_part, substitute

_MOST = 2**31
"""Sum of the whole-numbered weights: products with it fit 64 bits."""


class Schedule:
    """Which of K parts stands at which position.

    The parts are split in two halves, each half again, and so on: a half takes floor(share * n) of the first n
    positions of its parent. The rounding of every level adds less than one to a part's distance from its share.

    Attributes:
        bound: every prefix has less than this many positions of a part more or fewer than its share.

    Args:
        weights: one for each part, above 0; only their ratios count.

    Raises:
        ValueError: a weight that is not positive, or weights whose ratio takes too large numbers.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        fractions = [Fraction(weight) for weight in weights]
        if not fractions or min(fractions) <= 0:
            raise ValueError(f"weights must be above 0, got {', '.join(map(str, fractions))}")
        scale = math.lcm(*(weight.denominator for weight in fractions))
        whole = [int(weight * scale) for weight in fractions]
        divisor = math.gcd(*whole)
        self.weights = [weight // divisor for weight in whole]
        if sum(self.weights) >= _MOST:
            raise ValueError(
                f"the weights {', '.join(str(float(weight)) for weight in fractions)} stand in a ratio of too large "
                f"numbers ({' : '.join(map(str, self.weights))}): give them with fewer digits"
            )
        self.bound = max(1, (len(self.weights) - 1).bit_length())

    def locate(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(parts int64 [B], turns int64 [B]) of global positions (int64 [B], not negative).

        Position p is the turns-th (from 0) of its part's.
        """
        at = np.asarray(positions, dtype=np.int64)
        if at.size and at.min() < 0:
            raise ValueError(f"positions must not be negative, got {at.min()}")
        parts, turns = np.empty_like(at), np.empty_like(at)
        self._split(0, len(self.weights), np.arange(len(at)), at, parts, turns)
        return parts, turns

    def counts(self, position: int) -> list[int]:
        """How many of the positions before a position are of each part."""
        found = []

        def split(first: int, last: int, count: int) -> None:
            if last - first == 1:
                found.append(count)
                return
            middle = (first + last) // 2
            left = count * sum(self.weights[first:middle]) // sum(self.weights[first:last])
            split(first, middle, left)
            split(middle, last, count - left)

        split(0, len(self.weights), position)
        return found

    def _split(
        self,
        first: int,
        last: int,
        places: NDArray[np.int64],
        at: NDArray[np.int64],
        parts: NDArray[np.int64],
        turns: NDArray[np.int64],
    ) -> None:
        if last - first == 1:
            parts[places], turns[places] = first, at
            return
        middle = (first + last) // 2
        left, total = sum(self.weights[first:middle]), sum(self.weights[first:last])
        before = _floor_share(at, left, total)
        goes_left = _floor_share(at + 1, left, total) > before
        self._split(first, middle, places[goes_left], before[goes_left], parts, turns)
        self._split(middle, last, places[~goes_left], (at - before)[~goes_left], parts, turns)


def _floor_share(count: NDArray[np.int64], part: int, total: int) -> NDArray[np.int64]:
    """floor(count * part / total), exactly: neither product leaves 64 bits."""
    return count // total * part + count % total * part // total


class MixedOrder:
    """Which sample stands at which global position of training.

    Args:
        mixture: what is read.
        seed: of the run.
        windows: of each part, in shards; 0 permutes freely (`SampleOrder`).
    """

    def __init__(self, mixture: "Mixture", seed: int, windows: Sequence[int]) -> None:
        assert len(windows) == len(mixture.parts)
        self._schedule, self._first_ids = mixture.schedule, mixture.first_ids
        self.parts = [
            SampleOrder(part.num_samples, seed_of_part(seed, number), part.shard_sizes, window)
            for number, (part, window) in enumerate(zip(mixture.parts, windows, strict=True))
        ]

    def ids(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples at global positions (int64 [B], not negative, in any order).

        Returns:
            (epochs int64 [B], ids int64 [B]): which epoch of its part a sample is shown in, and its number in the
            mixture.
        """
        parts, turns = self._schedule.locate(positions)
        epochs, ids = np.empty_like(turns), np.empty_like(turns)
        for part in np.unique(parts):
            here = parts == part
            epochs[here], own = self.parts[part].ids(turns[here])
            ids[here] = own + self._first_ids[part]
        return epochs, ids

    def window_at(self, part: int, position: int) -> tuple[int, int]:
        """(epoch, window) that a part stands in at a position."""
        return self.parts[part].window_at(self._schedule.counts(position)[part])

    def shards_from(self, part: int, position: int, last: int, count: int) -> list[int]:
        """The next shards that a part with windows needs between two positions (`SampleOrder.shards_from`)."""
        now, end = self._schedule.counts(position)[part], self._schedule.counts(last)[part]
        return self.parts[part].shards_from(now, max(now, end), count)


class Mixture:
    """Corpora to train on, read as if they were one; safe to use from several threads.

    Attributes:
        parts: the corpora.
        num_samples: N, the samples of all; an epoch is as many.
        first_ids: int64 [parts + 1]; the samples of part k are first_ids[k]:first_ids[k + 1].
        classes: names of the classes, in the order of their numbers. Merged: those of the first part, then those of
            the second that the first does not have, and so on. Separate: PART:NAME, part after part.
        names: what to call the classes before people.
        class_counts: images of each class, over all parts.
        class_shares: float64 [classes], how likely an image that comes has each class.
        label_kind: multi if any part has many labels an image.

    Args:
        parts: at least one.
        weights: of the parts, above 0; only their ratios count. By default all are equal.
        classes: classes of the same name are one (merge), or every part keeps its own (separate).
        names: of the parts, for separate classes; by default those of their folders.
        known: the classes with their numbers, instead of those that the parts have.

    Raises:
        CorpusError: weights that cannot be, two parts of the same name, or a class that is not known.
    """

    def __init__(
        self,
        parts: Sequence[Corpus],
        weights: Sequence[Fraction | int] | None = None,
        classes: Literal["merge", "separate"] = "merge",
        names: Sequence[str] | None = None,
        known: Sequence[str] | None = None,
    ) -> None:
        self.parts = list(parts)
        try:
            self.schedule = Schedule(weights or [1] * len(self.parts))
        except ValueError as error:
            raise CorpusError(f"data.mixture: {error}") from error
        self.first_ids = np.concatenate([[0], np.cumsum([part.num_samples for part in self.parts], dtype=np.int64)])
        self.num_samples = int(self.first_ids[-1])
        self.label_kind: Literal["single", "multi"] = (
            "multi" if any(part.label_kind == "multi" for part in self.parts) else "single"
        )
        self._mode, self._part_names = classes, list(names or [part.name for part in self.parts])
        if classes == "separate" and len(set(self._part_names)) < len(self.parts):
            raise CorpusError(
                f"data.mixture_classes = separate needs parts of different names, got {', '.join(self._part_names)}: "
                "give them as {corpus: ..., weight: ..., name: ...}"
            )
        self._shard_starts = [np.concatenate([[0], np.cumsum(part.shard_sizes, dtype=np.int64)]) for part in self.parts]
        self._number_classes(known)

    @classmethod
    def of(cls, corpus: "Corpus | Mixture") -> "Mixture":
        """A corpus as a mixture of one, in every respect the same; a mixture itself."""
        return corpus if isinstance(corpus, Mixture) else cls([corpus])

    def _number_classes(self, known: Sequence[str] | None) -> None:
        numbers = {name: number for number, name in enumerate(known or [])}
        self.names = list(numbers)
        self._maps: list[NDArray[np.int64]] = []
        for part, part_name in zip(self.parts, self._part_names, strict=True):
            prefix = f"{part_name}:" if self._mode == "separate" else ""
            own = []
            for name, shown in zip(part.classes, part.names, strict=True):
                if known is not None and name not in numbers:
                    raise CorpusError(f"{part} has the class {name!r}, which is not known")
                number = numbers.setdefault(prefix + name, len(numbers))
                if number == len(self.names):
                    self.names.append(prefix + shown)
                own.append(number)
            self._maps.append(np.array(own, np.int64))
        self.classes = list(numbers)
        counts, self.class_shares = np.zeros(len(self.classes), np.int64), np.zeros(len(self.classes))
        for part, weight, mapped in zip(self.parts, self.schedule.weights, self._maps, strict=True):
            np.add.at(counts, mapped, part.class_counts)
            share = weight / sum(self.schedule.weights) / part.num_samples
            np.add.at(self.class_shares, mapped, share * np.array(part.class_counts))
        self.class_counts: list[int] = counts.tolist()

    def __str__(self) -> str:
        """For messages."""
        if len(self.parts) == 1:
            return str(self.parts[0])
        total = sum(self.schedule.weights)
        shares = [
            f"{part} ({weight / total:.3g})" for part, weight in zip(self.parts, self.schedule.weights, strict=True)
        ]
        return f"the mixture of {' and '.join(shares)}"

    @property
    def corpus_hash(self) -> str:
        """The identity: two mixtures with the same one show the same bytes under the same labels in the same order.

        For a single corpus its own.
        """
        if len(self.parts) == 1 and self._mode == "merge":
            return self.parts[0].corpus_hash
        content = {
            "parts": [part.corpus_hash for part in self.parts],
            "weights": self.schedule.weights,
            "classes": self.classes,
        }
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def part_of(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Which part samples (int64 [B]) are of."""
        return np.searchsorted(self.first_ids, np.asarray(ids, np.int64), side="right") - 1

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        """The encoded images of samples (int64 [B]), in the order asked for.

        Raises:
            CorpusError: as `Corpus.read`.
        """
        which = np.asarray(ids, np.int64)
        images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(which)
        for part, places, own in self._by_part(which):
            for place, image in zip(places.tolist(), self.parts[part].read(own), strict=True):
                images[place] = image
        return images

    def labels_of(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """The labels of samples (int64 [B]) as a sparse matrix [B, classes]; see `Corpus.labels_of`."""
        found = []
        for part, places, own in self._by_part(np.asarray(ids, np.int64)):
            rows, classes, weights = self.parts[part].labels_of(own)
            found.append((places[rows], np.where(classes < 0, -1, self._maps[part][classes]), weights))
        rows, classes, weights = (np.concatenate(column) for column in zip(*found, strict=True))
        by_row = np.argsort(rows, kind="stable")
        return rows[by_row], classes[by_row], weights[by_row]

    def image_sizes(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(widths int64 [B], heights int64 [B]) of samples (int64 [B]), pixels of the upright image."""
        which = np.asarray(ids, np.int64)
        widths, heights = np.empty_like(which), np.empty_like(which)
        for part, places, own in self._by_part(which):
            rows = self.parts[part].index[own]
            widths[places], heights[places] = rows["width"], rows["height"]
        return widths, heights

    def shards_of(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The shards of samples (int64 [B]), numbered through over the parts."""
        which = np.asarray(ids, np.int64)
        shards = np.empty_like(which)
        for part, places, own in self._by_part(which):
            before = sum(len(starts) - 1 for starts in self._shard_starts[:part])
            shards[places] = np.searchsorted(self._shard_starts[part], own, side="right") - 1 + before
        return shards

    def substitute(self, sample: int, seed: int, attempt: int) -> int:
        """The sample shown in place of one that cannot be read: one of the same part (data_prep/order.py)."""
        part = int(self.part_of([sample])[0])
        first = int(self.first_ids[part])
        return first + substitute(self._shard_starts[part], seed_of_part(seed, part), sample - first, attempt)

    def origin(self, sample: int) -> str:
        """Where a sample came from (`Corpus.origin`)."""
        part = int(self.part_of([sample])[0])
        return self.parts[part].origin(sample - int(self.first_ids[part]))

    def describe(self, sample: int) -> str:
        """A sample for messages: its number in its corpus, and where it came from."""
        part = int(self.part_of([sample])[0])
        try:
            origin = self.origin(sample)
        except CorpusError:  # that is lost too
            origin = "of unknown origin"
        return f"sample {sample - int(self.first_ids[part])} of {self.parts[part]} ({origin})"

    def _by_part(self, ids: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """For each part that some of the ids are of: (part, their places, their numbers in the part)."""
        if len(self.parts) == 1:
            return [(0, np.arange(len(ids)), ids)]
        parts = self.part_of(ids)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.num_samples):
            raise CorpusError(
                f"sample ids must lie in 0..{self.num_samples - 1}, got {ids.min()}..{ids.max()} ({self})"
            )
        found = ((int(part), np.flatnonzero(parts == part)) for part in np.unique(parts))
        return [(part, places, ids[places] - self.first_ids[part]) for part, places in found]
