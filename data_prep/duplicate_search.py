"""All pairs of 64-bit hashes within a Hamming distance, exactly, and in less than quadratic time.

Multi-index hashing (Norouzi, Punjani, Fleet: "Fast Exact Search in Hamming Space with Multi-Index Hashing", PAMI 2014):
the bits are dealt out to m bands; hashes within a distance D of each other lie, in at least one band i, within r_i, if
the sum of (r_i + 1) is D + 1. So each band has a table sorted by its bits, in which every key within r_i of the query's
is looked up, and what is found is compared as a whole. All is done for many queries at once with numpy.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 14
"""Queries that are looked up at a time: their arrays stay in a processor's cache."""
_EXPANDED = 1 << 20
"""Candidates that are compared at a time."""
_SLICE = 1024
"""Candidates of one query that are compared before it is asked again whether the query is still open."""
_MAX_KEY_BITS = 24
_FEW_BITS = 12
"""With fewer bits left a crowded key is not divided further."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]
"""Queries, what is near them, and at which distance: three arrays of one length."""


class _Band:
    """The hashes in the order of some of their bits.

    Args:
        hashes: uint64 [N].
        bits: places of the bits.
        radius: by how many of these bits a query may differ.
    """

    def __init__(self, hashes: NDArray[np.uint64], bits: Sequence[int], radius: int) -> None:
        self.radius = radius
        self.bits = bits
        self.mask = np.uint64(sum(1 << bit for bit in bits))
        self._tables = _gather_tables(bits)
        keys = self.keys(hashes)
        self.order = np.argsort(keys, kind="stable").astype(np.int32 if len(hashes) < 2**31 else np.int64)
        self.hashes = hashes[self.order]
        self.starts = np.zeros((1 << len(bits)) + 1, np.int64)
        np.cumsum(np.bincount(keys, minlength=1 << len(bits)), out=self.starts[1:])
        self.flips = np.array(
            [
                sum(1 << k for k in flipped)
                for r in range(radius + 1)
                for flipped in itertools.combinations(range(len(bits)), r)
            ],
            np.uint32,
        )

    def keys(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """The band's bits of each hash, side by side."""
        columns = np.ascontiguousarray(hashes, "<u8").view(np.uint8).reshape(-1, 8)
        keys = np.zeros(len(hashes), np.uint32)
        for column, table in self._tables:
            keys |= table[columns[:, column]]
        return keys


def _gather_tables(bits: Sequence[int]) -> list[tuple[int, NDArray[np.uint32]]]:
    """For each byte of a hash that has some of the bits, what each of its values adds to the key."""
    tables = []
    for column in range(8):
        table = np.zeros(256, np.uint32)
        for place, bit in enumerate(bits):
            if bit // 8 == column:
                table |= ((np.arange(256, dtype=np.uint32) >> np.uint32(bit % 8)) & np.uint32(1)) << np.uint32(place)
        if table.any():
            tables.append((column, table))
    return tables


@dataclass
class _Asked:
    """Queries in the order of a band's keys."""

    rows: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    keys: NDArray[np.uint32]

    def only(self, which: NDArray[np.bool_] | slice) -> "_Asked":
        return _Asked(self.rows[which], self.hashes[which], self.keys[which])


class HammingIndex:
    """Hashes that can be asked which of them lie near others.

    Takes about 8 bytes a hash and 12 for each band (three bands for a distance of 8 among millions).

    Args:
        hashes: uint64 [N].
        distance: bits by which a pair may differ.
        bits: places of the bits that the tables go by; pairs are compared in all 64.
        crowd: hashes under one key from which that key gets an index of its own, by the other bits; None: by size.
    """

    def __init__(
        self,
        hashes: NDArray[np.uint64],
        distance: int,
        bits: Sequence[int] = tuple(range(64)),
        crowd: int | None = None,
    ) -> None:
        self.size, self.distance = len(hashes), distance
        self._crowd = crowd
        self._bits = bits
        self._bands = [_Band(hashes, places, radius) for places, radius in _deal(len(hashes), distance, bits)]
        self._inside: dict[tuple[int, int], HammingIndex] = {}
        self._lock = threading.Lock()

    def search(
        self,
        queries: NDArray[np.uint64],
        found: Callable[[Pairs], None],
        still_open: NDArray[np.bool_] | None = None,
        threads: int = 1,
        looked: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Find every (query, hash) within the distance, each once.

        Args:
            queries: uint64 [Q].
            found: called with pairs in batches; from several threads, but with each query from one at a time, and
                in an order that is always the same.
            still_open: [Q]; `found` may clear its queries: they are looked for no further.
            threads: to work with.
            looked: called as it goes, with how many more lookups of the `lookups(Q)` are done.
        """
        with ThreadPoolExecutor(threads) as pool:
            for number, band in enumerate(self._bands):
                keys = band.keys(queries)
                # in the order of the keys, what a chunk looks up lies close together and stays in the cache
                order = np.argsort(keys, kind="stable")
                chunks = [order[start : start + _CHUNK] for start in range(0, len(order), _CHUNK)]

                def look_up(rows: NDArray[np.int64], number: int = number, keys: NDArray[np.uint32] = keys) -> None:
                    for pairs in self._near(number, _Asked(rows, queries[rows], keys[rows]), still_open):
                        found(pairs)

                for chunk, _ in zip(chunks, pool.map(look_up, chunks), strict=True):
                    looked(len(chunk))

    def lookups(self, queries: int) -> int:
        """How many a search of that many queries takes."""
        return queries * len(self._bands)

    def _pairs(self, queries: NDArray[np.uint64], still_open: NDArray[np.bool_] | None) -> Iterator[Pairs]:
        for number, band in enumerate(self._bands):
            keys = band.keys(queries)
            order = np.argsort(keys, kind="stable")
            yield from self._near(number, _Asked(order, queries[order], keys[order]), still_open)

    def _near(self, number: int, asked: _Asked, still_open: NDArray[np.bool_] | None) -> Iterator[Pairs]:
        """What one band finds."""
        for flip in self._bands[number].flips:
            if still_open is not None and not (going_on := still_open[asked.rows]).all():
                asked = asked.only(going_on)
            if len(asked.rows):
                yield from self._look_up(number, asked, flip, still_open)

    def _look_up(
        self, number: int, asked: _Asked, flip: np.uint32, still_open: NDArray[np.bool_] | None
    ) -> Iterator[Pairs]:
        band = self._bands[number]
        keys = asked.keys ^ flip
        starts = band.starts[keys]
        counts = band.starts[keys + np.uint32(1)] - starts
        limit = self._crowd_limit(band)
        if counts.max() > limit:
            for key in np.unique(keys[counts > limit]):
                yield from self._look_inside(number, int(key), asked.only(keys == key), still_open)
            counts[counts > limit] = 0
        rows = np.flatnonzero(counts)
        starts, counts = starts[rows], counts[rows]
        while rows.size:
            take = np.minimum(counts, _SLICE)
            ends = np.cumsum(take)
            cuts = np.searchsorted(ends, np.arange(_EXPANDED, int(ends[-1]), _EXPANDED))
            for part in itertools.pairwise([0, *cuts.tolist(), len(rows)]):
                some = slice(*part)
                yield from self._compare(number, asked, rows[some], starts[some], take[some])
            left = counts > take
            if still_open is not None:
                left &= still_open[asked.rows[rows]]
            rows, starts, counts = rows[left], starts[left] + take[left], counts[left] - take[left]

    def _compare(
        self, number: int, asked: _Asked, rows: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> Iterator[Pairs]:
        band = self._bands[number]
        ends = np.cumsum(counts)
        places = np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
        differing = np.repeat(asked.hashes[rows], counts) ^ band.hashes[places]
        hits = np.flatnonzero(np.bitwise_count(differing) <= self.distance)
        if hits.size:
            hits = hits[self._is_new(number, differing[hits])]
        if hits.size:
            queries = asked.rows[rows[np.searchsorted(ends, hits, side="right")]]
            yield queries, band.order[places[hits]].astype(np.int64), np.bitwise_count(differing[hits])

    def _is_new(self, number: int, differing: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which pairs no earlier band has found; by what they differ in."""
        new = np.ones(len(differing), bool)
        for earlier in self._bands[:number]:
            new &= np.bitwise_count(differing & earlier.mask) > earlier.radius
        return new

    def _crowd_limit(self, band: _Band) -> float:
        if len(self._bits) - len(band.bits) < _FEW_BITS:
            return np.inf
        return self._crowd if self._crowd is not None else max(8 * _SLICE, 256 * self.size >> len(band.bits))

    def _look_inside(
        self, number: int, key: int, asked: _Asked, still_open: NDArray[np.bool_] | None
    ) -> Iterator[Pairs]:
        """The same for one key of a band, under which so many hashes lie that comparing all takes too long."""
        band = self._bands[number]
        start, end = int(band.starts[key]), int(band.starts[key + 1])
        with self._lock:
            if (number, key) not in self._inside:
                others = [bit for bit in self._bits if bit not in band.bits]
                self._inside[number, key] = HammingIndex(band.hashes[start:end], self.distance, others, self._crowd)
            inside = self._inside[number, key]
        inner_open = None if still_open is None else still_open[asked.rows]
        for queries, found, distances in inside._pairs(asked.hashes, inner_open):
            new = self._is_new(number, asked.hashes[queries] ^ band.hashes[start + found])
            if new.any():
                yield asked.rows[queries[new]], band.order[start + found[new]].astype(np.int64), distances[new]
            if still_open is not None and inner_open is not None:
                inner_open &= still_open[asked.rows]


def _deal(size: int, distance: int, bits: Sequence[int]) -> list[tuple[list[int], int]]:
    """The bits and the radius of each band, for the least work. Bits are dealt like cards, so that those that say
    least (the lowest frequencies, which hang together) are spread."""

    def bands(count: int) -> list[tuple[list[int], int]]:
        radii = [(distance + 1) // count - 1 + (k < (distance + 1) % count) for k in range(count)]
        most = min(_MAX_KEY_BITS, max(size, 2).bit_length() + 2)
        return [(list(bits[k::count])[:most], radius) for k, radius in enumerate(radii)]

    def work(count: int) -> float:
        return sum(
            sum(comb(len(places), r) for r in range(radius + 1)) * (1 + 2 * size / 2 ** len(places))
            for places, radius in bands(count)
        )

    return bands(min(range(1, min(distance + 1, len(bits)) + 1), key=work))
