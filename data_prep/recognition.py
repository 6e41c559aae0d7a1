"""What a source is, told from what lies there: its kind, the folder that was chosen in it, and its files."""

import fnmatch
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from cluster.command import log
from cluster.folders import Folder, LocalFolder, file_at, folder_at
from cluster.paths import shown
from data_prep.class_levels import SourcePlace, refuse_loose_images, refuse_other_layouts
from data_prep.foreign_formats import refuse_foreign_file, refuse_foreign_folder, refuse_placeholder
from data_prep.image_tars import is_tar_name
from data_prep.label_files import standard_label_file, why_no_table
from data_prep.listing import SourceError, is_junk
from data_prep.source_tree import FolderTree, is_image_name
from data_prep.split_names import names_no_class
from data_prep.splits import ALL, described_splits, matching_folder, one_split, suggested
from data_prep.table_format import PARQUET, TABLES, TEXT_SUFFIXES, TableFile, table_suffix
from data_prep.tar_sample_source import is_corpus, telling_tar

Kind = Literal["folder", "tar", "table", "webdataset", "corpus"]


@dataclass(frozen=True)
class Asked:
    """What a user says of a source."""

    place: str
    """An absolute path or s3:// URL; of a folder, a file, or a pattern of files."""
    kind: str = "auto"
    inside: str | None = None
    split: str | None = None
    has_labels: bool = False
    has_truth: bool = False
    program: str = "shard"


@dataclass(frozen=True)
class Found:
    """A source that is known."""

    kind: Kind
    place: str
    """As given, or the folder in it that was chosen."""
    folder: Folder
    files: tuple[str, ...] = ()
    """Names in the folder of its tars or tables."""
    labels: str | None = None
    """A file beside the images that has their labels, where none was named and its name says that it does."""
    used: frozenset[str] = field(default_factory=frozenset)
    """Which of inside and split are done with; a tar goes by them itself."""

    @property
    def tables(self) -> list[TableFile]:
        """Its files as those of a table."""
        return [TableFile(self.folder, name) for name in self.files]


def recognise(asked: Asked) -> Found:
    """Find out what a source is.

    Raises:
        SourceError: there is nothing, nothing that can be read, or what would make a corpus that nobody wants: several
            splits, a level above the classes, images of all classes in one folder.
    """
    place = asked.place
    if is_file(place):
        return _file(asked)
    folder = source_folder(place)
    if _is_folder(folder):
        return _folder(folder, asked)
    if is_pattern(place):
        return _pattern(asked)
    if folder.local is not None:
        raise SourceError(f"source {place}: there is no such file or folder{_beside(folder.local)}")
    above, name = file_at(place, "source")
    return Found("tar" if is_tar_name(place) else "folder", place, above if is_tar_name(place) else folder, (name,))


def source_folder(place: str) -> Folder:
    """The folder of a source, to compare with other places: itself where it is a file."""
    return folder_at(place, "source") if "://" in place else LocalFolder(Path(place))


def is_file(place: str) -> bool:
    """Whether there is a file, and no folder, at an absolute path or URL."""
    if "://" not in place:
        return Path(place).is_file()
    folder, name = file_at(place, "source")
    return bool(name) and "://" in folder.url and folder.size(name) is not None


def _is_folder(folder: Folder) -> bool:
    return folder.local.is_dir() if folder.local is not None else bool(folder.names() or folder.folders())


def is_pattern(place: str) -> bool:
    """Whether a path has what patterns have."""
    return any(character in place for character in "*?[{")


def matching_names(folder: Folder, pattern: str, place: str) -> list[str]:
    """The files of a folder that match a pattern with * and braces, each part of it at least one.

    Raises:
        SourceError: no file matches.
    """
    there = [name for name in folder.names() if not name.startswith(".")]
    chosen: set[str] = set()
    try:
        parts = list(braceexpand(pattern))
    except ValueError as error:
        raise SourceError(f"source {place}: {pattern!r} is no pattern ({error})") from error
    for part in parts:
        matching = fnmatch.filter(there, part)
        if not matching:
            raise SourceError(f"source {place}: there is no file that matches {part} in {folder}")
        chosen.update(matching)
    return sorted(chosen, key=os.fsencode)


def is_table_name(name: str) -> bool:
    """Whether a file's name is that of a table."""
    return table_suffix(name) is not None


def tables_at(place: str, split: str | None) -> list[TableFile]:
    """The files of a table that is a file, a pattern of files or a folder of them.

    Raises:
        SourceError: they are of several splits and none was asked for.
    """
    if is_file(place):
        folder, name = file_at(place, "labels")
        return [TableFile(folder, name)] if is_table_name(name) else []
    folder, pattern = source_folder(place), None
    if _is_folder(folder):
        names = _data(folder.names())[1]
    elif is_pattern(place):
        folder, pattern = file_at(place, "labels")
        names = [name for name in matching_names(folder, pattern, place) if is_table_name(name)]
    else:
        raise SourceError(f"labels = {place}: there is no such file or folder{_beside(folder.local)}")
    return [TableFile(folder, name) for name in one_split(names, split=split, place=place, pattern=pattern)]


def _file(asked: Asked) -> Found:
    folder, name = file_at(asked.place, "source")
    found = Found("tar", asked.place, folder, (name,))
    refuse_placeholder(folder, name)
    if asked.kind != "auto":
        return replace(found, kind=_kind(asked.kind))
    if asked.has_labels or is_table_name(name):
        return replace(found, kind="table")
    refuse_foreign_file(folder, name)
    if is_image_name(name):
        raise SourceError(f"source {asked.place} is one image: give the folder of the class folders")
    if not asked.has_truth and name.endswith(".tar") and telling_tar(folder, [name]):
        return replace(found, kind="webdataset")
    return found


def _pattern(asked: Asked) -> Found:
    folder, pattern = file_at(asked.place, "source")
    names = matching_names(folder, pattern, asked.place)
    kind: Kind = "table" if all(map(is_table_name, names)) else "webdataset"
    wrong = next((name for name in names if kind == "webdataset" and not name.endswith(".tar")), None)
    if wrong is not None:
        packed = "; decompress it first (gunzip)" if wrong.endswith((".gz", ".tgz")) else ""
        raise SourceError(
            f"source {asked.place}: a pattern is one of WebDataset tars (.tar) or of tables "
            f"({TABLES}), and {shown(wrong)} is neither{packed}"
        )
    names = one_split(
        names, split=asked.split, place=asked.place, pattern=pattern, known=described_splits(folder),
        program=asked.program,
    )  # fmt: skip
    used = frozenset({"split"} if asked.split else ())
    return Found(_kind(asked.kind, kind), asked.place, folder, tuple(names), used=used)


def _folder(folder: Folder, asked: Asked) -> Found:
    used: set[str] = set()
    if asked.inside is not None:
        inside = asked.inside.strip("/")
        folder = _child(folder, inside, asked)
        used.add("inside")
    if asked.split is not None and asked.split != ALL and not asked.has_labels:  # else it is of the table
        below = _visible(folder)
        name = matching_folder(below, asked.split)
        if name is not None:
            folder = folder.child(name)
            used.add("split")
            log.info("split = %s: the source is %s", asked.split, folder)
        elif not any(_data(folder.names())):
            have = ", ".join(map(shown, below[:8])) or "no folders"
            raise SourceError(
                f"split = {asked.split}: source {asked.place} has no folder and no file of it, but {have}"
            )
    place = asked.place if not used else folder.url
    asked = replace(asked, place=place, split=None if "split" in used else asked.split)
    found = _in_folder(folder, asked)
    return replace(found, used=found.used | used)


def _in_folder(folder: Folder, asked: Asked) -> Found:
    found = Found("folder", asked.place, folder)
    if asked.has_labels:
        return replace(found, kind="table")
    if asked.kind in ("folder", "corpus"):
        return replace(found, kind=_kind(asked.kind))
    if asked.kind == "tar":
        raise SourceError(f"kind = tar: source {asked.place} is a folder: give the tar in it")
    if asked.kind == "auto" and is_corpus(folder):
        return replace(found, kind="corpus")
    tree = FolderTree(folder)
    tars, tables = _data(tree.files())
    for name in [*tars[:1], *tables[:1]]:
        refuse_placeholder(folder, name)
    if asked.kind == "webdataset":
        if not tars:
            raise SourceError(f"source {asked.place}: there is no tar in {folder}")
        return _of_split(found, "webdataset", tars, asked)
    if asked.kind == "table":
        return _of_split(found, "table", tables, asked)
    if asked.has_truth:
        return found
    below = _visible(folder)
    images = [name for name in tree.files() if is_image_name(name)]
    if not tars and (not tables or below):
        refuse_foreign_folder(tree, below, images)
    standard = standard_label_file(tree.files())
    if standard is not None and (images or below) and _has_labels(folder, standard):
        log.info("%s/%s says what is in the images (labels=)", folder, standard)
        return replace(found, kind="table", labels=f"{folder.url}/{standard}")
    if tars and telling_tar(folder, tars) is not None:
        _refuse_both(folder, below, tars, asked.place)
        return _of_split(found, "webdataset", tars, asked)
    beside_images = tables[:1] and tables[0].endswith(".parquet") and _holds_images_only(below)
    if tables and not images and (not below or (beside_images and _has_labels(folder, tables[0]))):
        return _of_split(found, "table", tables, asked)
    if below:
        refuse_other_layouts(tree, SourcePlace(asked.place))
    else:
        refuse_loose_images(tree, SourcePlace(asked.place), _above(folder))
    return found


def _refuse_both(folder: Folder, below: list[str], tars: list[str], place: str) -> None:
    """Refuse tars beside folders of images: nobody has said which of them is meant."""
    tree = FolderTree(folder)
    images = [name for name in below if tree.images(name)]
    if images:
        raise SourceError(
            f"source {place} has {len(tars)} WebDataset tars ({shown(tars[0])}) and {len(images)} folders of images "
            f"({shown(images[0])}). Give one of:\n  {suggested(place, 'kind=webdataset')}\n  "
            f"{suggested(place, 'kind=folder')}"
        )


def _of_split(found: Found, kind: Kind, names: list[str], asked: Asked) -> Found:
    names = one_split(
        names, split=asked.split, place=asked.place, known=described_splits(found.folder), program=asked.program
    )
    return replace(found, kind=kind, files=tuple(names), used=frozenset({"split"} if asked.split else ()))


def _data(files: list[str]) -> tuple[list[str], list[str]]:
    """The tars among files, and the tables: Parquet, or where there is none files of one other kind of table."""
    names = sorted((name for name in files if not is_junk(os.fsencode(name))), key=os.fsencode)
    tars = [name for name in names if name.endswith(".tar")]
    for suffix in (PARQUET, *(suffix for suffix in TEXT_SUFFIXES if suffix != ".json")):
        tables = [name for name in names if table_suffix(name) == suffix]
        if tables:
            return tars, tables
    return tars, []


def _visible(folder: Folder) -> list[str]:
    return [name for name in folder.folders() if not is_junk(os.fsencode(name))]


def _holds_images_only(below: list[str]) -> bool:
    return len(below) == 1 or all(map(names_no_class, below))


def _has_labels(folder: Folder, name: str) -> bool:
    problem = None if name.endswith(".json") else why_no_table(folder, name)
    if problem is not None:
        log.info("%s/%s is not read as a table of labels: %s", folder, name, problem)
    return problem is None


def _child(folder: Folder, inside: str, asked: Asked) -> Folder:
    child = folder.child(inside)
    if not child.folders() and not child.names():
        below = ", ".join(map(shown, _visible(folder)[:8])) or "no folders"
        raise SourceError(f"inside = {inside!r}: source {asked.place} has no such folder with anything in it: {below}")
    return child


def _above(folder: Folder) -> tuple[FolderTree, SourcePlace, str] | None:
    """The folder that one lies in, and its name there."""
    place, _, name = folder.url.rstrip("/").rpartition("/")
    if not name or place in ("", "s3:/"):
        return None
    return FolderTree(source_folder(place)), SourcePlace(place), name


def _kind(asked: str, otherwise: Kind = "folder") -> Kind:
    kinds: dict[str, Kind] = {
        "folder": "folder", "tar": "tar", "table": "table", "webdataset": "webdataset", "corpus": "corpus",
    }  # fmt: skip
    return kinds.get(asked, otherwise)


def _beside(path: Path | None) -> str:
    """What there is instead of a path that does not exist, for messages: what is in the folder above."""
    above = None if path is None else next((place for place in path.parents if place.is_dir()), None)
    names = [] if above is None or above == Path("/") else LocalFolder(above).folders() + LocalFolder(above).names()
    shown_names = ", ".join(map(shown, [name for name in names if not name.startswith(".")][:5]))
    return f"; {above} has {shown_names}" if shown_names else ""
