"""Images that are fetched one by one where they are named: http(s), object stores, files anywhere.

What fails in a way that passes (throttling, time-outs, resets, short answers) is tried again, with growing pauses;
what cannot be had (no such object, no permission, a server that stays broken) is a reason in place of the image.
"""

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.folders import Folder, folder_at
from cluster.storage import StorageError
from data_prep.columns import Strings
from data_prep.image_check import UnusableImage
from data_prep.source_reader import Images

_THREADS = 32
_GROUP = 32
_TRIED_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that pass."""
_LONGEST_PAUSE = 30.0
MAX_BYTES = 1 << 30
"""Of one image: an answer that is longer is something else."""


@dataclass(frozen=True)
class FetchPolicy:
    """How long one image is tried for."""

    timeout: float = 20.0
    """Seconds without a byte after which an attempt has failed."""
    attempts: int = 6
    """Pauses between them grow from half a second to half a minute, or are what the server asks for."""


@dataclass(frozen=True)
class RemoteImages(Images):
    """Each image under an address: http(s)://, s3://, or an absolute path."""

    addresses: Strings
    policy: FetchPolicy

    def take(self, rows: NDArray[np.int64]) -> "RemoteImages":
        return replace(self, addresses=self.addresses.take(rows))

    def groups(self, names: Strings, sizes: NDArray[np.uint64]) -> Iterator[list[memoryview | UnusableImage]]:
        fetcher = _Fetcher(self.policy)
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

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._session: Any = None
        self._buckets: dict[str, Folder] = {}

    def fetch(self, address: str) -> memoryview | UnusableImage:
        try:
            if address.startswith(("http://", "https://")):
                return memoryview(self._over_http(address))
            if "://" in address:
                return memoryview(self._from_bucket(address))
            return memoryview(self._from_file(address))
        except UnusableImage as reason:
            return reason

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _over_http(self, address: str) -> bytes:
        import requests

        if self._session is None:
            session = requests.Session()
            for scheme in ("http://", "https://"):
                session.mount(scheme, requests.adapters.HTTPAdapter(pool_connections=64, pool_maxsize=_THREADS))
            session.headers["User-Agent"] = "vitforge"
            self._session = session
        problem = ""
        for attempt in range(self._policy.attempts):
            pause = min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                with self._session.get(address, timeout=self._policy.timeout, stream=True) as answer:
                    if answer.ok:
                        return _body(answer)
                    problem = f"HTTP {answer.status_code}"
                    if answer.status_code not in _TRIED_AGAIN:
                        raise UnusableImage(f"cannot be fetched: {problem}")
                    wish = answer.headers.get("Retry-After", "")
                    if wish.isdigit():
                        pause = min(float(wish), 2 * _LONGEST_PAUSE)
            except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
                raise UnusableImage(f"cannot be fetched: {type(error).__name__}") from error
            except requests.exceptions.RequestException as error:
                problem = type(error).__name__
            if attempt + 1 < self._policy.attempts:
                time.sleep(pause)
        raise UnusableImage(f"cannot be fetched: {problem} in {self._policy.attempts} attempts")

    def _from_bucket(self, address: str) -> bytes:
        scheme, _, rest = address.partition("://")
        bucket, _, name = rest.partition("/")
        if not name:
            raise UnusableImage("the address names no object")
        folder = self._buckets.get(bucket)
        if folder is None:
            folder = self._buckets[bucket] = folder_at(f"{scheme}://{bucket}", "the table's address")
        try:
            return folder.read_bytes(name)  # tries again by itself
        except StorageError as error:
            if isinstance(error, OSError):
                raise  # the store went on failing: worth another try later
            if folder.size(name) is None:
                raise UnusableImage("there is no such object") from error
            raise UnusableImage(f"cannot be fetched: {error}") from error

    def _from_file(self, path: str) -> bytes:
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - a path of any bytes
                return file.read()
        except OSError as error:
            raise UnusableImage(f"cannot be read: {error.strerror}") from error


def _body(answer: Any) -> bytes:
    """The whole of an answer; one that is cut short raises, by its length."""
    parts, size = [], 0
    for part in answer.iter_content(1 << 20):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise UnusableImage(f"more than {MAX_BYTES} bytes: no image")
    return b"".join(parts)
