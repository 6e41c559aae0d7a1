"""The class folders inside a tar: which of its folders are meant, and what a tar is that has none."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.command import log
from cluster.folders import Folder
from cluster.paths import shown
from data_prep.class_levels import SourcePlace, refuse_other_layouts
from data_prep.columns import Strings
from data_prep.decoded_tars import TarPart
from data_prep.foreign_formats import foreign_format
from data_prep.image_folders import ClassListing, class_names, warn_of_others
from data_prep.listing import Listing, SourceError
from data_prep.source_reader import StreamImages
from data_prep.source_tree import TarTree
from data_prep.splits import ALL, matching_folder
from data_prep.webdataset_tars import split_name

_LOOKED_AT = 1000
"""Images, in the order of their names."""


@dataclass(frozen=True)
class InsideTar:
    """Which part of a tar is meant."""

    inside: str | None = None
    """A folder in it: that of the class folders, or of the images that a truth file is for."""
    split: str | None = None
    """A folder by the split that it is."""
    checked: bool = True
    """Whether folders that look like no classes (splits, say) are refused."""


def list_class_folders(folder: Folder, name: str, part: TarPart, meant: InsideTar, where: str) -> Listing:
    """Split the members of a tar by the folder they lie in."""
    listed = part.listed
    paths = [listed.names[row] for row in range(len(listed.names))]
    inside = meant.inside or meant.split
    top = top_of(paths, meant, where)
    if inside is None:
        while (shared := _shared_top(paths, top)) is not None:
            top += shared + b"/"
    rows = [row for row, path in enumerate(paths) if path.startswith(top)]
    below = [(paths[row][len(top) :], row) for row in rows]
    in_folders = sorted((path.partition(b"/")[0], path, row) for path, row in below if b"/" in path)
    loose = len(below) - len(in_folders)
    if not any(b"." in path.rsplit(b"/", 1)[-1] for path in paths):  # names that say nothing are those of images, too
        _refuse_foreign_members([*paths, *listed.others], where)
    if part.stream.points is not None:
        _refuse_packed_samples(paths, listed.others, where)
    if not in_folders:
        raise _no_class_folders(listed, top, inside, where, loose)
    if meant.checked:
        members = [path[len(top) :] for path in (*paths, *listed.others) if path.startswith(top)]
        place = SourcePlace(f"{folder.url}/{name}", True, os.fsdecode(top).rstrip("/"))
        refuse_other_layouts(TarTree(members), place)
    warn_of_others([listed])
    if loose:
        log.warning("left out: %d images in %s outside any class folder", loose, where)
    order = np.array([row for _, _, row in in_folders], np.int64)
    found = sorted({class_name for class_name, _, _ in in_folders})
    classes = class_names(found, where)
    numbers = {class_name: number for number, class_name in enumerate(found)}
    return Listing(
        "tar of class folders", f"{folder.url}/{name}", classes, Strings.of([path for _, path, _ in in_folders]),
        listed.sizes[order],
        StreamImages(folder, (part.stream,), np.zeros(len(order), np.int32), listed.offsets[order]),
        np.array([numbers[class_name] for class_name, _, _ in in_folders], np.int32),
    )  # fmt: skip


def top_of(paths: Sequence[bytes], meant: InsideTar, where: str) -> bytes:
    """What the paths of the images that are meant begin with.

    Raises:
        SourceError: there is no such folder.
    """
    tree = TarTree(paths)
    top = ""
    if meant.inside is not None:
        inside = meant.inside.strip("/")
        single = _lowest_single(tree).split("/")
        places = [inside, *("/".join([*single[: depth + 1], inside]) for depth in range(len(single)))]
        found = [place for place in places if any(path.startswith(f"{place}/".encode()) for path in paths)]
        if not found:
            raise SourceError(f"inside = {meant.inside!r}: {where} has no class folders with images there")
        top = found[0]
    if meant.split is not None and meant.split != ALL:
        above = top or _lowest_single(tree)
        name = matching_folder(tree.folders(above), meant.split)
        if name is None:
            have = ", ".join(map(shown, tree.folders(above)[:8])) or "no folders"
            raise SourceError(f"split = {meant.split}: {where} has no folder of that split, but {have}")
        top = f"{above}/{name}".lstrip("/")
    return f"{top}/".encode() if top else b""


def _lowest_single(tree: TarTree) -> str:
    """The folder below which images part: data/images where all lie there, and in folders of it."""
    path = ""
    while not tree.images(path) and len(folders := tree.folders(path)) == 1:
        below = f"{path}/{folders[0]}".lstrip("/")
        if not tree.folders(below):
            break
        path = below
    return path


def _refuse_foreign_members(paths: Sequence[bytes], where: str) -> None:
    found = foreign_format([os.fsdecode(path).rsplit("/", 1)[-1] for path in paths])
    if found is not None:
        way = found.way.format(path="'FOLDER'", shell="FOLDER")
        raise SourceError(f"{where} holds {found.name}, which is not read: unpack it (tar -xf), then {way}")


def _refuse_packed_samples(paths: Sequence[bytes], others: Sequence[bytes], where: str) -> None:
    """Refuse a gzip WebDataset shard, whose folders, if it has any, are no classes."""
    keys = {split_name(path)[0] for path in paths[:_LOOKED_AT]}
    labels = [path for path in others if path.endswith((b".cls", b".json")) and split_name(path)[0] in keys]
    if labels:
        raise SourceError(
            f"{where} holds images with labels beside them ({os.fsdecode(labels[0])}), as WebDataset shards do: these "
            f"are read where they are not compressed and end in .tar; decompress it (gunzip)"
        )


def _no_class_folders(listed: ClassListing, top: bytes, inside: str | None, where: str, loose: int) -> SourceError:
    """What a tar is that has no class folders."""
    if inside is not None:
        return SourceError(f"inside = {inside!r}: {where} has no class folders with images there")
    paths = [listed.names[row] for row in range(len(listed.names))]
    example = f": its members are like {os.fsdecode((paths + listed.others)[0])!r}" if paths or listed.others else ""
    return SourceError(
        f"{where} is neither a tar of one tar per class nor one of class folders{example}"
        + ("; give truth=FILE if these are ImageNet's validation images" if loose else "")
    )


def _shared_top(paths: Sequence[bytes], top: bytes) -> bytes | None:
    """The one folder below `top` in which all images lie, if they lie in folders of that folder."""
    below = [path[len(top) :].split(b"/", 2) for path in paths]
    if below and all(len(parts) == 3 for parts in below) and len({parts[0] for parts in below}) == 1:
        return below[0][0]
    return None
