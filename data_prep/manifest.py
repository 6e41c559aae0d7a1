"""The manifest of a corpus, read: the only place where what one says is taken from a file, and checked.

A manifest may be of anybody. Its own hash says that it is whole, and not that it is well meant: so its names are
names of files, its numbers fit each other and the sizes of its files, and nothing else is let through.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cluster import paths
from cluster.folders import Folder
from cluster.records import Component, Count, Digest, Record, check_record
from cluster.storage import StorageError
from data_prep.columns import LABEL_DTYPE
from data_prep.corpus_format import (
    FORMAT_VERSION,
    INDEX,
    LABEL_POINTERS,
    LABELS,
    MANIFEST,
    PLACES,
    PLAN,
    QUARANTINE,
    REPAIR,
    REPAIR_MANIFEST,
    SAMPLE_DTYPE,
    CorpusError,
    file_of_version,
    manifest_hash,
    manifest_of_version,
)

_RESERVED = ("lock", MANIFEST, PLAN)
"""What no file of a manifest may be called: corpus_cache.py keeps its lock beside them."""
_MOST_VERSIONS = 999_999
_VERSIONED = re.compile(r"(.+)#([1-9]\d*)")


def _tar(name: str) -> str:
    if not name.endswith(".tar") or name == ".tar":
        raise ValueError(f"the name {paths.shown(name)} is that of no tar")
    return name


def _relative(path: str) -> str:
    parts = path.split("/")
    up = next((place for place, part in enumerate(parts) if part != ".."), len(parts))
    # it leads up first, and then down
    if (problem := paths.why_not_inside("/".join(parts[up:]))) is not None or "\\" in path:
        raise ValueError(f"{paths.shown(path)} {problem or 'has a backslash'}")
    return path


class _File(Record):
    bytes: Count
    xxh3_128: Digest


class _Shard(Record):
    name: Annotated[Component, AfterValidator(_tar)]
    samples: Annotated[int, Field(ge=1, lt=2**32)]
    bytes: Count
    xxh3_128: Digest
    origins_xxh3_128: Digest | None = None
    samples_there: Annotated[int, Field(ge=1, lt=2**32)] | None = None
    """In the tar, where a subset has fewer."""


class _Source(Record):
    kind: str


class _CreatedBy(Record):
    source: str = ""


class _Removed(Record):
    images: Count
    inside_the_source: Count
    of_excluded_corpora: Count
    exact: Count
    near: Count
    mirrored: Count


class _CopyOf(Record):
    corpus_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    shard_bytes: list[Annotated[int, Field(ge=1, lt=2**63)]]


class _LabelForm(Record):
    """How labels stand beside the images of tars that others wrote."""

    member: Literal["cls", "json"]
    key: str | None = None
    names: bool = False
    no_label: list[str] = Field(default_factory=list)
    delimiter: str | None = None


class Manifest(Record):
    """What manifest.json must say; corpus_format.py says what it means."""

    label_kind: Literal["single", "multi"]
    classes: Annotated[list[str], Field(min_length=1)]
    class_descriptions: list[str] | None
    class_counts: list[Count]
    num_samples: Annotated[int, Field(ge=1, lt=2**48)]
    num_bytes: Count
    quarantined: Count
    shards: Annotated[list[_Shard], Field(min_length=1)]
    files: dict[Component, _File]
    source: _Source
    created_by: _CreatedBy
    version: Annotated[int, Field(ge=1, le=_MOST_VERSIONS)] = 1
    converted: Count = 0
    removed: _Removed | None = None
    shards_at: Annotated[str, AfterValidator(_relative)] | None = None
    copy_of: _CopyOf | None = None
    label_form: _LabelForm | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Manifest":
        """Its numbers are those of one corpus."""
        _require(len(self.class_counts) == len(self.classes), "class_counts: not as many as classes")
        described = self.class_descriptions
        _require(described is None or len(described) == len(self.classes), "class_descriptions: not one of each class")
        _require(len({shard.name for shard in self.shards}) == len(self.shards), "shards: one stands twice")
        counted = sum(shard.samples for shard in self.shards)
        _require(counted == self.num_samples, f"num_samples: {self.num_samples}, its shards have {counted}")
        copied = self.copy_of
        _require(copied is None or len(copied.shard_bytes) == len(self.shards), "copy_of: not of as many shards")
        taken = [name for name in _RESERVED if name in self.files]
        _require(not taken, f"files: none may be called {taken}")
        expected = {INDEX: SAMPLE_DTYPE.itemsize * self.num_samples}
        if self.label_kind == "multi":
            expected[LABEL_POINTERS] = 8 * (self.num_samples + 1)
        if PLACES in self.files:
            expected[PLACES] = 4 * self.num_samples
        for name, size in expected.items():
            self._require_file(
                name, lambda found, size=size: found == size, f"{size} bytes for {self.num_samples} samples"
            )
        if self.label_kind == "multi":
            self._require_file(LABELS, lambda found: found % LABEL_DTYPE.itemsize == 0, "whole labels")
        listed = file_of_version(QUARANTINE, self.version) in self.files
        _require(listed or not self.quarantined, f"files: {QUARANTINE} is missing")
        return self

    def _require_file(self, name: str, fits: Any, wanted: str) -> None:
        own = name if name == PLACES else file_of_version(name, self.version)
        _require(own in self.files, f"files: {own} is missing")
        _require(fits(self.files[own].bytes), f"files.{own}: {self.files[own].bytes} bytes are not {wanted}")


class _Appended(Record):
    first_shard: Count = 0


class PlanRecord(Record):
    """What plan.json must say, as far as it is read."""

    shards: Count = 0
    appended: _Appended = _Appended()
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def excluded(self) -> list[Any]:
        """Hashes of the corpora that duplicates were looked for in."""
        search = self.settings.get("duplicates")
        known = search.get("exclude") if isinstance(search, dict) else None
        return known if isinstance(known, list) else []


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def read_manifest(folder: Folder, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a corpus.

    Args:
        folder: of the corpus.
        name: of the manifest, where it is not that of the newest version.

    Raises:
        CorpusError: missing, of another format version, altered, or no manifest that one could read a corpus by.
        StorageError: the object store cannot be reached.
    """
    path = f"{folder}/{name}"
    if folder.size(name) is None:
        if folder.local is not None and not folder.local.is_dir():
            what = "that is a file" if folder.local.exists() else "there is no such folder"
            raise CorpusError(f"no corpus at {folder}: {what}")
        advice = (
            "make one with `python data_prep/shard.py SOURCE DESTINATION`"
            if folder.size(PLAN) is None
            else "its sharding has not finished; run the same shard command again to go on"
        )
        raise CorpusError(f"no corpus at {folder}: {MANIFEST} is missing; {advice}")
    try:
        manifest = folder.read_json(name)
    except OSError:
        raise
    except StorageError as error:
        raise CorpusError(f"{error}. {REPAIR_MANIFEST}") from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise CorpusError(f"{path} is not the manifest of a corpus. {REPAIR_MANIFEST}")
    if type(manifest["format_version"]) is not int or manifest["format_version"] != FORMAT_VERSION:
        raise CorpusError(
            f"{path} has format version {paths.shown(manifest['format_version'])}, this code reads {FORMAT_VERSION}: "
            "read it with the code that wrote it, or shard the images again"
        )
    try:
        whole = manifest.get("corpus_hash") == manifest_hash(manifest)
    except (RecursionError, ValueError):  # of what JSON can hold and a manifest cannot
        whole = False
    if not whole:
        raise CorpusError(f"{path} was altered: it does not match its own corpus_hash. {REPAIR_MANIFEST}")
    check_record(Manifest, manifest, f"{path} is not the manifest of a corpus", CorpusError)
    return manifest


def split_version(place: str) -> tuple[str, int | None]:
    """A place as people write it, without the `#N` at its end, and N or None: which version of the corpus there."""
    named = _VERSIONED.fullmatch(place)
    return (named[1], int(named[2])) if named else (place, None)


def read_version(folder: Folder, version: int | None) -> dict[str, Any]:
    """The manifest of a version of a corpus, of the newest for None. Raises: as `read_manifest`."""
    manifest = read_manifest(folder)
    if version is not None and version != manifest.get("version", 1):
        manifest = read_manifest(folder, name := older_manifest(folder, manifest, version))
        if manifest.get("version", 1) != version:
            raise CorpusError(f"{folder}/{name} is the manifest of another version. {REPAIR}")
    return manifest


def read_plan(folder: Folder, version: int) -> PlanRecord:
    """What a version of a corpus was planned as.

    Raises:
        CorpusError: there is no plan, or none that one could go by.
    """
    name = file_of_version(PLAN, version)
    try:
        plan = folder.read_json(name)
    except OSError:
        raise
    except StorageError as error:
        raise CorpusError(str(error)) from error
    return check_record(PlanRecord, plan, f"{folder}/{name} is no plan of a corpus", CorpusError)


def newest_version(folder: Folder) -> int | None:
    """The version that manifest.json is of, whether or not the corpus is whole; None where it cannot be told."""
    try:
        manifest = folder.read_json(MANIFEST) if folder.size(MANIFEST) is not None else None
    except OSError:
        raise
    except StorageError:
        return None
    version = manifest.get("version", 1) if isinstance(manifest, dict) else None
    return version if type(version) is int and 1 <= version <= _MOST_VERSIONS else None


def older_manifest(folder: Folder, newest: Mapping[str, Any], version: int) -> str:
    """Name of the manifest of an older version."""
    name = manifest_of_version(version)
    last = newest.get("version", 1)
    if version > last or folder.size(name) is None:
        raise CorpusError(f"{folder} has no version {version}: it has version{'s 1 to' if last > 1 else ''} {last}")
    return name


def check_base(folder: Folder, manifest: Mapping[str, Any], shards_at: Folder) -> None:
    """Whether the corpus that a subset shares shards with still has them as they were; it may have more by now."""
    try:
        there = {(shard["name"], shard["xxh3_128"]) for shard in read_manifest(shards_at)["shards"]}
    except CorpusError as error:
        raise CorpusError(
            f"{folder} is a subset that shares the shards of {shards_at}, and needs it: {error}"
        ) from error
    changed = [shard["name"] for shard in manifest["shards"] if (shard["name"], shard["xxh3_128"]) not in there]
    if changed:
        raise CorpusError(
            f"{folder} is a subset that shares the shards of {shards_at}, which is another corpus by now (its "
            f"{changed[0]} is not the one of then): make the subset again"
        )
