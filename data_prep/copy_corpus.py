"""Copy a corpus, also to and from S3: `python data_prep/copy_corpus.py SOURCE DESTINATION`.

Shards are copied in Ray tasks, as they are written: the lines of all nodes add up, and one node's failure is retried.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import xxhash
from pydantic import Field

from cluster import storage
from cluster.command import Progress, absolute_path, counted, duration, log, run_command
from cluster.folders import Folder, folder_at
from cluster.lease import FILE as LEASE
from cluster.marked_folders import temporary_folder
from cluster.paths import check_component
from cluster.settings import Settings, parse_command
from data_prep.card import write_card
from data_prep.copy_part import copy_part
from data_prep.corpus import Corpus
from data_prep.corpus_format import (
    MANIFEST,
    ORIGINS_CHECKSUM,
    PLAN,
    SHARDS_AT,
    CorpusError,
    file_of_version,
    identity,
    manifest_of_version,
    needs_own_shards,
)
from data_prep.corpus_jobs import check_places, check_room, held, in_megabytes, names_in, written
from data_prep.manifest import read_manifest, read_version, split_version
from data_prep.shard_task import SHARD_FILES, record_name, shard_file
from data_prep.tasks import Work, run_tasks

DESCRIPTION = """
Copy a corpus to another folder, on file systems that every node mounts or on S3 (s3://BUCKET/FOLDER). Every shard is
checked against the manifest while it is copied, and the manifest comes last: what is there is whole. A copy that was
interrupted goes on where it was when the same command is given again; a finished one is left as it is.

A part of a corpus (data_prep/subset.py) has no tars of its own. Its copy has: with the part's images only, in the
same order, for whatever reads tars. A run that began on the one goes on with the other. (Of a part on S3 the shards
that it shares are fetched into TMPDIR for that, one for each CPU at a time.)

  SOURCE       folder of the corpus, or of a part; SOURCE#N copies version N of one to which images were appended
  DESTINATION  a new folder

examples:
  python data_prep/copy_corpus.py /data/corpora/in21k s3://bucket/corpora/in21k
  python data_prep/copy_corpus.py /data/corpora/in21k-parts/heldout /data/corpora/in21k-heldout
"""

_MARK = "copying.json"
"""In the destination while it is not finished: which corpus is being copied there."""
_CHUNK = 4 << 20
_INDEX_FILES = "the index"


class CopySettings(Settings):
    """Settings of copying a corpus."""

    source: str
    """Folder of the corpus, or of a part of one; with #N at the end, version N of it."""
    destination: str
    """Folder of the copy; made if it is not there."""
    workers: int = Field(0, ge=0)
    """Shards copied at a time; 0 is one for each CPU of the cluster."""


@dataclass(frozen=True)
class _CopyTask:
    """Files that are copied in this order."""

    source: Folder
    destination: Folder
    sizes: Mapping[str, int]
    """Bytes of the files, by name."""
    checksums: Mapping[str, str]
    """xxh3_128 of those of them that the manifest has."""


def main() -> None:
    """The command."""
    copy_corpus(
        parse_command(
            CopySettings,
            prog="data_prep/copy_corpus.py",
            description=DESCRIPTION,
            positionals=("source", "destination"),
        )
    )


def copy_corpus(settings: CopySettings) -> Corpus:
    """Copy a corpus, or finish doing so; returns the copy opened.

    Raises:
        CorpusError: the source is no whole corpus, or the destination holds something else or has too little room.
        StorageError: one of them cannot be reached.
        LeaseError: another job works in the destination.
    """
    place, version = split_version(absolute_path(settings.source, "source"))
    source = folder_at(place, "source")
    destination = folder_at(absolute_path(settings.destination, "destination"), "destination")
    check_places(source, destination)
    with held(destination):
        return _copy_into(destination, source, version, settings.workers)


def _copy_into(destination: Folder, source: Folder, version: int | None, workers: int) -> Corpus:
    started = time.monotonic()
    manifest = read_version(source, version)
    corpus = None
    if _is_finished(manifest, destination):
        corpus = Corpus.open(destination)
        log.info("%s is finished already (%s): nothing to do", destination, counted(corpus.num_samples, "image"))
    elif needs_own_shards(manifest):
        part = Corpus.open(source)
        with _marked(destination, manifest):
            copy_part(part, destination, workers)
    else:
        _copy_files_of(source, destination, manifest, workers)
    if corpus is None:
        corpus = Corpus.open(destination)
        log.info(
            "copied %s to %s: %s in %s, %s, in %s; corpus hash %s",
            source, destination, counted(corpus.num_samples, "image"), counted(len(corpus.shard_sizes), "shard"),
            in_megabytes(sum(shard["bytes"] for shard in corpus.manifest["shards"])),
            duration(time.monotonic() - started), corpus.corpus_hash,
        )  # fmt: skip
    with written(destination):
        write_card(corpus)
    return corpus


@contextmanager
def _marked(destination: Folder, manifest: Mapping[str, Any]) -> Iterator[None]:
    """A destination, with a file in it that says what is being copied there until the block ends."""
    with written(destination):
        destination.remove_unfinished()
        destination.write_json(_MARK, {"corpus_hash": identity(manifest)})
        yield
        destination.remove(_MARK)


def _copy_files_of(source: Folder, destination: Folder, manifest: Mapping[str, Any], workers: int) -> None:
    """Copy a corpus that has shards of its own, file by file."""
    left_out = {MANIFEST, _MARK, LEASE, *_of_newer_versions(source, manifest)}
    sizes = {name: size for name, size in source.tree().items() if "/" not in name and name not in left_out}
    for name in sizes:
        check_component(name, f"{source}", CorpusError)
    there = destination.tree()
    missing = {name: size for name, size in sizes.items() if there.get(name) != size}
    check_room(destination, sum(missing.values()))
    with _marked(destination, manifest):
        _copy_all(source, destination, manifest, sizes, missing, workers)
        destination.write_json(MANIFEST, manifest)


def _of_newer_versions(source: Folder, manifest: Mapping[str, Any]) -> set[str]:
    """Names of the files in a corpus that only versions after that of a manifest have."""
    newest = read_manifest(source)
    own, last = manifest.get("version", 1), newest.get("version", 1)
    found = {manifest_of_version(version) for version in range(own, last)}
    known = {shard["name"] for shard in manifest["shards"]} | set(manifest["files"])
    for version in range(own + 1, last + 1):
        newer = newest if version == last else read_version(source, version)
        found |= {file_of_version(PLAN, version), *newer["files"]} - known
        for shard in newer["shards"]:
            if shard["name"] not in known:
                found |= {shard_file(shard["name"], suffix) for suffix in SHARD_FILES} | {record_name(shard["name"])}
    return found


def _is_finished(manifest: Mapping[str, Any], destination: Folder) -> bool:
    """Whether a copy is there, whole.

    Raises:
        CorpusError: the destination holds something else.
    """
    found = names_in(destination)
    mark = MANIFEST if MANIFEST in found else _MARK
    if not found:
        return False
    if mark not in found:
        raise CorpusError(
            f"destination {destination} is not empty and was not made by copying (it has {found[0]!r}): "
            f"give another folder"
        )
    if mark == _MARK:
        begun = destination.read_json(mark)
        known = begun.get("corpus_hash") if isinstance(begun, dict) else None
    else:
        there = read_manifest(destination)
        known = identity(there)
    if known != identity(manifest):
        raise CorpusError(f"destination {destination} holds another corpus: give another folder, or remove that one")
    if mark == _MARK:
        return False
    if needs_own_shards(there):
        what = (
            "is a part that shares the shards of another corpus"
            if SHARDS_AT in there
            else "has that part with whole shards, as older versions copied one: every other reader of its tars sees "
            "images that are not in the part"
        )
        raise CorpusError(f"destination {destination} {what}: give another folder, or remove that one")
    try:
        Corpus.open(destination)
    except CorpusError as error:
        log.warning("%s; copying that again", str(error).split(". ")[0])
        return False
    return True


def _copy_all(
    source: Folder,
    destination: Folder,
    manifest: Mapping[str, Any],
    sizes: Mapping[str, int],
    missing: Mapping[str, int],
    workers: int,
) -> None:
    checksums = {shard["name"]: shard["xxh3_128"] for shard in manifest["shards"]}
    for shard in manifest["shards"]:
        if ORIGINS_CHECKSUM in shard:
            checksums[shard_file(shard["name"], ".origins")] = shard[ORIGINS_CHECKSUM]
    older = [read_manifest(source, name) for name in sizes if fnmatch(name, "manifest-*.json")]
    for version in (manifest, *older):
        checksums |= {name: facts["xxh3_128"] for name, facts in version["files"].items()}
    if lost := sorted(set(checksums) - set(sizes)):
        raise CorpusError(f"{source}/{lost[0]} is missing: the corpus to copy is not whole")
    # a shard's record comes after what it stands for; what belongs to no shard is one piece of work
    groups = {
        shard["name"]: [shard_file(shard["name"], suffix) for suffix in SHARD_FILES] + [record_name(shard["name"])]
        for shard in manifest["shards"]
    }
    of_shards = {name for group in groups.values() for name in group}
    groups[_INDEX_FILES] = [name for name in sizes if name not in of_shards]
    tasks, megabytes = {}, {}
    for label, group in groups.items():
        wanted = {name: missing[name] for name in group if name in missing}
        megabytes[label] = -(-sum(sizes.get(name, 0) for name in group) // 10**6)
        if wanted:
            known = {name: checksums[name] for name in wanted if name in checksums}
            tasks[label] = partial(_CopyTask, source, destination, wanted, known)
    progress = Progress(sum(megabytes.values()), "MB", "copying")
    if len(tasks) < len(groups):
        progress.skip(sum(size for label, size in megabytes.items() if label not in tasks))
        log.info("%d of %d shards are there already", len(groups) - len(tasks), len(groups))
    work = Work(bytes=sum(missing.values()), decodes=False)
    run_tasks(_copy_files, tasks, destination, workers, progress, units=megabytes.__getitem__, work=work)


def _copy_files(task: _CopyTask) -> dict[str, Any]:
    """Copy files; returns how many bytes, in the form of a shard's record.

    Raises:
        CorpusError: one is not what the manifest says, or has changed.
        OSError: the storage fails; worth another try.
    """
    for name in task.sizes:
        if task.source.local is None:
            with _arriving(task.destination, name) as path:
                task.source.get(name, path)
                _check(task, name, path.stat().st_size, storage.hash_file(path))
                task.destination.put(path, name, move=True)
            continue
        digest, count = xxhash.xxh3_128(), 0
        path = task.source.local / name
        with path.open("rb", buffering=0) as file, task.destination.writing(name) as sink:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                count += len(chunk)
                storage.write_fully(sink, chunk)
            _check(task, name, count, digest.hexdigest())  # what fails here does not appear there
    return {"sizes": {".tar": sum(task.sizes.values())}}


@contextmanager
def _arriving(destination: Folder, name: str) -> Iterator[Path]:
    """A path for a file on its way: beside its place where that can be, so that it is not written twice."""
    if destination.local is None:
        with temporary_folder("copy") as folder:
            yield folder / name
        return
    path = storage.temporary_path(destination.local / name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _check(task: _CopyTask, name: str, size: int, checksum: str) -> None:
    if size != task.sizes[name] or checksum != task.checksums.get(name, checksum):
        raise CorpusError(
            f"{task.source}/{name} is damaged: it is not what the manifest says. Look at the whole corpus with "
            f"data_prep/verify.py"
        )


if __name__ == "__main__":
    run_command(main)
