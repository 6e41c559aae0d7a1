"""Files of mounted file systems as every stage writes and reads them: complete under their name, or not there.

What may also lie on an object store goes through `cluster.folders.Folder`.
"""

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import xxhash

from cluster import ownership

_T = TypeVar("_T")

_TEMPORARY = ".writing-"
"""In the name of every file that is not finished; nothing reads such a file, and a rerun removes it."""
_LEFT = re.compile(rf"\..+{re.escape(_TEMPORARY)}(?:{ownership.NAME_MARK}|(?P<older>[0-9a-f]{{12}}))", re.DOTALL)
_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_HALF_IN_BYTES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")
"""What may say half a character in JSON: an escape, of which two make one; itself, in UTF-8 or in UTF-16."""
_LONGEST_NAME = 150
"""Bytes of a file's name that are in its temporary one: file systems take 255 in all."""


class Sink(Protocol):
    """Where bytes go in, in order: a file, or an object that is being written."""

    def write(self, content: Any, /) -> int:
        """Take bytes; returns how many were taken, which may be fewer."""


class StorageError(ValueError):
    """A path that cannot be used, or a file that is not what it should be; the message says what would do."""


class MissingError(StorageError):
    """There is no such object in the object store."""


class TooLargeError(StorageError):
    """A file of more bytes than its reader takes."""


class ReadError(StorageError, OSError):
    """A file that could not be read for a moment; worth another try."""


_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EREMOTEIO, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
}  # fmt: skip
"""Errors of mounted file systems whose server is away."""


NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors that say that there is no file of a name: a longer one than any has and a link to itself among them."""


def unreadable(path: Path, error: OSError) -> StorageError:
    """What to raise where a file cannot be read."""
    kind = ReadError if error.errno in _PASSING else StorageError
    return kind(f"{path} cannot be read: {error.strerror}")


def patiently(function: Callable[[], _T], pauses: Iterable[float], passes: Callable[[OSError], bool]) -> _T:
    """What a function returns, called again after each pause as long as it fails of what may pass.

    Args:
        pauses: seconds.
        passes: whether an error may.

    Raises:
        OSError: the last one, or one that does not pass.
    """
    for pause in pauses:
        try:
            return function()
        except OSError as error:
            if not passes(error):
                raise
        time.sleep(pause)
    return function()


def local_path(path: str, key: str) -> Path:
    """`path` as a path of this file system.

    Args:
        path: as the user gave it.
        key: the setting it came from, for the message.

    Raises:
        StorageError: it is a URL.
    """
    if "://" in path:
        scheme = path.split("://")[0]
        raise StorageError(
            f"{key} = {path!r}: {scheme}:// cannot be used here, only a path of a file system that every node "
            f"mounts; copy or mount the data and give that path"
        )
    return Path(path)


def temporary_path(path: Path) -> Path:
    """A name beside `path` for a file that is not finished; what a killed writer leaves under it is removed later."""
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    return path.with_name(f".{name}{_TEMPORARY}{ownership.name_mark()}")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """An unbuffered file that appears under `path`, whole and on disk, when the block ends without an exception.

    It is written under a temporary name beside it, synced, renamed, and the folder synced. After an exception
    nothing is left, and what stood under `path` stays.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        write_fully(file, content)


def write_fully(sink: Sink, content: Any) -> None:
    """Write all of a buffer to a sink that may take less of it at a time."""
    view = memoryview(content)
    if view.nbytes:  # a view without bytes cannot be cast
        view = view.cast("B")
        while view:
            view = view[sink.write(view) :]


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically; equal values give equal bytes."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as readable JSON; equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: it is missing or is not whole JSON.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    return parse_json(content, str(path))


def parse_json(content: bytes | str, where: str) -> Any:
    """The value that JSON text says.

    Args:
        where: what holds it, for the message.

    Raises:
        StorageError: it is not whole JSON.
    """
    try:
        value = json.loads(content)
        if _HALF.search(content) if isinstance(content, str) else _HALF_IN_BYTES.search(content):
            json_bytes(value)  # which half a character would end much later, where it is written
    except (ValueError, RecursionError) as error:  # of lists in lists in lists it raises the latter
        raise StorageError(f"{where} is damaged: it is not JSON ({error})") from error
    return value


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def file_size(path: Path) -> int | None:
    """Bytes of a regular file, or None where there is none."""
    try:
        facts = path.stat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def is_folder(entry: "os.DirEntry[Any]") -> bool:
    """Whether an entry of a folder is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where we may not look
        return False


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove the files that killed writers of this user left in a folder under temporary names.

    The caller holds the lease or the lock without which nobody writes there: writers on machines whose processes
    cannot be seen from here have ended then.
    """
    for path in folder.glob(f".*{_TEMPORARY}*"):
        match = _LEFT.fullmatch(path.name)
        with suppress(FileNotFoundError):
            if match is None or not stat.S_ISREG(path.lstat().st_mode):
                continue
            # Names of before there were marks are told by their form and their file's owner.
            if path.lstat().st_uid == os.geteuid() if match["older"] else ownership.is_left_by_us(match):
                path.unlink()


def is_unfinished(name: str) -> bool:
    """Whether a file name is a temporary one of this module."""
    return name.startswith(".") and _TEMPORARY in name
