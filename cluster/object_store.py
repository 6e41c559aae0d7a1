"""A folder under a prefix of an S3 object store: `ObjectFolder`.

The requests are made on the client under s3fs, which has no conditional writes, and where one part of a file fails
begins the whole file again. Large objects go in parts, several at a time; downloads hold to one version of an object.
"""

import asyncio
import functools
import os
import posixpath
import re
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cluster import storage
from cluster.folders import Folder, Sink
from cluster.s3_connection import SECRETS, Answer, ObjectStoreError, connection
from cluster.storage import StorageError

_RANGE = 8 << 20
"""Bytes of one GET of a large object."""
_PART = 16 << 20
"""Bytes of one part of a large upload; more where 10,000 of them would not do."""
_MAX_PARTS = 10_000
_AT_ONCE = 8
"""Requests at a time for one object."""
_WRITER = "writer"
"""Metadata of objects: random, so that a writer whose answer was lost knows its own."""

_T = TypeVar("_T")


class ObjectFolder(Folder):
    """A folder under a prefix of a bucket.

    Args:
        bucket: its name.
        prefix: of the keys, without a slash at either end; may be empty.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.local = None
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectFolder) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.bucket, self.prefix, {key: os.environ[key] for key in SECRETS if key in os.environ})

    def child(self, name: str) -> "ObjectFolder":
        return ObjectFolder(self.bucket, posixpath.normpath(self._key(name)))

    def names(self) -> list[str]:
        return self._run(self._list("Contents"))

    def folders(self) -> list[str]:
        return self._run(self._list("CommonPrefixes"))

    def tree(self) -> dict[str, int]:
        return self._run(self._tree())

    def size(self, name: str) -> int | None:
        try:
            return int(self._run(self._request("head_object", name))["ContentLength"])
        except Answer as answer:
            _expect(answer, "missing")
        self._run(self._check_bucket())  # a HEAD has no body, which would tell a missing bucket from a missing object
        return None

    def read_bytes(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        content = bytearray()

        def take(at: int, part: bytes) -> None:
            if at + len(part) > len(content):
                content.extend(bytes(at + len(part) - len(content)))
            content[at : at + len(part)] = part

        self._run(self._download(name, offset, length, take))
        return bytes(content)

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        with self.writing(name) as sink:
            sink.write(content)

    def swap(self, name: str, content: bytes, expected: bytes | None) -> bool:
        return self._run(self._swap(name, content, expected))

    @contextmanager
    def writing(self, name: str) -> Iterator[Sink]:
        upload = _Upload(self, name)
        try:
            yield upload
            upload.finish()
        except BaseException:
            upload.abort()
            raise

    def put(self, path: Path, name: str, *, move: bool = False) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            self._run(self._put_file(file.fileno(), size, path, name))
        if move:
            path.unlink()

    def get(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_file(path) as file:

            def take(at: int, part: bytes) -> None:
                view = memoryview(part)
                while view:
                    count = os.pwrite(file.fileno(), view, at)
                    view, at = view[count:], at + count

            self._run(self._download(name, 0, None, take))

    def remove(self, name: str) -> None:
        self._run(self._request("delete_object", name))

    def remove_tree(self) -> None:
        self._run(self._abort_uploads(deep=True))
        self._run(self._remove_all(list(self.tree())))

    def remove_unfinished(self) -> None:
        self._run(self._abort_uploads(deep=False))

    def free(self) -> None:
        return None

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @property
    def _start(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return connection().run(coroutine)

    async def _request(self, method: str, name: str = "", size: int = 0, **parameters: Any) -> Any:
        """One request, tried again as long as patience lasts; `size` in bytes of what is sent with it."""
        if name:
            parameters["Key"] = self._key(name)
        s3 = connection()

        async def attempt() -> Any:
            client = await s3.fs.set_session()
            return await getattr(client, method)(Bucket=self.bucket, **parameters)

        return await s3.persist(attempt, self._place(name), size, self.bucket)

    def _place(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    async def _check_bucket(self) -> None:
        s3 = connection()
        if self.bucket not in s3.known_buckets:
            await self._request("list_objects_v2", Prefix=self._start, MaxKeys=1)  # says NoSuchBucket in its body
            s3.known_buckets.add(self.bucket)

    async def _pages(self, method: str, **parameters: Any) -> AsyncIterator[Any]:
        token: dict[str, Any] = {}
        while True:
            page = await self._request(method, Prefix=self._start, **parameters, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            if method == "list_objects_v2":
                token = {"ContinuationToken": page["NextContinuationToken"]}
            else:
                token = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    async def _list(self, what: str) -> list[str]:
        found = []
        field = "Key" if what == "Contents" else "Prefix"
        async for page in self._pages("list_objects_v2", Delimiter="/"):
            found += [entry[field][len(self._start) :].rstrip("/") for entry in page.get(what, [])]
        return sorted(name for name in found if name)

    async def _tree(self) -> dict[str, int]:
        found = {}
        async for page in self._pages("list_objects_v2"):
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # a marker that some tools leave for an empty folder
                    found[entry["Key"][len(self._start) :]] = int(entry["Size"])
        return dict(sorted(found.items()))

    async def _remove_all(self, names: list[str]) -> None:
        for start in range(0, len(names), 1000):
            keys = [{"Key": self._key(name)} for name in names[start : start + 1000]]
            answer = await self._request("delete_objects", Delete={"Objects": keys, "Quiet": True})
            for refused in answer.get("Errors", []):
                raise ObjectStoreError(f"s3://{self.bucket}/{refused['Key']} cannot be removed: {refused.get('Code')}")

    async def _abort_uploads(self, deep: bool) -> None:
        uploads = []
        async for page in self._pages("list_multipart_uploads"):
            uploads += [(each["Key"], each["UploadId"]) for each in page.get("Uploads", [])]
        for key, upload in uploads:
            name = key[len(self._start) :]
            if deep or "/" not in name:
                await self._abort(name, upload)

    async def _abort(self, name: str, upload: str) -> None:
        """Take back the parts of an upload, if that can be had soon: `remove_unfinished` does it too."""
        s3 = connection()

        async def attempt() -> None:
            client = await s3.fs.set_session()
            await client.abort_multipart_upload(Bucket=self.bucket, Key=self._key(name), UploadId=upload)

        with suppress(Answer, StorageError):
            await s3.persist(attempt, self._place(name), 0, self.bucket, patience=6)

    async def _read(self, name: str, at: int, end: int | None, etag: str | None) -> tuple[bytes, int, str]:
        """Bytes at..end (or fewer, where the object ends before) of an object, its whole size, and its ETag.

        Without `end` it is the whole object, and `at` is 0.
        """
        s3 = connection()
        parameters: dict[str, Any] = {} if end is None else {"Range": f"bytes={at}-{end - 1}"}
        if etag is not None:
            parameters["IfMatch"] = etag

        async def attempt() -> tuple[bytes, int, str]:
            client = await s3.fs.set_session()
            answer = await client.get_object(Bucket=self.bucket, Key=self._key(name), **parameters)
            async with answer["Body"] as stream:
                content = await stream.read()
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
            if span is None:  # the store sends the whole object, as it may
                first, last, whole = 0, len(content) - 1, int(answer["ContentLength"])
            else:
                first, last, whole = (int(number) for number in span.groups())
            if len(content) != last - first + 1 or (span is None and len(content) != whole):
                raise ConnectionError(f"got {len(content)} of {last - first + 1} bytes")
            stop = whole if end is None else min(end, whole)
            if not (first <= at and last + 1 >= stop):
                raise ConnectionError(f"asked for bytes {at} to {stop}, got {first} to {last + 1}")
            return content[at - first : stop - first], whole, str(answer["ETag"])

        return await s3.persist(attempt, self._place(name), (end or at + _RANGE) - at, self.bucket)

    async def _download(self, name: str, offset: int, length: int | None, take: Callable[[int, bytes], None]) -> None:
        """Hand the bytes offset..offset+length of an object over, in pieces in any order, with their place."""
        for _ in range(5):
            try:
                return await self._download_once(name, offset, length, take)
            except Answer as answer:
                if answer.kind == "missing":
                    raise StorageError(f"{self._place(name)} cannot be read: there is no such object") from None
                _expect(answer, "changed")  # between two ranges: begin again
        raise ObjectStoreError(f"{self._place(name)} cannot be read: it is being written over and over")

    async def _download_once(
        self, name: str, offset: int, length: int | None, take: Callable[[int, bytes], None]
    ) -> None:
        end = None if length is None else offset + length
        first = offset + _RANGE if end is None else min(end, offset + _RANGE)
        try:
            content, whole, etag = await self._read(name, offset, first, None)
        except Answer as answer:
            if answer.kind != "beyond":
                raise
            content, whole, etag = b"", 0, ""  # an empty object has no byte that could be asked for
            if (size := await self._size(name)) > offset:
                raise ObjectStoreError(f"{self._place(name)} cannot be read: it is being written") from None
            whole = size
        if end is None:
            end = max(whole, offset)
        elif end > whole:
            raise StorageError(f"{self._place(name)} ends before byte {end}: it was cut short")
        await asyncio.to_thread(take, 0, content)

        async def piece(at: int) -> None:
            part, _, _ = await self._read(name, at, min(at + _RANGE, end), etag)
            await asyncio.to_thread(take, at - offset, part)

        await _all([functools.partial(piece, at) for at in range(first, end, _RANGE)])

    async def _size(self, name: str) -> int:
        return int((await self._request("head_object", name))["ContentLength"])

    async def _swap(self, name: str, content: bytes, expected: bytes | None) -> bool:
        if expected is None:
            condition = {"IfNoneMatch": "*"}
        else:
            try:
                found, _, etag = await self._read(name, 0, None, None)
            except Answer:
                return False
            if found != expected:
                return False
            condition = {"IfMatch": etag}
        writer = uuid.uuid4().hex
        try:
            await self._request("put_object", name, len(content), Body=content, Metadata={_WRITER: writer}, **condition)
        except Answer:
            return await self._is_from(name, writer)
        return True

    async def _begin(self, name: str) -> "_Begun":
        writer = uuid.uuid4().hex
        answer = await self._request("create_multipart_upload", name, Metadata={_WRITER: writer})
        return _Begun(str(answer["UploadId"]), writer)

    async def _put_file(self, descriptor: int, size: int, path: Path, name: str) -> None:
        def read(at: int, count: int) -> bytes:
            content = bytearray()
            while len(content) < count and (part := os.pread(descriptor, count - len(content), at + len(content))):
                content += part
            if len(content) != count:
                raise StorageError(f"{path} became shorter while it was copied to {self._place(name)}")
            return bytes(content)

        if size <= _PART:
            content = await asyncio.to_thread(read, 0, size)
            await self._request("put_object", name, size, Body=content)
            return
        step = max(_PART, -(-size // _MAX_PARTS))
        upload = await self._begin(name)
        try:
            etags: dict[int, str] = {}

            async def send(number: int) -> None:
                at = (number - 1) * step
                content = await asyncio.to_thread(read, at, min(step, size - at))
                etags[number] = await self._send_part(name, upload, number, content)

            await _all([functools.partial(send, number) for number in range(1, -(-size // step) + 1)])
            await self._complete(name, upload, etags)
        except BaseException:
            await self._abort(name, upload.number)
            raise

    async def _send_part(self, name: str, upload: "_Begun", number: int, content: bytes) -> str:
        try:
            answer = await self._request(
                "upload_part", name, len(content), UploadId=upload.number, PartNumber=number, Body=content
            )
        except Answer:
            raise ObjectStoreError(f"{self._place(name)}: its upload was ended by another process") from None
        return str(answer["ETag"])

    async def _complete(self, name: str, upload: "_Begun", etags: Mapping[int, str]) -> None:
        parts = {"Parts": [{"PartNumber": number, "ETag": etag} for number, etag in sorted(etags.items())]}
        try:
            await self._request("complete_multipart_upload", name, UploadId=upload.number, MultipartUpload=parts)
        except Answer:  # it was ended already: by an attempt of ours whose answer was lost, or by another process
            if not await self._is_from(name, upload.writer):
                raise ObjectStoreError(f"{self._place(name)}: its upload was ended by another process") from None

    async def _is_from(self, name: str, writer: str) -> bool:
        try:
            return bool((await self._request("head_object", name))["Metadata"].get(_WRITER) == writer)
        except Answer:
            return False


class _Begun(NamedTuple):
    """An upload in parts that has begun."""

    number: str
    writer: str
    """The mark of the object that is made, by which it is known again."""


class _Upload:
    """An object that is written in order: parts go out while the next is filled."""

    def __init__(self, folder: ObjectFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._buffer = bytearray()
        self._upload: _Begun | None = None
        self._parts: list[Future[str]] = []

    def write(self, content: Any) -> int:
        """Take bytes."""
        view = memoryview(content).cast("B") if len(content) else memoryview(b"")
        for at in range(0, len(view), _PART):
            self._buffer += view[at : at + _PART]
            # a part of the first thousand has 16 MiB, of the second 32 MiB, ...: 10,000 of them hold any object
            if len(self._buffer) > (step := _PART << len(self._parts) // 1000):
                self._send(bytes(self._buffer[:step]))
                del self._buffer[:step]
        return len(view)

    def finish(self) -> None:
        """Make the object appear."""
        folder, name = self._folder, self._name
        if self._upload is None:
            content = bytes(self._buffer)
            folder._run(folder._request("put_object", name, len(content), Body=content))
            return
        self._send(bytes(self._buffer))
        etags = {number: part.result() for number, part in enumerate(self._parts, 1)}
        folder._run(folder._complete(name, self._upload, etags))

    def abort(self) -> None:
        """Leave nothing behind."""
        for part in self._parts:
            part.cancel()
        if self._upload is not None:
            self._folder._run(self._folder._abort(self._name, self._upload.number))

    def _send(self, content: bytes) -> None:
        folder, name = self._folder, self._name
        if self._upload is None:
            self._upload = folder._run(folder._begin(name))
        if len(self._parts) >= _AT_ONCE:
            self._parts[-_AT_ONCE].result()
        part = folder._send_part(name, self._upload, len(self._parts) + 1, content)
        self._parts.append(connection().start(part))


def object_folder(url: str, key: str) -> ObjectFolder:
    """The folder of a URL s3://BUCKET/PREFIX.

    Args:
        url: of it.
        key: the setting it came from, for the message.

    Raises:
        StorageError: it names no bucket.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{key} = {url!r} names no bucket: give s3://BUCKET/FOLDER")
    return ObjectFolder(bucket, "/".join(filter(None, prefix.split("/"))))


def _arrive(bucket: str, prefix: str, secrets: Mapping[str, str]) -> ObjectFolder:
    if not any(name in os.environ for name in (*SECRETS, "AWS_PROFILE")):  # the node's own come first
        os.environ.update(secrets)
    return ObjectFolder(bucket, prefix)


async def _all(pieces: list[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    """Run pieces of work, a bounded number at a time; the first failure ends the others."""
    if not pieces:
        return
    waiting = iter(pieces)

    async def work() -> None:
        for piece in waiting:
            await piece()

    workers = [asyncio.ensure_future(work()) for _ in range(min(_AT_ONCE, len(pieces)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _expect(answer: Answer, kind: str) -> None:
    if answer.kind != kind:
        raise answer
