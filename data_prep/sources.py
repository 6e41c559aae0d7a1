"""What there is to shard: each kind of source is recognised from what is there, or named, and listed the same way.

image_folders.py, image_tars.py, image_tables.py, embedded_images.py and tar_sample_source.py each list one kind.
"""

import fnmatch
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from braceexpand import braceexpand
from pydantic import BeforeValidator, Field

from cluster import storage
from cluster.command import absolute_path
from cluster.folders import Folder, LocalFolder, file_at, folder_at
from cluster.paths import shown
from cluster.settings import Settings, SettingsError
from data_prep.class_names import by_value, named_by_number, numbers_of, put_in_order, read_classes, read_words, relabel
from data_prep.corpus_jobs import LAID_DOWN
from data_prep.embedded_images import lay_down_files, list_laid_down
from data_prep.image_check import MAX_BYTES, TOO_MANY_BYTES
from data_prep.image_folders import list_image_folder, list_loose_images
from data_prep.image_tables import TableOptions, list_table
from data_prep.image_tars import is_tar_name, list_flat_tar, list_tar
from data_prep.label_cells import LabelCells
from data_prep.label_weights import with_scaled_weights
from data_prep.listing import Listing, SourceError
from data_prep.remote_images import FetchPolicy
from data_prep.sample_labels import LabelForm
from data_prep.small_files import file_beside, file_here, file_stamp
from data_prep.source_reader import FileImages
from data_prep.table_files import ColumnNames, class_names_of, columns_of, say_columns, table_files
from data_prep.table_format import TABLES, Columns, TableFile, value_text
from data_prep.table_labels import LabelKind, LabelOptions
from data_prep.tar_sample_source import holds_samples, is_corpus, list_corpus, list_samples, tars_in
from data_prep.validation_truth import with_truth

Kind = Literal["folder", "tar", "table", "webdataset", "corpus"]

_READ_BY: dict[str, set[str]] = {
    "folder": {"truth", "synsets", "inside"},
    "tar": {"truth", "synsets", "inside"},
    "table": {
        "labels", "path_column", "label_column", "label_columns", "label_delimiter", "no_label", "weight_column",
        "weight_scale", "image_column", "labels_per_image", "image_kb", "fetch_timeout_s", "fetch_attempts",
        "fetch_public_only",
    },
    "webdataset": {"label_column", "label_delimiter", "labels_per_image", "no_label", "weight_scale"},
    "corpus": {"weight_scale"},
}  # fmt: skip
"""Settings that only some kinds of source read."""

_CAME_LATER = {"label_columns", "label_delimiter", "no_label", "weight_scale"}
"""Settings that corpora from tables of 2026-11-28 and before do not know."""


def _texts(value: Any) -> Any:
    """One value or a list of them as text, as they would stand in a table: -1, unknown, [nan, -1]."""
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(value_text(each) if isinstance(each, (str, int, float)) else each for each in values)


NoLabel = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class SourceSettings(Settings):
    """What a source is and how it is read."""

    source: str
    """What there is to shard: a folder, tar, table, pattern of tars or corpus; on S3 too."""
    kind: Literal["auto", "folder", "tar", "table", "webdataset", "corpus"] = "auto"
    """What the source is; auto recognises it."""
    inside: str | None = None
    """Folder inside the source that holds the class folders, where there are several, such as train."""
    truth: str | None = None
    """Classes of images that lie without any (ImageNet's validation tar): ILSVRC2012_validation_ground_truth.txt, a
    file with one class a line in the order of the images, lines IMAGE CLASS, or LOC_val_solution.csv."""
    synsets: str | None = None
    """What the numbers in truth mean: meta.mat of ImageNet's developers' kit (found beside truth), or a text file of
    the class names in that order."""
    labels: str | None = None
    """Table that says what is in the images of SOURCE: then its paths are relative to SOURCE. (A table may be the
    SOURCE itself; then they are relative to its folder.)"""
    path_column: str | None = None
    """Column of a table with the path or address (s3://, http://) of an image; usual names are recognised."""
    label_column: str | None = None
    """Column with the label, or a list of labels; an image may stand in several rows, one for each label. In JSON
    beside the images of WebDataset tars, the key of the label."""
    label_columns: tuple[str, ...] = ()
    """Columns of 0 and 1, each of the class that it is called ("one-hot"); recognised where a table has only these
    beside the images."""
    label_delimiter: str | None = Field(None, min_length=1)
    """What stands between labels in a cell of several: a character such as ';', or space, tab, comma, semicolon, pipe,
    slash; list for lists in text such as ["a", "b"]; none where each cell is one label as it stands. Without it a
    column that seems to hold several labels in a cell is refused."""
    no_label: NoLabel = ()
    """Labels that mean that there is none, such as -1, nan, unknown or empty (for a cell in which nothing stands); one
    or a list. Images without any are left out where others have one label, else they are images of no class."""
    weight_column: str | None = None
    """Column with the weight of the label, or a list of weights."""
    weight_scale: float = Field(1, gt=0, le=1e9)
    """What weights are multiplied by, so that they are from 0 to 1: 0.01 for per cent."""
    image_column: str | None = None
    """Column of a Parquet table with the encoded image itself."""
    labels_per_image: LabelKind = "auto"
    """What a table gives an image: one class, or many weighted labels; auto is one where there are no weights and each
    image has one label."""
    image_kb: float = Field(100, gt=0, le=1e9)
    """Size to assume, when shards are cut, of images that must be fetched to know, in kilobytes."""
    fetch_timeout_s: float = Field(20, gt=0, le=86_400)
    """How long a server may send nothing before an attempt to fetch an image has failed, in seconds. After that time it
    must have sent 4 kB a second, too."""
    fetch_attempts: int = Field(6, ge=1, le=100)
    """How often an image is asked for where a server throttles or fails; the pauses grow from half a second to 30."""
    fetch_public_only: bool = False
    """Refuse http(s) addresses that lead, by any name or redirect, to this machine, a private or a link-local network:
    for tables of people you do not know, which could name what only this machine reaches. No proxy is used then."""
    words: str | None = None
    """What people call the classes: lines CLASS<tab>NAMES (words.txt of ImageNet), or a JSON class index."""
    relabel: str | None = None
    """File of lines OLD<tab>NEW: classes that get another name; several may become one."""
    classes: str | None = None
    """The classes and their order: a file of one class a line, NAME or NAME<tab>DESCRIPTION, or a JSON class index.
    Images of other classes are left out. Where the source has class numbers, these are their names."""


def list_source(settings: SourceSettings, workers: int = 0, destination: Folder | None = None) -> Listing:
    """List a source: its images with their labels, after renaming and selecting classes.

    Args:
        workers: for images in tables, which are copied first: files at a time.
        destination: of the corpus, where such copies go.

    Raises:
        SourceError: nothing there, nothing readable, or no image.
        SettingsError: a setting that this kind of source does not read.
    """
    place = absolute_path(settings.source, "source")
    kind = settings.kind if settings.kind != "auto" else _recognise(place, settings)
    _refuse_unread(kind, settings)
    try:
        listing = _list(kind, place, settings, workers, destination)
    except OSError as error:
        if isinstance(error, storage.StorageError):
            raise
        what = shown(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else "a file"
        raise SourceError(f"source {place} cannot be read: {error.strerror} ({what})") from error
    if kind in ("folder", "tar"):
        listing = by_value(listing)
    elif kind in ("webdataset", "corpus"):
        listing = with_scaled_weights(listing, settings.weight_scale)
    return _with_chosen_classes(_without_giants(listing), settings)


def _without_giants(listing: Listing) -> Listing:
    """Without what has more bytes than an image can have: it would be read into memory to find that out."""
    giants = listing.sizes > MAX_BYTES
    if not giants.any():
        return listing
    left_out = [(os.fsdecode(listing.names[row]), TOO_MANY_BYTES) for row in np.flatnonzero(giants).tolist()]
    return listing.take(np.flatnonzero(~giants), left_out)


def source_folder(place: str) -> Folder:
    """The folder of a source, to compare with other places: itself where it is a file."""
    return folder_at(place, "source") if "://" in place else LocalFolder(Path(place))


def _is_file(place: str) -> bool:
    if "://" not in place:
        return Path(place).is_file()
    folder, name = file_at(place, "source")
    return bool(name) and "://" in folder.url and folder.size(name) is not None


def _is_pattern(place: str) -> bool:
    return any(character in place for character in "*?[{")


def _recognise(place: str, settings: SourceSettings) -> Kind:
    if settings.labels is not None:
        return "table"
    if _is_file(place):
        folder, name = file_at(place, "source")
        if table_files(folder, name):
            return "table"
        is_samples = settings.truth is None and name.endswith(".tar") and holds_samples(folder, name)
        return "webdataset" if is_samples else "tar"
    folder = source_folder(place)
    if folder.local is None or folder.local.is_dir():
        if is_corpus(folder):
            return "corpus"
        if any(not name.startswith(".") for name in folder.folders()):
            return "folder"
        if table_files(folder):
            return "table"
        tars = tars_in(folder)
        if folder.local is not None or folder.names():
            return "webdataset" if tars and holds_samples(folder, tars[0]) else "folder"
    if _is_pattern(place):
        return "webdataset"
    if folder.local is None:
        return "tar" if is_tar_name(place) else "folder"
    raise SourceError(f"source {place}: there is no such file or folder")


def _refuse_unread(kind: str, settings: SourceSettings) -> None:
    special = set().union(*_READ_BY.values())
    fields = SourceSettings.model_fields
    given = {key for key in special if getattr(settings, key) != fields[key].default}
    unread = sorted(given - _READ_BY[kind])
    if unread:
        readers = sorted(name for name, keys in _READ_BY.items() if unread[0] in keys)
        raise SettingsError(
            f"{unread[0]} is not read: {settings.source} is taken for kind={kind}, and {unread[0]} is for "
            f"kind={' and kind='.join(readers)}"
        )


def _list(kind: str, place: str, settings: SourceSettings, workers: int, destination: Folder | None) -> Listing:
    if kind == "table":
        return _list_table(place, settings, workers, destination)
    if kind == "corpus":
        return list_corpus(place)
    if kind == "webdataset":
        cells = LabelCells.of(settings.label_delimiter)
        form = LabelForm("", key=settings.label_column, no_label=settings.no_label, cells=cells)
        return list_samples(*matching_tars(place), place, form, settings.labels_per_image)
    if kind == "tar":
        folder, name = file_at(place, "source")
        if settings.truth is None:
            return list_tar(folder, name, settings.inside)
        listed, images = list_flat_tar(folder, name)
        return with_truth(
            "flat tar with a truth file", place, listed.names, listed.sizes, images, *_truth_files(settings)
        )
    folder = source_folder(place)
    if settings.inside is not None:
        folder = folder.child(settings.inside)
    if settings.truth is None:
        return list_image_folder(folder)
    names, sizes = list_loose_images(folder)
    return with_truth(
        "flat folder with a truth file", place, names, sizes, FileImages(folder, names), *_truth_files(settings)
    )


def _truth_files(settings: SourceSettings) -> tuple[Path, Path | None]:
    truth = _file(settings.truth, "truth")
    assert truth is not None
    assert settings.truth is not None
    return truth, _file(settings.synsets or file_beside(settings.truth, "meta.mat", "truth"), "synsets")


def _file(path: str | None, key: str) -> Path | None:
    return None if path is None else file_here(path, key)


def matching_tars(place: str) -> tuple[Folder, list[str]]:
    """The tars of a folder, one tar, or those that match a pattern with * and braces: where they are, and their names.

    Raises:
        SourceError: there is none.
    """
    if _is_file(place):
        folder, name = file_at(place, "source")
        return folder, [name]
    folder, pattern = source_folder(place), "*"
    if _is_pattern(place) and not (folder.local and folder.local.is_dir()):
        folder, pattern = file_at(place, "source")
    there = tars_in(folder)
    chosen: set[str] = set()
    for each in braceexpand(pattern):
        found = fnmatch.filter(there, each)
        if not found:
            what = "no tar" if each == "*" else f"no tar that matches {each}"
            raise SourceError(f"source {place}: there is {what} in {folder}")
        chosen.update(found)
    return folder, sorted(chosen, key=os.fsencode)


def _list_table(place: str, settings: SourceSettings, workers: int, destination: Folder | None) -> Listing:
    key = "source" if settings.labels is None else "labels"
    table = place if settings.labels is None else absolute_path(settings.labels, "labels")
    files = _table_at(table)
    if not files:
        raise SourceError(f"{key} = {table} must be a {TABLES} file, or a folder of .parquet files: there is none")
    columns = columns_of(files, _column_names(settings))
    if columns.image is not None and settings.path_column is None:
        return _list_embedded(files, columns, place, settings, workers, destination)
    if settings.labels is None:
        root = files[0].folder
    else:
        root = source_folder(place)
        if root.local is not None and not root.local.is_dir():
            what = "is not a folder: with labels= it is that of the images" if root.local.exists() else "does not exist"
            raise SourceError(f"source {root} {what}")
    policy = FetchPolicy(settings.fetch_timeout_s, settings.fetch_attempts, settings.fetch_public_only)
    options = TableOptions(label_options(settings), round(settings.image_kb * 1e3), policy)
    return list_table(files, root, columns, options)


def label_options(settings: SourceSettings) -> LabelOptions:
    """What the settings say of labels."""
    cells = LabelCells.of(settings.label_delimiter)
    return LabelOptions(settings.labels_per_image, cells, settings.no_label, settings.weight_scale)


def _column_names(settings: SourceSettings) -> ColumnNames:
    return ColumnNames(
        settings.path_column, settings.label_column, settings.weight_column, settings.image_column,
        settings.label_columns, LabelCells.of(settings.label_delimiter), settings.no_label,
    )  # fmt: skip


def _table_at(place: str) -> list[TableFile]:
    return table_files(*file_at(place, "source")) if _is_file(place) else table_files(source_folder(place))


def embedded_stamp(settings: SourceSettings) -> str | None:
    """What tells a table that holds its images from another state of it, without reading it; None for other sources."""
    place = absolute_path(settings.source, "source")
    if settings.path_column is not None or settings.labels is not None or settings.kind not in ("auto", "table"):
        return None
    files = _table_at(place)
    if not files or columns_of(files, _column_names(settings)).image is None:
        return None
    stats = [(file.name, file.stamp()) for file in files]
    for key in ("classes", "relabel", "words"):
        if (beside := getattr(settings, key)) is not None:
            stats.append((Path(beside).name, file_stamp(beside, key)))
    fields = SourceSettings.model_fields
    said = {
        key: getattr(settings, key)
        for key in fields
        if key not in _CAME_LATER or getattr(settings, key) != fields[key].default
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
