"""This process's way to an S3 object store: one connection for all threads, and requests that are tried again.

s3fs brings the client and its event loop, which serves all threads of a process and starts anew after a fork. s3fs
counts attempts where people wait for a time; here a request is tried again with exponential back-off and jitter after
whatever may pass by itself (throttling, time-outs, resets, bodies cut short), until it has failed for
`VITFORGE_S3_PATIENCE` seconds (60); then one `ObjectStoreError` names the object. What no waiting cures is said at
once.

Endpoint, region and credentials come from the usual AWS variables and profiles.
"""

import asyncio
import functools
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cluster.command import log
from cluster.storage import StorageError

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Variables that travel inside pickled folders only: what Ray is told to set in its workers, it writes to its logs."""

PATIENCE = "VITFORGE_S3_PATIENCE"
"""Variable: seconds that a request may go on failing before that is an error."""

_FIRST_CONTACT = 6.0
"""Seconds to reach an endpoint that has never answered: it is more likely to be wrong than to be down."""
_SLOWEST = 256 << 10
"""Bytes a second below which a transfer counts as stuck."""
_LONGEST_WAIT = 8.0
"""Seconds between two attempts."""

_PASSING = re.compile("SlowDown|Throttl|Timeout|TooManyRequests|LimitExceeded|Busy|Internal|Unavailable|Incomplete"
                      "|Aborted|Conflict|Mismatch$|BadDigest|InvalidPart$")  # fmt: skip
"""Codes of answers that another attempt may not get."""
_ANSWERS = {
    "404": "missing", "NoSuchKey": "missing", "NoSuchUpload": "no upload",
    "412": "changed", "PreconditionFailed": "changed",
    "416": "beyond", "InvalidRange": "beyond",
}  # fmt: skip
"""Codes that tell callers something."""

_T = TypeVar("_T")


class ObjectStoreError(StorageError, OSError):
    """The object store went on failing; worth another try later. One message, which names the object."""


class Answer(Exception):  # noqa: N818 - it says what the answer is
    """The store has answered that what was asked for is not so; an attempt whose answer was lost may have done it.

    Attributes:
        kind: a value of _ANSWERS.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class Connection:
    """This process's way to the object store, for all its threads."""

    def __init__(self) -> None:
        # these take a second to import: only who uses S3 pays for it
        from botocore import exceptions as boto
        from s3fs import S3FileSystem

        self._unreached = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)

        self.patience = _patience()
        region = os.environ.get("AWS_REGION")  # botocore reads AWS_DEFAULT_REGION only
        self.fs = S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            client_kwargs={"region_name": region} if region else {},
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "connect_timeout": min(3.0, self.patience),
                "read_timeout": min(20.0, self.patience),
                "max_pool_connections": 100,
                # Ranges, in which all of an object's content is read, have no checksum of the store's at AWS; what is
                # read has one of ours, or is decoded.
                "response_checksum_validation": "when_required",
            },
        )
        self.answered = False
        self.known_buckets: set[str] = set()
        self._said = -1e9
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on s3fs's event loop, to its end; whoever is interrupted takes it back."""
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin to run a coroutine on s3fs's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.fs.loop)

    async def persist(
        self, attempt: Callable[[], Awaitable[_T]], place: str, size: int, bucket: str, patience: float = float("inf")
    ) -> _T:
        """Do something until it succeeds, patience ends, or it is clear that no waiting helps.

        Args:
            attempt: makes one attempt.
            place: the object, for messages.
            size: bytes that go over the line, for how long one attempt may take.
            bucket: its name, for messages.
            patience: seconds, where they are to be fewer than the user's.

        Raises:
            Answer: the store says that it is not as was thought.
            StorageError: no waiting helps.
            ObjectStoreError: patience has ended.
        """
        failed_since: float | None = None
        limit = min(30.0, self.patience) + size / _SLOWEST
        failures = 0
        while True:
            try:
                result = await asyncio.wait_for(attempt(), limit)
            except Exception as error:
                kind = self._answer(error)
                if kind is not None:
                    raise Answer(kind) from None
                passing, reason = self._judge(error, bucket)
                if not passing:
                    raise StorageError(f"{place} cannot be reached: {_without_secrets(reason)}") from error
                now = time.monotonic()
                failed_since = now if failed_since is None else failed_since
                failures += 1
                reached = self.answered or not isinstance(error, self._unreached)
                most = min(self.patience, patience, float("inf") if reached else _FIRST_CONTACT)
                wait = random.uniform(0.5, 1) * min(_LONGEST_WAIT, 0.1 * 2**failures)
                if now - failed_since + wait > most:
                    raise ObjectStoreError(
                        f"{place}: {_without_secrets(reason)}, {failures} times in {now - failed_since:.0f} s"
                    ) from error
                self._tell(place, reason)
                await asyncio.sleep(wait)
            else:
                self.answered = True
                return result

    def _answer(self, error: Exception) -> str | None:
        from botocore.exceptions import ClientError

        if not isinstance(error, ClientError):
            return None
        self.answered = True
        return _ANSWERS.get(str(error.response.get("Error", {}).get("Code", "")))

    def _judge(self, error: Exception, bucket: str) -> tuple[bool, str]:
        """Whether a failure may pass by itself, and what it is in words."""
        from aiohttp import ClientError as ConnectionFailure
        from aiohttp import ClientPayloadError
        from botocore import exceptions as boto

        endpoint = _endpoint(self.fs)
        if isinstance(error, boto.ClientError):
            facts = error.response.get("Error", {})
            code, status = str(facts.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            said = f"{code}: {facts.get('Message', '')}".rstrip(": ")
            if code == "NoSuchBucket":
                return False, f"there is no bucket {bucket!r} at {endpoint}: make it, or check AWS_ENDPOINT_URL"
            if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch") or "Token" in code:
                return False, (
                    f"{endpoint} refuses the credentials ({said}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
                    f"AWS_SESSION_TOKEN, or AWS_PROFILE"
                )
            if status in (401, 403) and code != "RequestTimeTooSkewed":
                return False, (
                    f"access denied by {endpoint} ({said}): these credentials may not do that in bucket {bucket!r}"
                )
            passing = ((status or 0) >= 500 and status != 501) or status in (408, 429) or _PASSING.search(code)
            return bool(passing), f"{endpoint} answers {said or status}"
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            return False, (
                "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                "(on every node, where they come from a file)"
            )
        if isinstance(error, self._unreached):
            hint = "" if self.answered else ": check AWS_ENDPOINT_URL and the network"
            return True, f"{endpoint} does not answer{hint}"
        if isinstance(error, (TimeoutError, boto.ReadTimeoutError)):
            return True, f"no answer from {endpoint} in time"
        others = (boto.HTTPClientError, boto.IncompleteReadError, boto.ResponseStreamingError, boto.ConnectionError)
        if isinstance(error, (*others, ConnectionFailure, ConnectionError)):
            cut = isinstance(error, (boto.IncompleteReadError, boto.ResponseStreamingError, ClientPayloadError))
            what = "an answer was cut short" if cut else _brief(error)
            return True, f"the connection to {endpoint} failed ({what})"
        if type(error).__name__ == "ResponseParserError":  # some throttle with a page that is no XML
            return True, f"{endpoint} answers what is not S3 ({_brief(error)})"
        if isinstance(error, StorageError) or not isinstance(error, (boto.BotoCoreError, ValueError, OSError)):
            raise error
        return False, _brief(error)

    def _tell(self, place: str, reason: str) -> None:
        """Say now and then that S3 makes trouble."""
        with self._lock:
            if time.monotonic() - self._said < 10:
                return
            self._said = time.monotonic()
        log.warning("%s: %s; trying again", place, _without_secrets(reason))


def connection() -> Connection:
    """The connection of this process under the variables as they are: a fork, or other variables, makes another."""
    variables = [(name, value) for name, value in os.environ.items() if name.startswith("AWS_") or name == PATIENCE]
    return _connection_of(os.getpid(), tuple(sorted(variables)))


@functools.lru_cache(maxsize=8)
def _connection_of(process: int, variables: tuple[tuple[str, str], ...]) -> Connection:
    return Connection()


def _patience() -> float:
    text = os.environ.get(PATIENCE, "60")
    try:
        patience = float(text)
    except ValueError:
        patience = -1.0
    if not 0 < patience < 1e6:
        raise StorageError(f"{PATIENCE}={text!r} is no number of seconds: unset it, or give one such as 60")
    return patience


def _endpoint(fs: Any) -> str:
    """Where the object store is, without a user or password that may stand in its address."""
    client = fs._s3
    address = client.meta.endpoint_url if client is not None else os.environ.get("AWS_ENDPOINT_URL", "S3")
    parts = urlsplit(str(address))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else str(address)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:200] if text else type(error).__name__).rstrip(".:")


def _without_secrets(text: str) -> str:
    """`text` without the values of credentials, whoever put them in."""
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text
