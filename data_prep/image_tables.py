"""Listing tables: in each row an image's path or address and its labels, perhaps with weights (the JFT style)."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.command import Progress, log
from cluster.folders import Folder, LocalFolder
from cluster.paths import shown, why_not_inside
from cluster.redact import address_without_credentials
from cluster.storage import NOT_THERE, unreadable
from data_prep.columns import Strings
from data_prep.listing import Listing, SourceError
from data_prep.remote_images import FetchPolicy, RemoteImages
from data_prep.source_reader import FileImages, Images
from data_prep.table_files import class_names_of, read_rows_of, say_columns
from data_prep.table_format import Columns, TableFile, TableRows
from data_prep.table_labels import NO_LABEL, LabelOptions, Place, RawLabels, read_labels

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
    assumed_bytes: int = 100_000
    """Of an image that must be fetched to know."""
    policy: FetchPolicy = field(default_factory=FetchPolicy)


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
    rows = _gather(files, columns, where)
    place = Place(
        where, columns.label,
        line=lambda label: f"{where}, line {rows.lines[rows.row_of_label[label]]}",
        image=lambda image: rows.paths[image],
    )  # fmt: skip
    found = read_labels(rows.raw, len(rows.paths), class_names_of(files[0], columns), options.labels, place)
    paths, sizes, images, missing = _locate(rows.paths, root, options)
    left_out = [(paths[row], "named in the table, but there is no such file") for row in np.flatnonzero(missing)]
    if missing.all():
        raise SourceError(
            f"none of the {len(paths)} images named in {where} is in {root.url}, for example not {paths[0]!r}: "
            f"relative paths are relative to the folder given as the source (with labels=TABLE), or to the table's own"
        )
    without = found.without[~missing[found.without]]
    left_out += [(paths[row], NO_LABEL) for row in without]
    listing = Listing(
        "table of images", where.removeprefix("table "), found.classes,
        Strings.of([os.fsencode(path) for path in paths]), sizes, images, found.labels, (),
    )  # fmt: skip
    missing[without] = True
    return listing if not left_out else listing.take(np.flatnonzero(~missing), left_out)


def _gather(files: Sequence[TableFile], columns: Columns, where: str) -> _Rows:
    batches: list[TableRows] = []
    progress = Progress(len(files), "files", "reading the table")
    total = 0
    for file in files:
        for batch in read_rows_of(file, columns):
            batches.append(batch)
            total += len(batch.counts)
        progress.update(1, f"{total:,} rows")
    if not total:
        raise SourceError(f"{where} names no image")
    paths = pa.chunked_array([batch.paths for batch in batches], pa.string())
    lines = np.concatenate([batch.lines for batch in batches])
    counts = np.concatenate([batch.counts for batch in batches])
    labels = pa.chunked_array([batch.labels.cast(pa.large_string()) for batch in batches], pa.large_string())
    weights = np.concatenate([batch.weights for batch in batches])
    unique, image_of_row = _sorted_codes(paths)
    _check_paths(unique, image_of_row, lines, where)
    unique, image_of_row = _normal(unique, image_of_row)
    row_of_label = np.repeat(np.arange(len(counts)), counts)
    texts, numbers = _sorted_codes(labels) if len(labels) else ([], np.zeros(0, np.int64))
    are_cells = any(batch.are_cells for batch in batches)
    raw = RawLabels(image_of_row[row_of_label], numbers, weights, texts, are_cells, columns.weight is not None)
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


def _normal(paths: list[str], image_of_row: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Paths that are written in several ways (a/x, ./a/x, a//x) as one; sorted, with which one each row names."""
    normal = [path if "://" in path else str(PurePosixPath(path)) for path in paths]
    if normal == paths:
        return paths, image_of_row
    unique = sorted(set(normal), key=str.encode)
    numbers = {path: number for number, path in enumerate(unique)}
    return unique, np.array([numbers[path] for path in normal], np.int64)[image_of_row]


def _check_paths(paths: Sequence[str], image_of_row: NDArray[np.int64], lines: NDArray[np.int64], where: str) -> None:
    for number, path in enumerate(paths):
        if not PurePosixPath(path).parts:
            problem: str | None = "is empty"
        elif "://" in path or path.startswith("/"):
            problem = "has a zero character" if "\0" in path else None
        else:
            problem = why_not_inside(path)
        if problem is not None:
            line = lines[np.flatnonzero(image_of_row == number)[0]]
            raise SourceError(
                f"{where}, line {line}: path {shown(path)} {problem}: it must be an address, an absolute path, or "
                f"relative to the source and inside it"
            )


def _locate(
    paths: list[str], root: Folder, options: TableOptions
) -> tuple[list[str], NDArray[np.uint64], Images, NDArray[np.bool_]]:
    """Paths as they are written down, sizes, where the images are, and which are missing."""
    far = np.array(["://" in path for path in paths], np.bool_)
    absolute = np.array([path.startswith("/") for path in paths], np.bool_)
    if not far.any() and not absolute.any():
        sizes = _sizes(root, paths)
        images: Images = FileImages(root, Strings.of([os.fsencode(path) for path in paths]))
        return paths, np.maximum(sizes, 0).astype(np.uint64), images, sizes < 0
    if absolute.all():
        inner = [path.lstrip("/") for path in paths]
        sizes = _sizes(LocalFolder(Path("/")), inner)
        images = FileImages(LocalFolder(Path("/")), Strings.of([os.fsencode(path) for path in inner]))
        return paths, np.maximum(sizes, 0).astype(np.uint64), images, sizes < 0
    addresses = [
        path if is_far or is_absolute else f"{root.url}/{path}"
        for path, is_far, is_absolute in zip(paths, far, absolute, strict=True)
    ]
    images = RemoteImages.at(addresses, options.policy)
    assumed = np.full(len(paths), options.assumed_bytes, np.uint64)
    log.info(
        "%s of %s images are fetched where the table says; shards are cut as if each had %s bytes (image_kb)",
        f"{int(far.sum()):,}", f"{len(paths):,}", f"{options.assumed_bytes:,}",
    )  # fmt: skip
    names = [address_without_credentials(path) for path in paths]
    if indistinct := len(paths) - len(set(names)):
        log.warning(
            "%s addresses differ from others only in what is not written down (a key, a token, what follows a #): "
            "nothing in the corpus will tell their images apart",
            f"{indistinct:,}",
        )
    return names, assumed, images, np.zeros(len(paths), np.bool_)


def _sizes(root: Folder, paths: Sequence[str]) -> NDArray[np.int64]:
    """Bytes of files in a folder, -1 for those that are not there."""
    local = root.local
    if local is None:
        known = root.tree()
        return np.array([known.get(path, -1) for path in paths], np.int64)
    progress = Progress(len(paths), "images", "listing")

    def sizes_of(chunk: Sequence[str]) -> list[int]:
        found = []
        for path in chunk:
            try:
                found.append(Path(local, path).stat().st_size)
            except OSError as error:
                if error.errno not in NOT_THERE:
                    raise unreadable(Path(local, path), error) from error
                found.append(-1)
        return found

    sizes: list[int] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
        for part in pool.map(sizes_of, chunks):
            sizes.extend(part)
            progress.update(len(part))
    return np.array(sizes, np.int64)
