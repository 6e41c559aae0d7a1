"""What every command that makes a corpus has around its work: the destination's checks, the summary."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.command import counted, duration, log
from cluster.folders import Folder
from cluster.lease import FILE as LEASE
from cluster.lease import Lease
from cluster.ownership import MARK, this_process
from cluster.storage import StorageError
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import CorpusPlan
from data_prep.corpus_format import MANIFEST, PLAN, QUARANTINE, CorpusError, file_of_version
from data_prep.listing import SourceError
from data_prep.removed import REMOVED, removed_in_words
from data_prep.shard_task import finished_records, remove_shard

LAID_DOWN = "images"
"""Folder in the destination for images that are copied out of tables first; gone when the corpus is finished."""
DUPLICATES = "duplicates"
"""Folder in the destination for what the search for duplicates has found so far; gone when the corpus is finished."""
LAID_DOWN_FILES = re.compile(rf"parts\.json|(\d{{6,}}|[0-9a-f]{{32}})\.(bytes|npz)|{re.escape(MARK)}")
DUPLICATES_FILES = re.compile(rf"[0-9a-f]{{32}}\.jsonl|[0-9a-f]{{32}}/part-\d{{6,}}\.bin|{re.escape(MARK)}")
"""All that is ever written there; nothing else is removed."""
_WORKING = {LAID_DOWN: LAID_DOWN_FILES, DUPLICATES: DUPLICATES_FILES}
GO_ON = "The finished shards stay; run the same command again to go on"


def check_places(source: Folder, folder: Folder) -> None:
    """Refuse a destination that cannot be one, before the source is looked at.

    Raises:
        SourceError: it lies inside the source.
        CorpusError: it is a file.
    """
    if source.local is not None and folder.local is not None:
        inside, outside = folder.local.resolve(), source.local.resolve()
        is_inside = inside == outside or outside in inside.parents
    else:
        is_inside = f"{folder}/".startswith(f"{source}/")
    if is_inside:
        raise SourceError(f"destination {folder} lies inside the source {source}: give a folder beside it")
    if folder.local is not None and folder.local.exists() and not folder.local.is_dir():
        raise CorpusError(f"destination {folder} is a file: give a folder")


@contextmanager
def held(folder: Folder) -> Iterator[None]:
    """A destination, held against a second job. The lease leaves nothing there, nor an empty folder that it made.

    Raises:
        LeaseError: another job works in it.
        StorageError: it cannot be written.
    """
    made: list[Path] = []
    if folder.local is not None:
        made = [place for place in (folder.local, *folder.local.parents) if not place.exists()]
        if not made and any(folder.local.iterdir()):
            made = [folder.local]  # perhaps all that is in it is of a job that was killed, and is removed
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        advice = "wait for it, stop it, or give another destination"
        try:
            stack.enter_context(Lease(folder, advice=advice, leaves_file=False))
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"destination {folder} cannot be written: {error.strerror or error}") from error
        yield


@contextmanager
def written(folder: Folder, advice: str = f". {GO_ON}") -> Iterator[None]:
    """Says of a failing file system, while a destination is written, that it was that.

    Args:
        advice: what would do.

    Raises:
        StorageError: an OSError in the block.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}{advice}") from error


def _remove_empty(places: list[Path]) -> None:
    with suppress(OSError):  # the first that is not empty ends it
        for place in places:
            place.rmdir()


def names_in(folder: Folder) -> list[str]:
    """What is directly in a destination, files and folders, sorted; its lease is not of it."""
    return sorted([*(name for name in folder.names() if name != LEASE), *folder.folders()])


def mark_working_folder(folder: Folder) -> None:
    """Say in a working folder that it is one, before anything is written there."""
    if folder.size(MARK) is None:
        folder.write_json(MARK, {"purpose": "what is needed until the corpus is finished", **this_process()})


def check_working_folders(folder: Folder) -> None:
    """Refuse a destination in which a folder of a user has the name of one of ours: what is in ours is removed.

    Raises:
        CorpusError: naming it.
    """
    for name, ours in _WORKING.items():
        # Those of before there were marks are told by the names of their files.
        files = folder.child(name).tree()
        if MARK not in files and (other := next((file for file in files if not ours.fullmatch(file)), None)):
            raise CorpusError(
                f"destination {folder} is not empty and was not made by sharding (it has {f'{name}/{other}'!r}): give "
                "another folder"
            )


def check_destination(folder: Folder) -> list[str]:
    """What is in a destination, without working folders.

    Raises:
        CorpusError: files that are none of ours.
    """
    check_working_folders(folder)
    found = [name for name in names_in(folder) if name not in (LAID_DOWN, DUPLICATES)]
    if found and PLAN not in found:
        raise CorpusError(
            f"destination {folder} is not empty and was not made by sharding (it has {found[0]!r}): give another folder"
        )
    return found


def finished_before(folder: Folder, plan: CorpusPlan) -> Corpus | None:
    """The corpus if an earlier run finished it; None if there is work to do.

    Raises:
        CorpusError: the folder holds another corpus or files that are none of ours.
    """
    found = check_destination(folder)
    if not found:
        return None
    there = folder.read_json(PLAN)
    if there != plan.describe():
        raise CorpusError(
            f"destination {folder} holds another corpus, made from another source or with other settings "
            f"({_in_words(there)}; now {_in_words(plan.describe())}): give another folder, or remove that one"
        )
    if MANIFEST not in found:
        return None
    try:
        corpus = Corpus.open(folder, version=plan.version)
    except CorpusError as error:
        log.warning("%s; writing that again", str(error).split(". ")[0])
        return None
    names = [shard["name"] for shard in corpus.manifest["shards"]]
    return corpus if len(finished_records(folder, names, plan.plan_hash)) == len(names) else None


def _in_words(plan: Any) -> str:
    source = plan.get("source") if isinstance(plan, dict) else None
    if not isinstance(source, dict):
        return "unreadable"
    counts = [f"{count:,} {what}" for what, count in sorted(source.items()) if type(count) is int]
    return ", ".join([*counts, str(plan.get("settings"))])


def check_room(folder: Folder, needed: float) -> None:
    """Refuse a destination with less than `needed` bytes free.

    Raises:
        CorpusError: it has less.
    """
    free = folder.free()
    if free is not None and needed > free:
        raise CorpusError(
            f"destination {folder} has {in_megabytes(free)} free, {in_megabytes(needed)} are needed: make room there"
        )


def begin(folder: Folder, plan: CorpusPlan, names: list[str]) -> dict[str, dict[str, Any]]:
    """Make the folder and write the plan; returns the records of the shards that are finished already, by name."""
    folder.remove_unfinished()
    folder.write_json(file_of_version(PLAN, plan.version), plan.describe())
    finished = finished_records(folder, names, plan.plan_hash)
    if finished:
        log.info("%d of %d shards are finished already", len(finished), len(names))
    return finished


def remove_unfinished_corpus(folder: Folder, names: list[str], version: int = 1) -> None:
    """Take back what `begin` and the tasks have written."""
    for name in names:
        remove_shard(folder, name)
    folder.remove(file_of_version(PLAN, version))
    if version == 1:
        remove_working_folders(folder)


def remove_working_folders(folder: Folder) -> None:
    """Remove what is needed only until the corpus is finished."""
    for name, ours in _WORKING.items():
        if folder.child(name).tree():
            folder.child(name).remove_tree(ours)


def log_summary(corpus: Corpus, seconds: float) -> None:
    """What was made, and what was left out of it and why."""
    manifest = corpus.manifest
    log.info(
        "wrote %s: %s of %s in %s, %s, in %s",
        corpus, counted(corpus.num_samples, "image"), counted(len(corpus.classes), "class", "classes"),
        counted(len(manifest["shards"]), "shard"),
        in_megabytes(manifest["num_bytes"]), duration(seconds),
    )  # fmt: skip
    if manifest["quarantined"]:
        reasons = Counter(entry["reason"] for entry in corpus.quarantined())
        are = f"{counted(manifest['quarantined'], 'image')} {'is' if manifest['quarantined'] == 1 else 'are'}"
        place = f"{corpus}/{corpus.file_name(QUARANTINE)}"
        log.warning("%s left out, listed in %s: %s", are, place, reasons_in_words(reasons))
    if "removed" in manifest:
        log.info("%s; see %s/%s", removed_in_words(manifest["removed"]), corpus, corpus.file_name(REMOVED))
    empty = [name for name, count in zip(corpus.classes, corpus.class_counts, strict=True) if not count]
    if empty:
        have = "has" if len(empty) == 1 else "have"
        log.warning("%s %s no image: %s", counted(len(empty), "class", "classes"), have, _some(empty))
    log.info("corpus hash %s", corpus.corpus_hash)


def reasons_in_words(reasons: Counter[str]) -> str:
    """Why images are left out, the most frequent reasons first."""
    return _some([f"{count:,} x {reason}" for reason, count in reasons.most_common()], "; ")


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


def in_megabytes(size: float) -> str:
    """Bytes as people read them."""
    if size < 1e5:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"
