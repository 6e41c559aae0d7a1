"""Folders of one process, removed by a later one where the process was killed; nothing else ever is.

Such a folder carries a mark, a file in it that names its user, host, boot, process and purpose, and on which the
process holds a lock for as long as it lives. It is removed where

    the mark is ours (our user's, of this very folder, whole), and nobody holds the lock, and
    the process is seen to be dead, or the folder is on a file system that one machine alone can have mounted, as the
    process saw it and as we do (to the server of a network's file system it is a disk, to all others it is not): every
    process that could hold the lock is one of this machine then, whatever container it is in.

What lies on a file system of several machines and was made on another one stays: its process may live.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.command import log
from cluster.ownership import MARK, is_dead, is_here, temporary_root, this_process

_NAME = re.compile(r"vitforge-[a-z0-9-]+-[0-9a-f]{16}")
_MARK_BYTES = 4096
_OF_ONE_MACHINE = {"ext2", "ext3", "ext4", "xfs", "f2fs", "jfs", "reiserfs", "tmpfs", "ramfs", "overlay"}
"""File systems that no two machines have mounted at a time. (Those of btrfs and zfs cannot be told by their device.)"""


class TemporaryFolderError(ValueError):
    """The system's temporary folder cannot be used."""


class MarkedFolder:
    """A folder of this process alone, with its mark; removed when it is closed, or the process ends.

    What processes that were killed left beside it is removed first.

    Args:
        purpose: what it is for; part of its name, for people. Lower-case letters, digits and hyphens.
        place: where it is to be made; None is `temporary_root`.

    Attributes:
        path: of the folder.

    Raises:
        OwnershipError: as `private_folder`.
        TemporaryFolderError: the system's temporary folder is full, or cannot be written.
        OSError: nothing can be made in `place`.
    """

    def __init__(self, purpose: str, place: Path | None = None) -> None:
        try:
            self._make(purpose, place)
        except OSError as error:
            if place is not None:
                raise
            raise TemporaryFolderError(
                f"nothing can be written to the temporary folder {tempfile.gettempdir()} ({error.strerror}): make room "
                "there, or set TMPDIR to another folder"
            ) from error

    def _make(self, purpose: str, place: Path | None) -> None:
        root = temporary_root() if place is None else place
        root.mkdir(parents=True, exist_ok=True)
        remove_left_behind(root)
        self.path = root / f"vitforge-{purpose}-{secrets.token_hex(8)}"
        assert _NAME.fullmatch(self.path.name), "a name that is not found again"
        self.path.mkdir(0o700)
        try:
            mark = _write_mark(self.path, purpose)
        except BaseException:
            (self.path / MARK).unlink(missing_ok=True)
            self.path.rmdir()
            raise
        self._mark = mark
        self._end = weakref.finalize(self, _end, self.path, mark, os.getpid())

    def empty(self) -> None:
        """Remove what is in the folder; it stays marked."""
        with _opened(self.path) as folder:
            _refuse_unless_marked(folder, self._mark)
            _remove_content(folder)

    def close(self) -> None:
        """Remove the folder."""
        self._end()


@contextmanager
def temporary_folder(purpose: str, place: Path | None = None) -> Iterator[Path]:
    """A `MarkedFolder` for the length of a block; gives its path."""
    folder = MarkedFolder(purpose, place)
    try:
        yield folder.path
    finally:
        folder.close()


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Whatever asks `tempfile` for a place in this process gets one in a folder, for the length of a block.

    For libraries that have no setting for it: MLflow 3.17 copies a package, weights and all, into a folder of its own
    as often as it writes or reads one.
    """
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def remove_left_behind(root: Path) -> None:
    """Remove the marked folders directly in a folder whose processes are dead; see above."""
    try:
        names = sorted(filter(_NAME.fullmatch, os.listdir(root)))  # noqa: PTH208 names, of which there may be many
    except OSError:  # a folder in which we may only make others
        return
    for name in names:
        try:
            if _removed_if_dead(root / name):
                log.info("removed %s, which a process that was killed had left", root / name)
        except OSError as error:
            log.debug("%s stays: %s", root / name, error)


def _write_mark(path: Path, purpose: str) -> int:
    """The mark, locked before it says anything: a descriptor that holds the lock."""
    mark = os.open(path / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # a file system without locks: what is left there is told by its process alone
            fcntl.flock(mark, fcntl.LOCK_EX)
        facts = path.stat()
        own_disk = _is_of_one_machine(facts.st_dev)
        record = {
            "purpose": purpose, "folder": path.name, "inode": facts.st_ino, "own_disk": own_disk, **this_process()
        }  # fmt: skip
        content = json.dumps(record).encode()
        if os.write(mark, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path / MARK))
        os.fsync(mark)
    except BaseException:
        os.close(mark)
        raise
    return mark


def _end(path: Path, mark: int, pid: int) -> None:
    if os.getpid() != pid:  # a fork of the owner ends
        return
    with suppress(OSError), _opened(path) as folder:
        _refuse_unless_marked(folder, mark)
        _remove_content(folder)
        os.unlink(MARK, dir_fd=folder)
        path.rmdir()
    os.close(mark)


def _refuse_unless_marked(folder: int, mark: int) -> None:
    """Refuse a folder that has taken the name of ours: who may write beside ours can move others there.

    Raises:
        OSError: our mark is not in it.
    """
    if not os.path.samestat(os.stat(MARK, dir_fd=folder, follow_symlinks=False), os.fstat(mark)):
        raise FileNotFoundError(errno.ENOENT, "the mark is another's", MARK)


def _removed_if_dead(path: Path) -> bool:
    with _opened(path) as folder:
        facts = os.fstat(folder)
        if facts.st_uid != os.geteuid():
            return False
        mark = os.open(MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        try:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unlocked = True
            except BlockingIOError:
                return False
            except OSError:
                unlocked = False
            owner = _owner(os.pread(mark, _MARK_BYTES, 0))
            if (owner.get("user"), owner.get("folder"), owner.get("inode")) != (
                os.geteuid(), path.name, facts.st_ino,
            ):  # fmt: skip
                return False
            on_disk = owner.get("own_disk") is True and _is_of_one_machine(facts.st_dev)
            if not is_dead(owner) and (is_here(owner) or not (unlocked and on_disk)):
                return False
            _remove_content(folder)
            os.unlink(MARK, dir_fd=folder)  # last: what is left half removed is found again
            path.rmdir()
            return True
        finally:
            os.close(mark)


def _owner(content: bytes) -> dict[str, Any]:
    """What a mark says; nothing for what is none."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_of_one_machine(device: int) -> bool:
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    kinds = {line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2] == number}
    return bool(kinds) and kinds <= _OF_ONE_MACHINE


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A folder's descriptor; what is done by it is done in this folder, whatever takes its name meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_content(folder: int) -> None:
    """Remove all that is in a folder but its mark, without following a link."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if entry.name != MARK]
    for name, is_folder in found:
        if is_folder:
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)
