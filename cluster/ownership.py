"""Whose a file or folder is, and whether the process that made it still lives.

What may be removed carries a mark of ours, which names its user, machine and process: a file in a folder
(`cluster.marked_folders`), or a part of the name of a file that is not finished (`cluster.storage`).
"""

import functools
import hashlib
import os
import platform
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MARK = ".vitforge-owner.json"
"""The file in a folder of ours that names its owner."""


class OwnershipError(ValueError):
    """A folder that is another's, or that may be."""


# ----------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------


def _boot() -> str:
    """What tells machines, and containers whose process numbers mean different processes, apart."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not space.is_symlink():
        return ""
    return f"{boot.read_text(encoding='ascii').strip()} {space.readlink()}"


HERE = {"host": platform.node(), "boot": _boot()}
"""Which machine (and which container of it) this is: two processes with the same one see each other's numbers."""


def _started(pid: int) -> float:
    """When a process began, in clock ticks since the boot: the time of day may be set while it runs.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    try:
        return float(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return psutil.Process(pid).create_time()  # a system without /proc


def this_process() -> dict[str, Any]:
    """What names this process among all that ever were: user, host, boot, number and start."""
    return {"user": os.geteuid(), **HERE, "pid": os.getpid(), "started": _started(os.getpid())}


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether a process, dead or alive, can be seen from here."""
    return bool(HERE["boot"]) and all(process.get(key) == value for key, value in HERE.items())


def is_dead(process: Mapping[str, Any]) -> bool:
    """Whether a process is seen to have ended; false where that cannot be seen from here.

    Args:
        process: as `this_process` gave it, from a file that anybody may have written.
    """
    pid, started = process.get("pid"), process.get("started")
    if not is_here(process) or type(pid) is not int or pid <= 0 or not isinstance(started, (int, float)):
        return False
    try:
        return not _exists(pid) or _started(pid) != started or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return not _exists(pid)  # or it is hidden from us, by /proc's option hidepid
    except (OSError, psutil.Error):
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


# ----------------------------------------------------------------------------------------------------------------
# Files that are not finished
# ----------------------------------------------------------------------------------------------------------------

_PLACE = hashlib.sha256(" ".join(HERE.values()).encode()).hexdigest()[:8]
NAME_MARK = r"(?P<user>\d+)-(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{12}"
"""What `name_mark` gives, as a regular expression."""


def name_mark() -> str:
    """What names user, machine, process and its start in the name of one file."""
    return f"{_mark_of(os.getpid())}-{secrets.token_hex(6)}"


@functools.cache
def _mark_of(pid: int) -> str:
    return f"{os.geteuid()}-{_PLACE}-{pid}-{_started(pid):.0f}"


def is_left_by_us(match: re.Match[str]) -> bool:
    """Whether a `NAME_MARK` is our user's, and its process is not one that is seen to live.

    That does not show that it is dead: the caller holds what its process had to hold to write there.
    """
    process = {"pid": int(match["pid"]), "started": float(match["started"])}
    if int(match["user"]) != os.geteuid():
        return False
    return match["place"] != _PLACE or is_dead({**HERE, **process})


# ----------------------------------------------------------------------------------------------------------------
# Folders of this user alone
# ----------------------------------------------------------------------------------------------------------------


def private_folder(path: Path) -> Path:
    """Make a folder that this user alone can enter, or take the one that is there if it is this user's.

    The folders above it are made as any are.

    Raises:
        OwnershipError: a symbolic link, a file or another user's folder is there. Any user can put one of these under a
            name that is known, and would read and replace what we write then.
        OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(0o700)
    refuse_others(path)
    if stat.S_IMODE(path.lstat().st_mode) & 0o077:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    return path


def refuse_others(path: Path, *, but: tuple[int, ...] = ()) -> None:
    """Refuse what is no folder of this user (or of users `but`), as a symbolic link to one, which others may have made.

    Raises:
        OwnershipError: saying what it is.
        OSError: it is not there.
    """
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        raise OwnershipError(f"{path} is a symbolic link")
    if not stat.S_ISDIR(facts.st_mode):
        raise OwnershipError(f"{path} is no folder")
    if facts.st_uid not in (os.geteuid(), *but):
        raise OwnershipError(f"{path} belongs to another user (number {facts.st_uid})")


def temporary_root() -> Path:
    """The folder of this user in the system's temporary folder (TMPDIR).

    Errors: as `private_folder`.
    """
    try:
        return private_folder(Path(tempfile.gettempdir()) / f"vitforge-{os.geteuid()}")
    except OwnershipError as error:
        raise OwnershipError(f"{error}, so that nothing is written there: set TMPDIR to a folder of your own") from None
