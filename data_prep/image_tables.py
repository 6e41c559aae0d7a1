"""Listing tables: in each row an image's path or address and its labels, perhaps with weights (the JFT style)."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.command import Progress, log
from cluster.folders import Folder
from data_prep.coco import CocoTable
from data_prep.columns import Strings
from data_prep.listing import Listing, SourceError
from data_prep.table_files import class_names_of, read_rows_of, say_columns
from data_prep.table_format import Columns, TableFile, TableRows
from data_prep.table_labels import NO_LABEL, LabelOptions, Place, RawLabels, read_labels
from data_prep.table_paths import Fetching, as_files, check_paths, locate, why_none

_THREADS = 16
_CHUNK = 4096


class _Rows(NamedTuple):
    """A whole table: N images in the order of their paths, K labels."""

    paths: list[str]
    """[N], unique, sorted by their bytes."""
    raw: RawLabels
    row_of_label: NDArray[np.int64]
    """[K]."""
    lines: NDArray[np.int64]
    """Of each row."""


@dataclass(frozen=True)
class TableOptions:
    """What a user may say about a table."""

    labels: LabelOptions = field(default_factory=LabelOptions)
    fetching: Fetching = field(default_factory=Fetching)


def list_table(files: Sequence[TableFile], root: Folder, columns: Columns, options: TableOptions) -> Listing:
    """List the images that a table names, with their labels.

    An image may stand in several rows, each with one of its labels. Images that are named but are not there are left
    out, with the reason; those of other machines are fetched when they are sharded.

    Args:
        files: of the table.
        root: what relative paths are relative to.

    Raises:
        SourceError: a row is wrong (with the line), or none of the images is there.
    """
    where = f"table {files[0]}" if len(files) == 1 else f"table {files[0].folder}"
    say_columns(columns, where)
    rows = _gather(_batches(files, columns), columns.weight is not None, root, where, columns.holds_paths)
    return _listing(rows, class_names_of(files[0], columns), columns.label, root, options, where)


def list_coco(table: CocoTable, file: TableFile, root: Folder, options: TableOptions) -> Listing:
    """List the images that a file of COCO's names. Args, errors: as `list_table`."""
    where = f"table {file}"
    log.info("%s is COCO's JSON: the %d categories of its annotations are classes", where, len(table.classes))
    rows = _gather([table.rows], False, root, where)
    return _listing(rows, table.classes, "category_id", root, options, where)


def _listing(
    rows: _Rows, names: Sequence[str] | None, column: str, root: Folder, options: TableOptions, where: str
) -> Listing:
    place = Place(
        where, column,
        line=lambda label: f"{where}, line {rows.lines[rows.row_of_label[label]]}",
        image=lambda image: rows.paths[image],
    )  # fmt: skip
    found = read_labels(rows.raw, len(rows.paths), names, options.labels, place)
    paths, sizes, images, missing = locate(rows.paths, root, options.fetching)
    left_out = [(paths[row], "named in the table, but there is no such file") for row in np.flatnonzero(missing)]
    if missing.all():
        raise SourceError(why_none(paths, root, where))
    without = found.without[~missing[found.without]]
    left_out += [(paths[row], NO_LABEL) for row in without]
    listing = Listing(
        "table of images", where.removeprefix("table "), found.classes,
        Strings.of([os.fsencode(path) for path in paths]), sizes, images, found.labels, (),
    )  # fmt: skip
    missing[without] = True
    return listing if not left_out else listing.take(np.flatnonzero(~missing), left_out)


def _batches(files: Sequence[TableFile], columns: Columns) -> Iterator[TableRows]:
    progress = Progress(len(files), "files", "reading the table")
    total = 0
    for file in files:
        for batch in read_rows_of(file, columns):
            yield batch
            total += len(batch.counts)
        progress.update(1, f"{total:,} rows")


def _gather(
    parts: Iterable[TableRows], are_weighted: bool, root: Folder, where: str, inside_only: bool = False
) -> _Rows:
    batches = list(parts)
    if not sum(len(batch.counts) for batch in batches):
        raise SourceError(f"{where} names no image")
    paths = pa.chunked_array([batch.paths for batch in batches], pa.string())
    lines = np.concatenate([batch.lines for batch in batches])
    counts = np.concatenate([batch.counts for batch in batches])
    labels = pa.chunked_array([batch.labels.cast(pa.large_string()) for batch in batches], pa.large_string())
    weights = np.concatenate([batch.weights for batch in batches])
    unique, image_of_row = _sorted_codes(paths)
    check_paths(unique, image_of_row, lines, where, inside_only=inside_only)
    unique, image_of_row = as_files(unique, image_of_row, root)
    row_of_label = np.repeat(np.arange(len(counts)), counts)
    texts, numbers = _sorted_codes(labels) if len(labels) else ([], np.zeros(0, np.int64))
    are_cells = any(batch.are_cells for batch in batches)
    raw = RawLabels(image_of_row[row_of_label], numbers, weights, texts, are_cells, are_weighted)
    return _Rows(unique, raw, row_of_label, lines)


def _sorted_codes(values: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The different values sorted by their bytes, and for each value which one it is."""
    # with 64-bit offsets: the paths of a large table have more than 2 GiB of text
    encoded = pc.dictionary_encode(values.cast(pa.large_string())).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    order = pc.sort_indices(encoded.dictionary.cast(pa.large_binary())).to_numpy()
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(order)).to_pylist(), place[encoded.indices.to_numpy().astype(np.int64)]
