"""Columns of Arrow, Parquet's and Ray's, in whatever type they come: as plain text, lists, bytes and numbers."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.listing import SourceError
from data_prep.table_format import Columns


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds text, also as categories."""
    kind = _values(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a type holds bytes, also as categories."""
    kind = _values(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_image(kind: pa.DataType) -> bool:
    """Whether a type holds images: bytes, or a struct that has them (Hugging Face's {"bytes", "path"})."""
    kind = _values(kind)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return is_bytes(kind)


def _values(kind: pa.DataType) -> pa.DataType:
    """The type of the values: of a dictionary, of runs, of an extension type."""
    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def plain(column: Any) -> pa.Array:
    """A column in one piece, its categories, runs and views as values; the items of lists, too."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # of text of more than 2 GiB
        array = array.cast(pa.large_string()).combine_chunks()
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif isinstance(array, pa.DictionaryArray):
            array = array.dictionary_decode()
        elif pa.types.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        else:
            break
    kind = array.type
    if pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    if pa.types.is_binary_view(kind):
        return array.cast(pa.large_binary())
    if _is_list(kind):
        # of a slice, of lists that a null hides and of views only `flatten` gives the items in order
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        return pa.LargeListArray.from_arrays(offsets, plain(array.flatten()))
    return array


def _is_list(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    )  # fmt: skip


def text_column(column: Any, name: str, where: str) -> pa.Array:
    """A column of text without nulls.

    Raises:
        SourceError: it is of another type, or has a null.
    """
    array = plain(column)
    if array.null_count or not is_text(array.type):
        raise SourceError(f"{where}: column {name!r} must be text in every row, not {array.type}")
    return array.cast(pa.string())


def label_lists(
    batch: Any, columns: Columns, where: str
) -> tuple[NDArray[np.int64], pa.Array, NDArray[np.float64], bool]:
    """The labels of a batch as (counts [B], labels as text [K], weights [K], whether they are whole cells).

    Raises:
        SourceError: the columns are of other types, or have not as many weights as labels.
    """
    if columns.indicators:
        counts, texts = _indicated(batch, columns, where)
        is_cell = False
    else:
        labels = plain(batch.column(columns.label))
        is_cell = not _is_list(labels.type)
        if is_cell:
            counts, texts = np.ones(len(labels), np.int64), _texts(labels, where)
        else:
            counts = pc.list_value_length(labels).to_numpy(zero_copy_only=False).astype(np.int64)
            items = plain(labels.flatten())
            if items.null_count:
                raise SourceError(f"{where}: a list of labels has a null in it")
            texts = _texts(items, where)
        if is_cell and columns.cells.splits:
            counts, texts = _split(texts, columns, where)
            is_cell = False
    if columns.weight is None:
        return counts, texts, np.ones(len(texts), np.float64), is_cell
    weights = plain(batch.column(columns.weight))
    if _is_list(weights.type):
        given = pc.list_value_length(weights).to_numpy(zero_copy_only=False)
        weights = plain(weights.flatten())
    else:
        given = np.ones(len(weights), np.int64)
    if not np.array_equal(given, counts):
        raise SourceError(f"{where}, row {int(np.flatnonzero(given != counts)[0]) + 1}: not as many weights as labels")
    # a weight that is not there is refused as no number
    values = pc.fill_null(weights.cast(pa.float64()), float("nan"))
    return counts, texts, values.to_numpy(zero_copy_only=False), is_cell


def _texts(values: pa.Array, where: str) -> pa.Array:
    """Labels as text, "" where there is none."""
    kind = values.type
    known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    if not (is_text(kind) or any(test(kind) for test in known)):
        raise SourceError(f"{where}: the labels must be text or numbers, or lists of them, not {kind}")
    if pa.types.is_float16(kind):  # which has no cast to text
        values = values.cast(pa.float32())
    texts = pc.fill_null(values.cast(pa.large_string()), "")
    return pc.utf8_trim_whitespace(texts) if is_text(kind) else texts


def _split(cells: pa.Array, columns: Columns, where: str) -> tuple[NDArray[np.int64], pa.Array]:
    known: dict[str, list[str]] = {}
    texts: list[str] = []
    counts = np.zeros(len(cells), np.int64)
    for row, cell in enumerate(cells.to_pylist()):
        if cell not in known:
            try:
                known[cell] = columns.cells.split(cell) if cell else [cell]
            except ValueError as error:
                raise SourceError(f"{where}, row {row + 1}: label {cell[:60]!r} cannot be split: {error}") from None
        texts += known[cell]
        counts[row] = len(known[cell])
    return counts, pa.array(texts, pa.large_string())


def _indicated(batch: Any, columns: Columns, where: str) -> tuple[NDArray[np.int64], pa.Array]:
    """Numbers of the columns of 0 and 1 that are 1, as text."""
    found = np.zeros((len(plain(batch.column(columns.indicators[0]))), len(columns.indicators)), np.bool_)
    for number, name in enumerate(columns.indicators):
        texts = pc.dictionary_encode(_texts(plain(batch.column(name)), where))
        which = texts.indices.to_numpy()
        values = [
            columns.is_set(text, name, f"{where}, row {int(np.argmax(which == place)) + 1}")
            for place, text in enumerate(texts.dictionary.to_pylist())
        ]
        found[:, number] = np.array(values, np.bool_)[which]
    numbers = np.nonzero(found)[1]
    return found.sum(axis=1).astype(np.int64), pa.array([str(number) for number in numbers.tolist()], pa.large_string())
