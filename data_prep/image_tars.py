"""Listing tars of images, plain or gzip: of one tar for each class, of class folders, or flat with a truth file.

A plain tar is listed by hopping over its headers. A gzip one is decoded once, from front to back, which also finds the
points from which its images are read later (gzip_points.py); what that gave is kept in the cache folder, so that the
same command given again does not decode it again.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from cluster.command import Progress, log
from cluster.folders import Folder
from data_prep.columns import Strings
from data_prep.corpus_cache import cache_folder
from data_prep.gzip_points import GzipError, GzipPoints, Slice, find_points
from data_prep.image_folders import (
    ClassListing,
    class_names,
    collect,
    labels_of,
    warn_of_others,
    warn_of_splits,
)
from data_prep.listing import Listing, SourceError, looks_like_image
from data_prep.source_reader import Stream, StreamImages, reader_of
from data_prep.tar_headers import Member, ReadAt, TarError, iterate_members

_COMPRESSED = ((b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_GZIP = b"\x1f\x8b"
_TAR_NAMES = (b".tar", b".tar.gz", b".tgz")
_UNKNOWN_END = 1 << 62
_CACHE_VERSION = 2
_READERS = 16
"""Requests at a time for a gzip tar on an object store, 1 MiB each, while it is decoded once."""


def is_tar_name(name: str) -> bool:
    """Whether a file's name is that of a tar that can be read."""
    return name.encode("utf-8", "replace").endswith(_TAR_NAMES)


@dataclass(frozen=True)
class _Part:
    """One tar: a class, or the whole where there are no class tars."""

    class_name: bytes
    listed: ClassListing
    stream: Stream


def list_tar(folder: Folder, name: str, inside: str | None) -> Listing:
    """List a tar of one tar for each class, or one that holds class folders.

    Args:
        folder, name: of the tar.
        inside: a folder in the tar that holds the class folders, or None.

    Raises:
        SourceError: it is none of these, damaged, compressed in another way than gzip, or has no image.
    """
    where = f"source {folder.url}/{name}"
    parts = _walk(folder, name, where)
    if len(parts) == 1 and not parts[0].class_name:
        return _list_class_folders(folder, name, parts[0], inside, where)
    if inside is not None:
        raise SourceError(f"inside = {inside!r}: {where} holds class tars, not folders")
    parts = sorted(parts, key=lambda part: part.class_name)
    classes = class_names([part.class_name for part in parts], where)
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


def list_flat_tar(folder: Folder, name: str) -> tuple[ClassListing, StreamImages]:
    """The images of a tar that has no classes, sorted by name.

    Raises:
        SourceError: it is damaged, holds tars, or has no image.
    """
    where = f"source {folder.url}/{name}"
    parts = _walk(folder, name, where)
    if len(parts) != 1 or parts[0].class_name:
        raise SourceError(f"{where} holds class tars: truth= is for images without classes")
    listed = parts[0].listed
    images = StreamImages(folder, (parts[0].stream,), np.zeros(len(listed.sizes), np.int32), listed.offsets)
    return listed, images


def _list_class_folders(folder: Folder, name: str, part: _Part, inside: str | None, where: str) -> Listing:
    """Split the members of a tar by the folder they lie in."""
    listed = part.listed
    paths = [listed.names[row] for row in range(len(listed.names))]
    top = b"" if inside is None else inside.strip("/").encode() + b"/"
    if inside is None:
        while (shared := _shared_top(paths, top)) is not None:
            top += shared + b"/"
    rows = [row for row, path in enumerate(paths) if path.startswith(top)]
    below = [(paths[row][len(top) :], row) for row in rows]
    in_folders = sorted((path.partition(b"/")[0], path, row) for path, row in below if b"/" in path)
    loose = len(below) - len(in_folders)
    if not in_folders:
        if inside is not None:
            raise SourceError(f"inside = {inside!r}: {where} has no class folders with images there")
        example = (
            f": its members are like {os.fsdecode((paths + listed.others)[0])!r}" if paths or listed.others else ""
        )
        raise SourceError(
            f"{where} is neither a tar of one tar per class nor one of class folders{example}"
            + ("; give truth=FILE if these are ImageNet's validation images" if loose else "")
        )
    warn_of_others([listed])
    if loose:
        log.warning("left out: %d images in %s outside any class folder", loose, where)
    order = np.array([row for _, _, row in in_folders], np.int64)
    found = sorted({class_name for class_name, _, _ in in_folders})
    classes = class_names(found, where)
    warn_of_splits(classes, where)
    numbers = {class_name: number for number, class_name in enumerate(found)}
    return Listing(
        "tar of class folders", f"{folder.url}/{name}", classes, Strings.of([path for _, path, _ in in_folders]),
        listed.sizes[order],
        StreamImages(folder, (part.stream,), np.zeros(len(order), np.int32), listed.offsets[order]),
        np.array([numbers[class_name] for class_name, _, _ in in_folders], np.int32),
    )  # fmt: skip


def _shared_top(paths: Sequence[bytes], top: bytes) -> bytes | None:
    """The one folder below `top` in which all images lie, if they lie in folders of that folder."""
    below = [path[len(top) :].split(b"/", 2) for path in paths]
    if below and all(len(parts) == 3 for parts in below) and len({parts[0] for parts in below}) == 1:
        return below[0][0]
    return None


# ------------------------------------------------------------------------------------------ reading tars' headers


def _walk(folder: Folder, name: str, where: str) -> list[_Part]:
    """The class tars of a tar, or the tar itself as one part without a class name."""
    try:
        read_at, size = reader_of(folder, name)
        refuse_compression(read_at(8, 0), where)
        if read_at(2, 0) != _GZIP:
            return _walk_plain(read_at, size, folder, name, where)
        key = f"{folder.url}/{name} {folder.stamp(name)}"
        kept = _from_cache(key, name)
        if kept is not None:
            return kept
        parts = _walk_gzip(folder, name, size, where)
        _to_cache(key, parts)
        return parts
    except (TarError, GzipError) as error:
        raise SourceError(str(error)) from error


def _walk_plain(read_at: ReadAt, size: int, folder: Folder, name: str, where: str) -> list[_Part]:
    members = [member for member in iterate_members(read_at, 0, size, where) if member.kind != b"5"]
    tars = [member for member in members if _is_class_tar(member)]
    whole = Stream(name)
    if not tars:
        _refuse_compression_of_members([member.name for member in members], where)
        return [_Part(b"", _listed(members, b"", where), whole)]
    place = f"{folder.url}/{name}"
    if not any(read_at(2, member.offset) == _GZIP for member in tars):

        def list_plain(member: Member) -> ClassListing:
            own = read_at if folder.local is not None else reader_of(folder, name)[0]  # one thread's, on a store
            return _list_plain_class_tar(own, member, place)

        classes = [os.fsdecode(class_of_tar(member.name)) for member in tars]
        listed = collect(classes, [partial(list_plain, member) for member in tars])
        return [_Part(class_of_tar(m.name), part, whole) for m, part in zip(tars, listed, strict=True)]
    key = f"{place} {folder.stamp(name)}"
    kept = _from_cache(key, name)
    if kept is not None:
        return kept
    progress = Progress(len(tars), "class tars", "decoding")

    def list_class_tar(member: Member) -> _Part:
        own = read_at if folder.local is not None else reader_of(folder, name)[0]
        class_name = class_of_tar(member.name)
        if own(2, member.offset) == _GZIP:
            return _list_gzip_class_tar(own, member, class_name, name, place)
        return _Part(class_name, _list_plain_class_tar(own, member, place), whole)

    parts = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for part in pool.map(list_class_tar, tars):
            parts.append(part)
            progress.update(1)
    warn_of_others([part.listed for part in parts])
    _to_cache(key, parts)
    return parts


def _walk_gzip(folder: Folder, name: str, size: int, where: str) -> list[_Part]:
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
        return [_Part(b"", _listed(members, b"", where), stream)]
    warn_of_others([part for _, part in found])
    return [_Part(class_name, part, stream) for class_name, part in found]


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


def _list_gzip_class_tar(read_at: ReadAt, member: Member, class_name: bytes, name: str, place: str) -> _Part:
    where = f"class tar {os.fsdecode(class_name)}.tar.gz in {place}"
    listed: list[ClassListing] = []

    def visit(inner: ReadAt) -> None:
        listed.append(_listed(iterate_members(inner, 0, _UNKNOWN_END, where), class_name, where))

    points = find_points(Slice(read_at, member.offset, member.size), where, visit, threads=1)
    return _Part(class_name, listed[0], Stream(name, member.offset, points))


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


# ------------------------------------------------------------- what decoding a gzip file gave, kept for the next time


def _cache_path(key: str) -> Path:
    name = hashlib.sha256(f"{_CACHE_VERSION} {key}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder("gzip") / f"{name}.npz"


def _to_cache(key: str, parts: Sequence[_Part]) -> None:
    streams: list[Stream] = []
    numbers = []
    for part in parts:
        if not streams or part.stream is not streams[-1]:
            known = next((k for k, stream in enumerate(streams) if stream is part.stream), None)
            if known is not None:
                numbers.append(known)
                continue
            streams.append(part.stream)
        numbers.append(len(streams) - 1)
    names = Strings.join([part.listed.names for part in parts])
    classes = Strings.of([part.class_name for part in parts])
    arrays: dict[str, Any] = {
        "names": names.content, "name_pointers": names.pointers,
        "classes": classes.content, "class_pointers": classes.pointers,
        "counts": np.array([len(part.listed.sizes) for part in parts]),
        "sizes": np.concatenate([part.listed.sizes for part in parts]),
        "offsets": np.concatenate([part.listed.offsets for part in parts]),
        "numbers": np.array(numbers),
        "starts": np.array([stream.start if stream.points else -1 for stream in streams], np.int64),
        "others": np.frombuffer(json.dumps([[n.hex() for n in p.listed.others] for p in parts]).encode(), np.uint8),
    }  # fmt: skip
    points = [stream.points for stream in streams if stream.points is not None]
    windows = Strings.join([each.windows for each in points])
    arrays |= {
        "point_counts": np.array([len(each.decoded) for each in points]),
        "decoded": np.concatenate([each.decoded for each in points]),
        "encoded": np.concatenate([each.encoded for each in points]),
        "bits": np.concatenate([each.bits for each in points]),
        "windows": windows.content, "window_pointers": windows.pointers,
    }  # fmt: skip
    path = _cache_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(path, buffer.getbuffer())
    log.info("what decoding gave is kept in %s for when the command is given again", path)


def _from_cache(key: str, name: str) -> list[_Part] | None:
    path = _cache_path(key)
    if not path.is_file():
        return None
    try:
        parts = _parts_in(path, name)
    except Exception as error:  # numpy's and zipfile's readers raise whatever their parsing runs into
        log.warning("what decoding %s gave before is damaged in %s (%s): decoding it again", name, path, error)
        return None
    warn_of_others([part.listed for part in parts])
    log.info("what decoding %s gave is known from before (%s)", name, path)
    return parts


def _parts_in(path: Path, name: str) -> list[_Part]:
    with np.load(path, allow_pickle=False) as arrays:
        a = {key: arrays[key] for key in arrays.files}
    point_ends = np.concatenate([[0], np.cumsum(a["point_counts"])]).astype(int)
    windows = Strings(a["windows"], a["window_pointers"])
    streams: list[Stream] = []
    used = 0
    for start in a["starts"].tolist():
        if start < 0:
            streams.append(Stream(name))
            continue
        span = np.arange(point_ends[used], point_ends[used + 1])
        used += 1
        points = GzipPoints(a["decoded"][span], a["encoded"][span], a["bits"][span], windows.take(span))
        streams.append(Stream(name, start, points))
    names, classes = Strings(a["names"], a["name_pointers"]), Strings(a["classes"], a["class_pointers"])
    others = json.loads(a["others"].tobytes())
    ends = np.concatenate([[0], np.cumsum(a["counts"])]).astype(int)
    parts = []
    for number in range(len(classes)):
        span = np.arange(ends[number], ends[number + 1])
        listed = ClassListing(
            names.take(span), a["sizes"][span], a["offsets"][span], [bytes.fromhex(text) for text in others[number]]
        )
        parts.append(_Part(classes[number], listed, streams[int(a["numbers"][number])]))
    return parts
