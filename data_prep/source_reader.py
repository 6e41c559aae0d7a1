"""Where the bytes of a source's images are, and how they are read ahead of whoever writes them.

Reading fills memory that is used again and again: fresh memory for every image costs more CPU time (page faults) than
reading it does.
"""

import errno
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.folders import Folder
from cluster.storage import patiently
from data_prep.columns import Strings
from data_prep.gzip_points import GzipError, GzipPoints, GzipReader
from data_prep.image_check import UnusableImage
from data_prep.tar_headers import ReadAt

_GROUP_IMAGES, _GROUP_BYTES = 64, 1 << 20
"""What one thread reads at a time: enough to make a thread's turn worth it, little enough to stay in its cache."""
_AHEAD = 8
"""Threads, and groups of images, that reading is ahead."""
_AHEAD_OF_NETWORK = 32
"""The same where each read waits for a network."""
_GZIP_GROUP_BYTES = 32 << 20
"""What is read from gzip streams at a time, in the order of the stream: neighbours share their decoding."""
_GZIP_AHEAD = 2
_REMOTE_GZIP_GROUP_BYTES, _REMOTE_GZIP_AHEAD = 8 << 20, 8
"""The same on an object store, where each image waits for a request or two of _REMOTE_GZIP_PIECE bytes."""
_REMOTE_GZIP_PIECE = 512 << 10
_MAX_OPEN = 128

_OF_THE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ELOOP, errno.EISDIR}
"""Errors of one file, that may not be read or lies on a bad place of a disk; of others the whole source is at fault."""
_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before a file that cannot be read is tried again: mounted file systems have moments."""
_MOST_UNREADABLE, _MOST_UNREADABLE_SHARE = 10, 0.01
"""Of the files of one task: with more of them, and a larger share, the node or the mount is at fault, not the files."""
UNREADABLE = "cannot be read"
"""Begins the reason of a file that was there and could not be read."""
DANGLING = "a link to a file that is not there"

Read = int | UnusableImage
"""How many bytes of an image there were, one more than fit if there are more, or why there are none."""


class SourceError(ValueError):
    """A source that cannot be sharded; the message says what would do."""


class Images(ABC):
    """The encoded images of (a part of) a listing, N of them in its order. Pickles, to travel to workers."""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> "Images":
        """Some of them (int64 [K]), in that order."""

    @abstractmethod
    def groups(self, names: Strings, sizes: NDArray[np.uint64]) -> Iterator[Sequence[memoryview | UnusableImage]]:
        """The encoded images in order, a group at a time; the reason in place of one that cannot be had.

        The views of a group are released when the next one is asked for: copy, or write, what must stay.

        Args:
            names: [N] for messages.
            sizes: bytes of each image, [N].

        Raises:
            SourceError: the source is not there on this node, or has changed since it was listed.
            OSError: the file system or the network fails; worth another try.
        """


@dataclass(frozen=True)
class FileImages(Images):
    """Each image a file of a folder."""

    folder: Folder
    paths: Strings
    """Below the folder, bytes [N]."""

    def take(self, rows: NDArray[np.int64]) -> "FileImages":
        return replace(self, paths=self.paths.take(rows))

    def groups(self, names: Strings, sizes: NDArray[np.uint64]) -> Iterator[Sequence[memoryview | UnusableImage]]:
        local = self.folder.local
        if local is None:
            yield from _read_ahead(self._fill_remote, names, sizes, self.folder.url, _AHEAD_OF_NETWORK)
            return
        _check_there(local)
        base = os.fsencode(local) + b"/"
        unreadable = 0

        def fill(place: int, view: memoryview) -> Read:
            nonlocal unreadable
            path = base + self.paths[place]
            read = _read_file(path, view)
            if isinstance(read, UnusableImage) and str(read) != DANGLING:
                unreadable += 1
                if unreadable > max(_MOST_UNREADABLE, _MOST_UNREADABLE_SHARE * len(sizes)):
                    raise OSError(
                        f"{unreadable} of {len(sizes)} files of the source, the last of them {os.fsdecode(path)}, "
                        f"on node {os.uname().nodename}: {read}"
                    )
            return read

        yield from _read_ahead(fill, names, sizes, self.folder.url, _AHEAD)

    def _fill_remote(self, place: int, view: memoryview) -> int:
        return _copy(self.folder.read_bytes(os.fsdecode(self.paths[place])), view)


@dataclass(frozen=True)
class Stream:
    """A run of bytes that images lie in: a file, or a gzip file, or a gzip file that is a member of a tar."""

    file: str
    """Name in the folder."""
    start: int = 0
    """Where it begins in the file, bytes."""
    points: GzipPoints | None = None
    """Of a gzip stream."""


@dataclass(frozen=True)
class StreamImages(Images):
    """Each image a run of bytes in one of a few streams: the tars of a folder, plain or compressed."""

    folder: Folder
    streams: tuple[Stream, ...]
    which: NDArray[np.int32]
    """The stream of each image, [N]."""
    offsets: NDArray[np.uint64]
    """Of each image in its (decoded) stream, bytes [N]."""

    def take(self, rows: NDArray[np.int64]) -> "StreamImages":
        which, offsets = self.which[rows], self.offsets[rows]
        used, numbers = np.unique(which, return_inverse=True)
        streams = []
        for new, old in enumerate(used.tolist()):
            stream = self.streams[old]
            if stream.points is not None:
                stream = replace(stream, points=stream.points.around(offsets[numbers == new]))
            streams.append(stream)
        return StreamImages(self.folder, tuple(streams), numbers.astype(np.int32), offsets)

    def groups(self, names: Strings, sizes: NDArray[np.uint64]) -> Iterator[Sequence[memoryview | UnusableImage]]:
        if self.folder.local is not None:
            _check_there(self.folder.local / self.streams[0].file if self.streams else self.folder.local)
        files = _OpenFiles(self.folder)
        where = self.folder.url
        if any(stream.points is not None for stream in self.streams):
            local = self.folder.local is not None
            yield from _read_ahead(
                lambda group, views: self._read_sorted(files, group, views), names, sizes, where,
                _GZIP_AHEAD if local else _REMOTE_GZIP_AHEAD,
                by_group=True, group_bytes=_GZIP_GROUP_BYTES if local else _REMOTE_GZIP_GROUP_BYTES,
            )  # fmt: skip
            return
        ahead = _AHEAD if self.folder.local is not None else _AHEAD_OF_NETWORK
        yield from _read_ahead(lambda place, view: self._fill(files, place, view), names, sizes, where, ahead)

    def _fill(self, files: "_OpenFiles", place: int, view: memoryview) -> int:
        stream = self.streams[self.which[place]]
        return files.read_into(stream.file, view, stream.start + int(self.offsets[place]))

    def _read_sorted(self, files: "_OpenFiles", group: range, views: Sequence[memoryview]) -> list[int]:
        counts = [0] * len(group)
        readers: dict[int, GzipReader] = {}
        in_order = np.lexsort((self.offsets[group.start : group.stop], self.which[group.start : group.stop]))
        for number in in_order.tolist():
            place = group[number]
            which = int(self.which[place])
            stream = self.streams[which]
            if stream.points is None:
                counts[number] = self._fill(files, place, views[number])
                continue
            if which not in readers:
                readers = {which: GzipReader(files.read_at(stream.file, stream.start), stream.points, stream.file)}
            try:
                counts[number] = readers[which].read_into(int(self.offsets[place]), views[number])
            except GzipError as error:
                raise SourceError(f"{error}: it has changed since it was listed, or the disk has errors") from error
        return counts


def reader_of(folder: Folder, name: str) -> tuple[ReadAt, int]:
    """What reads a file at any place, and its bytes; for one thread where the folder is on an object store.

    Raises:
        StorageError: it is missing.
    """
    file = folder.open(name)
    if folder.local is not None:
        return lambda size, offset: os.pread(file.fileno(), size, offset), os.fstat(file.fileno()).st_size

    def read_at(size: int, offset: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read_at, file.seek(0, os.SEEK_END)


class _OpenFiles:
    """The files of a folder, open as long as they are in use; for several threads."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        if self._folder.local is None:
            return _copy(self._folder.read_bytes(name, offset, len(view)), view)
        opened = self._open_file(name)  # held until the read is done
        return _read_fully(opened.number, view, offset)

    def read_at(self, name: str, start: int) -> Callable[[int, int], bytes]:
        """Reads (size, offset) of the file from `start` on; short at its end. For one thread."""
        if self._folder.local is not None:
            opened = self._open_file(name)
            return lambda size, offset: os.pread(opened.number, size, start + offset)
        with self._lock:
            if name not in self._sizes:
                size = self._folder.size(name)
                if size is None:
                    raise SourceError(f"{self._folder}/{name} is gone: it was there when the source was listed")
                self._sizes[name] = size
        end = self._sizes[name]
        first, piece = 0, b""

        def read_forward(size: int, offset: int) -> bytes:
            nonlocal first, piece
            if not first <= offset <= offset + size <= first + len(piece):
                length = max(0, min(_REMOTE_GZIP_PIECE, end - start - offset))
                first, piece = offset, self._folder.read_bytes(name, start + offset, length)
            return piece[offset - first : offset - first + size]

        return read_forward

    def _open_file(self, name: str) -> "_OpenFile":
        assert self._folder.local is not None
        with self._lock:
            opened = self._open.get(name)
            if opened is None:
                opened = self._open[name] = _OpenFile(self._folder.local / name)
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            return opened


class _OpenFile:
    """A read-only file that closes when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        try:
            self.number = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise SourceError(f"{path} is gone: it was there when the source was listed") from None

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _read_ahead(
    fill: Callable[..., Read | list[int]],
    names: Strings,
    sizes: NDArray[np.uint64],
    where: str,
    ahead: int,
    *,
    by_group: bool = False,
    group_bytes: int = _GROUP_BYTES,
) -> Iterator[list[memoryview | UnusableImage]]:
    """The images in groups, read by threads into a few buffers.

    Args:
        fill: brings one image (place, view), or with `by_group` all of a group (range, views), into memory.
        ahead: groups that are read at a time.
    """
    groups = _cut_into_groups(sizes, group_bytes, _GROUP_IMAGES if not by_group else len(sizes))
    largest = max((int(sizes[group.start : group.stop].sum()) for group in groups), default=0)
    free = [bytearray(largest) for _ in range(min(ahead, len(groups)) + 1)]

    def read_group(group: range, buffer: bytearray) -> tuple[bytearray, list[memoryview | UnusableImage]]:
        whole = memoryview(buffer)
        ends = np.cumsum(sizes[group.start : group.stop], dtype=np.int64).tolist()
        views = [whole[end - int(sizes[place]) : end] for place, end in zip(group, ends, strict=True)]
        counts = fill(group, views) if by_group else [fill(place, view) for place, view in zip(group, views)]  # noqa: B905
        assert isinstance(counts, list)
        images: list[memoryview | UnusableImage] = []
        for place, count, view in zip(group, counts, views, strict=True):
            images.append(count if isinstance(count, UnusableImage) else view)
            if not isinstance(count, UnusableImage) and count != sizes[place]:
                raise SourceError(
                    f"{os.fsdecode(names[place])} in {where} changed while it was being sharded: it had {sizes[place]} "
                    f"bytes when it was listed; run again when nothing writes there"
                )
        return buffer, images

    pool = ThreadPoolExecutor(ahead)
    running: list[Future[tuple[bytearray, list[memoryview | UnusableImage]]]] = []
    waiting = iter(groups)
    try:
        while True:
            while len(running) < ahead and (group := next(waiting, None)) is not None:
                running.append(pool.submit(read_group, group, free.pop()))
            if not running:
                return
            buffer, images = running.pop(0).result()
            yield images
            for image in images:
                if isinstance(image, memoryview):
                    image.release()
            free.append(buffer)
    finally:
        pool.shutdown(cancel_futures=True)


def _cut_into_groups(sizes: NDArray[np.uint64], group_bytes: int, group_images: int) -> list[range]:
    """Places 0..N in runs of few images and few bytes."""
    groups, start, total = [], 0, 0
    for place, size in enumerate(sizes.tolist()):
        total += size
        if place - start + 1 == group_images or total >= group_bytes:
            groups.append(range(start, place + 1))
            start, total = place + 1, 0
    return [*groups, range(start, len(sizes))] if start < len(sizes) else groups


def _check_there(path: Path) -> None:
    if not path.exists():
        raise SourceError(
            f"source {path} is not there on node {os.uname().nodename}: it must be mounted at the same path on "
            f"every node of the cluster"
        )


def _copy(content: bytes, view: memoryview) -> int:
    view[: len(content)] = content[: len(view)]
    return len(content)


def _read_fully(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` from an offset of a file; returns the bytes that were there."""
    done = 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done


def _read_file(path: bytes, view: memoryview) -> Read:
    """Fill `view` with a file."""
    try:
        return patiently(partial(_read_once, path, view), _PAUSES, lambda error: error.errno in _OF_THE_FILE)
    except FileNotFoundError:
        if _dangled_before(path, len(view)):
            return UnusableImage(DANGLING, may_pass=True)
        raise SourceError(f"{os.fsdecode(path)} is gone: it was there when the source was listed") from None
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
        return UnusableImage(f"{UNREADABLE}: {error.strerror}", may_pass=True)


def _dangled_before(path: bytes, size: int) -> bool:
    """Whether a path was a link to nothing when it was listed, with the size of the link itself."""
    link = Path(os.fsdecode(path))
    return link.is_symlink() and link.lstat().st_size == size


def _read_once(path: bytes, view: memoryview) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        count = os.readv(descriptor, [view, bytearray(1)])
        if count < len(view):
            count += _read_fully(descriptor, view[count:], count)
        return count
    finally:
        os.close(descriptor)
