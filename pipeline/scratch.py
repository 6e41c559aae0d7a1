"""A folder on a node's own disk for files on their way elsewhere; what killed processes left is cleared away."""

import fcntl
import os
import shutil
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import IO

from cluster.settings import SettingsError


class Scratch:
    """A folder of this process alone. Beside it lies a lock that dies with the process, however it ends.

    Args:
        place: where such folders are; empty takes one in the system's temporary folder.
        name: what it is for; part of its name, for people.

    Raises:
        SettingsError: it cannot be made.
    """

    def __init__(self, place: str, name: str) -> None:
        self.root = Path(place) if place else Path(tempfile.gettempdir()) / f"vitforge-{os.getuid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.path, self._lock = self._claim(f"{name}-{uuid.uuid4().hex[:12]}")
        except OSError as error:
            raise SettingsError(
                f"{self.root} cannot be used for checkpoints on their way ({error.strerror}): set checkpoint.scratch "
                "to a folder on this node's own disk"
            ) from error
        self._clear()
        self._end = weakref.finalize(self, _remove, self.path, self._lock)

    def empty(self) -> None:
        """Remove what is in the folder."""
        for path in self.path.iterdir():
            path.unlink()

    def close(self) -> None:
        """Remove the folder; the end of the process does so too, if it has time to."""
        self._end()

    def _claim(self, name: str) -> tuple[Path, IO[bytes]]:
        path = self.root / name
        while True:
            lock = _lock_of(path).open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _lock_of(path).exists():  # or another process has taken it for a dead one's in between
                path.mkdir()
                return path, lock
            lock.close()

    def _clear(self) -> None:
        for left in self.root.glob("*.lock"):
            try:
                with left.open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left.with_suffix(""), ignore_errors=True)
                    left.unlink(missing_ok=True)
            except OSError:
                continue  # its process lives


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _remove(path: Path, lock: IO[bytes]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _lock_of(path).unlink(missing_ok=True)
    lock.close()
