"""Which processes of this machine are ranks of ours: each has a mark open that only who knows the secret can name.

The mark is a file in memory (Linux's memfd) without content. Its name, in the process table beside the process's other
open files, is an HMAC of the rank's number under the secret that the ranks share. So the ranks to end are found in the
process table itself: no process number is ever told, and one that the system has given to another process is not hit.
"""

import contextlib
import hashlib
import hmac
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path


class RankMark:
    """The mark of this process, as long as it lives or until it is closed."""

    def __init__(self, secret: bytes, rank: int) -> None:
        self._file = os.memfd_create(_name(secret, rank)) if sys.platform == "linux" else None

    def close(self) -> None:
        """Take the mark away."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def end_ranks(secret: bytes, ranks: Collection[int]) -> list[int]:
    """Kill those of some ranks that run here: same process table, same user; returns the numbers of their processes.

    This process itself is left alone. Where there is no such table (not Linux), whoever started the ranks ends them.
    """
    if sys.platform != "linux":
        return []
    links = {f"/memfd:{_name(secret, rank)} (deleted)" for rank in ranks}
    ended = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # Another user's, or one that has just ended.
            with contextlib.suppress(OSError):
                if _end_if_marked(int(entry.name), links):
                    ended.append(int(entry.name))
    return ended


def _end_if_marked(pid: int, links: set[str]) -> bool:
    process = os.pidfd_open(pid)  # names this process even after its number has become another's
    try:
        if Path(f"/proc/{pid}").stat().st_uid != os.geteuid():
            return False
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                if str(file.readlink()) in links:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    return True
        return False
    finally:
        os.close(process)


def _name(secret: bytes, rank: int) -> str:
    return "vitforge-rank-" + hmac.new(secret, b"rank %d" % rank, hashlib.sha256).hexdigest()
