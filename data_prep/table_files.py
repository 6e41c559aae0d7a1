"""Tables of images (CSV, JSON, Parquet): which files they are, and which of their columns say what."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.command import log
from cluster.folders import Folder
from cluster.storage import StorageError
from data_prep.arrow_columns import is_image, label_lists, plain, text_column
from data_prep.label_cells import LabelCells
from data_prep.listing import SourceError
from data_prep.table_format import BATCH, PARQUET, Columns, TableFile, TableRows, table_suffix, value_text
from data_prep.text_tables import head, read_rows_of_text, text_values

_LOOKED_AT = 1000
"""Rows that tell what a column holds."""
_YES_OR_NO_ALONE = {"0", "1", "0.0", "1.0", "true", "false"}
_YES_OR_NO = {*_YES_OR_NO_ALONE, "True", "False", "-1", "-1.0", ""}
_INDEX = re.compile(r"|Unnamed: \d+|index|__index_level_\d+__")
"""Columns that pandas writes for the numbers of rows."""
_SPACES = re.compile(r"[\s-]+")

# Usual names of columns, the likeliest first.
_PATHS = (
    *("path", "file_path", "filepath", "filepaths", "file_name", "filename", "file", "image_path", "uri", "url"),
    *("image_url", "image_name", "imagename", "image", "img", "picture", "image_id", "imageid", "img_id", "id_code"),
    *("fname", "name", "id", "key"),
)
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
    "label_name",
    "labelname",
    "category_name",
    "species",
    "breed",
    "diagnosis",
)
_NO_LABEL = re.compile(
    r"split|set|subset|partition|fold|phase|usage|captions?|text|title|description|url|width|height|size|md5|sha\d*|hash|date|time"
)
"""Columns that say something else than a label, where a table has no other one."""
NO_WEIGHTS = "none"
"""What weight_column= is where a column that is called like weights is something else."""
_WEIGHTS = ("weight", "weights", "score", "scores", "confidence", "confidences")


def table_files(folder: Folder, name: str | None = None) -> list[TableFile]:
    """The files of a table; none where it is no table.

    Args:
        folder: of the file, or of several of Parquet.
        name: of the file, which is there; None for the Parquet files directly in the folder, sorted.
    """
    if name is not None:
        return [TableFile(folder, name)] if table_suffix(name) is not None else []
    names = [name for name in folder.names() if table_suffix(name) == PARQUET and not name.startswith(".")]
    return [TableFile(folder, name) for name in names]


@dataclass(frozen=True)
class ColumnNames:
    """What a user may say of a table's columns."""

    path: str | None = None
    label: str | None = None
    weight: str | None = None
    image: str | None = None
    indicators: tuple[str, ...] = ()
    cells: LabelCells = field(default_factory=LabelCells)
    unset: tuple[str, ...] = ()


def columns_of(files: Sequence[TableFile], said: ColumnNames) -> Columns:
    """Which columns a table is read by: those that are named, or those with a usual name.

    Raises:
        SourceError: a column is not there, or cannot be told.
    """
    names, binary = _header(files[0])
    where = f"table {files[0]}"
    image = _pick(names, said.image, _IMAGES, "image_column", where, among=binary)
    path = _pick(names, said.path, _PATHS, "path_column", where, among=[name for name in names if name not in binary])
    usual_weights = _WEIGHTS if said.weight is None else ()
    unweighted = said.weight == NO_WEIGHTS and NO_WEIGHTS not in names
    weight = None if unweighted else _pick(names, said.weight, usual_weights, "weight_column", where)
    label = None if said.indicators else _pick(names, said.label, _LABELS, "label_column", where)
    indicators: Sequence[str] = said.indicators
    for name in indicators:
        _pick(names, name, (), "label_columns", where)
    zero_one = [] if label or indicators else _columns_of_zero_and_one(files[0], names)
    others = [name for name in names if name not in zero_one and not _INDEX.fullmatch(name)]
    if len(zero_one) > 1 and len(others) == 1 and path is None and image is None:
        path = others[0]
    if len(zero_one) > 1 and others in ([path], [image]):
        indicators = zero_one
    if path is None and image is None:
        raise SourceError(
            f"{where} has no column that says where the images are: its columns are {_shown(names)}; the first line "
            f"must be like `path,label`, or name one with path_column= (image_column= where the images are in it)"
        )
    if label is None and not indicators:
        label = _only_other(names, (path, image, weight))
    if label is None and not indicators:
        hint = "name one with label_column="
        if len(zero_one) > 1:
            hint += f", or label_columns=[{','.join(zero_one)}] takes those of 0 and 1 for classes"
        raise SourceError(f"{where} has no column of labels: its columns are {_shown(names)}; {hint}")
    if indicators:
        return Columns(path, "", weight if said.weight else None, image, tuple(indicators), said.cells, said.unset)
    return Columns(path, label or "", weight, image, (), said.cells, said.unset)


def with_paths_alone(file: TableFile, columns: Columns) -> Columns:
    """The columns of a table whose images are not in it: {"bytes": null, "path": ...} in its first rows."""
    if columns.image is None:
        return columns
    kind = _schema(file).field(columns.image).type
    if not pa.types.is_struct(kind) or "path" not in {part.name for part in kind}:
        return columns
    batch = next(parquet_batches(file, _LOOKED_AT, [columns.image]), None)
    if batch is None or not len(batch):
        return columns
    images = plain(batch.column(columns.image))
    if images.field("bytes").null_count < len(images) or images.field("path").null_count == len(images):
        return columns
    log.info("%s: its images are files, by their paths in column %r", file, columns.image)
    return replace(columns, path=columns.image, image=None, holds_paths=True)


def column_names(file: TableFile) -> list[str]:
    """Names of a table's columns. Errors: as `columns_of`."""
    return _header(file)[0]


def column_values(file: TableFile, column: str) -> Iterator[str]:
    """What a column says in each row, as text.

    Raises:
        SourceError: the file cannot be read.
    """
    if file.suffix != PARQUET:
        yield from text_values(file, column)
        return
    for batch in parquet_batches(file, BATCH, [column]):
        yield from ((value_text(value) or "") for value in batch.column(column).to_pylist())


def rows_of_splits(batch: pa.RecordBatch, columns: Columns) -> tuple[pa.RecordBatch, NDArray[np.int64]]:
    """The rows of the splits that are read, and which ones of the batch they are."""
    if columns.split is None:
        return batch, np.arange(len(batch))
    chosen = np.array([value_text(value) in columns.splits for value in batch.column(columns.split).to_pylist()], bool)
    return batch.filter(pa.array(chosen)), np.flatnonzero(chosen)


def say_columns(columns: Columns, where: str) -> None:
    """Say which columns a table is read by."""
    if columns.indicators:
        labels = f"its {len(columns.indicators)} columns of 0 and 1 are classes: {_shown(columns.indicators)}"
    else:
        labels = f"labels are in column {columns.label!r}"
        labels += f", their weights in {columns.weight!r}" if columns.weight else ""
    log.info("%s: images are in column %r, %s", where, columns.image or columns.path, labels)


def _only_other(names: Sequence[str], known: Sequence[str | None]) -> str | None:
    """The column of labels of a table that has no other one beside its images: id_code, diagnosis."""
    others = [name for name in names if name not in known and not _INDEX.fullmatch(name)]
    if len(others) != 1 or _NO_LABEL.fullmatch(_SPACES.sub("_", others[0].strip().lower())):
        return None
    return others[0]


def _shown(names: Sequence[str]) -> str:
    return ", ".join([*names[:20], "..."] if len(names) > 20 else names)


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
            raise SourceError(f"{key} = {asked!r}: {where} has no such column; its columns are {_shown(names)}")
        return asked
    candidates = {_SPACES.sub("_", name.strip().lower()): name for name in (names if among is None else among)}
    return next((candidates[name] for name in usual if name in candidates), None)


def _header(file: TableFile) -> tuple[list[str], list[str]]:
    """Names of a table's columns, and of those that hold images' bytes."""
    if file.suffix == PARQUET:
        try:
            schema = _schema(file)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"table {file} cannot be read: {error}") from error
        return list(schema.names), [field.name for field in schema if is_image(field.type)]
    # not every object need have all of the keys
    return list(dict.fromkeys(str(key) for entry in head(file) if isinstance(entry, dict) for key in entry)), []


def _columns_of_zero_and_one(file: TableFile, names: Sequence[str]) -> list[str]:
    """The columns that hold 0 and 1 alone in the first rows, or -1 and nothing, which are sometimes meant as no."""
    if file.suffix == PARQUET:
        simple = [field.name for field in _schema(file) if not (is_image(field.type) or pa.types.is_nested(field.type))]
        batch = next(parquet_batches(file, _LOOKED_AT, simple), None)
        rows = [] if batch is None else batch.to_pylist()
    else:
        rows = [entry for entry in head(file) if isinstance(entry, dict)]
    found = []
    for name in names:
        texts = {value_text(row.get(name)) for row in rows}
        if texts <= _YES_OR_NO and texts & _YES_OR_NO_ALONE:
            found.append(name)
    return found


def _schema(file: TableFile) -> pa.Schema:
    with file.open() as content, _parquet_errors(file):
        return pq.read_schema(content)


def class_names_of(file: TableFile, columns: Columns) -> list[str] | None:
    """Names of the classes whose numbers the labels are, or None where nothing says them.

    A Parquet file of Hugging Face's datasets carries them in its schema; columns of 0 and 1 are called like classes.
    """
    if columns.indicators:
        return [name.strip() for name in columns.indicators]
    if file.suffix != PARQUET:
        return None
    try:
        metadata = _schema(file).metadata or {}
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][columns.label]
        names = feature.get("names") or feature.get("feature", {}).get("names")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def read_rows_of(file: TableFile, columns: Columns) -> Iterator[TableRows]:
    """The rows of one file, in batches.

    Raises:
        SourceError: it cannot be read, or a row is wrong; the message has its line.
    """
    if file.suffix != PARQUET:
        yield from read_rows_of_text(file, columns)
        return
    try:
        yield from _read_parquet(file, columns)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"table {file} cannot be read: {error}") from error


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
    row = 1
    for whole in parquet_batches(file, BATCH, columns.names):
        batch, kept = rows_of_splits(whole, columns)
        where = f"table {file}, rows from {row} on"
        column = plain(batch.column(columns.path))
        if columns.holds_paths:
            column = plain(column.field("path"))
        elif pa.types.is_integer(column.type):  # ids
            column = column.cast(pa.string())
        paths = text_column(column, columns.path, where)
        counts, labels, values, are_cells = label_lists(batch, columns, where)
        yield TableRows(paths, counts, labels, values, row + kept, are_cells)
        row += len(whole)
