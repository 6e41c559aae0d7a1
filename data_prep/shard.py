"""Turn images into a corpus of shards: `python data_prep/shard.py SOURCE DESTINATION [KEY=VALUE ...]`."""

import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import Field

from cluster import storage
from cluster.command import Progress, absolute_path, log, run_command
from cluster.folders import Folder, LocalFolder, folder_at
from cluster.settings import Settings, parse_command
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import assemble
from data_prep.corpus_jobs import (
    GO_ON,
    begin,
    check_places,
    check_room,
    finished_before,
    in_megabytes,
    log_summary,
    reasons_in_words,
    remove_unfinished_corpus,
    run_tasks,
)
from data_prep.label_files import list_labelled, read_words
from data_prep.shard_plan import Plan
from data_prep.shard_task import finished_records, write_shard
from data_prep.sources import SourceError, list_source

_INDEX_BYTES = 200
"""A sample's share of the files beside the tars, for an estimate of the room that is needed."""

DESCRIPTION = """
Turn images into a corpus: WebDataset tars of equal size with an index, in a global shuffle, on all CPUs of the
Ray cluster (or of this machine). Every image is decoded once; the bytes of valid ones stay as they are, the others
are listed with the reason in DESTINATION/quarantine.jsonl. A run that was interrupted goes on where it was when the
same command is given again, and a finished corpus is left as it is.

  SOURCE       an image folder (one sub-folder of images for each class), or a tar of one tar for each class
               (ImageNet-21k and ImageNet-1k as they are distributed), or with labels=FILE any folder of images
  DESTINATION  a new folder, on storage that every node mounts or on S3 (s3://BUCKET/FOLDER)

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
    folder = folder_at(absolute_path(settings.destination, "destination"), "destination")
    check_places(LocalFolder(source), folder)
    plan = _make_plan(settings, source)
    finished = finished_before(folder, plan)
    if finished is not None:
        log.info("%s is finished already (%s images): nothing to do", folder, f"{finished.num_samples:,}")
        return finished
    there = finished_records(folder, [plan.name(shard) for shard in range(len(plan))], plan.plan_hash)
    missing = 1 - len(there) / len(plan)
    check_room(folder, (plan.total_bytes + _INDEX_BYTES * len(plan.listing)) * missing)
    try:
        corpus = _make_corpus(folder, plan, settings.workers)
    except OSError as error:
        if isinstance(error, storage.StorageError):
            raise
        raise storage.StorageError(f"{folder} cannot be written: {error}. {GO_ON}") from error
    log_summary(corpus, time.monotonic() - started)
    return corpus


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
        in_megabytes(plan.total_bytes / len(plan)),
    )  # fmt: skip
    return plan


def _make_corpus(folder: Folder, plan: Plan, workers: int) -> Corpus:
    records = _write_shards(folder, plan, workers)
    if not any(record["samples"] for record in records):
        reasons = Counter(entry["reason"] for record in records for entry in record["quarantined"])
        remove_unfinished_corpus(folder, [record["name"] for record in records])
        raise SourceError(f"no image of source {plan.root} can be decoded: {reasons_in_words(reasons)}")
    folder.remove_unfinished()
    assemble(folder, plan, records)
    return Corpus.open(folder)


def _write_shards(folder: Folder, plan: Plan, workers: int) -> list[dict[str, Any]]:
    """Write the shards that are not finished yet; returns the records of all, in their order."""
    shards = {plan.name(shard): shard for shard in range(len(plan))}
    records = begin(folder, plan, list(shards))
    missing = {name: shard for name, shard in shards.items() if name not in records}
    progress = Progress(len(plan.listing), "images", "sharding")
    progress.skip(sum(plan.samples(shards[name]) for name in records))
    tasks = {name: partial(plan.task, shard, folder) for name, shard in missing.items()}
    records |= run_tasks(write_shard, tasks, folder, workers, progress, lambda name: plan.samples(shards[name]))
    return [records[name] for name in shards]


if __name__ == "__main__":
    run_command(main)
