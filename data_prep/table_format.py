"""What tables of images are: their files, the columns they are read by, and batches of their rows."""

import gzip
import io
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.folders import Folder
from data_prep.label_cells import LabelCells
from data_prep.label_numbers import EMPTY, same_label
from data_prep.listing import SourceError

_GZIP = ".gz"
TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
"""Of tables as text, which may be gzip, too; in small letters."""
PARQUET = ".parquet"
_SET = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
TABLES = ".csv, .tsv, .jsonl, .json (each of them also .gz) or .parquet"
BATCH = 65536
"""Rows that are read at a time."""


def table_suffix(name: str) -> str | None:
    """What a file's name says of its form: one of TEXT_SUFFIXES or PARQUET; None where it is no table."""
    small = name.lower()
    if small.endswith(PARQUET):
        return PARQUET
    plain = small.removesuffix(_GZIP)
    return next((suffix for suffix in TEXT_SUFFIXES if plain.endswith(suffix)), None)


@dataclass(frozen=True)
class TableFile:
    """One file of a table, wherever it lies. Pickles, to travel to workers."""

    folder: Folder
    name: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def suffix(self) -> str:
        """Of its name, in small letters and without .gz: one of TEXT_SUFFIXES or PARQUET; "" where it is no table."""
        return table_suffix(self.name) or ""

    def open(self) -> BinaryIO:
        """Its content."""
        return self.folder.open(self.name)

    def size(self) -> int:
        """Its bytes."""
        return self.folder.size(self.name) or 0

    def stamp(self) -> str:
        """What becomes another when it is written again."""
        return self.folder.stamp(self.name)

    def lines(self) -> io.TextIOWrapper:
        """Its text, which gzip may have packed."""
        content = self.open()
        if self.name.lower().endswith(_GZIP):
            content = cast(BinaryIO, _GzipFile(content))
        return io.TextIOWrapper(content, encoding="utf-8-sig", newline="")


class _GzipFile(gzip.GzipFile):
    """Closes the file beneath, too."""

    def __init__(self, packed: BinaryIO) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None where there is none."""

    path: str | None
    label: str
    """Empty where `indicators` say it."""
    weight: str | None
    image: str | None = None
    indicators: tuple[str, ...] = ()
    """Columns of 0 and 1, each of a class ("one-hot")."""
    cells: LabelCells = field(default_factory=LabelCells)
    unset: tuple[str, ...] = ()
    """What a column of 0 and 1 may hold instead of 0 (no_label)."""
    split: str | None = None
    """Column that names the split of each row, where not all are read."""
    splits: tuple[str, ...] = ()
    """What it says in the rows that are read."""
    holds_paths: bool = False
    """Whether the column of paths is one of images whose bytes are elsewhere: {"bytes": null, "path": ...}."""

    def is_set(self, text: str, column: str, where: str) -> bool:
        """Whether a cell of a column of 0 and 1 says that the image is of its class.

        Args:
            where: the row, for messages.

        Raises:
            SourceError: it says something else.
        """
        known = _SET.get(text.strip().lower())
        if known is not None:
            return known
        if any(same_label(text.strip(), other) for other in self.unset):
            return False
        raise SourceError(
            f"{where}: {column} is {text!r}, and 0 or 1 is needed: no_label={text.strip() or EMPTY} takes it as 0; "
            f"label_columns= names the columns that are classes, label_column= a column of labels"
        )

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        every = (self.image, self.path, self.label, self.weight, *self.indicators, self.split)
        return list(dict.fromkeys(name for name in every if name))


class TableRows(NamedTuple):
    """Some rows of a table: B images with K labels in all."""

    paths: pa.Array
    """Text [B]."""
    counts: NDArray[np.int64]
    """Labels of each row [B]."""
    labels: pa.Array
    """Text [K]."""
    weights: NDArray[np.float64]
    """[K]."""
    lines: NDArray[np.int64]
    """Where each row stands in its file [B], for messages."""
    are_cells: bool = True
    """Whether labels are whole cells of a column, and not items of lists."""


def value_text(value: object) -> str | None:
    """A label as text: names, numbers, true and false, and "" for nothing; None for what can be no label."""
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if value.bit_length() < 1024 else None  # Python writes no number of thousands of digits
    return repr(value) if isinstance(value, float) else None
