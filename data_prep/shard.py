"""Turn images into a corpus of shards: `python data_prep/shard.py SOURCE DESTINATION [KEY=VALUE ...]`."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import Field

from cluster import storage
from cluster.command import Progress, absolute_path, duration, log, run_command
from cluster.settings import Settings, parse_command
from data_prep.corpus import MANIFEST, PLAN, Corpus, CorpusError
from data_prep.corpus_assembly import assemble
from data_prep.label_files import list_labelled, read_words
from data_prep.shard_plan import Plan
from data_prep.shard_task import finished_record, remove_shard, write_shard
from data_prep.sources import SourceError, list_source

_ATTEMPTS = 4
_GO_ON = "The finished shards stay; run the same command again to go on"
_INDEX_BYTES = 200
"""A sample's share of the files beside the tars, for an estimate of the room that is needed."""
_PATIENCE = 0.25
"""Share of a corpus's images that may fail to decode before a warning stands in the summary."""

DESCRIPTION = """
Turn images into a corpus: WebDataset tars of equal size with an index, in a global shuffle, on all CPUs of the
Ray cluster (or of this machine). Every image is decoded once; the bytes of valid ones stay as they are, the others
are listed with the reason in DESTINATION/quarantine.jsonl. A run that was interrupted goes on where it was when the
same command is given again, and a finished corpus is left as it is.

  SOURCE       an image folder (one sub-folder of images for each class), or a tar of one tar for each class
               (ImageNet-21k and ImageNet-1k as they are distributed), or with labels=FILE any folder of images
  DESTINATION  a new folder, on storage that every node mounts

example:
  python data_prep/shard.py /data/imagenet21k.tar /data/in21k words=/data/words.txt shard_mb=512
"""


class ShardSettings(Settings):
    """Settings of sharding."""

    source: str
    """Image folder, or tar of one tar for each class."""
    destination: str
    """Folder of the corpus; made if it is not there."""
    shard_mb: float = Field(512, gt=0)
    """Size of a shard to aim at, in megabytes (10^6 bytes); all shards become nearly equal."""
    seed: int = Field(0, ge=0)
    """Of the shuffle that decides which image goes into which shard."""
    words: str | None = None
    """File of lines CLASS<tab>NAMES, what people call the classes (words.txt of ImageNet)."""
    labels: str | None = None
    """For many labels an image: a .jsonl file of {"path", "labels", "weights"}, or a .csv with path,label,weight."""
    workers: int = Field(0, ge=0)
    """Shards written at a time; 0 is one for each CPU of the cluster. The corpus does not depend on it."""


def main() -> None:
    """The command."""
    shard_corpus(
        parse_command(
            ShardSettings,
            prog="data_prep/shard.py",
            description=DESCRIPTION,
            positionals=("source", "destination"),
        )
    )


def shard_corpus(settings: ShardSettings) -> Corpus:
    """Shard a source into a corpus, or finish doing so; returns it opened.

    Raises:
        SourceError: the source is missing, empty, unreadable, without images, or changed while it was read.
        CorpusError: the destination holds something else, or has too little room.
    """
    started = time.monotonic()
    source = storage.local_path(absolute_path(settings.source, "source"), "source")
    folder = storage.local_path(absolute_path(settings.destination, "destination"), "destination")
    _check_places(source, folder)
    plan = _make_plan(settings, source)
    finished = _finished_before(folder, plan)
    if finished is not None:
        log.info("%s is finished already (%s images): nothing to do", folder, f"{finished.num_samples:,}")
        return finished
    _check_room(folder, plan)
    try:
        corpus, records = _make_corpus(folder, plan, settings.workers)
    except OSError as error:
        raise storage.StorageError(f"{folder} cannot be written: {error}. {_GO_ON}") from error
    _log_summary(corpus, records, plan, time.monotonic() - started)
    return corpus


def _make_corpus(folder: Path, plan: Plan, workers: int) -> tuple[Corpus, list[dict[str, Any]]]:
    records = _write_shards(folder, plan, workers)
    if not any(record["samples"] for record in records):
        reasons = Counter(entry["reason"] for record in records for entry in record["quarantined"])
        _remove_unfinished_corpus(folder, plan)
        raise SourceError(f"no image of source {plan.listing.root} can be decoded: {_shown(reasons)}")
    storage.remove_unfinished(folder)
    assemble(folder, plan, records)
    return Corpus.open(str(folder)), records


def _make_plan(settings: ShardSettings, source: Path) -> Plan:
    if settings.labels is None:
        listing = list_source(source)
    else:
        listing = list_labelled(source, storage.local_path(absolute_path(settings.labels, "labels"), "labels"))
    descriptions = None
    if settings.words is not None:
        words = storage.local_path(absolute_path(settings.words, "words"), "words")
        descriptions = read_words(words, listing.classes)
    plan = Plan(listing, descriptions, round(settings.shard_mb * 1e6), settings.seed)
    log.info(
        "%s images of %s classes in %s (%s): %d shards of about %s",
        f"{len(listing):,}", f"{len(listing.classes):,}", source, listing.kind, len(plan),
        _megabytes(plan.total_bytes / len(plan)),
    )  # fmt: skip
    return plan


# ------------------------------------------------------------------------------------------- the destination


def _check_places(source: Path, folder: Path) -> None:
    inside, outside = folder.resolve(), source.resolve()
    if inside == outside or outside in inside.parents:
        raise SourceError(f"destination {folder} lies inside the source {source}: give a folder beside it")
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"destination {folder} is a file: give a folder")


def _finished_before(folder: Path, plan: Plan) -> Corpus | None:
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
        what = f"{there['source']['images']:,} images, {there['settings']}" if "source" in there else "unreadable"
        raise CorpusError(
            f"destination {folder} holds another corpus, made from another source or with other settings ({what}; now "
            f"{len(plan.listing):,} images, {plan.settings}): give another folder, or remove that one"
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


def _check_room(folder: Path, plan: Plan) -> None:
    missing = [k for k in range(len(plan)) if finished_record(folder, plan.name(k), plan.plan_hash) is None]
    needed = (plan.total_bytes + _INDEX_BYTES * len(plan.listing)) * len(missing) / len(plan)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    if needed > free:
        raise CorpusError(
            f"destination {folder} has {_megabytes(free)} free, {_megabytes(needed)} are needed: make room there"
        )


def _remove_unfinished_corpus(folder: Path, plan: Plan) -> None:
    for shard in range(len(plan)):
        remove_shard(folder, plan.name(shard))
    (folder / PLAN).unlink()
    folder.rmdir()


# --------------------------------------------------------------------------------------------- the work itself


def _write_shards(folder: Path, plan: Plan, workers: int) -> list[dict[str, Any]]:
    """Write the shards that are not finished yet; returns the records of all, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.remove_unfinished(folder)
    storage.write_json(folder / PLAN, plan.describe())
    records = {shard: finished_record(folder, plan.name(shard), plan.plan_hash) for shard in range(len(plan))}
    missing = [shard for shard, record in records.items() if record is None]
    if len(missing) < len(plan):
        log.info("%d of %d shards are finished already", len(plan) - len(missing), len(plan))
    if missing:
        for shard, record in _run_tasks(folder, plan, missing, workers):
            records[shard] = record
    return [record for _, record in sorted(records.items()) if record is not None]


def _run_tasks(folder: Path, plan: Plan, missing: list[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write shards in Ray tasks, a bounded number at a time; yields (shard, record) as they finish."""
    from cluster.ray_runtime import ray_session  # before ray: it sets what ray reads when it is imported

    with ray_session():
        import ray

        # A failing disk or network is tried again, also on another node; a source that is wrong is not.
        remote = ray.remote(num_cpus=1, max_retries=_ATTEMPTS - 1, retry_exceptions=[OSError])(write_shard)
        at_once = workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, int] = {}
        progress = Progress(len(plan.listing), "images", "sharding")
        progress.skip(len(plan.listing) - sum(plan.samples(shard) for shard in missing))
        waiting = iter(missing)
        written = 0
        note = ""
        while True:
            while len(running) < at_once and (shard := next(waiting, None)) is not None:
                running[remote.remote(plan.task(shard, folder))] = shard
            if not running:
                break
            done, _ = ray.wait(list(running), num_returns=1)
            shard = running.pop(done[0])
            record = _result(ray, done[0], plan.name(shard), folder)
            written += record["sizes"][".tar"]
            rate = written / 1e6 / max(time.monotonic() - progress.started, 1e-9)
            note = f"{rate:,.0f} MB/s"
            progress.update(plan.samples(shard), note)
            yield shard, record
        log.info("%s", progress.line(note))


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
                f"{name} in {folder} could not be written in {_ATTEMPTS} attempts: {cause}. {_GO_ON}"
            ) from error
        raise


# ------------------------------------------------------------------------------------------------- the summary


def _log_summary(corpus: Corpus, records: list[dict[str, Any]], plan: Plan, seconds: float) -> None:
    manifest = corpus.manifest
    log.info(
        "wrote %s: %s images of %s classes in %d shards, %s, in %s",
        corpus.path, f"{corpus.num_samples:,}", f"{len(corpus.classes):,}", len(manifest["shards"]),
        _megabytes(manifest["num_bytes"]), duration(seconds),
    )  # fmt: skip
    reasons = Counter(reason for _, reason in plan.listing.left_out)
    reasons.update(entry["reason"] for record in records for entry in record["quarantined"])
    if reasons:
        log.warning(
            "%s images are left out, listed in %s: %s",
            f"{manifest['quarantined']:,}", corpus.path / "quarantine.jsonl", _shown(reasons),
        )  # fmt: skip
        if manifest["quarantined"] > _PATIENCE * len(plan.listing):
            log.warning("that is a large share of the source: is it whole?")
    empty = [name for name, count in zip(corpus.classes, corpus.class_counts, strict=True) if not count]
    if empty:
        log.warning("%d classes have no image: %s", len(empty), _some(empty))
    log.info("corpus hash %s", corpus.corpus_hash)


def _shown(reasons: Counter[str]) -> str:
    return _some([f"{count:,} x {reason}" for reason, count in reasons.most_common()], "; ")


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


def _megabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_command(main)
