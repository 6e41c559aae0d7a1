"""Whole shards of an object store in a folder of the node, of limited size, shared by all that read there.

Ranks, runs and corpora share one folder and one limit. It holds

    CHECKSUM.tar        a shard, whole and checked; named by its content, so that corpora with the same shards share it
    CHECKSUM.lock       held while a process fetches the shard; as long (a hole, not bytes) as the room it will take
    CHECKSUM.fetching/  where the shard arrives
    plan-ID             held by a reader; the checksums of the shards that it will need, in order
    room.lock           held by whoever counts or makes room

Every lock is one of `flock`, which ends with the process that holds it: what a killed process leaves is recognised
by its lock being free, and removed when room is made. Removing a shard that somebody still reads does no harm: what
is open stays readable until it is closed.
"""

import fcntl
import os
import re
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster import storage
from cluster.command import log
from cluster.folders import Folder
from cluster.ownership import MARK, OwnershipError, private_folder, this_process
from cluster.storage import StorageError

_THREADS = 4
"""Shards that one reader fetches at a time, ahead of their use."""
_ATTEMPTS = 3
"""How often a shard is fetched that arrives with other bytes than were written."""
_DISK_SHARE = 0.8
"""Of the disk, beside what is on it from others."""
PLANNED = 4096
"""Shards of an order that are written down; what comes later counts as never."""
_LOOK_AGAIN_S, _IDLE_S = 0.25, 5.0
"""Between looks for room that another process may have made, and while nothing is to be fetched."""
_NOW, _NEVER = -1, 1 << 62
"""When a shard is due that a reader waits for, and one that nobody has asked for; others by their place in an order."""


_OURS = re.compile(r"[0-9a-f]{32}\.(tar|lock|fetching)|plan-[0-9a-f]{12}|room\.lock")
"""Names of what is in a cache; nothing else there is ever removed."""


class FetchError(StorageError, OSError):
    """A shard that could not be brought here, though it may well be there: the store is away, or the disk is full."""


class ShardCache:
    """The shards of one corpus, each fetched when it is first asked for or by the known order before that.

    Safe to use from several threads and processes.

    Attributes:
        limit: bytes that the shards in the folder may take, of all corpora together; at most 80 % of the disk.

    Args:
        folder: holds the shards.
        names, sizes, checksums: of the shards: file name, bytes, xxh3_128 in hexadecimal.
        cache_dir: on a disk of this node.
        limit_bytes: of the cache folder.

    Raises:
        StorageError: the folder cannot be made, or the limit is below the largest shard.
    """

    def __init__(
        self,
        folder: Folder,
        names: Sequence[str],
        sizes: Sequence[int],
        checksums: Sequence[str],
        cache_dir: Path,
        limit_bytes: int,
    ) -> None:
        assert len(names) == len(sizes) == len(checksums)
        self.folder, self.names, self.sizes, self.checksums = folder, list(names), list(sizes), list(checksums)
        self.cache_dir = cache_dir
        try:
            _make_cache(cache_dir)
        except OSError as error:
            raise StorageError(f"the cache {cache_dir} cannot be made: {error.strerror}. Set VITFORGE_CACHE") from error
        used = sum(storage.file_size(path) or 0 for path in cache_dir.glob("*.tar") if _OURS.fullmatch(path.name))
        self.limit = min(limit_bytes, int(_DISK_SHARE * (shutil.disk_usage(cache_dir).free + used)))
        self.check_room(max(self.sizes, default=0), "its largest shard")
        self._plan: _Held | None = None
        self._waiting = threading.Condition()
        self._order: list[int] = []
        self._under_way: set[int] = set()
        self._failed: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._full_until = 0.0
        self._closed = False

    def check_room(self, needed: int, what: str) -> None:
        """Refuse a limit that is too small.

        Raises:
            StorageError: it is below `needed` bytes; names what needs them, and the limit that would do.
        """
        if self.limit < needed:
            raise StorageError(
                f"{self.folder.url}: {what} needs {needed / 1e9:.3g} GB on this node, the cache {self.cache_dir} may "
                f"take {self.limit / 1e9:.3g} GB: set cache_gb={-(-needed // 10**7) / 100:g} or more (data.cache_gb in "
                "training), or VITFORGE_CACHE to a folder on a larger disk"
            )

    def path(self, shard: int) -> Path:
        """Where the shard is on this node, whole and checked; fetched first if need be.

        Another reader's shard may push it out again: use `open` to be sure to hold it.

        Raises:
            StorageError: it is missing or damaged where it comes from; names it.
        """
        if not self._present(shard):
            with self._written(shard), self._held(shard) as lock:
                if not self._present(shard):
                    while not self._reserve(lock, shard, _NOW):
                        time.sleep(_LOOK_AGAIN_S)
                    self._fetch(shard, lock)
        return self._place(shard)

    def open(self, shard: int) -> int:
        """A descriptor of the shard's file for reading; the caller closes it.

        Raises:
            StorageError: as `path`.
        """
        while True:
            path = self.path(shard)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # pushed out in between
                continue
            os.utime(descriptor)  # used now
            return descriptor

    def renew(self, shard: int) -> bool:
        """Look at this node's copy of a shard in which a sample was found damaged.

        Returns:
            Whether the copy was damaged; it has been fetched again then. False: the shard itself is.

        Raises:
            StorageError: as `path`.
        """
        with self._written(shard), self._held(shard):
            path = self._place(shard)
            if path.exists():
                if storage.hash_file(path) == self.checksums[shard]:
                    return False
                log.warning("%s was damaged in %s: fetching it again", self._url(shard), self.cache_dir)
                path.unlink()
        self.path(shard)
        return True

    def prefetch(self, order: Sequence[int], ahead: int) -> None:
        """Say in which order shards will be needed from now on.

        The first `ahead` of them are fetched by threads, as far as that pushes out nothing that is needed sooner. What
        all readers of the folder have said decides what is pushed out: first what nobody will need, the longest
        unused before others, then what will be needed last.
        """
        content = b"".join(bytes.fromhex(self.checksums[shard]) for shard in order[:PLANNED])
        with self._room():
            if self._plan is None:
                self._plan = _Held.take(self.cache_dir / f"plan-{uuid.uuid4().hex[:12]}", wait=False)
                assert self._plan is not None
                weakref.finalize(self, self._plan.release)
            self._plan.write(content)
            # Under the same lock: what the plan no longer needs may be pushed out from here on, and a thread that still
            # went by the order before would fetch it again.
            with self._waiting:
                self._order, self._full_until = list(order[:ahead]), 0.0
                self._failed.clear()
        with self._waiting:
            while len(self._threads) < _THREADS and not self._closed:
                # The threads must not keep alive what nobody reads from any more.
                arguments = (weakref.ref(self), self._waiting)
                thread = threading.Thread(target=_work_ahead, args=arguments, name="vitforge-shards", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._waiting.notify_all()

    def close(self) -> None:
        """End the threads; the shards stay."""
        with self._waiting:
            self._closed, self._order = True, []
            self._waiting.notify_all()
        for thread in self._threads:
            thread.join()
        if self._plan:
            self._plan.release()

    # ---- fetching --------------------------------------------------------------------------------------------------
    def _place(self, shard: int) -> Path:
        return self.cache_dir / f"{self.checksums[shard]}.tar"

    def _lock_path(self, shard: int) -> Path:
        return self.cache_dir / f"{self.checksums[shard]}.lock"

    def _held(self, shard: int) -> "_Held":
        """Be the one process that may fetch or remove a shard, when it is our turn."""
        lock = self._take(shard, wait=True)
        assert lock is not None
        return lock

    def _take(self, shard: int, wait: bool) -> "_Held | None":
        """As `_held`; None if somebody holds it and `wait` is false."""
        lock = _Held.take(self._lock_path(shard), wait)
        if lock is not None:  # what a fetcher that was killed left goes: its lock, which counted the room, is ours now
            shutil.rmtree(self._arriving(shard), ignore_errors=True)
        return lock

    def _arriving(self, shard: int) -> Path:
        return self.cache_dir / f"{self.checksums[shard]}.fetching"

    @contextmanager
    def _written(self, shard: int) -> Iterator[None]:
        """Says of a cache that cannot be written that it is that: the shard may well be there."""
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise FetchError(
                f"{self._url(shard)} cannot be fetched to {self.cache_dir}: {error}. Make room there, or set "
                "VITFORGE_CACHE to a folder on another disk"
            ) from error

    def _url(self, shard: int) -> str:
        return f"{self.folder.url}/{self.names[shard]}"

    def _present(self, shard: int) -> bool:
        return storage.file_size(self._place(shard)) == self.sizes[shard]

    def _fetch(self, shard: int, lock: "_Held") -> None:
        """Bring a shard here, into room that was reserved."""
        arriving = self._arriving(shard)
        arriving.mkdir()
        try:
            self._transfer(shard, arriving / "shard")
            with self._room():  # nobody counts the shard and the room for it
                (arriving / "shard").replace(self._place(shard))
                lock.set_length(0)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)

    def _transfer(self, shard: int, path: Path) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.folder.get(self.names[shard], path)
            except OSError as error:
                raise FetchError(f"{self._url(shard)} cannot be fetched to {self.cache_dir}: {error}") from error
            size, checksum = path.stat().st_size, storage.hash_file(path)
            if (size, checksum) == (self.sizes[shard], self.checksums[shard]):
                return
            found = f"{size} bytes with checksum {checksum}, not {self.sizes[shard]} with {self.checksums[shard]}"
            log.warning("%s arrived damaged (%s), attempt %d of %d", self._url(shard), found, attempt, _ATTEMPTS)
        raise StorageError(f"{self._url(shard)} is damaged: it arrived {_ATTEMPTS} times as {found}")

    def _fetch_ahead(self) -> float:
        """Fetch the first shard of the order that is not here; after how many seconds to look for the next."""
        with self._waiting:
            order = self._order
            if time.monotonic() < self._full_until:
                return _LOOK_AGAIN_S
        pause = _IDLE_S
        for place, shard in enumerate(order):
            with self._waiting:
                if self._order is not order:
                    return 0.0
                if shard in self._under_way or shard in self._failed or self._present(shard):
                    continue
                self._under_way.add(shard)
            try:
                lock = self._take(shard, wait=False)
                if lock is None:  # another process fetches it
                    pause = _LOOK_AGAIN_S
                    continue
                with lock:
                    if self._present(shard):
                        continue
                    if not self._reserve(lock, shard, place, order):
                        with self._waiting:
                            if self._order is not order:
                                return 0.0
                            self._full_until = time.monotonic() + _LOOK_AGAIN_S
                        return _LOOK_AGAIN_S
                    self._fetch(shard, lock)
                    return 0.0
            except (StorageError, OSError) as error:
                # Whoever comes to need the shard tries again, and reports.
                log.warning("fetching ahead: %s", error)
                with self._waiting:
                    self._failed.add(shard)
            finally:
                with self._waiting:
                    self._under_way.discard(shard)
        return pause

    # ---- room ------------------------------------------------------------------------------------------------------
    def _reserve(self, lock: "_Held", shard: int, due: int, order: list[int] | None = None) -> bool:
        """Make room for a shard, held by the length of its lock file.

        Args:
            due: its place in `order`, or _NOW.

        Returns:
            False if others are needed sooner than it, or its order is out of date.
        """
        with self._room():
            if order is not None and order is not self._order:
                return False
            used, here = 0, []
            with os.scandir(self.cache_dir) as entries:
                names = [entry.name for entry in entries]
            for name in filter(_OURS.fullmatch, names):
                try:
                    facts = (self.cache_dir / name).stat()
                except FileNotFoundError:  # a fetch that ended just now
                    continue
                stem, _, kind = name.rpartition(".")
                if kind == "tar":
                    used += facts.st_size
                    here.append((stem, facts.st_size, facts.st_mtime))
                elif kind == "lock" and stem not in ("room", self.checksums[shard]) and not self._clear(stem):
                    used += facts.st_size
            too_much = used + self.sizes[shard] - self.limit
            pushed_out = []
            if too_much > 0:
                places = self._places_in_plans()
                here.sort(key=lambda each: (-places.get(each[0], _NEVER), each[2]))
                for checksum, size, _ in here:
                    if too_much <= 0 or places.get(checksum, _NEVER) <= due:
                        break
                    pushed_out.append(checksum)
                    too_much -= size
            if too_much > 0:
                return False
            for checksum in pushed_out:
                (self.cache_dir / f"{checksum}.tar").unlink(missing_ok=True)
            lock.set_length(self.sizes[shard])
            return True

    def _places_in_plans(self) -> dict[str, int]:
        """The earliest place of each shard in what readers have said; what ended readers left is removed."""
        places: dict[str, int] = {}
        for path in self.cache_dir.glob("plan-*"):
            if not _OURS.fullmatch(path.name):
                continue
            if self._plan is None or path != self._plan.path:
                left = _Held.take(path, wait=False)
                if left is not None:
                    left.release()
                    continue
            try:
                content = path.read_bytes().hex()
            except FileNotFoundError:
                continue  # its reader has just ended
            for place in range(len(content) // 32):
                checksum = content[32 * place : 32 * place + 32]
                places[checksum] = min(place, places.get(checksum, place))
        return places

    def _clear(self, checksum: str) -> bool:
        """Remove what a killed fetcher left; False if the fetcher lives."""
        left = _Held.take(self.cache_dir / f"{checksum}.lock", wait=False)
        if left is None:
            return False
        with left:
            shutil.rmtree(self.cache_dir / f"{checksum}.fetching", ignore_errors=True)
        return True

    @contextmanager
    def _room(self) -> Iterator[None]:
        with (self.cache_dir / "room.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _make_cache(folder: Path) -> None:
    """Make a cache's folder, or take the one that is there if it is one: what is in it is removed to make room.

    Raises:
        StorageError: it is another user's, or holds other files.
    """
    try:
        private_folder(folder)
    except OwnershipError as error:
        raise StorageError(f"the cache cannot be kept there: {error}. Set VITFORGE_CACHE to another folder") from error
    if (folder / MARK).is_file():
        return
    # Caches of before there were marks are told by the names of all that is in them.
    names = [path.name for path in folder.iterdir()]
    others = [name for name in names if not (_OURS.fullmatch(name) or storage.is_unfinished(name))]
    if others and others != [MARK]:
        raise StorageError(
            f"{folder} is no cache of shards: it holds {min(others)!r}, and a cache removes what is in it. "
            "Set VITFORGE_CACHE to a new folder"
        )
    storage.write_json(folder / MARK, {"purpose": "cache of shards", **this_process()})


def _work_ahead(reader: "weakref.ref[ShardCache]", waiting: threading.Condition) -> None:
    while True:
        cache = reader()
        if cache is None or cache._closed:
            return
        pause = cache._fetch_ahead()
        del cache
        if pause:
            with waiting:  # for a new order; what other processes do is not heard
                waiting.wait(pause)


class _Held:
    """A file that is there as long as one process holds it; a killed one leaves it, free for the next to take."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `take`."""
        self.path, self.descriptor = path, descriptor

    @classmethod
    def take(cls, path: Path, wait: bool) -> "_Held | None":
        """Hold a file, made if need be; None if somebody holds it and `wait` is false."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return cls(path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            os.close(descriptor)  # its holder removed it while we waited: there is a new one, or none

    def set_length(self, length: int) -> None:
        """Make the file that long without writing anything."""
        os.ftruncate(self.descriptor, length)

    def write(self, content: bytes) -> None:
        """Replace the file's content."""
        os.ftruncate(self.descriptor, 0)
        view = memoryview(content)
        while view:
            view = view[os.pwrite(self.descriptor, view, len(content) - len(view)) :]

    def release(self) -> None:
        """Remove the file and let go of it; does nothing the second time."""
        if self.descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> "_Held":
        return self

    def __exit__(self, *problem: object) -> None:
        self.release()
