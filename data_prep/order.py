"""The order of samples: a pure function of (seed, epoch, global position) with O(1) seek.

Nothing as long as the corpus is ever built (with windows, a table of the shards of an epoch), so a run resumes at
any position, on any number of ranks, at once. The permutation is a Feistel network over the smallest power of two
that covers the corpus, with cycle walking (Black and Rogaway: "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.counter_rng import check_seed, philox4x32

_ROUNDS = 8
_MIN_BITS = 8
"""Halves of less than four bits mix too little; small sets walk inside a larger domain instead."""

# What a permutation is of, told apart in the generator's last counter word: stream 0xFFFF, which no other
# use of randomness has (counter_rng.uniform).
OF_SAMPLES, _OF_SHARDS, _OF_WINDOW, OF_SOURCE = 0xFFFF0000, 0xFFFF0100, 0xFFFF0200, 0xFFFF0300
_OF_PART, _OF_SUBSTITUTE, _OF_OTHER_SHARD, OF_SUBSET = 0xFFFF0400, 0xFFFF0500, 0xFFFF0600, 0xFFFF0700
OF_SLOTS = 0xFFFF0800

ATTEMPTS_IN_SHARD = 4
"""Substitutes for a bad sample that are looked for in a shard before the next one."""


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A round function: 64 well-mixed bits of value and key (the finaliser of MurmurHash3 by A. Appleby)."""
    x = values * np.uint64(0x9E3779B97F4A7C15) + key
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x


class Permutation:
    """A pseudo-random permutation of 0..size-1, computed element by element.

    Args:
        size: how many elements, at least 1 and at most 2**62.
        seed, epoch, use, part: what the permutation is of; any other value of one of them gives an unrelated one.
    """

    def __init__(self, size: int, seed: int, epoch: int = 0, use: int = OF_SAMPLES, part: int = 0) -> None:
        assert 1 <= size <= 2**62, size
        self.size = size
        bits = max((size - 1).bit_length(), _MIN_BITS)
        self._low_bits, self._high_bits = np.uint64((bits + 1) // 2), np.uint64(bits // 2)
        blocks = np.arange(use, use + _ROUNDS // 2)
        words = philox4x32(check_seed(seed), part & 0xFFFFFFFF, part >> 32, epoch, blocks).astype(np.uint64)
        keys = np.concatenate([words[0] << np.uint64(32) | words[1], words[2] << np.uint64(32) | words[3]])
        self._keys: list[np.uint64] = list(keys)

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The elements at `positions` (int64 [B], each in 0..size-1), int64 [B]."""
        at = np.asarray(positions, dtype=np.int64)
        if at.size and not (at.min() >= 0 and at.max() < self.size):
            raise ValueError(f"positions must lie in 0..{self.size - 1}, got {at.min()}..{at.max()}")
        result = self._walk_once(at.astype(np.uint64))
        outside = np.flatnonzero(result >= self.size)
        while outside.size:  # cycle walking: apply again until the value is inside; ends because it is a bijection
            moved = self._walk_once(result[outside])
            result[outside] = moved
            outside = outside[moved >= self.size]
        return result.astype(np.int64)

    def _walk_once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        # The halves differ by one bit when the number of bits is odd; they swap sizes with their places.
        left_bits, right_bits = self._high_bits, self._low_bits
        one = np.uint64(1)
        right = x & ((one << right_bits) - one)
        left = x >> right_bits
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & ((one << left_bits) - one))
            left_bits, right_bits = right_bits, left_bits
        return left << right_bits | right


class SampleOrder:
    """Which sample stands at which global position of training.

    Args:
        num_samples: N, samples in the corpus; position p lies in epoch p // N.
        seed: of the run; another seed gives another order.
        shard_sizes: samples of each shard, in the corpus's order; needed only for windows.
        window: 0 permutes all samples freely. W > 0 permutes the shards, groups W of them into a window and permutes
            inside it, so that whole shards can be fetched from an object store. It does not depend on the ranks.

    Raises:
        ValueError: an empty corpus, a negative seed or window, or a window without shard sizes.
    """

    def __init__(self, num_samples: int, seed: int, shard_sizes: Sequence[int] | None = None, window: int = 0) -> None:
        if num_samples < 1:
            raise ValueError("a corpus without samples has no order")
        if window < 0:
            raise ValueError(f"window = {window} must be 0 (no windows) or a number of shards")
        if window and shard_sizes is None:
            raise ValueError(f"window = {window} needs the number of samples of every shard")
        self.num_samples, self.seed, self.window = num_samples, check_seed(seed), window
        self._sizes = np.asarray(shard_sizes if window and shard_sizes is not None else [num_samples], np.int64)
        if int(self._sizes.sum()) != num_samples:
            raise ValueError(f"the shards hold {int(self._sizes.sum())} samples, not the {num_samples} of the corpus")
        self._first_ids = np.concatenate([[0], np.cumsum(self._sizes)])
        self._epochs: dict[int, _ShuffledShards] = {}

    def ids(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples at global positions (int64 [B], not negative, in any order).

        Returns:
            (epochs int64 [B], ids int64 [B]): position p lies in epoch p // N; within an epoch every id comes once.
        """
        at = np.asarray(positions, dtype=np.int64)
        if at.size and at.min() < 0:
            raise ValueError(f"positions must not be negative, got {at.min()}")
        epochs, places = np.divmod(at, self.num_samples)
        ids = np.empty_like(at)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            if self.window:
                ids[here] = self._windowed(int(epoch), places[here])
            else:
                ids[here] = Permutation(self.num_samples, self.seed, int(epoch))(places[here])
        return epochs, ids

    def window_at(self, position: int) -> tuple[int, int]:
        """(epoch, window) that a position lies in; every epoch is one window where there are none."""
        epoch, place = divmod(position, self.num_samples)
        if not self.window:
            return epoch, 0
        return epoch, int(self._shuffled(epoch).windows_of(np.asarray([place]))[0])

    def shards_from(self, position: int, last: int, count: int) -> list[int]:
        """The shards in the order in which they are needed: from the window of a position to that of the last one.

        Returns:
            At most `count` shards; those of one window are needed together.
        """
        assert self.window
        (epoch, window), (last_epoch, last_window) = self.window_at(position), self.window_at(last)
        shards: list[int] = []
        while len(shards) < count and epoch <= last_epoch:
            end = (last_window + 1) * self.window if epoch == last_epoch else None
            shards += self._shuffled(epoch).shards[window * self.window : end].tolist()
            epoch, window = epoch + 1, 0
        return shards[:count]

    def _shuffled(self, epoch: int) -> "_ShuffledShards":
        """The shards of an epoch; kept, since a run looks at one epoch millions of times, at two at its end."""
        found = self._epochs.get(epoch)
        if found is None:
            found = _ShuffledShards(self._sizes, self.window, self.seed, epoch)
            self._epochs = {**{key: each for key, each in self._epochs.items() if abs(key - epoch) == 1}, epoch: found}
        return found

    def _windowed(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        shuffled = self._shuffled(epoch)
        windows = shuffled.windows_of(places)
        inside = np.empty_like(places)
        for window in np.unique(windows):
            here = windows == window
            start, end = int(shuffled.window_starts[window]), int(shuffled.window_starts[window + 1])
            permute = Permutation(end - start, self.seed, epoch, _OF_WINDOW, part=int(window))
            inside[here] = start + permute(places[here] - start)
        slots = np.searchsorted(shuffled.starts, inside, side="right") - 1
        result: NDArray[np.int64] = self._first_ids[shuffled.shards[slots]] + (inside - shuffled.starts[slots])
        return result


class _ShuffledShards:
    """The shards of one epoch in their order, and the places at which they and their windows start."""

    def __init__(self, sizes: NDArray[np.int64], window: int, seed: int, epoch: int) -> None:
        self.shards = Permutation(len(sizes), seed, epoch, _OF_SHARDS)(np.arange(len(sizes)))
        self.starts = np.concatenate([[0], np.cumsum(sizes[self.shards])])
        self.window_starts = np.append(self.starts[:-1:window], self.starts[-1])

    def windows_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.window_starts, places, side="right") - 1


def seed_of_part(seed: int, part: int) -> int:
    """The seed of the order of a part of a mixture; the first keeps the run's own."""
    if part == 0:
        return seed
    words = philox4x32(check_seed(seed), part, 0, 0, _OF_PART)
    return int(words[0]) << 32 | int(words[1])


def substitute(shard_starts: NDArray[np.int64], seed: int, sample: int, attempt: int) -> int:
    """The sample shown in place of one that cannot be read, decided by these numbers alone.

    The first ATTEMPTS_IN_SHARD attempts are samples of the same shard, which is at hand; then come those of another
    shard, and so on. Every sample of a shard has the same other shards, so that a shard that is lost costs an object
    store one more shard and not one for each of its samples.

    Args:
        shard_starts: int64 [shards + 1], the first sample of each shard, and their number.
        seed: of the order.
        sample: the one that cannot be read.
        attempt: 0, 1, ... as long as the substitutes cannot be read either.
    """
    shard, turn = int(np.searchsorted(shard_starts, sample, side="right")) - 1, attempt // ATTEMPTS_IN_SHARD
    if turn:
        shard = _draw(len(shard_starts) - 1, seed, shard, turn, _OF_OTHER_SHARD)
    first, end = int(shard_starts[shard]), int(shard_starts[shard + 1])
    return first + _draw(end - first, seed, sample, attempt, _OF_SUBSTITUTE)


def _draw(size: int, seed: int, number: int, attempt: int, use: int) -> int:
    words = philox4x32(check_seed(seed), number & 0xFFFFFFFF, number >> 32, attempt, use)
    return (int(words[0]) << 32 | int(words[1])) % size
