"""Reads tables of images (CSV, JSON lines, Parquet) in batches of columns: where an image is, and its labels."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.folders import Folder
from cluster.storage import StorageError, parse_json
from data_prep.listing import SourceError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
_BATCH = 65536
_LOOKED_AT = 1000
"""JSON lines that tell the keys."""

# Usual names of columns, the likeliest first.
_PATHS = ("path", "file_path", "filepath", "file_name", "filename", "file", "image_path", "uri", "url", "image_url")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "content", "data")
_LABELS = (
    "label",
    "labels",
    "class",
    "classes",
    "class_name",
    "category",
    "categories",
    "target",
    "wnid",
    "tags",
    "cls",
)
_WEIGHTS = ("weight", "weights", "score", "scores", "confidence", "confidences")


@dataclass(frozen=True)
class TableFile:
    """One file of a table, wherever it lies. Pickles, to travel to workers."""

    folder: Folder
    name: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def suffix(self) -> str:
        """Of its name: ".csv", ".jsonl" or ".parquet"."""
        return PurePosixPath(self.name).suffix

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
        """Its text."""
        return io.TextIOWrapper(self.open(), encoding="utf-8-sig", newline="")


def table_files(folder: Folder, name: str | None = None) -> list[TableFile]:
    """The files of a table; none where it is no table.

    Args:
        folder: of the file, or of several of Parquet.
        name: of the file, which is there; None for the Parquet files directly in the folder, sorted.
    """
    if name is not None:
        return [TableFile(folder, name)] if name.endswith(TABLE_SUFFIXES) else []
    names = [name for name in folder.names() if name.endswith(".parquet") and not name.startswith(".")]
    return [TableFile(folder, name) for name in names]


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None where there is none."""

    path: str | None
    label: str
    weight: str | None
    image: str | None = None


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


def columns_of(
    files: Sequence[TableFile], path: str | None, label: str | None, weight: str | None, image: str | None
) -> Columns:
    """Which columns a table is read by: those that are named, or those with a usual name.

    Raises:
        SourceError: a column is not there, or cannot be told.
    """
    names, binary = _header(files[0])
    where = f"table {files[0]}"
    found_image = _pick(names, image, _IMAGES, "image_column", where, among=binary)
    found_path = _pick(names, path, _PATHS, "path_column", where, among=[name for name in names if name not in binary])
    found_label = _pick(names, label, _LABELS, "label_column", where)
    found_weight = _pick(names, weight, _WEIGHTS, "weight_column", where)
    if found_path is None and found_image is None:
        raise SourceError(
            f"{where} has no column that says where the images are: its columns are {', '.join(names)}; the first line "
            f"must be like `path,label`, or name one with path_column= (image_column= where the images are in it)"
        )
    if found_label is None:
        raise SourceError(
            f"{where} has no column of labels: its columns are {', '.join(names)}; name one with label_column="
        )
    return Columns(found_path, found_label, found_weight, found_image)


def _pick(
    names: Sequence[str],
    asked: str | None,
    usual: Iterable[str],
    key: str,
    where: str,
    among: Sequence[str] | None = None,
) -> str | None:
    if asked is not None:
        if asked not in names:
            raise SourceError(f"{key} = {asked!r}: {where} has no such column; its columns are {', '.join(names)}")
        return asked
    candidates = {name.lower(): name for name in (names if among is None else among)}
    return next((candidates[name] for name in usual if name in candidates), None)


def _header(file: TableFile) -> tuple[list[str], list[str]]:
    """Names of a table's columns, and of those that hold images' bytes."""
    try:
        if file.suffix == ".parquet":
            schema = _schema(file)
            return list(schema.names), [field.name for field in schema if _is_image(field.type)]
        with file.lines() as lines:
            if file.suffix == ".csv":
                return next(csv.reader(lines), []), []
            # not every object need have all of the keys
            entries = [parse_json(line, "a line") for line in itertools.islice(lines, _LOOKED_AT) if line.strip()]
            return list(dict.fromkeys(key for entry in entries if isinstance(entry, dict) for key in entry)), []
    except (OSError, UnicodeDecodeError, ValueError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"table {file} cannot be read: {error}") from error


def _schema(file: TableFile) -> pa.Schema:
    with file.open() as content, _parquet_errors(file):
        return pq.read_schema(content)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def class_names_of(file: TableFile, label_column: str) -> list[str] | None:
    """Names of the classes that a Parquet file of Hugging Face's datasets carries in its schema, or None."""
    if file.suffix != ".parquet":
        return None
    try:
        metadata = _schema(file).metadata or {}
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]
        names = feature.get("names") or feature.get("feature", {}).get("names")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def read_rows_of(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    """The rows of one file, in batches.

    Raises:
        SourceError: it cannot be read, or a row is wrong; the message has its line.
    """
    read = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}[file.suffix]
    try:
        yield from read(file, columns)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"table {file} cannot be read: {error}") from error


def label_lists(
    labels: pa.Array, weights: pa.Array | None, where: str
) -> tuple[NDArray[np.int64], pa.Array, NDArray[np.float64]]:
    """Columns of labels, one value or a list in each row, as (counts [B], labels as text [K], weights [K]).

    Raises:
        SourceError: the columns are of other types, or have not as many weights as labels.
    """
    if isinstance(labels, pa.DictionaryArray):
        labels = labels.dictionary_decode()
    if pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type):
        counts = pc.fill_null(pc.list_value_length(labels), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = labels.flatten()
    else:
        present = pc.is_valid(labels).to_numpy(zero_copy_only=False)
        counts = present.astype(np.int64)
        flat = labels.drop_null()
    if not (pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type) or pa.types.is_integer(flat.type)):
        raise SourceError(f"{where}: the labels must be text or whole numbers, or lists of them, not {flat.type}")
    if flat.null_count:
        raise SourceError(f"{where}: a list of labels has a null in it")
    if weights is None:
        return counts, flat.cast(pa.string()), np.ones(len(flat), np.float64)
    if pa.types.is_list(weights.type) or pa.types.is_large_list(weights.type):
        given = pc.fill_null(pc.list_value_length(weights), 0).to_numpy(zero_copy_only=False)
        values = weights.flatten()
    else:
        given = pc.is_valid(weights).to_numpy(zero_copy_only=False).astype(np.int64)
        values = weights.drop_null()
    if not np.array_equal(given, counts):
        raise SourceError(f"{where}, row {int(np.flatnonzero(given != counts)[0]) + 1}: not as many weights as labels")
    return counts, flat.cast(pa.string()), values.cast(pa.float64()).to_numpy(zero_copy_only=False)


def parquet_batches(file: TableFile, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a Parquet file, `rows` rows at a time.

    Raises:
        SourceError: the file is damaged.
        OSError: the storage fails.
    """
    with file.open() as content, _parquet_errors(file):
        yield from pq.ParquetFile(content).iter_batches(rows, columns=columns)


@contextmanager
def _parquet_errors(file: TableFile) -> Iterator[None]:
    """Tells a damaged Parquet file from storage that fails: of the former pyarrow raises OSError without errno.

    Memory that it cannot have is what a damaged file asks for.
    """
    try:
        yield
    except (pa.ArrowException, MemoryError, OverflowError) as error:
        raise SourceError(f"table {file} is damaged: {error}") from error
    except OSError as error:
        if error.errno is not None or isinstance(error, StorageError):
            raise
        raise SourceError(f"table {file} is damaged: {error}") from error


def _read_parquet(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    assert columns.path is not None
    names = list(filter(None, [columns.path, columns.label, columns.weight]))
    row = 1
    for batch in parquet_batches(file, _BATCH, names):
        where = f"table {file}, rows from {row} on"
        paths = batch.column(columns.path)
        if paths.null_count or not (pa.types.is_string(paths.type) or pa.types.is_large_string(paths.type)):
            raise SourceError(f"{where}: column {columns.path!r} must be text in every row")
        weights = batch.column(columns.weight) if columns.weight else None
        counts, labels, values = label_lists(batch.column(columns.label), weights, where)
        yield TableRows(paths.cast(pa.string()), counts, labels, values, np.arange(row, row + len(paths)))
        row += len(paths)


class _Collector:
    """Gathers rows of text files into batches."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.paths: list[str] = []
        self.counts: list[int] = []
        self.labels: list[str] = []
        self.weights: list[float] = []
        self.lines: list[int] = []

    def add(self, path: str, labels: Sequence[str], weights: Sequence[float], line: int) -> TableRows | None:
        self.paths.append(path)
        self.counts.append(len(labels))
        self.labels.extend(labels)
        self.weights.extend(weights)
        self.lines.append(line)
        return self.take() if len(self.paths) == _BATCH else None

    def take(self) -> TableRows:
        rows = TableRows(
            pa.array(self.paths, pa.string()), np.array(self.counts, np.int64), pa.array(self.labels, pa.string()),
            np.array(self.weights, np.float64), np.array(self.lines, np.int64),
        )  # fmt: skip
        self._start()
        return rows


def _read_csv(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    collector = _Collector()
    with file.lines() as lines:
        rows = csv.reader(lines)
        header = next(rows, [])
        path, label = header.index(columns.path or ""), header.index(columns.label)
        weight = header.index(columns.weight) if columns.weight else None
        for row in rows:
            if not row:
                continue
            where = f"table {file}, line {rows.line_num}"
            if len(row) != len(header):
                raise SourceError(f"{where}: has {len(row)} fields where the header has {len(header)}")
            try:
                weights = [float(row[weight])] if weight is not None else [1.0]
            except ValueError:
                raise SourceError(f"{where}: weight {row[weight or 0]!r} is not a number") from None
            full = collector.add(row[path], [row[label]], weights, rows.line_num)
            if full is not None:
                yield full
    yield collector.take()


def _read_json_lines(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    collector = _Collector()
    with file.lines() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"table {file}, line {number}"
            try:
                entry = parse_json(line, "it")
            except StorageError as error:
                raise SourceError(f"{where}: not JSON ({error})") from error
            path, labels, weights = _json_entry(entry, columns, where)
            full = collector.add(path, labels, weights, number)
            if full is not None:
                yield full
    yield collector.take()


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and value.bit_length() < 1024)


def _json_entry(entry: Any, columns: Columns, where: str) -> tuple[str, list[str], list[float]]:
    if not isinstance(entry, dict) or columns.path not in entry or columns.label not in entry:
        raise SourceError(f"{where}: must be an object with {columns.path} and {columns.label}")
    labels = entry[columns.label]
    labels = labels if isinstance(labels, list) else [labels]
    weights = entry.get(columns.weight or "", [1.0] * len(labels))
    weights = weights if isinstance(weights, list) else [weights]
    if not (
        isinstance(entry[columns.path], str)
        and len(labels) == len(weights)
        and all(isinstance(label, str) or type(label) is int for label in labels)
        and all(_is_number(weight) for weight in weights)
    ):
        raise SourceError(
            f"{where}: {columns.path} must be text, {columns.label} names or numbers, weights as many numbers"
        )
    return entry[columns.path], [str(label) for label in labels], [float(weight) for weight in weights]
