"""The corpus as training reads it: sharded images with an index. corpus_format.py says which files it has."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from cluster import storage
from cluster.folders import Folder, folder_at
from cluster.storage import StorageError, patiently
from data_prep.checked_rows import CheckedRows, Checks, hash_blocks
from data_prep.columns import LABEL_DTYPE, ragged_take
from data_prep.corpus_cache import cache_folder, fetch_files
from data_prep.corpus_format import (
    COPY_OF,
    INDEX,
    LABEL_POINTERS,
    LABELS,
    ORIGINS_CHECKSUM,
    PLACES,
    QUARANTINE,
    REPAIR,
    SAMPLE_DTYPE,
    CorpusError,
    ShardError,
    check_size,
    file_of_version,
    identity,
    image_check,
    shards_folder,
    write_again,
)
from data_prep.left_out import LeftOut, read_lines
from data_prep.manifest import check_base, read_version, split_version
from data_prep.shard_cache import FetchError, ShardCache
from data_prep.tar_headers import BLOCK

CACHE_BYTES = 100 * 10**9
"""What the shards of object stores may take on a node where nothing else is said."""

_MAX_OPEN_SHARDS = 256
_PAUSES = (0.2, 1.0, 4.0)
"""Seconds before a shard that cannot be opened or read is tried again: mounted file systems have moments."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP}
"""Errors of one shard; of others the node or the mount is at fault, and no sample is lost."""
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


class Shards(Protocol):
    """The tars of a corpus as files of this node."""

    def path(self, shard: int) -> Path:
        """Where a shard is, whole; fetched first if need be."""

    def open(self, shard: int) -> int:
        """A descriptor of a shard's file; the caller closes it."""

    def renew(self, shard: int) -> bool:
        """Look for damage in this node's copy of a shard and put that right; False where the shard itself has it."""


class _LocalShards:
    """Shards that lie on a mounted file system."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._names = folder, names

    def path(self, shard: int) -> Path:
        return self._folder / self._names[shard]

    def open(self, shard: int) -> int:
        return os.open(self.path(shard), os.O_RDONLY)

    def renew(self, shard: int) -> bool:
        return False


class _OpenShard:
    """A read-only file that closes when nobody holds it any more, so that a cache may drop it during a read."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class Corpus:
    """A corpus opened for reading; safe to use from several threads; a pickled one opens again where it arrives.

    Attributes:
        folder: of it.
        path: where its index and labels are on this node: its folder, or for an object store what the cache holds.
        manifest: the content of manifest.json.
        index: rows of SAMPLE_DTYPE [N]; read at each access, and checked (checked_rows.py).
        checks: of the blocks of its files of rows, for other processes that open the same corpus; empty where it was
            opened without looking at their content.
    """

    def __init__(self, folder: Folder, path: Path, manifest: dict[str, Any], cache_bytes: int, checks: Checks) -> None:
        """Use `Corpus.open`."""
        self.folder = folder
        self.path = path
        self.manifest = manifest
        self.checks = checks
        self._cache_bytes = cache_bytes
        self.index = self._rows(self.file_name(INDEX), SAMPLE_DTYPE, self._validate)
        if self.label_kind == "multi":
            self._label_pointers = self._rows(self.file_name(LABEL_POINTERS), "<u8")
            self._labels = self._rows(self.file_name(LABELS), LABEL_DTYPE, self._validate_labels)
        if PLACES in manifest["files"]:
            self._places = self._rows(PLACES, "<u4")
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._origins: OrderedDict[int, list[str]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        place: str | Folder,
        check: Literal["content", "sizes"] = "content",
        cache_bytes: int = CACHE_BYTES,
        version: int | None = None,
        checks: Checks | None = None,
    ) -> "Corpus":
        """Open a corpus after checking its manifest, its index and the presence and size of every shard.

        `check="sizes"` leaves out the checksum of the index, and on an object store the look at the shards, for a
        process whose parent has looked at them already.

        The content of the shards is checked sample by sample as it is read (and whole by data_prep/verify.py).

        Args:
            place: its folder; with `#N` at the end, version N of it.
            check: how much is checked.
            cache_bytes: what the shards of object stores may take on this node.
            version: which one, where images were appended; None for the newest.
            checks: with `check="sizes"`, those of the corpus that the parent opened.

        Raises:
            CorpusError: missing, unfinished, of another format version, cut short or altered.
            StorageError: the object store cannot be reached, or there is no room for the index.
        """
        if isinstance(place, str):
            place, named = split_version(place)
            version = named or version
            folder = folder_at(place, "corpus")
        else:
            folder = place
        manifest = read_version(folder, version)
        shards_at = shards_folder(folder, manifest)
        if shards_at != folder:
            check_base(folder, manifest, shards_at)
        sizes = [(folder, name, facts["bytes"]) for name, facts in manifest["files"].items()]
        sizes += [(shards_at, shard["name"], shard["bytes"]) for shard in manifest["shards"]]
        if folder.local is not None:
            for where, name, size in sizes:
                check_size(where, name, where.size(name), size)
            here = folder.local
        else:
            if check == "content":
                there = {where.url: where.tree() for where in (folder, shards_at)}
                for where, name, size in sizes:
                    check_size(where, name, there[where.url].get(name), size)
            here = fetch_files(folder, manifest["files"], manifest["corpus_hash"], check=check == "content")
        found = _check_content(folder, here, manifest) if check == "content" else checks or {}
        return cls(folder, here, manifest, cache_bytes, found)

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus.open, (self.folder, "sizes", self._cache_bytes, self.version, self.checks)

    def _rows(self, name: str, dtype: Any, validate: Callable[[NDArray[Any]], None] = lambda rows: None) -> CheckedRows:
        checks = self.checks.get(self.manifest["files"][name]["xxh3_128"])
        where = f"{self.path}/{name}"
        cached = self.folder.local is None
        return CheckedRows(self.path / name, dtype, checks=checks, where=where, cached=cached, validate=validate)

    def _validate(self, rows: NDArray[np.void]) -> None:
        """Refuse rows of the index that lie in no shard, or have a class that is none."""
        sizes = self._shard_bytes
        shards, labels = rows["shard"], rows["label"]
        least = -1 if self.label_kind == "multi" else 0
        inside = (shards < len(sizes)) & (labels >= least) & (labels < len(self.manifest["classes"]))
        # a tar header comes before an image; offsets are below 2**63 then, and the sum does not overflow
        ends = sizes[np.where(inside, shards, 0)]
        inside &= (rows["offset"] >= BLOCK) & (rows["offset"] <= ends)
        inside &= rows["length"] <= ends - np.minimum(rows["offset"], ends)
        if not inside.all():
            wrong = rows[np.flatnonzero(~inside)[0]]
            raise CorpusError(
                f"{self}/{self.file_name(INDEX)} has a sample that is none of this corpus (shard {wrong['shard']}, "
                f"{wrong['length']} bytes at {wrong['offset']}, class {wrong['label']}): shard the images again"
            )

    def _validate_labels(self, rows: NDArray[np.void]) -> None:
        if not ((rows["class"] < len(self.manifest["classes"])) & np.isfinite(rows["weight"])).all():
            raise CorpusError(
                f"{self}/{self.file_name(LABELS)} has a label that is none of this corpus: shard the images again"
            )

    @cached_property
    def _shard_bytes(self) -> NDArray[np.uint64]:
        return np.array([shard["bytes"] for shard in self.manifest["shards"]], np.uint64)

    def __str__(self) -> str:
        return self.url

    @property
    def url(self) -> str:
        """Its folder as people write it: a path, or s3://BUCKET/PREFIX."""
        return self.folder.url

    @property
    def place(self) -> str:
        """Where it lies, with its version, as `open` takes it: what was opened, though a newer version come."""
        return f"{self.url}#{self.version}"

    @property
    def version(self) -> int:
        """1, or more where images were appended."""
        return int(self.manifest.get("version", 1))

    def file_name(self, name: str) -> str:
        """Name of one of its files (INDEX, QUARANTINE, ...) in this version."""
        return file_of_version(name, self.version)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.url.rstrip("/").rpartition("/")[2]

    @cached_property
    def shards_folder(self) -> Folder:
        """Where the tars are: its own folder, or that of the corpus whose shards it shares."""
        return shards_folder(self.folder, self.manifest)

    @cached_property
    def shards(self) -> Shards:
        """The tars, as files of this node."""
        shards = self.manifest["shards"]
        names = [shard["name"] for shard in shards]
        if self.shards_folder.local is not None:
            return _LocalShards(self.shards_folder.local, names)
        sizes, checksums = [shard["bytes"] for shard in shards], [shard["xxh3_128"] for shard in shards]
        return ShardCache(self.shards_folder, names, sizes, checksums, cache_folder("shards"), self._cache_bytes)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_samples(self) -> int:
        """N, the number of images."""
        return int(self.manifest["num_samples"])

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self.manifest["classes"])

    @property
    def class_descriptions(self) -> list[str] | None:
        """What people call the classes (from a words file), in the same order, or None."""
        descriptions = self.manifest["class_descriptions"]
        return None if descriptions is None else list(descriptions)

    @property
    def names(self) -> list[str]:
        """What to call the classes before people: their descriptions, or their names where they have none."""
        return self.class_descriptions or self.classes

    @property
    def class_counts(self) -> list[int]:
        """Images of each class (with many labels, images that carry it)."""
        return list(self.manifest["class_counts"])

    @property
    def label_kind(self) -> Literal["single", "multi"]:
        """Whether a sample has one class or many weighted labels."""
        return "multi" if self.manifest["label_kind"] == "multi" else "single"

    @property
    def corpus_hash(self) -> str:
        """The identity of the corpus: two corpora with the same one hold the same images in the same order.

        A subset and its copy are two such, in other tars.
        """
        return identity(self.manifest)

    def quarantined(self) -> Iterator[dict[str, str]]:
        """Images that were left out: {"origin", "reason"}.

        Raises:
            CorpusError: the list is damaged; names the line.
        """
        name = self.file_name(QUARANTINE)
        if name in self.manifest["files"]:
            with (self.path / name).open("rb") as lines:
                for entry in read_lines(LeftOut, lines, f"{self}/{name}"):
                    yield {"origin": entry.origin, "reason": entry.reason}

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard; the ids of a shard are consecutive."""
        return [shard["samples"] for shard in self.manifest["shards"]]

    @property
    def window_bytes(self) -> list[int]:
        """Bytes of each shard, by which shuffle windows are chosen: the same for a subset and its copy."""
        copied = self.manifest.get(COPY_OF)
        return copied["shard_bytes"] if copied else [shard["bytes"] for shard in self.manifest["shards"]]

    @cached_property
    def _first_ids(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.shard_sizes, dtype=np.int64)])

    def labels_of(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """The labels of samples (int64 [B]), as a sparse matrix [B, classes].

        Returns:
            (rows int64 [K], classes int64 [K], weights float32 [K]): sample ids[rows[k]] has class classes[k].
            With one class a sample, K = B and every weight is 1.
        """
        which = self._checked_ids(ids)
        if self.label_kind == "single":
            classes = self.index.take(which)["label"].astype(np.int64)
            return np.arange(len(which)), classes, np.ones(len(which), np.float32)
        starts, ends = self._label_pointers.take(np.concatenate([which, which + 1])).reshape(2, -1)
        if not ((starts <= ends) & (ends <= len(self._labels))).all():
            raise CorpusError(
                f"{self}/{self.file_name(LABEL_POINTERS)} points outside the labels: shard the images again"
            )
        starts, counts = starts.astype(np.int64), (ends - starts).astype(np.int64)
        labels = self._labels[ragged_take(starts, counts)]
        return np.repeat(np.arange(len(which)), counts), labels["class"].astype(np.int64), labels["weight"].copy()

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        """The encoded images of samples (int64 [B]), each a fresh uint8 array, in the order asked for.

        Raises:
            CorpusError: the bytes are not those that were written; names the shard, the sample and its key.
        """
        which = self._checked_ids(ids)
        rows = self.index.take(which)
        images = []
        columns = (rows["offset"].tolist(), rows["length"].tolist(), rows["shard"].tolist(), rows["check"].tolist())
        for place, (offset, length, shard, check) in enumerate(zip(*columns, strict=True)):
            image = np.empty(length, np.uint8)
            count = self._read_into(image, shard, offset)
            if count != length or image_check(image) != check:
                image = self._read_again(int(which[place]))
            images.append(image)
        return images

    def prefetch(self, order: Sequence[int], ahead: int) -> None:
        """Say in which order shards will be read from now on; of an object store the first `ahead` are fetched.

        See `ShardCache.prefetch`.
        """
        if not isinstance(self.shards, ShardCache):
            return
        self.shards.prefetch(order, ahead)
        with self._lock:  # what the cache has let go of takes room on the disk as long as it is open
            for shard, opened in list(self._open_shards.items()):
                if os.fstat(opened.descriptor).st_nlink == 0:
                    del self._open_shards[shard]

    def origin(self, sample: int) -> str:
        """Where a sample came from: the path of its image inside the source.

        Raises:
            CorpusError: the shard's .origins file is missing or cut short.
        """
        shard = int(self.index.take(self._checked_ids([sample]))[0]["shard"])
        with self._lock:
            lines = self._origins.get(shard)
        if lines is None:
            lines = self.read_origins(shard)
            with self._lock:
                self._origins[shard] = lines
                while len(self._origins) > 8:
                    self._origins.popitem(last=False)
        return lines[int(self.places_of([sample])[0])]

    def places_of(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Which of the samples of its shard's tar each sample is (int64 [B]), counted from 0."""
        which = self._checked_ids(ids)
        shards = self.index.take(which)["shard"]
        if PLACES not in self.manifest["files"]:
            places = which - self._first_ids[shards]
        else:
            places = self._places.take(which).astype(np.int64)
        if not ((places >= 0) & (places < self._samples_there[shards])).all():
            raise CorpusError(f"{self}: a sample lies in another shard than its index says: shard the images again")
        return places

    @cached_property
    def _samples_there(self) -> NDArray[np.int64]:
        """Samples in the tar of each shard."""
        return np.array([shard.get("samples_there", shard["samples"]) for shard in self.manifest["shards"]], np.int64)

    def origins(self) -> Iterator[str]:
        """Where each sample came from, in the order of the ids.

        Raises:
            CorpusError: as `origin`.
        """
        for shard in range(len(self.shard_sizes)):
            lines = self.read_origins(shard)
            ids = np.arange(self._first_ids[shard], self._first_ids[shard + 1])
            yield from (lines[place] for place in self.places_of(ids).tolist())

    def read_origins(self, shard: int) -> list[str]:
        """Where each sample of a shard's tar came from, read anew.

        Raises:
            CorpusError: as `origin`, or it is not what was written.
        """
        facts = self.manifest["shards"][shard]
        name = f"{facts['name'].removesuffix('.tar')}.origins"
        try:
            content = self.shards_folder.read_bytes(name)
        except StorageError as error:
            raise CorpusError(f"{error}. {REPAIR}") from error
        if ORIGINS_CHECKSUM in facts and xxhash.xxh3_128_hexdigest(content) != facts[ORIGINS_CHECKSUM]:
            raise CorpusError(
                f"{self.shards_folder}/{name} is damaged: it is not what was written. {write_again(facts['name'])}"
            )
        try:
            lines = content.decode("utf-8").split("\n")[:-1]
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self.shards_folder}/{name} is no UTF-8 text (byte {error.start}). {REPAIR}") from error
        expected = facts.get("samples_there", facts["samples"])
        if len(lines) != expected:
            raise CorpusError(f"{self.shards_folder}/{name} has {len(lines)} lines for {expected} samples. {REPAIR}")
        return lines

    def _checked_ids(self, ids: ArrayLike) -> NDArray[np.int64]:
        which = np.asarray(ids, dtype=np.int64).reshape(-1)
        if which.size and not (which.min() >= 0 and which.max() < self.num_samples):
            raise CorpusError(
                f"sample ids must lie in 0..{self.num_samples - 1}, got {which.min()}..{which.max()} ({self})"
            )
        return which

    def _read_into(self, image: NDArray[np.uint8], shard: int, offset: int) -> int:
        """Fill an array from an offset of a shard; returns the bytes that there were.

        Raises:
            FetchError: the mount fails.
            OSError: the disk does, at this place.
        """

        def read() -> int:
            opened = self._shard(shard)
            try:
                return os.preadv(opened.descriptor, [image.data], offset)
            except OSError:
                with self._lock:
                    self._open_shards.pop(shard, None)  # the next try opens it anew
                raise

        try:
            return patiently(read, _PAUSES, lambda error: not isinstance(error, StorageError))
        except OSError as error:
            if isinstance(error, StorageError) or error.errno == errno.EIO:
                raise
            raise self._fetch_error(shard, error) from error

    def _fetch_error(self, shard: int, error: OSError) -> FetchError:
        name = self.manifest["shards"][shard]["name"]
        advice = ": raise `ulimit -n`" if error.errno in _TOO_MANY else ""
        return FetchError(f"{self.shards_folder}/{name} cannot be read on this node: {error.strerror}{advice}")

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is not None:
                self._open_shards.move_to_end(shard)
                return opened
        opened = self._opened(shard)  # which may take long, and other threads read meanwhile
        with self._lock:
            self._open_shards[shard] = opened
            if len(self._open_shards) > _MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)
        return opened

    def _opened(self, shard: int) -> _OpenShard:
        def opened() -> _OpenShard:
            try:
                return _OpenShard(self.shards.open(shard))
            except OSError as error:
                if error.errno in _TOO_MANY:
                    with self._lock:
                        self._open_shards.clear()
                raise

        try:
            return patiently(
                opened, _PAUSES, lambda error: not isinstance(error, StorageError) and error.errno not in _GONE
            )
        except FetchError:
            raise  # it may well be there
        except StorageError as error:
            raise ShardError(str(error)) from error
        except OSError as error:
            if error.errno not in _GONE:
                raise self._fetch_error(shard, error) from error
            name = self.manifest["shards"][shard]["name"]
            raise ShardError(f"{self.shards_folder}/{name} cannot be opened: {error.strerror}. {REPAIR}") from error

    def _read_again(self, sample: int) -> NDArray[np.uint8]:
        """Read a sample whose bytes were not those that were written; this node's copy of its shard may be at fault."""
        row = self.index[sample]
        shard, offset = int(row["shard"]), int(row["offset"])
        self.shards.renew(shard)
        with self._lock:
            self._open_shards.pop(shard, None)  # another process may have renewed it
        image = np.empty(int(row["length"]), np.uint8)
        if self._read_into(image, shard, offset) == len(image) and image_check(image) == row["check"]:
            return image
        # the 512 bytes before an image are its tar header, which begins with the member's name
        header = os.pread(self._shard(shard).descriptor, 100, max(offset - 512, 0))
        member = header.split(b"\0")[0].decode("ascii", "backslashreplace")
        name = self.manifest["shards"][shard]["name"]
        raise CorpusError(
            f"{self.shards_folder}/{name} is damaged: sample {sample} (member {member!r}, {len(image)} bytes at offset "
            f"{offset}) is not what was written. {write_again(name)}"
        )


def _check_content(folder: Folder, here: Path, manifest: dict[str, Any]) -> dict[str, NDArray[np.uint32]]:
    """Compare the files of a corpus with its manifest; returns the checksums of the blocks of those of rows.

    Raises:
        CorpusError: one is not what was written.
    """
    version = int(manifest.get("version", 1))
    row_bytes = {
        file_of_version(INDEX, version): SAMPLE_DTYPE.itemsize,
        file_of_version(LABELS, version): LABEL_DTYPE.itemsize,
        file_of_version(LABEL_POINTERS, version): 8,
        PLACES: 4,
    }
    checks = {}
    for name, facts in manifest["files"].items():
        try:
            if name in row_bytes:
                whole, checks[facts["xxh3_128"]] = hash_blocks(here / name, row_bytes[name])
            else:
                whole = storage.hash_file(here / name)
        except OSError as error:
            raise storage.unreadable(here / name, error) from error
        if whole != facts["xxh3_128"]:
            raise CorpusError(f"{folder}/{name} is damaged: its checksum is not the manifest's. {REPAIR}")
    return checks
