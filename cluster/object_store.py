"""A folder under a prefix of an S3 object store: `ObjectFolder`."""

import io
import os
import posixpath
import re
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from cluster import s3_objects, storage
from cluster.command import log
from cluster.folders import Folder, Sink
from cluster.redact import without_credentials
from cluster.s3_connection import SECRETS, connection
from cluster.s3_objects import Objects, Upload
from cluster.storage import MissingError, StorageError, TooLargeError

_T = TypeVar("_T")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")

_PIECE = 8 << 20
"""Bytes that `Folder.open` fetches at a time from an object store: a request costs more than reading past a little."""


class ObjectFolder(Folder):
    """A folder under a prefix of a bucket.

    Args:
        bucket: its name.
        prefix: of the keys, without a slash at either end; may be empty.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.local = None
        self._objects = Objects(bucket, prefix)
        self.url = self._objects.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectFolder) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        secrets = {name: os.environ[name] for name in SECRETS if name in os.environ}
        for name in _ENDPOINTS:  # Ray is not told one with a password in it
            if (endpoint := os.environ.get(name)) and without_credentials(endpoint) != endpoint:
                secrets[name] = endpoint
        return _arrive, (self._objects.bucket, self._objects.prefix, secrets)

    def child(self, name: str) -> "ObjectFolder":
        return ObjectFolder(self._objects.bucket, posixpath.normpath(self._objects.key(name)))

    def names(self) -> list[str]:
        return _run(self._objects.names())

    def folders(self) -> list[str]:
        return _run(self._objects.folders())

    def tree(self) -> dict[str, int]:
        return _run(self._objects.tree())

    def size(self, name: str) -> int | None:
        known = _run(self._objects.size_and_etag(name))
        return None if known is None else known[0]

    def stamp(self, name: str) -> str:
        return self._known(name)[1]

    def open(self, name: str) -> BinaryIO:
        size, _ = self._known(name)
        return io.BufferedReader(_RangeReader(self, name, size), min(_PIECE, max(size, 1)))

    def _known(self, name: str) -> tuple[int, str]:
        known = _run(self._objects.size_and_etag(name))
        if known is None:
            raise MissingError(f"{self._objects.place(name)} cannot be read: there is no such object")
        return known

    def read_bytes(self, name: str, offset: int = 0, length: int | None = None, *, most: int | None = None) -> bytes:
        if length == 0:
            return b""
        parts: dict[int, bytes] = {}

        def take(at: int, part: bytes) -> None:
            if at == 0:
                parts.clear()
            parts[at] = part
            if most is not None and sum(map(len, parts.values())) > most:
                raise TooLargeError(f"{self._objects.place(name)} has more than {most:,} bytes")

        _run(self._objects.download(name, offset, length, take))
        return b"".join(parts[at] for at in sorted(parts))

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        with self.writing(name) as sink:
            sink.write(content)

    def swap(self, name: str, content: bytes, expected: bytes | None) -> bool:
        return _run(self._objects.swap(name, content, expected))

    def remove_if(self, name: str, expected: bytes) -> bool:
        return _run(self._objects.remove_if(name, expected))

    @contextmanager
    def writing(self, name: str) -> Iterator[Sink]:
        sink = _ObjectSink(self._objects, name)
        try:
            yield sink
            sink.finish()
        except BaseException:
            sink.abort()
            raise

    def put(self, path: Path, name: str, *, move: bool = False) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        _run(self._objects.put_file(name, descriptor, os.fstat(descriptor).st_size))
        if move:
            path.unlink()

    def get(self, name: str, path: Path) -> None:
        arriving = storage.temporary_path(path)
        try:
            _run(self._objects.get_file(name, os.open(arriving, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)))
            arriving.replace(path)
        finally:
            arriving.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        _run(self._objects.remove(name))

    def remove_tree(self, ours: re.Pattern[str]) -> None:
        _run(self._objects.abort_all(deep=True, ours=ours))
        _run(self._objects.remove_all(ours))
        if left := self.tree():
            log.warning("%s stays: %s is not ours", self, next(iter(left)))

    def remove_empty(self) -> None:
        """A store has no folders beside those of its objects."""

    def remove_unfinished(self, *, deep: bool = False) -> None:
        _run(self._objects.abort_all(deep=deep))

    def free(self) -> None:
        return None


class _ObjectSink:
    """An object that is written in order: parts go out while the next is filled."""

    def __init__(self, objects: Objects, name: str) -> None:
        self._objects, self._name = objects, name
        self._buffer = bytearray()
        self._upload: Upload | None = None
        self._parts: list[Future[str]] = []

    def write(self, content: Any) -> int:
        """Take bytes."""
        view = memoryview(content).cast("B") if len(content) else memoryview(b"")
        for at in range(0, len(view), s3_objects.PART):
            self._buffer += view[at : at + s3_objects.PART]
            # a part of the first thousand has 16 MiB, of the second 32 MiB, ...: 10,000 of them hold any object
            if len(self._buffer) > (step := s3_objects.PART << len(self._parts) // 1000):
                self._send(bytes(self._buffer[:step]))
                del self._buffer[:step]
        return len(view)

    def finish(self) -> None:
        """Make the object appear."""
        if self._upload is None:
            _run(self._objects.put(self._name, bytes(self._buffer)))
            return
        self._send(bytes(self._buffer))
        etags = {number: part.result() for number, part in enumerate(self._parts, 1)}
        _run(self._objects.complete(self._name, self._upload, etags))

    def abort(self) -> None:
        """Leave nothing behind."""
        for part in self._parts:
            part.cancel()
        if self._upload is not None:
            _run(self._objects.abort(self._name, self._upload.number))

    def _send(self, content: bytes) -> None:
        if self._upload is None:
            self._upload = _run(self._objects.begin(self._name))
        if len(self._parts) >= s3_objects.AT_ONCE:
            self._parts[-s3_objects.AT_ONCE].result()
        part = self._objects.send_part(self._name, self._upload, len(self._parts) + 1, content)
        self._parts.append(connection().start(part))


class _RangeReader(io.RawIOBase):
    """An object as a file: every read is a request.

    Args:
        folder, name: of the object.
        size: of it, in bytes.
    """

    def __init__(self, folder: Folder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._at = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        view[:count] = self._folder.read_bytes(self._name, self._at, count)
        self._at += count
        return count


def object_folder(url: str, key: str) -> ObjectFolder:
    """The folder of a URL s3://BUCKET/PREFIX.

    Args:
        url: of it.
        key: the setting it came from, for the message.

    Raises:
        StorageError: it names no bucket.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{key} = {url!r} names no bucket: give s3://BUCKET/FOLDER")
    return ObjectFolder(bucket, "/".join(filter(None, prefix.split("/"))))


def _arrive(bucket: str, prefix: str, secrets: Mapping[str, str]) -> ObjectFolder:
    own = any(name in os.environ for name in (*SECRETS, "AWS_PROFILE"))
    for name, value in secrets.items():  # the node's own come first
        if name not in os.environ and not (own and name in SECRETS):
            os.environ[name] = value
    return ObjectFolder(bucket, prefix)


def _run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    return connection().run(coroutine)
