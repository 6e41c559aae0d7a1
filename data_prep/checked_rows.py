"""Files of rows of one size, as long as a corpus, whose every row is checked when it is read.

The index of a corpus is read for days, a few rows at random places at a time, by ranks on many nodes. Its checksum
covers the whole of it and is compared once, by who opens it; what changes on the disk after that (a failing disk, a
copy over the file, another user) would change labels in silence. So:

- Whoever compares the whole file's checksum takes one of each block of BLOCK_ROWS rows in the same pass. They travel to
  the ranks of all nodes (`checks` of a corpus), which read the file through them: a node whose mount shows another file
  finds out, too. Corpora of any age have them, as nothing of it is stored.
- A block is read into memory of our own, compared, and only then are its rows used. A mapping would show what is on the
  disk at each look, changed between the comparison and the use; and a mapped file that is cut short ends the process.

300 million samples have 2.3 MB of checksums. A row costs one read of 14 KB, mostly from the system's page cache, and
its checksum: some microseconds, where the image that it is of takes a millisecond to decode.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from cluster import storage
from cluster.storage import StorageError, patiently
from data_prep.corpus_format import CorpusError

BLOCK_ROWS = 512
_AT_ONCE = 64
"""Blocks that are read at a time where neighbours are wanted."""
_PAUSES = (0.2, 1.0, 4.0)
"""Seconds before a block that cannot be read is tried again: mounted file systems have moments."""

Checks = Mapping[str, NDArray[np.uint32]]
"""Checksums of the blocks of files (lower half of xxh3_64), by the xxh3_128 of the whole file in hexadecimal."""


class AlteredIndexError(CorpusError):
    """The index of a corpus is not what it was when it was opened: no sample of it can be trusted any more."""


def hash_blocks(path: Path, row_bytes: int) -> tuple[str, NDArray[np.uint32]]:
    """(xxh3_128 of a file's content in hexadecimal, checksums of its blocks), of one pass."""
    block = BLOCK_ROWS * row_bytes
    whole, found = xxhash.xxh3_128(), []
    with path.open("rb") as file:  # buffered: whole blocks come, not as many bytes as there are for now
        while piece := file.read(_AT_ONCE * block):
            whole.update(piece)
            found += _checksums(piece, block)
    return whole.hexdigest(), np.array(found, np.uint32)


def _checksums(content: memoryview | bytes, block: int) -> list[int]:
    view = memoryview(content)
    return [xxhash.xxh3_64_intdigest(view[start : start + block]) & 0xFFFFFFFF for start in range(0, len(view), block)]


class CheckedRows:
    """The rows of a file, as an array: `rows[id]`, `rows[ids]`, `rows[first:end]`, `rows["column"]` (all of a column).

    Every access reads. Safe to use from several threads.

    Attributes:
        dtype: of a row.

    Args:
        path: of the file.
        dtype: of a row.
        checks: of the blocks; None where nobody has looked at the file yet, and nothing is compared.
        where: what to call it in messages.
        cached: whether the file is a copy, that is made anew where it is missing: one that is altered is removed.
        validate: is shown all rows before they are used, and raises CorpusError for what no row can be.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        dtype: Any,
        *,
        checks: NDArray[np.uint32] | None,
        where: str,
        cached: bool = False,
        validate: Callable[[NDArray[Any]], None] = lambda rows: None,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self._checks, self._where, self._validate = checks, where, validate
        self._copy = path if cached else None
        try:
            self._file = path.open("rb", buffering=0)  # closes with the last reference
            self._length = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize
        except OSError as error:
            raise storage.unreadable(path, error) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: int | slice | str | ArrayLike) -> Any:
        if isinstance(key, str):
            column = np.empty(len(self), self.dtype[key])
            step = _AT_ONCE * BLOCK_ROWS
            for start in range(0, len(self), step):
                column[start : start + step] = self._span(start, min(start + step, len(self)))[key]
            return column
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._span(start, stop)[::step] if step > 0 else self.take(np.arange(start, stop, step))
        rows = np.asarray(key, np.int64)
        return self.take(rows.reshape(1))[0] if rows.ndim == 0 else self.take(rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        rows = self._span(0, len(self))
        return rows if dtype is None else rows.astype(dtype)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of these numbers (int64 [B], in any order), [B].

        Raises:
            AlteredIndexError: they are not what they were when the file was opened.
            CorpusError: they can be no rows of this file.
            StorageError: the file cannot be read.
        """
        if not len(rows):
            return np.empty(0, self.dtype)
        order = np.argsort(rows, kind="stable")
        ascending = rows[order].tolist()
        first, last = ascending[0], ascending[-1]
        if first < 0 or last >= len(self):
            raise IndexError(f"rows {first}..{last} of {self._where}, which has {len(self)}")
        if last - first + 1 == len(rows) and bool((np.diff(rows[order]) == 1).all()):
            sorted_rows = self._span(first, last + 1)
        else:
            parts, at, content, size = [], -1, b"", self.dtype.itemsize
            for row in ascending:
                block, place = divmod(row, BLOCK_ROWS)
                if block != at:
                    at, content = block, self._blocks(block, block + 1)
                parts.append(content[size * place : size * (place + 1)])
            sorted_rows = np.frombuffer(b"".join(parts), self.dtype)
            self._validate(sorted_rows)
        found = np.empty_like(sorted_rows)
        found[order] = sorted_rows
        return found

    def _span(self, start: int, stop: int) -> NDArray[Any]:
        """Neighbouring rows, which may be written to."""
        rows = np.empty(max(stop - start, 0), self.dtype)
        at = start
        while at < stop:
            first = at // BLOCK_ROWS
            end = min(first + _AT_ONCE, -(-stop // BLOCK_ROWS))
            piece = np.frombuffer(self._blocks(first, end), self.dtype)[
                at - first * BLOCK_ROWS : stop - first * BLOCK_ROWS
            ]
            rows[at - start : at - start + len(piece)] = piece
            at += len(piece)
        self._validate(rows)
        return rows

    def _blocks(self, first: int, end: int) -> bytes:
        """The content of neighbouring blocks, as it was when the file was opened."""
        block = BLOCK_ROWS * self.dtype.itemsize
        size = min(end * block, len(self) * self.dtype.itemsize) - first * block
        try:
            content = patiently(lambda: os.pread(self._file.fileno(), size, first * block), _PAUSES, lambda error: True)
        except OSError as error:
            raise StorageError(f"{self._where} cannot be read: {error.strerror}") from error
        altered = len(content) != size
        if not altered and self._checks is not None:
            altered = _checksums(content, block) != self._checks[first:end].tolist()
        if altered:
            raise self._altered(first * BLOCK_ROWS, min(end * BLOCK_ROWS, len(self)) - 1)
        return content

    def _altered(self, first: int, last: int) -> AlteredIndexError:
        if self._copy is None:
            advice = "Bring the file back as it was, find out who or what writes there, and run the same command again"
        else:
            self._copy.unlink(missing_ok=True)
            advice = "This node's copy of it is removed: run the same command again"
        return AlteredIndexError(
            f"{self._where} was altered while it was in use: rows {first} to {last} are not what they were when it was "
            f"opened. {advice}"
        )
