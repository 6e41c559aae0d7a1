"""Columns of strings and of labels: what a list of Python objects would be, for tens of millions of rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LABEL_DTYPE = np.dtype([("class", "<u4"), ("weight", "<f4")])
"""One of many labels of a sample."""
MAX_WEIGHT = float(np.finfo(np.float32).max)
"""Of a label."""


def ragged_take(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices starts[i], starts[i] + 1, ..., starts[i] + counts[i] - 1 for each i, one run after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


@dataclass(frozen=True)
class Strings:
    """N byte strings in one array."""

    content: NDArray[np.uint8]
    pointers: NDArray[np.int64]
    """[N + 1]: string i is content[pointers[i]:pointers[i + 1]]."""

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> "Strings":
        """From a sequence of byte strings."""
        pointers = np.zeros(len(strings) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, strings), np.int64, len(strings)), out=pointers[1:])
        return cls(np.frombuffer(b"".join(strings), np.uint8), pointers)

    @classmethod
    def join(cls, parts: Iterable["Strings"]) -> "Strings":
        """One column after the other."""
        columns = list(parts)
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.pointers) for part in columns)])
        content = np.concatenate([np.zeros(0, np.uint8), *(part.content for part in columns)])
        return cls(content, np.concatenate([[0], np.cumsum(lengths)]))

    def take(self, rows: NDArray[np.int64]) -> "Strings":
        """The strings of some rows (int64 [K]), in that order."""
        starts = self.pointers[rows]
        counts = self.pointers[rows + 1] - starts
        return Strings(self.content[ragged_take(starts, counts)], np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        return len(self.pointers) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.content[self.pointers[row] : self.pointers[row + 1]].tobytes()


@dataclass(frozen=True)
class Labels:
    """Many weighted labels for each of N images."""

    rows: NDArray[np.void]
    """LABEL_DTYPE [K]."""
    pointers: NDArray[np.int64]
    """[N + 1]: image i has rows[pointers[i]:pointers[i + 1]]."""

    @classmethod
    def of(cls, labels: Sequence[Sequence[tuple[int, float]]]) -> "Labels":
        """From a list of (class, weight) for each image."""
        pointers = np.zeros(len(labels) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, labels), np.int64, len(labels)), out=pointers[1:])
        flat = [pair for pairs in labels for pair in pairs]
        return cls(np.array(flat, LABEL_DTYPE), pointers)

    def take(self, rows: NDArray[np.int64]) -> "Labels":
        """The labels of some images (int64 [K]), in that order."""
        starts = self.pointers[rows]
        counts = self.pointers[rows + 1] - starts
        return Labels(self.rows[ragged_take(starts, counts)], np.concatenate([[0], np.cumsum(counts)]))

    def __getitem__(self, row: int) -> NDArray[np.void]:
        return self.rows[self.pointers[row] : self.pointers[row + 1]]
