"""A folder of files wherever it lies: on a mounted file system, or under a prefix of an object store.

Everything that may be on S3 (corpora, run folders, sources) is reached through `Folder`; nothing else knows which
of the two it is. A file appears under its name whole or not at all, in both.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from cluster import paths, storage
from cluster.command import log
from cluster.marked_folders import temporary_folder
from cluster.storage import Sink, StorageError

_LOCK = ".swap-lock"
"""Suffix of the file beside one that is swapped, which processes of mounted file systems lock."""


class Folder(ABC):
    """A folder of files. It need not exist before something is written into it. Pickles, to travel to workers.

    Names are relative to it and may hold slashes; one that leads out of it is refused (StorageError), whoever gave it.

    Attributes:
        url: as people write it: an absolute path, or s3://BUCKET/PREFIX.
        local: its path where it is on a mounted file system, else None.
    """

    url: str
    local: Path | None

    def __str__(self) -> str:
        return self.url

    @abstractmethod
    def child(self, name: str) -> "Folder":
        """A folder inside this one."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the files directly in it, sorted, without unfinished ones; empty where it does not exist."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders directly in it, sorted; empty where it does not exist."""

    @abstractmethod
    def tree(self) -> dict[str, int]:
        """Every finished file in it and in its folders: name to bytes, in the order of the names."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""

    @abstractmethod
    def stamp(self, name: str) -> str:
        """What becomes another when a file is written again, with any content that differs.

        Raises:
            StorageError: it is missing.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file, to be read from any place in it; for one thread.

        Raises:
            StorageError: it is missing or cannot be read.
        """

    @abstractmethod
    def read_bytes(self, name: str, offset: int = 0, length: int | None = None, *, most: int | None = None) -> bytes:
        """The content of a file, or `length` bytes of it from `offset` on.

        Args:
            most: bytes that are taken at most.

        Raises:
            StorageError: it is missing, cannot be read, or ends before that; TooLargeError: it has more than `most`.
        """

    @abstractmethod
    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, whole or not at all; what stood under the name is replaced.

        Raises:
            OSError: the storage fails; worth another try.
        """

    @abstractmethod
    def swap(self, name: str, content: bytes, expected: bytes | None) -> bool:
        """Write a file if it holds `expected` now (None: if there is none), in one step against other writers.

        Returns:
            False where it holds something else; it is left as it is then.
        """

    @abstractmethod
    def remove_if(self, name: str, expected: bytes) -> bool:
        """Remove a file if it holds `expected` now, in one step against `swap`; whether it did."""

    @abstractmethod
    @contextmanager
    def writing(self, name: str) -> Iterator[Sink]:
        """A file that appears under its name, whole, when the block ends without an exception."""
        yield NotImplemented

    @contextmanager
    def building(self, name: str) -> Iterator[BinaryIO]:
        """As `writing`, but the bytes go into an unbuffered file of this node, which has a descriptor.

        Where the folder is not of a mounted file system, the file is in TMPDIR until it is sent.
        """
        with tempfile.TemporaryFile(buffering=0) as file:  # which has no name: a killed process leaves nothing
            yield file
            self.put(Path(f"/proc/self/fd/{file.fileno()}"), name)

    @abstractmethod
    def put(self, path: Path, name: str, *, move: bool = False) -> None:
        """Bring a local file here, whole or not at all.

        Args:
            move: the local file is not needed any more: it is renamed where that is possible, and gone afterwards.
        """

    @abstractmethod
    def get(self, name: str, path: Path) -> None:
        """Bring a file to a local path, whole or not at all; a machine that fails may lose it again.

        Raises:
            StorageError: it is missing or cannot be read.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it is there."""

    @abstractmethod
    def remove_tree(self, ours: re.Pattern[str]) -> None:
        """Remove what we wrote in the folder and in its folders, if it is there, and those that are empty then.

        The caller holds the lease or the lock without which nobody writes there.

        Args:
            ours: all that the names of our files can be, relative to the folder. Any other file stays, loudly: what
                people put into a folder of ours is theirs.
        """

    @abstractmethod
    def remove_empty(self) -> None:
        """Remove the folders in it that hold nothing, and itself if it holds nothing then."""

    @abstractmethod
    def remove_unfinished(self, *, deep: bool = False) -> None:
        """Remove what killed writers left directly in the folder, and if `deep` in the folders in it."""

    @abstractmethod
    def free(self) -> int | None:
        """Bytes that can still be written, or None where there is no such limit."""

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as readable JSON; equal values give equal bytes."""
        self.write_bytes(name, storage.json_bytes(value))

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            StorageError: it is missing or is not whole JSON.
        """
        return storage.parse_json(self.read_bytes(name), f"{self.url}/{name}")

    def inside(self, name: str) -> str:
        """`name`, if it is one of something in this folder.

        Raises:
            StorageError: it leads out of it, or can be no name.
        """
        return paths.check_inside(name, self.url, StorageError)


class LocalFolder(Folder):
    """A folder of a mounted file system."""

    def __init__(self, path: Path) -> None:
        self.local: Path = path
        self.url = str(path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalFolder) and other.local == self.local

    def __hash__(self) -> int:
        return hash(self.local)

    def child(self, name: str) -> "LocalFolder":
        return LocalFolder(self._at(name))

    def names(self) -> list[str]:
        return [name for name, is_folder in self._entries() if not is_folder]

    def folders(self) -> list[str]:
        return [name for name, is_folder in self._entries() if is_folder]

    def _entries(self) -> list[tuple[str, bool]]:
        try:
            with os.scandir(self.local) as entries:
                return sorted((e.name, storage.is_folder(e)) for e in entries if not _is_hidden(e.name))
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            raise StorageError(f"{self.local} is to be a folder, and there is a file: move it away") from error

    def tree(self) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.local):
            for name in names:
                path = Path(folder, name)
                # a link to nothing is no file, nor is what has just gone
                if not _is_hidden(name) and (size := storage.file_size(path)) is not None:
                    found[path.relative_to(self.local).as_posix()] = size
        return dict(sorted(found.items()))

    def size(self, name: str) -> int | None:
        return storage.file_size(self._at(name))

    def stamp(self, name: str) -> str:
        with self.open(name) as file:
            stat = os.fstat(file.fileno())
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def open(self, name: str) -> BinaryIO:
        path = self._at(name)
        try:
            return path.open("rb")
        except OSError as error:
            raise storage.unreadable(path, error) from error

    def read_bytes(self, name: str, offset: int = 0, length: int | None = None, *, most: int | None = None) -> bytes:
        path = self._at(name)
        try:
            with self.open(name) as file:
                file.seek(offset)
                content = file.read(-1 if most is None else most + 1) if length is None else file.read(length)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise storage.unreadable(path, error) from error
        if length is not None and len(content) != length:
            raise StorageError(f"{path} ends before byte {offset + length}: it was cut short")
        if most is not None and len(content) > most:
            raise storage.TooLargeError(f"{path} has more than {most:,} bytes")
        return content

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        storage.write_bytes(self._place(name), content)

    def swap(self, name: str, content: bytes, expected: bytes | None) -> bool:
        path = self._place(name)
        with _locked(path):
            if (path.read_bytes() if path.exists() else None) != expected:
                return False
            storage.write_bytes(path, content)
            return True

    def remove_if(self, name: str, expected: bytes) -> bool:
        path = self._at(name)
        if not path.exists():
            return False
        with _locked(path) as lock:
            if not path.exists() or path.read_bytes() != expected:
                return False
            path.unlink()
            lock.unlink()
            return True

    @contextmanager
    def writing(self, name: str) -> Iterator[Sink]:
        with self.building(name) as file:
            yield file

    @contextmanager
    def building(self, name: str) -> Iterator[BinaryIO]:
        with storage.atomic_file(self._place(name)) as file:
            yield file

    def put(self, path: Path, name: str, *, move: bool = False) -> None:
        target = self._place(name)
        if move and path.stat().st_dev == target.parent.stat().st_dev:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            try:
                path.replace(target)
            except OSError as error:
                if error.errno != errno.EXDEV:  # two mounts of one file system, as of a container, are two for that
                    raise
            else:
                storage.sync_folder(target.parent)
                return
        with path.open("rb") as source, storage.atomic_file(target) as file:
            while chunk := source.read(4 << 20):
                storage.write_fully(file, chunk)
        if move:
            path.unlink()

    def get(self, name: str, path: Path) -> None:
        self.open(name).close()
        LocalFolder(path.parent).put(self._at(name), path.name)

    def remove(self, name: str) -> None:
        self._at(name).unlink(missing_ok=True)

    def remove_tree(self, ours: re.Pattern[str]) -> None:
        if self.local.is_symlink():
            log.warning("%s stays: it is a symbolic link", self)
            return
        self.remove_unfinished(deep=True)
        for folder, _, names in os.walk(self.local):
            for name in names:
                path = Path(folder, name)
                place = path.relative_to(self.local).as_posix()
                if ours.fullmatch(place) or (_is_lock(name) and ours.fullmatch(_locked_by(place))):
                    path.unlink(missing_ok=True)
        self.remove_empty()
        if left := self.tree():
            log.warning("%s stays: %s is not ours", self, next(iter(left)))

    def remove_empty(self) -> None:
        for folder, _, _ in os.walk(self.local, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()

    def remove_unfinished(self, *, deep: bool = False) -> None:
        storage.remove_unfinished(self.local)
        if deep:
            for name in self.folders():
                if not (self.local / name).is_symlink():
                    self.child(name).remove_unfinished(deep=True)

    def free(self) -> int | None:
        place = next(place for place in (self.local, *self.local.parents) if place.is_dir())
        return shutil.disk_usage(place).free

    def _at(self, name: str) -> Path:
        return self.local / self.inside(name)

    def _place(self, name: str) -> Path:
        path = self._at(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """A lock on a file, held against `swap` and `remove_if` of other processes; gives the lock's own file."""
    name = path.with_name(f".{path.name}{_LOCK}")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.fdopen(os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")
        except FileNotFoundError:  # the last holder has removed the folder just now
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_open_under(name, lock.fileno()):
                continue  # the last holder has removed it: whoever comes now makes another
            yield name
            return


def _is_open_under(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_hidden(name: str) -> bool:
    return storage.is_unfinished(name) or _is_lock(name)


def _is_lock(name: str) -> bool:
    return name.startswith(".") and name.endswith(_LOCK)


def _locked_by(place: str) -> str:
    above, slash, name = place.rpartition("/")
    return f"{above}{slash}{name.removeprefix('.').removesuffix(_LOCK)}"


@contextmanager
def at_hand(folder: Folder, name: str) -> Iterator[Path]:
    """A path of this machine under which a file of a folder can be read inside the block, as it is where it lies."""
    folder.inside(name)
    if folder.local is not None:
        yield folder.local / name
        return
    with temporary_folder("file") as scratch:
        path = scratch / Path(name).name
        folder.get(name, path)
        yield path


def file_at(place: str, key: str) -> tuple[Folder, str]:
    """The folder that a file at an absolute path or URL lies in, and its name there. Args, errors: as `folder_at`."""
    if place.startswith("s3://"):
        above, _, name = place.rpartition("/")
        return folder_at(above, key), name
    path = storage.local_path(place, key)
    return LocalFolder(path.parent), path.name


def folder_at(place: str, key: str) -> Folder:
    """The folder at an absolute path or URL.

    Args:
        place: as the user gave it, made absolute.
        key: the setting it came from, for the message.

    Raises:
        StorageError: a URL of a kind that is not supported, or one that names no bucket.
    """
    if place.startswith("s3://"):
        from cluster.object_store import object_folder

        return object_folder(place, key)
    return LocalFolder(storage.local_path(place, key))
