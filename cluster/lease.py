"""A lease on a folder: one job at a time works in it, and a holder that died does not block it for ever.

The lease is a file, FOLDER/lease.json, changed only by compare-and-swap, so that it works on a mounted file system
and on an object store alike. The holder writes a higher counter into it every third of its time to live. Another
job takes it over at once where the holder's process is seen to be dead (same machine), otherwise when the counter
stood still for a whole time to live by the other job's own clock: clocks of two machines are never compared.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cluster.command import duration, log
from cluster.folders import Folder
from cluster.ownership import is_dead, is_here, this_process
from cluster.storage import StorageError, json_bytes

FILE = "lease.json"
TTL_S = 180.0
"""Seconds without a renewal after which a holder counts as dead: longer than an outage of the storage that its work
survives."""
_GIVE_UP = 0.8
"""Share of the time to live after which a holder that cannot renew stops: before another may take over."""


class LeaseError(ValueError):
    """Another job holds the folder."""


class Lease:
    """A lease, taken when the block is entered and given back when it ends.

    Args:
        folder: what is held; it need not exist yet.
        lost: called from the lease's thread, with the reason, when it is no longer ours. The default ends the
            process at once: whatever it would still write belongs to another job's folder by then.
        ttl_s: the time to live; the same for all jobs that may meet.
        advice: what would do for a job that is refused.
        leaves_file: whether the file stays, as that of a free lease, when the lease is given back.
    """

    def __init__(
        self,
        folder: Folder,
        lost: "Callable[[str], None] | None" = None,
        ttl_s: float = TTL_S,
        *,
        advice: str = "wait for it, stop it, or use another run.name",
        leaves_file: bool = True,
    ) -> None:
        self.folder, self.ttl_s = folder, ttl_s
        self._advice, self.leaves_file = advice, leaves_file
        self.token = uuid.uuid4().hex
        self._lost = lost or end_process
        self._counter = 0
        self._written: bytes | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            LeaseError: another job is alive and holds it.
        """
        self._take()
        self._thread = threading.Thread(target=self._renew, name="vitforge-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join(timeout=self.ttl_s)
        try:
            if self.leaves_file:
                self.folder.swap(FILE, json_bytes({"token": None}), self._written)
            elif self._written is not None:
                self.folder.remove_if(FILE, self._written)
        except (OSError, StorageError) as failure:
            log.warning("the lease on %s could not be given back (%s): it ends by itself", self.folder, failure)

    def _take(self) -> None:
        found = self._read()
        seen, waited = time.monotonic(), False
        while True:
            holder = _parse(found)
            if holder is None or is_dead(holder):
                if holder is not None:
                    log.info("the job that held %s (%s) is dead; going on in its place", self.folder, _name(holder))
                if self._write(found):
                    return
            elif is_here(holder):
                raise LeaseError(self._refusal(holder))
            elif time.monotonic() - seen >= self.ttl_s:
                log.warning(
                    "the job that held %s (%s) did not renew its lease for %s; going on in its place",
                    self.folder,
                    _name(holder),
                    duration(self.ttl_s),
                )
                if self._write(found):
                    return
            elif not waited:
                waited = True
                log.info(
                    "%s was held by a job on another machine (%s); waiting up to %s to see whether it is alive",
                    self.folder,
                    _name(holder),
                    duration(self.ttl_s),
                )
            time.sleep(min(0.5, self.ttl_s / 20))
            now = self._read()
            if now != found:
                renewed = _parse(now)
                if renewed is not None and not is_dead(renewed):
                    raise LeaseError(self._refusal(renewed))
                found, seen = now, time.monotonic()

    def _refusal(self, holder: dict[str, Any]) -> str:
        return f"another job works in {self.folder} ({_name(holder)}): {self._advice}"

    def _renew(self) -> None:
        renewed = began = time.monotonic()
        while not self._ended.wait(self.ttl_s / 3 if renewed == began else self.ttl_s / 30):
            began = time.monotonic()
            try:
                if self._write(self._written):
                    renewed = began
                    continue
                found = self._read()
                holder = _parse(found)
                if holder is None or holder.get("token") != self.token:
                    who = _name(holder) if holder else "nobody"
                    self._lost(f"the lease on {self.folder} is lost: it belongs to {who} now. This job stops")
                    return
                self._written = found  # a write that went through although its answer was lost
                renewed = began
            except (OSError, StorageError) as error:
                log.warning("the lease on %s could not be renewed (%s); trying again", self.folder, error)
            if time.monotonic() - renewed > _GIVE_UP * self.ttl_s:
                self._lost(
                    f"the lease on {self.folder} could not be renewed for {duration(time.monotonic() - renewed)}: "
                    "another job may take it over. This job stops"
                )
                return

    def _write(self, expected: bytes | None) -> bool:
        record = {"token": self.token, "counter": self._counter + 1, "ttl_s": self.ttl_s, **this_process()}
        content = json_bytes(record)
        if not self.folder.swap(FILE, content, expected):
            return False
        self._counter += 1
        self._written = content
        return True

    def _read(self) -> bytes | None:
        if self.folder.size(FILE) is None:
            return None
        return self.folder.read_bytes(FILE)


class Watcher:
    """Says whether a lease is still the one that a process works under; for the ranks, which do not hold it.

    Args:
        token: of the lease.
    """

    def __init__(self, folder: Folder, token: str, ttl_s: float = TTL_S) -> None:
        self.folder, self.token, self.ttl_s = folder, token, ttl_s
        self._seen: bytes | None = None
        self._changed = self._asked = time.monotonic()

    def lost(self) -> str | None:
        """Why the lease no longer covers this process, or None while it does. Reads one small file."""
        away, self._asked = time.monotonic() - self._asked, time.monotonic()
        if away > self.ttl_s / 2:  # this process was stopped, and the holder with it, perhaps
            self._changed += away
        try:
            found = self.folder.read_bytes(FILE)
        except (OSError, StorageError):  # storage that does not answer is a lease that is not seen to be renewed
            if self._seen is None:
                late = time.monotonic() - self._changed > self.ttl_s
                return f"the lease on {self.folder} cannot be read" if late else None
            found = self._seen
        if found != self._seen:
            self._seen, self._changed = found, time.monotonic()
        holder = _parse(found)
        if holder is None or holder.get("token") != self.token:
            return f"the lease on {self.folder} belongs to {_name(holder) if holder else 'nobody'} now"
        if is_dead(holder):
            return f"the job's driver ({_name(holder)}) is gone"
        if time.monotonic() - self._changed > self.ttl_s:
            return f"the job's driver ({_name(holder)}) did not renew its lease for {duration(self.ttl_s)}"
        return None


def end_process(reason: str) -> None:
    """Say why and end this process at once, without any of what it would do on the way out."""
    log.error("%s", reason)
    os._exit(1)


def _parse(content: bytes | None) -> dict[str, Any] | None:
    """The holder that a lease names; None for a free one, or one that is not readable."""
    try:
        record = json.loads(content) if content else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("token") else None


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"
