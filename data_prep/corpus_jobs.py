"""What every command that makes a corpus has around its work: the destination's checks, Ray tasks, the summary."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.command import Progress, duration, log
from data_prep.corpus import MANIFEST, PLAN, QUARANTINE, Corpus, CorpusError
from data_prep.corpus_assembly import CorpusPlan
from data_prep.shard_task import finished_record, remove_shard
from data_prep.sources import SourceError

_ATTEMPTS = 4
GO_ON = "The finished shards stay; run the same command again to go on"
_PATIENCE = 0.25
"""Share of a corpus's images that may fail to decode before a warning stands in the summary."""


def check_places(source: Path, folder: Path) -> None:
    """Refuse a destination that cannot be one, before the source is looked at.

    Raises:
        SourceError: it lies inside the source.
        CorpusError: it is a file.
    """
    inside, outside = folder.resolve(), source.resolve()
    if inside == outside or outside in inside.parents:
        raise SourceError(f"destination {folder} lies inside the source {source}: give a folder beside it")
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"destination {folder} is a file: give a folder")


def finished_before(folder: Path, plan: CorpusPlan) -> Corpus | None:
    """The corpus if an earlier run finished it; None if there is work to do.

    Raises:
        CorpusError: the folder holds another corpus or files that are none of ours.
    """
    if not folder.is_dir():
        return None
    found = [path.name for path in folder.iterdir() if not storage.is_unfinished(path.name)]
    if not found:
        return None
    if PLAN not in found:
        raise CorpusError(
            f"destination {folder} is not empty and was not made by sharding (it has {sorted(found)[0]!r}): "
            f"give another folder"
        )
    there = storage.read_json(folder / PLAN)
    if there != plan.describe():
        raise CorpusError(
            f"destination {folder} holds another corpus, made from another source or with other settings "
            f"({_in_words(there)}; now {_in_words(plan.describe())}): give another folder, or remove that one"
        )
    if MANIFEST not in found:
        return None
    try:
        corpus = Corpus.open(str(folder))
    except CorpusError as error:
        log.warning("%s; writing that again", str(error).split(". ")[0])
        return None
    names = [shard["name"] for shard in corpus.manifest["shards"]]
    return corpus if all(finished_record(folder, name, plan.plan_hash) for name in names) else None


def _in_words(plan: dict[str, Any]) -> str:
    if "source" not in plan:
        return "unreadable"
    counts = [f"{count:,} {what}" for what, count in sorted(plan["source"].items()) if what != "kind"]
    return ", ".join([*counts, str(plan["settings"])])


def check_room(folder: Path, needed: float) -> None:
    """Refuse a destination with less than `needed` bytes free.

    Raises:
        CorpusError: it has less.
    """
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    if needed > free:
        raise CorpusError(
            f"destination {folder} has {in_megabytes(free)} free, {in_megabytes(needed)} are needed: make room there"
        )


def begin(folder: Path, plan: CorpusPlan, names: list[str]) -> dict[str, dict[str, Any]]:
    """Make the folder and write the plan; returns the records of the shards that are finished already, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.remove_unfinished(folder)
    storage.write_json(folder / PLAN, plan.describe())
    records = {name: finished_record(folder, name, plan.plan_hash) for name in names}
    finished = {name: record for name, record in records.items() if record is not None}
    if finished:
        log.info("%d of %d shards are finished already", len(finished), len(names))
    return finished


def remove_unfinished_corpus(folder: Path, names: list[str]) -> None:
    """Take back what `begin` and the tasks have written."""
    for name in names:
        remove_shard(folder, name)
    (folder / PLAN).unlink()
    folder.rmdir()


def run_tasks(
    function: Callable[[Any], dict[str, Any]],
    tasks: Mapping[str, Callable[[], Any]],
    folder: Path,
    workers: int,
    progress: Progress,
    units: Callable[[str], int],
) -> dict[str, dict[str, Any]]:
    """Do the work of shards in Ray tasks, a bounded number at a time, and show how it goes.

    Args:
        function: takes a task and returns the shard's record; done twice it must give the same files.
        tasks: for the name of each shard what makes its task, called when its turn has come: a task may be large.
        folder: of the corpus.
        workers: shards at a time; 0 for what the cluster has CPUs for.
        progress: the caller's; its time counts from when Ray is there.
        units: how much of the progress the shard of a name is.

    Returns:
        The records of the shards, by name.

    Raises:
        SourceError: the source is at fault.
        StorageError: the file system failed in several attempts.
    """
    if not tasks:
        return {}
    from cluster.ray_runtime import ray_session  # before ray: it sets what ray reads when it is imported

    with ray_session():
        import ray

        # A failing disk or network is tried again, also on another node; a source that is wrong is not.
        remote = ray.remote(num_cpus=1, max_retries=_ATTEMPTS - 1, retry_exceptions=[OSError])(function)
        at_once = workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        progress.started = time.monotonic()
        records: dict[str, dict[str, Any]] = {}
        running: dict[Any, str] = {}
        done_bytes, note = 0, ""
        waiting = iter(tasks.items())
        while True:
            while len(running) < at_once and (following := next(waiting, None)) is not None:
                name, make_task = following
                running[remote.remote(make_task())] = name
            if not running:
                log.info("%s", progress.line(note))
                return records
            done, _ = ray.wait(list(running), num_returns=1)
            name = running.pop(done[0])
            records[name] = _result(ray, done[0], name, folder)
            done_bytes += records[name]["sizes"][".tar"]
            note = f"{done_bytes / 1e6 / max(time.monotonic() - progress.started, 1e-9):,.0f} MB/s"
            progress.update(units(name), note)


def _result(ray: Any, reference: Any, name: str, folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = ray.get(reference)
        return record
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SourceError):
            raise SourceError(str(cause)) from error
        if isinstance(cause, OSError):
            raise storage.StorageError(
                f"{name} in {folder} could not be written in {_ATTEMPTS} attempts: {cause}. {GO_ON}"
            ) from error
        raise


def log_summary(corpus: Corpus, seconds: float) -> None:
    """What was made, and what was left out of it and why."""
    manifest = corpus.manifest
    log.info(
        "wrote %s: %s images of %s classes in %d shards, %s, in %s",
        corpus.path, f"{corpus.num_samples:,}", f"{len(corpus.classes):,}", len(manifest["shards"]),
        in_megabytes(manifest["num_bytes"]), duration(seconds),
    )  # fmt: skip
    if manifest["quarantined"]:
        with (corpus.path / QUARANTINE).open(encoding="utf-8") as lines:
            reasons = Counter(json.loads(line)["reason"] for line in lines)
        log.warning(
            "%s images are left out, listed in %s: %s",
            f"{manifest['quarantined']:,}", corpus.path / QUARANTINE, reasons_in_words(reasons),
        )  # fmt: skip
        if manifest["quarantined"] > _PATIENCE * (corpus.num_samples + manifest["quarantined"]):
            log.warning("that is a large share of the source: is it whole?")
    empty = [name for name, count in zip(corpus.classes, corpus.class_counts, strict=True) if not count]
    if empty:
        log.warning("%d classes have no image: %s", len(empty), _some(empty))
    log.info("corpus hash %s", corpus.corpus_hash)


def reasons_in_words(reasons: Counter[str]) -> str:
    """Why images are left out, the most frequent reasons first."""
    return _some([f"{count:,} x {reason}" for reason, count in reasons.most_common()], "; ")


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


def in_megabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"
