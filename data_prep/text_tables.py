"""Reads tables that are text: CSV with any usual separator, JSON lines, and JSON as pandas and others write it."""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.storage import StorageError, parse_json
from data_prep.json_tables import json_rows
from data_prep.listing import SourceError
from data_prep.table_format import BATCH, Columns, TableFile, TableRows, value_text

_LOOKED_AT = 1000
"""Rows that tell the columns."""
_SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written."""

    separator: str
    strips: bool
    """Whether spaces follow the separators, which are no part of the values."""

    def rows(self, lines: Iterable[str]) -> Any:
        """The rows of the file's lines."""
        return csv.reader(lines, delimiter=self.separator, skipinitialspace=self.strips)


def head(file: TableFile) -> list[dict[str, Any]]:
    """The first rows of a table, by column; only the names of the columns, with "", where it has no rows.

    Raises:
        SourceError: it cannot be read.
    """
    with text_errors(file), file.lines() as lines:
        if file.suffix == ".json":
            return [entry for _, entry in itertools.islice(json_rows(lines, str(file)), _LOOKED_AT)]
        if file.suffix not in _SEPARATORS:
            entries = [parse_json(line, "a line") for line in itertools.islice(lines, _LOOKED_AT) if line.strip()]
            return [entry for entry in entries if isinstance(entry, dict)]
        some = list(itertools.islice(lines, _LOOKED_AT))
        rows = _dialect(file, some).rows(some)
        header = _header(file, next(rows, []))
        found = [dict(zip(header, row, strict=False)) for row in rows]
        return found or [dict.fromkeys(header, "")]


def text_values(file: TableFile, column: str) -> Iterator[str]:
    """What a column says in each row. Errors: as `read_text`."""
    with text_errors(file), file.lines() as lines:
        if file.suffix == ".json":
            entries: Iterable[Any] = (entry for _, entry in json_rows(lines, str(file)))
        elif file.suffix not in _SEPARATORS:
            entries = (entry for _, entry in _json_lines(lines, file))
        else:
            some = list(itertools.islice(lines, _LOOKED_AT))
            rows = _dialect(file, some).rows(itertools.chain(some, lines))
            header = _header(file, next(rows, []))
            entries = (dict(zip(header, row, strict=False)) for row in rows if row)
        for entry in entries:
            yield (value_text(entry.get(column)) if isinstance(entry, dict) else None) or ""


def read_rows_of_text(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    """The rows of a table, in batches.

    Raises:
        SourceError: it cannot be read, or a row is wrong; the message has its line.
    """
    with text_errors(file):
        if file.suffix in _SEPARATORS:
            yield from _read_csv(file, columns)
        else:
            yield from _read_json(file, columns)


@contextmanager
def text_errors(file: TableFile) -> Iterator[None]:
    """Says of a file that cannot be read as text, or as what it is packed in, that it is a table and which."""
    try:
        yield
    except UnicodeDecodeError as error:
        if file.folder.read_bytes(file.name, 0, 2) == b"\x1f\x8b":
            raise SourceError(f"table {file} cannot be read: it is compressed: call it {file.name}.gz") from error
        raise SourceError(f"table {file} cannot be read: it is not UTF-8 ({error}); save it as that") from error
    except SourceError:
        raise
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error, StorageError) as error:
        raise SourceError(f"table {file} cannot be read: {error}") from error


def _dialect(file: TableFile, lines: Sequence[str]) -> Dialect:
    """By the header: the separator that is there most often."""
    first = next((line for line in lines if line.strip()), "")
    outside = "".join(first.split('"')[::2])
    separators = _SEPARATORS[file.suffix]
    separator = max(separators, key=lambda s: (outside.count(s), -separators.index(s)))
    if separator == "\t":
        return Dialect(separator, strips=False)
    rows = list(csv.reader(lines[:200], delimiter=separator))
    spaced = [all(field[:1] in (" ", "") for field in row[1:]) and " " in {f[:1] for f in row[1:]} for row in rows]
    return Dialect(separator, strips=bool(spaced) and (spaced[0] or all(spaced[1:] or [False])))


def _header(file: TableFile, row: Sequence[str]) -> list[str]:
    names = [name.strip() for name in row]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise SourceError(f"table {file} has two columns called {twice[0]!r}")
    return names


class _Collector:
    """Gathers rows into batches."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.paths: list[str] = []
        self.counts: list[int] = []
        self.labels: list[str] = []
        self.weights: list[float] = []
        self.lines: list[int] = []
        self.are_cells = False

    def add(
        self, path: str, labels: Sequence[str], weights: Sequence[float], line: int, is_cell: bool
    ) -> TableRows | None:
        self.paths.append(path)
        self.counts.append(len(labels))
        self.labels.extend(labels)
        self.weights.extend(weights)
        self.lines.append(line)
        self.are_cells |= is_cell
        return self.take() if len(self.paths) == BATCH else None

    def take(self) -> TableRows:
        rows = TableRows(
            pa.array(self.paths, pa.string()), np.array(self.counts, np.int64), pa.array(self.labels, pa.string()),
            np.array(self.weights, np.float64), np.array(self.lines, np.int64), self.are_cells,
        )  # fmt: skip
        self._start()
        return rows


def _read_csv(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    with file.lines() as lines:
        some = list(itertools.islice(lines, _LOOKED_AT))
        rows = _dialect(file, some).rows(itertools.chain(some, lines))
        header = _header(file, next(rows, []))
        yield from _batches(_by_column(file, rows, header, columns.names), columns, f"table {file}, line")


def _by_column(
    file: TableFile, rows: Any, header: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of rows and their values in some columns."""
    places = [(name, header.index(name)) for name in names]
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise SourceError(
                f"table {file}, line {rows.line_num}: has {len(row)} fields where the header has {len(header)}"
            )
        found = {name: row[place] for name, place in places}
        for value in found.values():
            if "\n" in value or "\r" in value:
                raise SourceError(
                    f"table {file}, line {rows.line_num}: a value goes over several lines ({value[:60]!r}): "
                    "a quote may be missing"
                )
        yield rows.line_num, found


def _read_json(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    with file.lines() as lines:
        if file.suffix == ".json":
            yield from _batches(json_rows(lines, str(file)), columns, f"table {file}, entry")
            return
        yield from _batches(_json_lines(lines, file), columns, f"table {file}, line")


def _json_lines(lines: io.TextIOBase, file: TableFile) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, parse_json(line, "it")
            except StorageError as error:
                raise SourceError(f"table {file}, line {number}: not JSON ({error})") from error


def _batches(entries: Iterator[tuple[int, Any]], columns: Columns, where: str) -> Iterator[TableRows]:
    collector = _Collector()
    wanted = dict.fromkeys(name for name in (columns.path, columns.label) if name)
    for number, entry in entries:
        if columns.split and isinstance(entry, dict) and value_text(entry.get(columns.split)) not in columns.splits:
            continue
        row = f"{where} {number}"
        if not isinstance(entry, dict) or not wanted.keys() <= entry.keys():
            raise SourceError(f"{row}: must be an object with {' and '.join(wanted)}")
        path = entry[columns.path or ""]
        if not isinstance(path, str):
            raise SourceError(f"{row}: {columns.path} must be text, not {str(path)[:60]}")
        if columns.indicators:
            labels, is_cell = _indicated(entry, columns, row), False
        else:
            labels, is_cell = _labels(entry[columns.label], columns, row)
        weights = [1.0] * len(labels) if columns.weight is None else _weights(entry, columns, len(labels), row)
        full = collector.add(path, labels, weights, number, is_cell)
        if full is not None:
            yield full
    yield collector.take()


def _labels(value: Any, columns: Columns, where: str) -> tuple[list[str], bool]:
    """The labels of a cell, and whether it is one that was not split."""
    if isinstance(value, str) and not columns.cells.splits:
        return [value.strip()], True
    if isinstance(value, list):
        texts = [value_text(item) for item in value]
        if any(text is None for text in texts):
            raise SourceError(f"{where}: {columns.label} must be names or numbers, not {str(value)[:60]}")
        return [text for text in texts if text is not None], False
    text = value_text(value)
    if text is None:
        raise SourceError(
            f"{where}: {columns.label} must be a name, a number, or a list of them, not {str(value)[:60]}"
        )
    if not columns.cells.splits or not text:
        return [text], isinstance(value, str)
    try:
        return columns.cells.split(text), False
    except ValueError as error:
        raise SourceError(f"{where}: {columns.label} {text[:60]!r} cannot be split: {error}") from None


def _indicated(entry: dict[str, Any], columns: Columns, where: str) -> list[str]:
    """Numbers of the columns of 0 and 1 that are 1, as text; what is neither stays what it is, to be refused."""
    labels = []
    for number, name in enumerate(columns.indicators):
        if name not in entry:
            raise SourceError(f"{where}: has no {name}")
        text = value_text(entry[name])
        if columns.is_set(str(entry[name])[:60] if text is None else text, name, where):
            labels.append(str(number))
    return labels


def _weights(entry: dict[str, Any], columns: Columns, count: int, where: str) -> list[float]:
    value = entry.get(columns.weight or "", [1.0] * count)
    if count == 1 and isinstance(value, (str, float)) and (weight := _number(value)) is not None:
        return [weight]
    if isinstance(value, str) and columns.cells.splits:
        value = columns.cells.split(value)
    values = value if isinstance(value, list) else [value]
    weights = [_number(item) for item in values]
    for item, weight in zip(values, weights, strict=True):
        if weight is None:
            raise SourceError(f"{where}: weight {item!r} is not a number")
    if len(weights) != count:
        raise SourceError(f"{where}: not as many weights ({len(weights)}) as labels ({count})")
    return [weight for weight in weights if weight is not None]


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if type(value) is float or (type(value) is int and value.bit_length() < 1024) else None
