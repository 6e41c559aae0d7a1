"""What there is to shard: each kind of source is recognised from what is there, or named, and listed the same way.

recognition.py tells the kind; image_folders.py, image_tars.py, image_tables.py, embedded_images.py and
tar_sample_source.py each list one.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster import storage
from cluster.command import absolute_path
from cluster.folders import Folder
from cluster.paths import shown
from cluster.settings import SettingsError
from data_prep.class_names import by_value, named_by_number, numbers_of, put_in_order, read_classes, read_words, relabel
from data_prep.coco import read_coco
from data_prep.corpus_jobs import LAID_DOWN
from data_prep.embedded_images import lay_down_files, list_laid_down
from data_prep.image_check import MAX_BYTES, TOO_MANY_BYTES
from data_prep.image_folders import list_image_folder, list_loose_images
from data_prep.image_tables import TableOptions, list_coco, list_table
from data_prep.image_tars import list_flat_tar, list_tar
from data_prep.label_cells import LabelCells
from data_prep.label_weights import with_scaled_weights
from data_prep.listing import Listing, SourceError
from data_prep.recognition import Asked, Found, recognise, source_folder, tables_at
from data_prep.remote_images import FetchPolicy
from data_prep.sample_labels import LabelForm
from data_prep.small_files import file_beside, file_here, file_stamp
from data_prep.source_reader import FileImages
from data_prep.source_settings import CAME_LATER, SourceSettings, column_names_of, label_options, refuse_unread
from data_prep.splits import ALL
from data_prep.table_files import class_names_of, columns_of, say_columns, with_paths_alone
from data_prep.table_format import PARQUET, TABLES, Columns, TableFile
from data_prep.table_paths import Fetching
from data_prep.table_splits import of_split
from data_prep.tar_class_folders import InsideTar
from data_prep.tar_sample_source import list_corpus, list_samples, tars_in
from data_prep.validation_truth import with_truth


@dataclass(frozen=True)
class Source:
    """A source that was found."""

    found: Found
    settings: SourceSettings
    """With what it says of itself."""


def list_source(
    settings: SourceSettings, workers: int = 0, destination: Folder | None = None, source: Source | None = None
) -> Listing:
    """List a source: its images with their labels, after renaming and selecting classes.

    Args:
        workers: for images in tables, which are copied first: files at a time.
        destination: of the corpus, where such copies go.
        source: where `find_source` has found it already.

    Raises:
        SourceError: nothing there, nothing readable, or no image.
        SettingsError: a setting that this kind of source does not read.
    """
    source = source or find_source(settings)
    found, settings = source.found, source.settings
    with _readable(found.place):
        listing = _list(found, settings, workers, destination)
    if found.kind in ("folder", "tar"):
        listing = by_value(listing)
    elif found.kind in ("webdataset", "corpus"):
        listing = with_scaled_weights(listing, settings.weight_scale)
    return _with_chosen_classes(_without_giants(listing), settings)


@contextmanager
def _readable(place: str) -> Iterator[None]:
    """Says of what cannot be read that it is of the source."""
    try:
        yield
    except OSError as error:
        if isinstance(error, storage.StorageError):
            raise
        what = shown(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else "a file"
        raise SourceError(f"source {place} cannot be read: {error.strerror} ({what})") from error


def find_source(settings: SourceSettings) -> Source:
    """What the settings name. Errors: as `list_source`."""
    place = absolute_path(settings.source, "source")
    with _readable(place):
        found = recognise(
            Asked(
                place, settings.kind, settings.inside, settings.split, settings.labels is not None, bool(settings.truth)
            )
        )
    if found.labels is not None:
        settings = settings.model_copy(update={"labels": found.labels})
    refuse_unread(settings, found.kind, found.used)
    return Source(found, settings)


def _without_giants(listing: Listing) -> Listing:
    """Without what has more bytes than an image can have: it would be read into memory to find that out."""
    giants = listing.sizes > MAX_BYTES
    if not giants.any():
        return listing
    left_out = [(os.fsdecode(listing.names[row]), TOO_MANY_BYTES) for row in np.flatnonzero(giants).tolist()]
    return listing.take(np.flatnonzero(~giants), left_out)


def _list(found: Found, settings: SourceSettings, workers: int, destination: Folder | None) -> Listing:
    folder, place = found.folder, found.place
    if found.kind == "table":
        return _list_table(found, settings, workers, destination)
    if found.kind == "corpus":
        return list_corpus(place)
    if found.kind == "webdataset":
        cells = LabelCells.of(settings.label_delimiter)
        form = LabelForm("", key=settings.label_column, no_label=settings.no_label, cells=cells)
        listing = list_samples(folder, found.files or tars_in(folder), place, form, settings.labels_per_image)
        return listing if settings.inside is None or "inside" in found.used else _inside(listing, settings.inside)
    if found.kind == "tar":
        (name,) = found.files
        inside = InsideTar(settings.inside, settings.split, settings.kind != "tar")
        if settings.truth is None:
            return list_tar(folder, name, inside)
        listed, images = list_flat_tar(folder, name, inside)
        return with_truth(
            "flat tar with a truth file", place, listed.names, listed.sizes, images, *_truth_files(settings)
        )
    if settings.truth is None:
        return list_image_folder(folder)
    names, sizes = list_loose_images(folder)
    return with_truth(
        "flat folder with a truth file", place, names, sizes, FileImages(folder, names), *_truth_files(settings)
    )


def _inside(listing: Listing, inside: str) -> Listing:
    """The samples of tars whose keys lie in a folder."""
    begin = f"{inside.strip('/')}/".encode()
    names = (listing.names[row].partition(b"/")[2].removeprefix(b"./") for row in range(len(listing)))
    rows = [row for row, name in enumerate(names) if name.startswith(begin)]
    if not rows:
        raise SourceError(
            f"inside = {inside!r}: no sample of {listing.place} lies there; they are like "
            f"{shown(os.fsdecode(listing.names[0]))}"
        )
    return listing.take(np.array(rows, np.int64))


def _truth_files(settings: SourceSettings) -> tuple[Path, Path | None]:
    truth = _file(settings.truth, "truth")
    assert truth is not None
    assert settings.truth is not None
    return truth, _file(settings.synsets or file_beside(settings.truth, "meta.mat", "truth"), "synsets")


def _file(path: str | None, key: str) -> Path | None:
    return None if path is None else file_here(path, key)


def _list_table(found: Found, settings: SourceSettings, workers: int, destination: Folder | None) -> Listing:
    files = _tables_of(found, settings)
    policy = FetchPolicy(settings.fetch_timeout_s, settings.fetch_attempts, settings.fetch_public_only)
    options = TableOptions(
        label_options(settings), Fetching(round(settings.image_kb * 1e3), policy, settings.fetch)
    )  # fmt: skip
    if settings.labels is None:
        root = files[0].folder
    else:
        root = found.folder if not found.files else source_folder(found.place)
        if root.local is not None and not root.local.is_dir():
            raise SourceError(f"source {found.place} is not a folder: with labels= it is that of the images")
    coco = read_coco(files[0])
    if coco is not None:
        _refuse_columns(files, settings)
        return list_coco(coco, files[0], root, options)
    given = [] if settings.labels is None else [f"labels={shlex.quote(settings.labels)}"]
    columns = of_split(files, columns_of(files, column_names_of(settings)), settings.split, found.place, given)
    if settings.split not in (None, ALL) and columns.split is None and "split" not in found.used and len(files) == 1:
        raise SettingsError(f"split is not read: table {files[0]} is one file, and no column of it names splits")
    if settings.path_column is None:
        columns = with_paths_alone(files[0], columns)
    if columns.image is not None and settings.path_column is None:
        return _list_embedded(files, columns, found.place, settings, workers, destination)
    return list_table(files, root, columns, options)


def _tables_of(found: Found, settings: SourceSettings) -> list[TableFile]:
    """The files of a table, that is the source or names its images."""
    if settings.labels is None:
        files, key, place = found.tables, "source", found.place
    else:
        key, place = "labels", absolute_path(settings.labels, "labels")
        files = tables_at(place, settings.split if "split" not in found.used else None)
    if not files:
        raise SourceError(
            f"{key} = {place} must be a {TABLES} file, a pattern of such files or a folder of them: there is none"
        )
    return files


def _refuse_columns(files: list[TableFile], settings: SourceSettings) -> None:
    """Refuse what a file of COCO's has not."""
    keys = ("path_column", "label_column", "label_columns", "label_delimiter", "weight_column", "image_column")
    given = [key for key in keys if getattr(settings, key)]
    if given:
        raise SettingsError(f"{given[0]} is not read: {files[0]} is COCO's JSON, which has no columns")
    if len(files) > 1:
        raise SourceError(f"{files[0]} is COCO's JSON: one file of it makes a corpus, not {len(files)}")


def embedded_stamp(source: Source) -> str | None:
    """What tells a table that holds its images from another state of it, without reading it; None for other sources."""
    found, settings = source.found, source.settings
    if found.kind != "table" or settings.labels is not None or settings.path_column is not None or not found.files:
        return None
    files = found.tables
    if files[0].suffix != PARQUET:
        return None
    if with_paths_alone(files[0], columns_of(files, column_names_of(settings))).image is None:
        return None
    stats = [(file.name, file.stamp()) for file in files]
    for key in ("classes", "relabel", "words"):
        if (beside := getattr(settings, key)) is not None:
            stats.append((Path(beside).name, file_stamp(beside, key)))
    fields = SourceSettings.model_fields
    # settings that came later are said where they are given: the stamps of older corpora stay what they are
    said = {
        key: getattr(settings, key)
        for key in fields
        if key not in CAME_LATER or getattr(settings, key) != fields[key].default
    }
    return hashlib.sha256(json.dumps([said, stats]).encode()).hexdigest()[:32]


def _list_embedded(
    files: list[TableFile],
    columns: Columns,
    place: str,
    settings: SourceSettings,
    workers: int,
    destination: Folder | None,
) -> Listing:
    if destination is None:
        raise SourceError(f"source {place} has its images in the table: they can only be listed while sharding")
    laid_down = destination.child(LAID_DOWN)
    columns = replace(columns, path=settings.path_column)
    say_columns(columns, f"table {place}")
    parts = lay_down_files(files, columns, laid_down, workers)
    return list_laid_down(laid_down, parts, place, columns, class_names_of(files[0], columns), label_options(settings))


def _with_chosen_classes(listing: Listing, settings: SourceSettings) -> Listing:
    if settings.relabel is not None:
        path = _file(settings.relabel, "relabel")
        assert path is not None
        listing = relabel(listing, path)
    chosen = _file(settings.classes, "classes")
    if chosen is not None:
        names, descriptions = read_classes(chosen)
        numbers = numbers_of(listing.classes, names)
        if numbers is not None:
            listing = named_by_number(listing, numbers, names, descriptions, f"classes = {chosen}")
        else:
            listing = put_in_order(listing, names, descriptions, f"classes = {chosen}")
    words = _file(settings.words, "words")
    return listing if words is None else replace(listing, class_descriptions=read_words(words, listing.classes))
