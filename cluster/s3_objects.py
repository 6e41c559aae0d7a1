"""The objects under a prefix of a bucket: the requests that a folder is made of, as coroutines of s3fs's event loop.

They are made on the client under s3fs, which has no conditional writes, and which begins a whole file again where one
part of it fails. Large objects go in parts, several at a time; downloads hold to one version of an object.
"""

import asyncio
import functools
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from cluster import paths
from cluster.command import log
from cluster.s3_connection import Answer, ObjectStoreError, connection
from cluster.storage import MissingError, StorageError

RANGE = 8 << 20
"""Bytes of one GET of a large object."""
PART = 16 << 20
"""Bytes of one part of a large upload; more where 10,000 of them would not do."""
MAX_PARTS = 10_000
AT_ONCE = 8
"""Requests at a time for one object."""
_WRITER = "writer"
"""Metadata of objects: random, so that a writer whose answer was lost knows its own."""
_ABORT_PATIENCE = 6.0
"""Seconds for taking back an upload that failed."""

Take = Callable[[int, bytes], None]
"""Is given pieces of an object, in any order, with their place."""

_T = TypeVar("_T")


class Upload(NamedTuple):
    """An upload in parts that has begun."""

    number: str
    writer: str
    """The mark of the object that is made, by which it is known again."""


class Objects:
    """The objects of a bucket whose keys begin with a prefix.

    Every method raises StorageError where no waiting helps, and ObjectStoreError when patience has ended.

    Args:
        bucket: its name.
        prefix: of the keys, without a slash at either end; may be empty.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._start = f"{prefix}/" if prefix else ""

    def key(self, name: str) -> str:
        """The key of a name.

        Raises:
            StorageError: the name leads out of the folder: what lies between here and the store may follow its dots.
        """
        return self._start + paths.check_inside(name, self.url, StorageError)

    def place(self, name: str) -> str:
        """An object as people write it."""
        return f"{self.url}/{name}" if name else self.url

    async def names(self) -> list[str]:
        """Of the objects directly under the prefix, sorted."""
        return await self._list("Contents", "Key")

    async def folders(self) -> list[str]:
        """What lies directly under the prefix and has objects under it, sorted."""
        return await self._list("CommonPrefixes", "Prefix")

    async def tree(self) -> dict[str, int]:
        """All objects: name to bytes, in the order of the names."""
        found = {}
        async for page in self._pages("list_objects_v2"):
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # a marker that some tools leave for an empty folder
                    found[entry["Key"][len(self._start) :]] = int(entry["Size"])
        return dict(sorted(found.items()))

    async def size_and_etag(self, name: str) -> tuple[int, str] | None:
        """Bytes of an object and what tells this writing of it from others, or None where there is none."""
        try:
            answer = await self._request("head_object", name)
            return int(answer["ContentLength"]), str(answer["ETag"])
        except Answer as missing:
            _expect(missing, "missing")
        known = connection().known_buckets
        if self.bucket not in known:  # a HEAD has no body, which would tell a missing bucket from a missing object
            await self._request("list_objects_v2", Prefix=self._start, MaxKeys=1)
            known.add(self.bucket)
        return None

    async def download(self, name: str, offset: int, length: int | None, take: Take) -> None:
        """Hand over the bytes offset..offset+length of an object, or all from `offset` on.

        The first piece, at 0, is handed over alone; if it comes again, all begins again.

        Raises:
            StorageError: it is missing, or ends before that.
        """
        for _ in range(5):
            try:
                return await self._download_once(name, offset, length, take)
            except Answer as answer:
                if answer.kind == "missing":
                    raise MissingError(f"{self.place(name)} cannot be read: there is no such object") from None
                _expect(answer, "changed")  # between two ranges
        raise ObjectStoreError(f"{self.place(name)} cannot be read: it is being written over and over")

    async def put(self, name: str, content: bytes) -> None:
        """Write an object."""
        await self._request("put_object", name, len(content), Body=content)

    async def put_file(self, name: str, descriptor: int, size: int) -> None:
        """Write an object with the content of a file; the descriptor is closed."""
        try:
            if size <= PART:
                await self.put(name, await self._part_of_file(name, descriptor, 0, size))
                return
            step = max(PART, -(-size // MAX_PARTS))
            upload = await self.begin(name)
            etags: dict[int, str] = {}

            async def send(number: int) -> None:
                at = (number - 1) * step
                content = await self._part_of_file(name, descriptor, at, min(step, size - at))
                etags[number] = await self.send_part(name, upload, number, content)

            try:
                await _all([functools.partial(send, number) for number in range(1, -(-size // step) + 1)])
                await self.complete(name, upload, etags)
            except BaseException:
                await self.abort(name, upload.number)
                raise
        finally:
            os.close(descriptor)

    async def get_file(self, name: str, descriptor: int) -> None:
        """Write the content of an object into a file, from its beginning; the descriptor is closed."""

        def take(at: int, part: bytes) -> None:
            if at == 0:
                os.ftruncate(descriptor, 0)
            view = memoryview(part)
            while view:
                count = os.pwrite(descriptor, view, at)
                view, at = view[count:], at + count

        try:
            await self.download(name, 0, None, take)
        finally:
            os.close(descriptor)

    async def swap(self, name: str, content: bytes, expected: bytes | None) -> bool:
        """Write an object if it holds `expected` now (None: if there is none); whether it did."""
        if expected is None:
            condition: dict[str, Any] = {"IfNoneMatch": "*"}
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

    async def begin(self, name: str) -> Upload:
        """Begin an upload in parts."""
        writer = uuid.uuid4().hex
        answer = await self._request("create_multipart_upload", name, Metadata={_WRITER: writer})
        return Upload(str(answer["UploadId"]), writer)

    async def send_part(self, name: str, upload: Upload, number: int, content: bytes) -> str:
        """Send part 1, 2, ... of an upload; returns its ETag."""
        try:
            answer = await self._request(
                "upload_part", name, len(content), UploadId=upload.number, PartNumber=number, Body=content
            )
        except Answer:
            raise ObjectStoreError(f"{self.place(name)}: its upload was ended by another process") from None
        return str(answer["ETag"])

    async def complete(self, name: str, upload: Upload, etags: Mapping[int, str]) -> None:
        """Make the object of all the parts appear."""
        parts = {"Parts": [{"PartNumber": number, "ETag": etag} for number, etag in sorted(etags.items())]}
        try:
            await self._request("complete_multipart_upload", name, UploadId=upload.number, MultipartUpload=parts)
        except Answer:  # it was ended already: by an attempt of ours whose answer was lost, or by another process
            if not await self._is_from(name, upload.writer):
                raise ObjectStoreError(f"{self.place(name)}: its upload was ended by another process") from None

    async def abort(self, name: str, number: str) -> None:
        """Take back the parts of an upload, if that can be had soon; `abort_all` does it too."""
        with suppress(Answer, StorageError):
            await self._request("abort_multipart_upload", name, patience=_ABORT_PATIENCE, UploadId=number)

    async def abort_all(self, *, deep: bool, ours: re.Pattern[str] | None = None) -> None:
        """Take back uploads that have begun, of `ours` or all, with a slash only if `deep`; as far as is allowed."""
        begun = []
        try:
            async for page in self._pages("list_multipart_uploads"):
                begun += [(each["Key"][len(self._start) :], each["UploadId"]) for each in page.get("Uploads", [])]
        except StorageError as error:
            if isinstance(error, OSError):
                raise
            log.info("%s; uploads that killed processes have left stay there", error)
        for name, number in begun:
            if (deep or "/" not in name) and (ours is None or ours.fullmatch(name)):
                await self.abort(name, number)

    async def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        await self._request("delete_object", name)

    async def remove_if(self, name: str, expected: bytes) -> bool:
        """Remove an object if it holds `expected` now; whether it did."""
        try:
            found, _, etag = await self._read(name, 0, None, None)
            if found != expected:
                return False
            await self._request("delete_object", name, IfMatch=etag)
        except Answer:  # it is gone, perhaps by an attempt of ours whose answer was lost, or is another by now
            return (await self.size_and_etag(name)) is None
        return True

    async def remove_all(self, ours: re.Pattern[str]) -> None:
        """Remove the objects whose names are ours."""
        names = [name for name in await self.tree() if ours.fullmatch(name)]
        for start in range(0, len(names), 1000):
            keys = [{"Key": self._start + name} for name in names[start : start + 1000]]
            answer = await self._request("delete_objects", Delete={"Objects": keys, "Quiet": True})
            for refused in answer.get("Errors", []):
                raise ObjectStoreError(f"s3://{self.bucket}/{refused['Key']} cannot be removed: {refused.get('Code')}")

    async def _request(
        self, method: str, name: str = "", size: int = 0, patience: float = float("inf"), **parameters: Any
    ) -> Any:
        """One request, tried again as long as patience lasts; `size` in bytes of what is sent with it."""
        s3 = connection()
        if name:
            parameters["Key"] = self.key(name)

        async def attempt() -> Any:
            client = await s3.fs.set_session()
            return await getattr(client, method)(Bucket=self.bucket, **parameters)

        return await s3.persist(attempt, self.place(name), size, self.bucket, patience)

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

    async def _list(self, what: str, field: str) -> list[str]:
        found = []
        async for page in self._pages("list_objects_v2", Delimiter="/"):
            found += [entry[field][len(self._start) :].rstrip("/") for entry in page.get(what, [])]
        return sorted(name for name in found if name)

    async def _is_from(self, name: str, writer: str) -> bool:
        try:
            return bool((await self._request("head_object", name))["Metadata"].get(_WRITER) == writer)
        except Answer:
            return False

    async def _part_of_file(self, name: str, descriptor: int, at: int, count: int) -> bytes:
        def read() -> bytes:
            content = bytearray()
            while len(content) < count and (part := os.pread(descriptor, count - len(content), at + len(content))):
                content += part
            if len(content) != count:
                raise StorageError(f"the file for {self.place(name)} became shorter while it was sent")
            return bytes(content)

        return await _in_thread(read)

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
            answer = await client.get_object(Bucket=self.bucket, Key=self.key(name), **parameters)
            async with answer["Body"] as stream:
                content = await stream.read()
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
            if span is None:  # the store sends the whole object, as it may
                first, last, whole = 0, int(answer["ContentLength"]) - 1, int(answer["ContentLength"])
            else:
                first, last, whole = (int(number) for number in span.groups())
            if len(content) != last - first + 1:
                raise ConnectionError(f"got {len(content)} of {last - first + 1} bytes")
            stop = whole if end is None else min(end, whole)
            if not (first <= at and last + 1 >= stop):
                raise ConnectionError(f"asked for bytes {at} to {stop}, got {first} to {last + 1}")
            return content[at - first : stop - first], whole, str(answer["ETag"])

        return await s3.persist(attempt, self.place(name), (end or at + RANGE) - at, self.bucket)

    async def _download_once(self, name: str, offset: int, length: int | None, take: Take) -> None:
        end = None if length is None else offset + length
        first = offset + RANGE if end is None else min(end, offset + RANGE)
        try:
            content, whole, etag = await self._read(name, offset, first, None)
        except Answer as answer:
            _expect(answer, "beyond")  # an empty object has no byte that could be asked for
            whole = int((await self._request("head_object", name))["ContentLength"])
            if whole > offset:
                raise Answer("changed") from None
            content, etag = b"", ""
        if end is None:
            end = max(whole, offset)
        elif end > whole:
            raise StorageError(f"{self.place(name)} ends before byte {end}: it was cut short")
        await _in_thread(functools.partial(take, 0, content))

        async def piece(at: int) -> None:
            part, _, _ = await self._read(name, at, min(at + RANGE, end), etag)
            await _in_thread(functools.partial(take, at - offset, part))

        await _all([functools.partial(piece, at) for at in range(first, end, RANGE)])


async def _in_thread(function: Callable[[], _T]) -> _T:
    """What waits for a disk must not hold up the event loop; a cancelled one is waited for: it uses a file."""
    work = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


async def _all(pieces: list[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    """Run pieces of work, a bounded number at a time; the first failure ends the others."""
    waiting = iter(pieces)

    async def work() -> None:
        for piece in waiting:
            await piece()

    workers = [asyncio.ensure_future(work()) for _ in range(min(AT_ONCE, len(pieces)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _expect(answer: Answer, kind: str) -> None:
    if answer.kind != kind:
        raise answer
