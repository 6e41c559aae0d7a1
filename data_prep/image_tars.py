"""Listing tars of images, plain or gzip: of one tar for each class, of class folders, or flat with a truth file.

A plain tar is listed by hopping over its headers. A gzip one is decoded once, from front to back, which also finds the
points from which its images are read later (gzip_points.py); what that gave is kept in the cache folder, so that the
same command given again does not decode it again.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.command import Progress, log
from cluster.folders import Folder
from data_prep.columns import Strings
from data_prep.decoded_tars import TarPart, keep_parts, kept_parts
from data_prep.gzip_points import GzipError, Slice, find_points
from data_prep.image_folders import (
    ClassListing,
    class_names,
    collect,
    labels_of,
    warn_of_others,
)
from data_prep.listing import Listing, SourceError, is_junk, looks_like_image
from data_prep.source_reader import Stream, StreamImages, reader_of
from data_prep.split_names import are_splits
from data_prep.tar_class_folders import InsideTar, list_class_folders, top_of
from data_prep.tar_headers import Member, ReadAt, TarError, iterate_members

_COMPRESSED = ((b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_GZIP = b"\x1f\x8b"
_TAR_NAMES = (b".tar", b".tar.gz", b".tgz")
_UNKNOWN_END = 1 << 62
_READERS = 16
"""Requests at a time for a gzip tar on an object store, 1 MiB each, while it is decoded once."""


def is_tar_name(name: str) -> bool:
    """Whether a file's name is that of a tar that can be read."""
    return name.encode("utf-8", "replace").endswith(_TAR_NAMES)


_WHOLE = InsideTar()


def list_tar(folder: Folder, name: str, part: InsideTar = _WHOLE) -> Listing:
    """List a tar of one tar for each class, or one that holds class folders.

    Args:
        folder, name: of the tar.
        part: which part of it.

    Raises:
        SourceError: it is none of these, damaged, compressed in another way than gzip, or has no image.
    """
    where = f"source {folder.url}/{name}"
    parts = _walk(folder, name, where)
    if len(parts) == 1 and not parts[0].class_name:
        return list_class_folders(folder, name, parts[0], part, where)
    if part.inside is not None or part.split is not None:
        key, value = ("inside", part.inside) if part.inside is not None else ("split", part.split)
        raise SourceError(f"{key} = {value!r}: {where} holds tars, not folders: unpack it, and give one of them")
    parts = sorted(parts, key=lambda part: part.class_name)
    classes = class_names([part.class_name for part in parts], where)
    if part.checked and are_splits(classes):
        raise SourceError(
            f"{where} holds the tars {', '.join(classes[:4])}, which are splits and no classes: unpack it (tar -xf), "
            f"and give one of them (kind=tar takes them for classes all the same)"
        )
    listed = [part.listed for part in parts]
    if not any(len(part.names) for part in listed):
        raise SourceError(f"{where} has no images in its {len(parts)} class tars")
    which = labels_of(listed)
    # class tars that are not compressed share the stream of the outer one
    streams = tuple(part.stream for part in parts)
    shared = streams[:1] if len(set(map(id, streams))) == 1 else streams
    images = StreamImages(
        folder,
        shared,
        np.zeros_like(which) if len(shared) == 1 else which,
        np.concatenate([part.offsets for part in listed]),
    )
    return Listing(
        "tar of class tars", f"{folder.url}/{name}", classes, Strings.join([part.names for part in listed]),
        np.concatenate([part.sizes for part in listed]), images, which,
    )  # fmt: skip


def list_flat_tar(folder: Folder, name: str, part: InsideTar = _WHOLE) -> tuple[ClassListing, StreamImages]:
    """The images of a tar that has no classes, or of a folder in it, sorted by name.

    Raises:
        SourceError: it is damaged, holds tars, or has no image.
    """
    where = f"source {folder.url}/{name}"
    parts = _walk(folder, name, where)
    if len(parts) != 1 or parts[0].class_name:
        raise SourceError(f"{where} holds class tars: truth= is for images without classes")
    listed = parts[0].listed
    top = top_of([listed.names[row] for row in range(len(listed.names))], part, where)
    if top:
        rows = np.array([row for row in range(len(listed.names)) if listed.names[row].startswith(top)], np.int64)
        names = Strings.of([listed.names[row][len(top) :] for row in rows.tolist()])
        listed = ClassListing(names, listed.sizes[rows], listed.offsets[rows], listed.others)
    images = StreamImages(folder, (parts[0].stream,), np.zeros(len(listed.sizes), np.int32), listed.offsets)
    return listed, images


# ------------------------------------------------------------------------------------------ reading tars' headers


def _walk(folder: Folder, name: str, where: str) -> list[TarPart]:
    """The class tars of a tar, or the tar itself as one part without a class name."""
    try:
        read_at, size = reader_of(folder, name)
        refuse_compression(read_at(8, 0), where)
        if read_at(2, 0) != _GZIP:
            return _walk_plain(read_at, size, folder, name, where)
        key = f"{folder.url}/{name} {folder.stamp(name)}"
        kept = kept_parts(key, name)
        if kept is not None:
            return kept
        parts = _walk_gzip(folder, name, size, where)
        keep_parts(key, parts)
        return parts
    except (TarError, GzipError) as error:
        raise SourceError(str(error)) from error


def _walk_plain(read_at: ReadAt, size: int, folder: Folder, name: str, where: str) -> list[TarPart]:
    members = [member for member in iterate_members(read_at, 0, size, where) if member.kind != b"5"]
    tars = [member for member in members if _is_class_tar(member)]
    whole = Stream(name)
    if not tars:
        _refuse_compression_of_members([member.name for member in members], where)
        return [TarPart(b"", _listed(members, b"", where), whole)]
    place = f"{folder.url}/{name}"
    if not any(read_at(2, member.offset) == _GZIP for member in tars):

        def list_plain(member: Member) -> ClassListing:
            own = read_at if folder.local is not None else reader_of(folder, name)[0]  # one thread's, on a store
            return _list_plain_class_tar(own, member, place)

        classes = [os.fsdecode(class_of_tar(member.name)) for member in tars]
        listed = collect(classes, [partial(list_plain, member) for member in tars])
        return [TarPart(class_of_tar(m.name), part, whole) for m, part in zip(tars, listed, strict=True)]
    key = f"{place} {folder.stamp(name)}"
    kept = kept_parts(key, name)
    if kept is not None:
        return kept
    progress = Progress(len(tars), "class tars", "decoding")

    def list_class_tar(member: Member) -> TarPart:
        own = read_at if folder.local is not None else reader_of(folder, name)[0]
        class_name = class_of_tar(member.name)
        if own(2, member.offset) == _GZIP:
            return _list_gzip_class_tar(own, member, class_name, name, place)
        return TarPart(class_name, _list_plain_class_tar(own, member, place), whole)

    parts = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for part in pool.map(list_class_tar, tars):
            parts.append(part)
            progress.update(1)
    warn_of_others([part.listed for part in parts])
    keep_parts(key, parts)
    return parts


def _walk_gzip(folder: Folder, name: str, size: int, where: str) -> list[TarPart]:
    """Decode a whole tar once: its members, those of its class tars, and the points for reading them."""
    place = f"{folder.url}/{name}"
    found: list[tuple[bytes, ClassListing]] = []
    members: list[Member] = []
    log.info("decoding %s once, to find its images: they are read at random places afterwards", place)

    def visit(read_at: ReadAt) -> None:
        progress = Progress(size, "bytes", "decoding")
        at = 0
        for member in iterate_members(read_at, 0, _UNKNOWN_END, where):
            if member.kind == b"5":
                continue
            if _is_class_tar(member):
                if read_at(2, member.offset) == _GZIP:
                    raise SourceError(
                        f"{where} is compressed, and so are the class tars in it ({os.fsdecode(member.name)}): "
                        f"decompress one of the two; the outer one gains nothing (gunzip)"
                    )
                found.append((class_of_tar(member.name), _list_plain_class_tar(read_at, member, place)))
            else:
                members.append(member)
            # of the decoded bytes, which are about as many for images, that do not compress
            progress.update(min(member.offset + member.size, size) - at, f"{len(found):,} class tars")
            at = min(member.offset + member.size, size)

    if folder.local is not None:
        source: Path | Slice = folder.local / name
    else:
        source = Slice(lambda length, offset: folder.read_bytes(name, offset, length), 0, size, _READERS)
    points = find_points(source, where, visit, os.cpu_count() or 1)
    stream = Stream(name, 0, points)
    if not found:
        return [TarPart(b"", _listed(members, b"", where), stream)]
    warn_of_others([part for _, part in found])
    return [TarPart(class_name, part, stream) for class_name, part in found]


def _is_class_tar(member: Member) -> bool:
    base = member.name.rsplit(b"/", 1)[-1]
    return member.kind == b"0" and base.endswith(_TAR_NAMES) and not base.startswith(b".")


def class_of_tar(name: bytes) -> bytes:
    """The class that a tar holds, by its name."""
    base = name.rsplit(b"/", 1)[-1]
    for suffix in (b".tar.gz", b".tgz", b".tar"):
        base = base.removesuffix(suffix)
    return base


def _list_plain_class_tar(read_at: ReadAt, member: Member, place: str) -> ClassListing:
    class_name = class_of_tar(member.name)
    where = f"class tar {os.fsdecode(class_name)}.tar in {place}"
    refuse_compression(read_at(8, member.offset), where)
    return _listed(iterate_members(read_at, member.offset, member.offset + member.size, where), class_name, where)


def _list_gzip_class_tar(read_at: ReadAt, member: Member, class_name: bytes, name: str, place: str) -> TarPart:
    where = f"class tar {os.fsdecode(class_name)}.tar.gz in {place}"
    listed: list[ClassListing] = []

    def visit(inner: ReadAt) -> None:
        listed.append(_listed(iterate_members(inner, 0, _UNKNOWN_END, where), class_name, where))

    points = find_points(Slice(read_at, member.offset, member.size), where, visit, threads=1)
    return TarPart(class_name, listed[0], Stream(name, member.offset, points))


def _listed(members: Any, class_name: bytes, where: str) -> ClassListing:
    """The images among the members of a tar, sorted by path; paths of a class tar begin with the class."""
    found: list[tuple[bytes, int, int]] = []
    others: list[bytes] = []
    begin = class_name + b"/" if class_name else b""
    for name, offset, size, kind in members:
        if kind == b"5":
            continue
        # some class tars hold `CLASS/image`, some `./image`, most `image`
        path = begin + name.removeprefix(b"./").removeprefix(begin)
        if is_junk(path):
            continue
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
    return ClassListing(Strings.of([path for path, _, _ in found]), sizes, offsets, others)


def refuse_compression(beginning: bytes, where: str, gzip: bool = True) -> None:
    """Refuse a file that begins (8 bytes) as a compressed one does, with what would do.

    Args:
        gzip: whether that is read.

    Raises:
        SourceError: it is.
    """
    for signature, name in _COMPRESSED if gzip else (*_COMPRESSED, (_GZIP, "gzip")):
        if beginning.startswith(signature):
            raise SourceError(
                f"{where} is compressed with {name}: images in it cannot be reached by offset; decompress it first"
                + (" (gunzip)" if name == "gzip" else ", or to gzip")
            )
    if beginning.startswith(b"PK\x03\x04"):
        raise SourceError(f"{where} is a zip archive: unpack it and give the folder")


def _refuse_compression_of_members(names: Sequence[bytes], where: str) -> None:
    compressed = [name for name in names if name.endswith((b".tar.bz2", b".tar.xz", b".tar.zst"))]
    if compressed:
        raise SourceError(
            f"{where} holds compressed class tars ({os.fsdecode(compressed[0])}): images in them cannot be "
            f"reached by offset; decompress them first, or to gzip"
        )
