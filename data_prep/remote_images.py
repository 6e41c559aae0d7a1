"""Images that are fetched one by one where they are named: http(s), object stores, files anywhere.

What fails in a way that passes (throttling, time-outs, resets, short answers) is tried again, with growing pauses;
what cannot be had (no such object, no permission, a server that stays broken) is a reason in place of the image.
"""

import os
import random
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.command import log
from cluster.folders import Folder, folder_at
from cluster.paths import shown
from cluster.storage import MissingError, StorageError, TooLargeError
from data_prep.columns import Strings
from data_prep.image_check import MAX_BYTES, TOO_MANY_BYTES, UnusableImage
from data_prep.source_reader import UNREADABLE, Images, SourceError

if TYPE_CHECKING:
    from data_prep.image_download import Answer, ImageDownloads

_THREADS = 32
_GROUP = 32
_TRIED_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that pass."""
_LONGEST_PAUSE = 30.0
NOT_FETCHED = "could not be fetched"
"""How the reason begins for which an image is left out that another day may give."""


@dataclass(frozen=True)
class FetchPolicy:
    """How long one image is tried for."""

    timeout: float = 20.0
    """Seconds without a byte after which an attempt has failed."""
    attempts: int = 6
    """Pauses between them grow from half a second to half a minute, or are what the server asks for."""
    public_only: bool = False
    """Whether only servers with public addresses are asked."""


@dataclass(frozen=True)
class RemoteImages(Images):
    """Each image under an address: http(s)://, s3://, or an absolute path."""

    addresses: Strings
    policy: FetchPolicy
    buckets: tuple[Folder, ...]
    """That the addresses name: what opens them travels with them."""

    @classmethod
    def at(cls, addresses: Iterable[str], policy: FetchPolicy) -> "RemoteImages":
        """The images under these addresses."""
        known = list(addresses)
        buckets = sorted({bucket for bucket, _ in map(_bucket_and_name, known) if bucket})
        folders = tuple(folder_at(f"s3://{bucket}", "the table's address") for bucket in buckets)
        return cls(Strings.of([os.fsencode(address) for address in known]), policy, folders)

    def take(self, rows: NDArray[np.int64]) -> "RemoteImages":
        return replace(self, addresses=self.addresses.take(rows))

    def groups(self, names: Strings, sizes: NDArray[np.uint64]) -> Iterator[list[memoryview | UnusableImage]]:
        fetcher = _Fetcher(self.policy, self.buckets)
        running: list[Future[memoryview | UnusableImage]] = []
        waiting = iter(range(len(self.addresses)))
        pool = ThreadPoolExecutor(_THREADS)
        try:
            while True:
                while len(running) < 2 * _THREADS and (place := next(waiting, None)) is not None:
                    running.append(pool.submit(fetcher.fetch, os.fsdecode(self.addresses[place])))
                if not running:
                    return
                group = [each.result() for each in running[:_GROUP]]
                del running[:_GROUP]
                yield group
        finally:
            pool.shutdown(cancel_futures=True)
            fetcher.close()


class _Fetcher:
    """Fetches from several threads; connections are kept."""

    def __init__(self, policy: FetchPolicy, buckets: Iterable[Folder]) -> None:
        self._policy = policy
        self._downloads: ImageDownloads | None = None
        self._lock = threading.Lock()
        self._buckets = {folder.url: folder for folder in buckets}

    def fetch(self, address: str) -> memoryview | UnusableImage:
        scheme, far, _ = address.partition("://")
        try:
            if not far:
                return memoryview(self._from_file(address))
            if scheme.lower() in ("http", "https"):
                return self._over_http(address)
            if scheme.lower() == "s3":
                return memoryview(self._from_bucket(address))
            raise UnusableImage(f"{scheme}:// is no address that images are fetched from: http, https and s3 are")
        except UnusableImage as reason:
            return reason

    def close(self) -> None:
        if self._downloads is not None:
            self._downloads.close()

    def _over_http(self, address: str) -> memoryview:
        import requests

        from data_prep.image_download import PrivateAddressError, SlowServerError

        problem = ""
        for attempt in range(self._policy.attempts):
            pause = min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                answer = self._download(address)
                if answer.body is not None:
                    return answer.body
                problem = f"HTTP {answer.status}"
                if answer.status not in _TRIED_AGAIN:
                    raise UnusableImage(f"cannot be fetched: {problem}")
                if answer.retry_after.isdigit():
                    pause = min(float(answer.retry_after), 2 * _LONGEST_PAUSE)
            except UnusableImage:
                raise
            except PrivateAddressError as error:
                raise UnusableImage(f"not fetched: {error}") from error
            except SlowServerError as error:
                problem = str(error)
            except (ValueError, requests.exceptions.TooManyRedirects) as error:  # of the address, at any depth
                raise UnusableImage(f"cannot be fetched: {type(error).__name__}") from error
            except requests.exceptions.RequestException as error:
                problem = type(error).__name__
            if attempt + 1 < self._policy.attempts:
                time.sleep(pause)
        raise UnusableImage(f"{NOT_FETCHED}: {problem} in {self._policy.attempts} attempts", may_pass=True)

    def _download(self, address: str) -> "Answer":
        from data_prep.image_download import ImageDownloads

        with self._lock:
            if self._downloads is None:
                self._downloads = ImageDownloads(self._policy.timeout, _THREADS, self._policy.public_only)
        return self._downloads.get(address)

    def _from_bucket(self, address: str) -> bytes:
        bucket, name = _bucket_and_name(address)
        if not bucket or not name:
            raise UnusableImage("the address names no object")
        try:
            return self._buckets[f"s3://{bucket}"].read_bytes(name, most=MAX_BYTES)  # tries again by itself
        except StorageError as error:
            if isinstance(error, OSError):
                raise  # the store went on failing: worth another try later
            if isinstance(error, MissingError):
                raise UnusableImage("there is no such object") from error
            if isinstance(error, TooLargeError):
                raise UnusableImage(TOO_MANY_BYTES) from error
            reason = str(error).removeprefix(f"s3://{bucket}/{name}").lstrip(": ")
            raise UnusableImage(f"cannot be fetched: {reason}") from error

    def _from_file(self, path: str) -> bytes:
        try:
            # A pipe without a writer would be waited for, for ever.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise UnusableImage("no file, but a folder, a pipe or a device")
                if about.st_size > MAX_BYTES:
                    raise UnusableImage(TOO_MANY_BYTES)
                return file.read()
        except OSError as error:
            passing = not isinstance(error, FileNotFoundError)
            raise UnusableImage(f"{UNREADABLE}: {error.strerror}", may_pass=passing) from error


def check_fetching(addresses: Iterable[str], fetch: bool) -> None:
    """Say how many images are fetched over http(s) and from where, or refuse it where nobody asked for that.

    Raises:
        SourceError: there are such addresses, and `fetch` is false.
    """
    hosts: Counter[str] = Counter()
    for address in addresses:
        scheme, _, rest = address.partition("://")
        if scheme.lower() in ("http", "https"):
            hosts[re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2].lower()] += 1
    if not hosts:
        return
    most = ", ".join(f"{shown(host)} ({count:,})" for host, count in hosts.most_common(3))
    what = f"{hosts.total():,} images of {len(hosts):,} hosts: {most}{', ...' if len(hosts) > 3 else ''}"
    if not fetch:
        raise SourceError(
            f"the table names addresses, and nothing is fetched unless you say so: with fetch=true it would be {what}. "
            f"Where the images are here already, give their tars or their folder as the source instead"
        )
    log.info("fetching %s", what)


def _bucket_and_name(address: str) -> tuple[str, str]:
    """What s3://BUCKET/NAME names; two empty strings for other addresses."""
    scheme, _, rest = address.partition("://")
    bucket, _, name = rest.partition("/")
    return (bucket, name) if scheme.lower() == "s3" else ("", "")
