"""What a user may say of a source, and which kinds of source read it."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cluster.settings import Settings, SettingsError
from data_prep.label_cells import LabelCells
from data_prep.table_files import ColumnNames
from data_prep.table_format import value_text
from data_prep.table_labels import LabelKind, LabelOptions

_READ_BY: dict[str, set[str]] = {
    "folder": {"truth", "synsets"},
    "tar": {"truth", "synsets", "inside", "split"},
    "table": {
        "labels", "path_column", "label_column", "label_columns", "label_delimiter", "no_label", "weight_column",
        "weight_scale", "image_column", "labels_per_image", "image_kb", "fetch", "fetch_timeout_s",
        "fetch_attempts", "fetch_public_only",
    },
    "webdataset": {"inside", "label_column", "label_delimiter", "labels_per_image", "no_label", "weight_scale"},
    "corpus": {"weight_scale"},
}  # fmt: skip
"""Settings that only some kinds of source read; inside and split are done with where they chose a folder or files."""

CAME_LATER = {"split", "fetch", "label_columns", "label_delimiter", "no_label", "weight_scale"}
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
    """Folder inside the source, or in the tar, that is meant, where there are several: that of the class folders."""
    split: str | None = None
    """Which split, where several lie beside each other: train, validation, test, or another name that they have. It
    chooses a folder, or the files with that word in their names; all takes the files of all splits."""
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
    """Column with the weight of the label, or a list of weights; usual names are recognised; none reads no weights."""
    weight_scale: float = Field(1, gt=0, le=1e9)
    """What weights are multiplied by, so that they are from 0 to 1: 0.01 for per cent."""
    image_column: str | None = None
    """Column of a Parquet table with the encoded image itself."""
    labels_per_image: LabelKind = "auto"
    """What a table gives an image: one class, or many weighted labels; auto is one where there are no weights and each
    image has one label."""
    image_kb: float = Field(100, gt=0, le=1e9)
    """Size to assume, when shards are cut, of images that must be fetched to know, in kilobytes."""
    fetch: bool = False
    """Whether images are asked for at the http(s) addresses that a table names. Without it such a table is refused."""
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


def refuse_unread(settings: SourceSettings, kind: str, used: Collection[str]) -> None:
    """Refuse settings that a kind of source does not read.

    Args:
        used: those of inside and split that are done with.

    Raises:
        SettingsError: one was given.
    """
    special = set().union(*_READ_BY.values())
    fields = SourceSettings.model_fields
    given = {key for key in special if getattr(settings, key) != fields[key].default} - set(used)
    if settings.split == "all" or kind == "table":  # whose columns may name splits
        given.discard("split")
    unread = sorted(given - _READ_BY[kind])
    if unread:
        readers = sorted(name for name, keys in _READ_BY.items() if unread[0] in keys)
        readers = readers if unread[0] not in ("inside", "split") else ["folder", "tar"]
        raise SettingsError(
            f"{unread[0]} is not read: {settings.source} is taken for kind={kind}, and {unread[0]} is for "
            f"kind={' and kind='.join(readers)}"
        )


def label_options(settings: SourceSettings) -> LabelOptions:
    """What the settings say of labels."""
    cells = LabelCells.of(settings.label_delimiter)
    return LabelOptions(settings.labels_per_image, cells, settings.no_label, settings.weight_scale)


def column_names_of(settings: SourceSettings) -> ColumnNames:
    """What the settings say of columns."""
    return ColumnNames(
        settings.path_column, settings.label_column, settings.weight_column, settings.image_column,
        settings.label_columns, LabelCells.of(settings.label_delimiter), settings.no_label,
    )  # fmt: skip
