"""What there is to shard: the images of a folder, or of a tar of one tar per class, listed but not opened.

A listing is held in columns, so that tens of millions of images fit in memory, and is in sorted order, so that the
same images give the same corpus whether they lie in folders or in tars.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.command import Progress, log
from data_prep.columns import Labels, Strings
from data_prep.tar_headers import TarError, iterate_members

_IMAGE_SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif .jp2 .ppm .pgm".split()
)
"""What makes a file a candidate, beside having no suffix; whether it is an image is judged by its content."""

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "dev", "eval"}
_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_LISTING_THREADS = 16
"""Listing waits for the file system most of the time, on network storage nearly all of it."""


class SourceError(ValueError):
    """A source that cannot be sharded; the message says what would do."""


@dataclass(frozen=True)
class Listing:
    """The images of a source in sorted order, N of them."""

    kind: str
    """"image folder", "tar of class tars" or "image folder with a labels file"."""
    root: Path
    """The folder, or the tar."""
    classes: list[str]
    """Names in the order of their numbers (sorted)."""
    names: Strings
    """Path of each image below the root, bytes [N]; for a tar `class/member`."""
    sizes: NDArray[np.uint64]
    """Bytes of each image, [N]."""
    offsets: NDArray[np.uint64] | None
    """Of each image in the tar, [N]; None for a folder."""
    labels: NDArray[np.int32] | Labels
    """The class of each image, int32 [N], or many labels for each."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Images that are named but cannot be had: (path, reason)."""

    def __len__(self) -> int:
        return len(self.sizes)


class _ClassListing(NamedTuple):
    """The images of one class, sorted by name."""

    names: Strings
    sizes: NDArray[np.uint64]
    offsets: NDArray[np.uint64]
    others: list[bytes]
    """Files that do not look like images by their names."""


def list_source(source: Path) -> Listing:
    """List a source with one class an image: an image folder, or a tar of one tar per class.

    Raises:
        SourceError: nothing there, nothing readable, or no image.
    """
    try:
        if source.is_dir():
            return _list_folder(source)
        if source.is_file():
            return _list_tar(source)
    except TarError as error:
        raise SourceError(str(error)) from error
    except OSError as error:
        raise SourceError(f"source {source} cannot be read: {error.strerror} ({error.filename})") from error
    raise SourceError(f"source {source}: there is no such file or folder")


def looks_like_image(name: bytes) -> bool:
    """Whether a file's name is that of an image, or says nothing; hidden files are never images."""
    base = name.rsplit(b"/", 1)[-1]
    _, dot, suffix = base.rpartition(b".")
    return not base.startswith(b".") and (not dot or (b"." + suffix).lower() in _IMAGE_SUFFIXES)


# ---------------------------------------------------------------------------------------------- image folders


def _list_folder(root: Path) -> Listing:
    with os.scandir(os.fsencode(root)) as entries:
        top = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(b"."))
    if not top:
        raise SourceError(f"source {root} is empty")
    folders = [name for name, is_folder in top if is_folder and name != b"__MACOSX"]
    loose = [name for name, is_folder in top if not is_folder]
    classes = _class_names(folders, root)
    listed = _collect(classes, [partial(_list_class_folder, root, name) for name in folders])
    loose_images = [name for name in loose if looks_like_image(name) and b"." in name]
    if not any(part.names for part in listed):
        tars = [name for name in loose if name.endswith(b".tar")]
        raise SourceError(
            f"source {root} has no images in its {len(folders)} sub-folders"
            + (f" ({len(loose_images)} images lie directly in it)" if loose_images else "")
            + (
                "; it has tars: give the tar of class tars itself as the source"
                if tars
                else "; an image folder has one sub-folder of images for each class"
            )
        )
    if loose_images:
        log.warning(
            "left out: %d images directly in %s, outside any class folder, for example %s",
            len(loose_images), root, os.fsdecode(loose_images[0]),
        )  # fmt: skip
    if {name.lower() for name in classes} <= _SPLIT_NAMES:
        log.warning(
            "the classes are named %s: if these are splits, give the folder inside %s that holds the class folders",
            ", ".join(classes), root,
        )  # fmt: skip
    return _join("image folder", root, classes, listed, in_tar=False)


def _list_class_folder(root: Path, name: bytes) -> _ClassListing:
    found: list[tuple[bytes, int]] = []
    others: list[bytes] = []
    base = os.fsencode(root)
    waiting = [name]
    while waiting:
        folder = waiting.pop()
        with os.scandir(base + b"/" + folder) as entries:
            for entry in entries:
                path = folder + b"/" + entry.name
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    waiting.append(path)
                elif looks_like_image(entry.name):
                    found.append((path, entry.stat().st_size))
                else:
                    others.append(path)
    found.sort()
    sizes = np.fromiter((size for _, size in found), np.uint64, len(found))
    return _ClassListing(Strings.of([path for path, _ in found]), sizes, np.zeros(0, np.uint64), others)


# -------------------------------------------------------------------------------------------- tar of class tars


def _list_tar(path: Path) -> Listing:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        refuse_compression(os.pread(descriptor, 8, 0), f"source {path}")
        end = os.fstat(descriptor).st_size
        members = [m for m in iterate_members(descriptor, 0, end, f"source {path}") if m.kind != b"5"]
        tars = sorted((m for m in members if m.name.endswith(b".tar") and m.kind == b"0"), key=_class_of_tar)
        if not tars:
            _refuse_compression_of_members([m.name for m in members], path)
            example = f": its members are like {os.fsdecode(members[0].name)!r}" if members else ""
            raise SourceError(
                f"source {path} is not a tar of one tar per class{example}; if it holds class folders, unpack it and "
                f"give the folder"
            )
        classes = _class_names([_class_of_tar(m) for m in tars], path)

        def list_class(name: bytes, start: int, size: int) -> _ClassListing:
            where = f"class tar {os.fsdecode(name)}.tar in {path}"
            refuse_compression(os.pread(descriptor, 8, start), where)
            return _list_class_tar(descriptor, name, start, start + size, where)

        jobs = [partial(list_class, _class_of_tar(m), m.offset, m.size) for m in tars]
        listed = _collect(classes, jobs)
    finally:
        os.close(descriptor)
    if not any(part.names for part in listed):
        raise SourceError(f"source {path} has no images in its {len(tars)} class tars")
    return _join("tar of class tars", path, classes, listed, in_tar=True)


def _class_of_tar(member: tuple[bytes, int, int, bytes]) -> bytes:
    return member[0].rsplit(b"/", 1)[-1].removesuffix(b".tar")


def _list_class_tar(descriptor: int, class_name: bytes, start: int, end: int, where: str) -> _ClassListing:
    found: list[tuple[bytes, int, int]] = []
    others: list[bytes] = []
    for name, offset, size, kind in iterate_members(descriptor, start, end, where):
        if kind == b"5":
            continue
        # some class tars hold `CLASS/image`, some `./image`, most `image`
        path = class_name + b"/" + name.removeprefix(b"./").removeprefix(class_name + b"/")
        if not looks_like_image(name):
            others.append(path)
        elif kind != b"0":
            raise TarError(
                f"{where}: member {os.fsdecode(name)!r} is a link: make the tar with --dereference --hard-dereference"
            )
        else:
            found.append((path, size, offset))
    found.sort()
    sizes = np.fromiter((size for _, size, _ in found), np.uint64, len(found))
    offsets = np.fromiter((offset for _, _, offset in found), np.uint64, len(found))
    return _ClassListing(Strings.of([path for path, _, _ in found]), sizes, offsets, others)


def refuse_compression(beginning: bytes, where: str) -> None:
    """Refuse a file that begins (8 bytes) as a compressed one does, with what would do.

    Raises:
        SourceError: it does.
    """
    for signature, name in _COMPRESSED:
        if beginning.startswith(signature):
            raise SourceError(
                f"{where} is compressed with {name}: images in it cannot be reached by offset; decompress it first"
                + (" (gunzip)" if name == "gzip" else "")
            )
    if beginning.startswith(b"PK\x03\x04"):
        raise SourceError(f"{where} is a zip archive: unpack it and give the folder")


def _refuse_compression_of_members(names: Sequence[bytes], path: Path) -> None:
    compressed = [name for name in names if name.endswith((b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz"))]
    if compressed:
        raise SourceError(
            f"source {path} holds compressed class tars ({os.fsdecode(compressed[0])}): images in them cannot be "
            f"reached by offset; decompress them first"
        )


# ------------------------------------------------------------------------------------------------------ shared


def _class_names(names: Sequence[bytes], source: Path) -> list[str]:
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


def _collect(classes: Sequence[str], jobs: Iterable[Callable[[], _ClassListing]]) -> list[_ClassListing]:
    progress = Progress(len(classes), "classes", "listing")
    listed: list[_ClassListing] = []
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
    others = [name for part in listed for name in part.others]
    if others:
        log.warning("left out: %d files without an image's suffix, for example %s", len(others), os.fsdecode(others[0]))
    return listed


def _join(kind: str, root: Path, classes: list[str], parts: list[_ClassListing], in_tar: bool) -> Listing:
    counts = [len(part.names) for part in parts]
    return Listing(
        kind,
        root,
        classes,
        Strings.join([part.names for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.offsets for part in parts]) if in_tar else None,
        np.repeat(np.arange(len(classes), dtype=np.int32), counts),
    )
