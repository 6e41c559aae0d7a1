"""Images whose bytes stand in a table (Parquet, a Ray Dataset), laid down where they can be read at random.

Rows of such tables cannot be read one by one, and a global shuffle asks for that: reading one image of a Parquet file
decodes its whole row group. So the bytes are copied once into runs of bytes beside the corpus, by Ray tasks, a file or
a block of the dataset each; they are removed when the corpus is finished. That takes their size in room for as long.
"""

import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from cluster.command import Progress, log
from cluster.folders import Folder
from cluster.storage import write_fully
from data_prep.arrow_columns import is_bytes, label_lists, plain
from data_prep.columns import Strings
from data_prep.corpus_jobs import LAID_DOWN_FILES, mark_working_folder
from data_prep.listing import Listing, SourceError
from data_prep.source_reader import Stream, StreamImages
from data_prep.table_files import parquet_batches, rows_of_splits
from data_prep.table_format import Columns, TableFile
from data_prep.table_labels import NO_LABEL, LabelOptions, Place, RawLabels, read_labels
from data_prep.tasks import Work, run_tasks

_ROWS = 256
_PARTS = "parts.json"


@dataclass(frozen=True)
class _FileTask:
    """The images of one Parquet file."""

    file: TableFile
    folder: Folder
    part: str
    columns: Columns
    stamp: str


def lay_down_files(files: Sequence[TableFile], columns: Columns, folder: Folder, workers: int) -> list[str]:
    """Copy the images of Parquet files into a folder; returns the names of the parts, in the order of the files.

    Files that an earlier run has done are not read again.

    Raises:
        SourceError: a file cannot be read, or a column has another type.
        StorageError: the folder cannot be written.
    """
    mark_working_folder(folder)
    parts = [f"{number:06d}" for number in range(len(files))]
    tasks = {}
    for file, part in zip(files, parts, strict=True):
        stamp = f"{file.name} {file.stamp()} {columns}"
        if folder.size(f"{part}.npz") is None or str(_load(folder, part)["stamp"]) != stamp:
            tasks[part] = partial(_FileTask, file, folder, part, columns, stamp)
    sizes = {part: file.size() for part, file in zip(parts, files, strict=True)}
    progress = Progress(sum(sizes.values()), "bytes", "copying the images of the table")
    progress.skip(sum(size for part, size in sizes.items() if part not in tasks))
    work = Work(bytes=sum(sizes[part] for part in tasks), decodes=False)
    run_tasks(_lay_down_file, tasks, folder, workers, progress, lambda part: sizes[part], work=work)
    return parts


def lay_down_dataset(dataset: Any, columns: Columns, folder: Folder) -> list[str]:
    """Copy the images of a Ray Dataset into a folder, unless that was done before; returns the names of the parts.

    Raises:
        SourceError: a column is not there or has another type.
    """
    if folder.size(_PARTS) is not None:
        log.info("the images of the dataset lie in %s from an earlier run", folder.url)
        known: list[str] = folder.read_json(_PARTS)
        return known
    folder.remove_tree(LAID_DOWN_FILES)
    mark_working_folder(folder)
    schema = dataset.schema()
    names = list(schema.names) if schema is not None else []
    for key, column in (
        ("image", columns.image),
        ("label", columns.label),
        ("weight", columns.weight),
        ("name", columns.path),
        *(("label_columns", name) for name in columns.indicators),
    ):
        if column and column not in names:
            raise SourceError(f"{key} = {column!r}: the dataset has no such column, it has {', '.join(names)}")

    def lay_down(batch: pa.Table) -> pa.Table:
        part = uuid.uuid4().hex
        _lay_down([batch], columns, folder, part, "", "the dataset")
        return pa.table({"part": [part], "rows": [len(batch)]})

    done = list(dataset.map_batches(lay_down, batch_format="pyarrow", batch_size=None).iter_rows())
    parts = sorted(row["part"] for row in done)
    folder.write_json(_PARTS, parts)
    log.info("copied %s images of the dataset to %s", f"{sum(row['rows'] for row in done):,}", folder.url)
    return parts


def list_laid_down(
    folder: Folder,
    parts: Sequence[str],
    place: str,
    columns: Columns,
    names: Sequence[str] | None,
    options: LabelOptions,
) -> Listing:
    """List what was laid down.

    Args:
        columns: that it was laid down by.
        names: of the classes where the labels are numbers of them, or None.

    Raises:
        SourceError: there is no image, a label is no number where names are given, has no name, stands twice beside
            one image, or has a weight that is none.
    """
    loaded = [_load(folder, part) for part in parts]
    images = Strings.join([Strings(part["names"], part["name_pointers"]) for part in loaded])
    sizes = np.concatenate([part["sizes"] for part in loaded])

    def name(row: int) -> str:
        return images[row].decode("utf-8", "backslashreplace")

    left_out = [(name(row), "no image in this row") for row in np.flatnonzero(sizes == 0).tolist()]
    if not (sizes > 0).any():
        raise SourceError(f"{place} has no image: {len(sizes)} rows")
    counts = np.concatenate([part["counts"] for part in loaded])
    labels = Strings.join([Strings(part["labels"], part["label_pointers"]) for part in loaded])
    weights = np.concatenate([part["weights"] for part in loaded])
    texts = [labels[row].decode() for row in range(len(labels))]
    different = sorted(set(texts))
    known = {text: number for number, text in enumerate(different)}
    are_weighted = columns.weight is not None and bool((weights != 1).any())
    raw = RawLabels(
        np.repeat(np.arange(len(counts)), counts), np.array([known[text] for text in texts], np.int64), weights,
        different, any(bool(part["are_cells"]) for part in loaded), are_weighted,
    )  # fmt: skip
    found = read_labels(raw, len(counts), names, options, Place(place, columns.label, lambda label: place, name))
    column = found.labels
    without = [row for row in found.without.tolist() if sizes[row]]
    left_out += [(name(row), NO_LABEL) for row in without]
    which = np.repeat(np.arange(len(loaded), dtype=np.int32), [len(part["sizes"]) for part in loaded])
    offsets = np.concatenate([part["offsets"] for part in loaded])
    checks = np.concatenate([part["checks"] for part in loaded])
    listing = Listing(
        "table with images", place, found.classes, images, sizes,
        StreamImages(folder, tuple(Stream(f"{part}.bytes") for part in parts), which, offsets), column,
    )  # fmt: skip

    def all_it_says(row: int) -> tuple[bytes, int, bytes]:
        return images[row], int(checks[row]), column[row].tobytes()

    # by all that a row says: blocks of a dataset come in any order
    keep = sorted(set(np.flatnonzero(sizes > 0).tolist()) - set(without), key=all_it_says)
    return listing.take(np.array(keep, np.int64), left_out)


def _lay_down_file(task: _FileTask) -> dict[str, Any]:
    columns = task.columns
    try:
        batches = (rows_of_splits(batch, columns)[0] for batch in parquet_batches(task.file, _ROWS, columns.names))
        size = _lay_down(batches, columns, task.folder, task.part, f"{task.file.name}/", str(task.file), task.stamp)
    except pa.ArrowException as error:  # of its columns' types
        raise SourceError(f"table {task.file} cannot be read: {error}") from error
    return {"sizes": {".tar": size}}


def _lay_down(
    batches: Any, columns: Columns, folder: Folder, part: str, begin: str, where: str, stamp: str = ""
) -> int:
    """Write one part: the bytes of its images, and then what they are; returns the bytes."""
    names: list[bytes] = []
    sizes: list[int] = []
    offsets: list[int] = []
    checks: list[int] = []
    counts: list[NDArray[np.int64]] = []
    labels: list[bytes] = []
    weights: list[NDArray[np.float64]] = []
    are_cells = False
    at = 0
    with folder.writing(f"{part}.bytes") as sink:
        for batch in batches:
            assert columns.image is not None
            images, paths = _bytes_and_paths(plain(batch.column(columns.image)), where)
            if columns.path is not None:
                paths = plain(batch.column(columns.path)).cast(pa.string()).to_pylist()
            count, texts, values, is_cell = label_lists(batch, columns, where)
            are_cells |= is_cell
            counts.append(count)
            labels += [text.encode() for text in texts.to_pylist()]
            weights.append(values)
            for image, path in zip(images, paths, strict=True):
                data = b"" if image is None else image.as_buffer() if image.is_valid else b""
                view = memoryview(data)
                check = xxhash.xxh3_64_intdigest(view)
                if begin:  # rows are told apart by their place in the file
                    name = f"{begin}{len(names):07d}{'-' if path else ''}{path or ''}"
                else:
                    name = path or xxhash.xxh3_128_hexdigest(view)
                names.append(name.encode())
                sizes.append(len(view))
                offsets.append(at)
                checks.append(check)
                at += len(view)
                write_fully(sink, view)
    name_column, label_column = Strings.of(names), Strings.of(labels)
    buffer = io.BytesIO()
    np.savez(
        buffer, names=name_column.content, name_pointers=name_column.pointers, sizes=np.array(sizes, np.uint64),
        offsets=np.array(offsets, np.uint64), checks=np.array(checks, np.uint64),
        counts=np.concatenate([np.zeros(0, np.int64), *counts]), labels=label_column.content,
        label_pointers=label_column.pointers, weights=np.concatenate([np.zeros(0), *weights]), stamp=np.array(stamp),
        are_cells=np.array(are_cells),
    )  # fmt: skip
    folder.write_bytes(f"{part}.npz", buffer.getbuffer())
    return at


def _bytes_and_paths(column: pa.Array, where: str) -> tuple[Any, list[str | None]]:
    """Images as binary scalars, and their paths where the column has them (Hugging Face's {"bytes", "path"})."""
    if pa.types.is_struct(column.type) and "bytes" in {field.name for field in column.type}:
        fields = {field.name for field in column.type}
        paths = plain(column.field("path")).cast(pa.string()).to_pylist() if "path" in fields else [None] * len(column)
        return _bytes_and_paths(plain(column.field("bytes")), where)[0], paths
    if not is_bytes(column.type):
        raise SourceError(
            f"{where}: images must be encoded bytes (or a struct with `bytes`), not {column.type}; "
            f"ray.data.read_binary_files gives them"
        )
    return column, [None] * len(column)


def _load(folder: Folder, part: str) -> dict[str, Any]:
    with np.load(io.BytesIO(folder.read_bytes(f"{part}.npz")), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
