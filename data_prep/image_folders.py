"""Listing image folders: one sub-folder of images for each class, on a file system or an object store."""

import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster import storage
from cluster.command import Progress, log
from cluster.folders import Folder
from cluster.paths import shown
from data_prep.columns import Strings
from data_prep.listing import Listing, SourceError, is_junk, looks_like_image
from data_prep.source_reader import FileImages

_LISTING_THREADS = 16
"""Listing waits for the file system most of the time, on network storage nearly all of it."""


class ClassListing(NamedTuple):
    """The images of one class, sorted by name."""

    names: Strings
    sizes: NDArray[np.uint64]
    offsets: NDArray[np.uint64]
    """In its stream; empty where each image is a file."""
    others: list[bytes]
    """Files that do not look like images by their names."""


def list_image_folder(folder: Folder) -> Listing:
    """List a folder with one sub-folder of images (at any depth) for each class.

    Raises:
        SourceError: it is empty, or no sub-folder has an image.
    """
    root = folder.url
    folders = [name for name in folder.folders() if not is_junk(os.fsencode(name))]
    loose = [name for name in folder.names() if not name.startswith(".")]
    if not folders and not loose:
        raise SourceError(f"source {root} is empty")
    encoded = sorted(os.fsencode(name) for name in folders)
    classes = class_names(encoded, root)
    local = folder.local
    if local is not None:
        jobs: Iterable[Callable[[], ClassListing]] = [partial(_list_local, local, name) for name in encoded]
    else:
        jobs = [partial(_list_remote, folder, os.fsdecode(name)) for name in encoded]
    listed = collect(classes, jobs)
    loose_images = [name for name in loose if looks_like_image(name.encode("utf-8", "replace")) and "." in name]
    if not any(part.names for part in listed):
        others = [name for part in listed for name in part.others]
        raise SourceError(_why_empty(root, len(folders), loose, loose_images, others))
    classes, listed = _without_other_folders(classes, listed, root)
    if loose_images:
        log.warning(
            "left out: %d images directly in %s, outside any class folder, for example %s",
            len(loose_images), root, loose_images[0],
        )  # fmt: skip
    names = Strings.join([part.names for part in listed])
    return Listing(
        "image folder", root, classes, names, np.concatenate([part.sizes for part in listed]),
        FileImages(folder, names), labels_of(listed),
    )  # fmt: skip


def _without_other_folders(
    classes: list[str], listed: list[ClassListing], root: str
) -> tuple[list[str], list[ClassListing]]:
    """Without folders that have files and no image, such as annotations; one without anything is a class of none."""
    others = [name for name, part in zip(classes, listed, strict=True) if part.others and not part.names]
    if others:
        log.warning(
            "left out: %s in %s: no class, but a folder of files that are no images", ", ".join(others[:5]), root
        )
    kept = [(name, part) for name, part in zip(classes, listed, strict=True) if name not in others]
    return [name for name, _ in kept], [part for _, part in kept]


def _why_empty(
    root: str, folders: int, loose: Sequence[str], loose_images: Sequence[str], others: Sequence[bytes]
) -> str:
    tars = [name for name in loose if name.endswith((".tar", ".tar.gz", ".tgz"))]
    hint = "; an image folder has one sub-folder of images for each class"
    if tars:
        hint = _tars_instead(root, tars)
    elif loose_images:
        hint += ", or give truth=FILE (the classes of ImageNet's validation images) or labels=TABLE"
    return (
        f"source {root} has no images in its {folders} sub-folders"
        + (f" ({len(loose_images)} images lie directly in it)" if loose_images else "")
        + (f", but {len(others)} other files such as {shown(os.fsdecode(others[0]))}" if others else "")
        + hint
    )


def _tars_instead(root: str, tars: Sequence[str]) -> str:
    """What to do with tars that hold images and no labels: of class folders, or all of one class."""
    given = f"python data_prep/shard.py {shlex.quote(f'{root}/{tars[0]}')} DESTINATION"
    if len(tars) == 1 or "://" in root:
        return f"; it has tars, without labels beside their images: give the tar itself as the source:\n  {given}"
    joined = shlex.quote(f"{root}-classes.tar")
    return (
        f"; it has {len(tars)} tars, without labels beside their images. A tar of class folders is a source itself; "
        f"tars of one class each ({shown(tars[0])}, ...) are one as a tar of them. Give one of:\n  {given}\n"
        f"  (cd {shlex.quote(root)} && tar -cf {joined} *.tar*); python data_prep/shard.py {joined} DESTINATION"
    )


def list_loose_images(folder: Folder) -> tuple[Strings, NDArray[np.uint64]]:
    """Names and sizes of the images directly in a folder, sorted."""
    sizes = {name: size for name, size in _sizes_in(folder) if looks_like_image(os.fsencode(name))}
    names = sorted(sizes, key=os.fsencode)
    return Strings.of([os.fsencode(name) for name in names]), np.array([sizes[name] for name in names], np.uint64)


def _sizes_in(folder: Folder) -> list[tuple[str, int]]:
    if folder.local is None:
        return [(name, size) for name, size in folder.tree().items() if "/" not in name]
    with os.scandir(os.fsencode(folder.local)) as entries:
        return [(os.fsdecode(entry.name), _size(entry)) for entry in entries if not storage.is_folder(entry)]


def _list_local(root: Path, name: bytes) -> ClassListing:
    found: list[tuple[bytes, int]] = []
    others: list[bytes] = []
    base = os.fsencode(root)
    waiting = [name]
    while waiting:
        folder = waiting.pop()
        with os.scandir(base + b"/" + folder) as entries:
            for entry in entries:
                path = folder + b"/" + entry.name
                if is_junk(entry.name):
                    continue
                if storage.is_folder(entry):
                    if entry.is_symlink() and _leads_back(base + b"/" + path):
                        log.warning(
                            "left out: the link %s in %s leads to a folder that it lies in, whose images would be "
                            "listed again and again", shown(os.fsdecode(path)), root,
                        )  # fmt: skip
                        continue
                    waiting.append(path)
                elif looks_like_image(entry.name):
                    found.append((path, _size(entry)))
                else:
                    others.append(path)
    return _sorted(found, others)


def _leads_back(link: bytes) -> bool:
    """Whether a link to a folder leads to one that it lies in."""
    target, above = os.path.realpath(link), os.path.realpath(os.path.dirname(link))  # noqa: PTH120 - bytes
    return above == target or above.startswith(target.rstrip(b"/") + b"/")


def _size(entry: "os.DirEntry[bytes]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return entry.stat(follow_symlinks=False).st_size  # of a link to nothing: whoever reads it finds out


def _list_remote(folder: Folder, name: str) -> ClassListing:
    found: list[tuple[bytes, int]] = []
    others: list[bytes] = []
    for path, size in folder.child(name).tree().items():
        encoded = os.fsencode(f"{name}/{path}")
        if is_junk(encoded):
            continue
        if looks_like_image(encoded):
            found.append((encoded, size))
        else:
            others.append(encoded)
    return _sorted(found, others)


def _sorted(found: list[tuple[bytes, int]], others: list[bytes]) -> ClassListing:
    found.sort()
    sizes = np.fromiter((size for _, size in found), np.uint64, len(found))
    return ClassListing(Strings.of([path for path, _ in found]), sizes, np.zeros(0, np.uint64), others)


# ------------------------------------------------------------------------------- shared with the listing of tars


def class_names(names: Sequence[bytes], source: str) -> list[str]:
    """Names of classes as text.

    Raises:
        SourceError: one is not UTF-8, or stands twice.
    """
    decoded = []
    for name in names:
        try:
            decoded.append(name.decode("utf-8"))
        except UnicodeDecodeError:
            raise SourceError(f"class name {name!r} in {source} is not UTF-8: rename it") from None
    twice = [name for name, count in Counter(decoded).items() if count > 1]
    if twice:
        raise SourceError(f"{source} has two tars for class {twice[0]!r}: join or rename them")
    return decoded


def collect(classes: Sequence[str], jobs: Iterable[Callable[[], ClassListing]]) -> list[ClassListing]:
    """List classes in threads, with progress; says what was left out."""
    progress = Progress(len(classes), "classes", "listing")
    listed: list[ClassListing] = []
    images = 0
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        try:
            for part in pool.map(lambda job: job(), jobs):
                listed.append(part)
                images += len(part.names)
                progress.update(1, f"{images:,} images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    warn_of_others(listed)
    return listed


def warn_of_others(listed: Sequence[ClassListing]) -> None:
    """Say which files were not taken for images."""
    others = [name for part in listed for name in part.others]
    if others:
        log.warning("left out: %d files without an image's suffix, for example %s", len(others), os.fsdecode(others[0]))


def labels_of(listed: Sequence[ClassListing]) -> NDArray[np.int32]:
    """The class of each image, int32 [N]."""
    return np.repeat(np.arange(len(listed), dtype=np.int32), [len(part.names) for part in listed])
