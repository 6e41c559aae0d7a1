"""Turn images into a corpus of shards: `python data_prep/shard.py SOURCE DESTINATION [KEY=VALUE ...]`."""

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

from pydantic import Field

from cluster.command import Progress, absolute_path, counted, log, run_command
from cluster.folders import Folder, folder_at
from cluster.settings import SettingsError, parse_command
from data_prep.append import NewClasses, plan_append, what_is_new
from data_prep.card import write_card
from data_prep.convert import Conversion, Ending
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import assemble
from data_prep.corpus_format import MANIFEST, CorpusError
from data_prep.corpus_jobs import (
    begin,
    check_places,
    check_room,
    check_working_folders,
    finished_before,
    held,
    in_megabytes,
    log_summary,
    reasons_in_words,
    remove_unfinished_corpus,
    remove_working_folders,
    written,
)
from data_prep.duplicates import DEFAULT_DISTANCE, MAX_DISTANCE, DuplicateSearch, remove_duplicates
from data_prep.endings import Endings
from data_prep.failure_share import FailureShare
from data_prep.label_report import report_labels
from data_prep.listing import Listing, SourceError
from data_prep.recognition import source_folder
from data_prep.removed import UNCOMPARED
from data_prep.shard_plan import Plan
from data_prep.shard_task import finished_records, write_shard
from data_prep.source_settings import SourceSettings
from data_prep.sources import embedded_stamp, find_source, list_source
from data_prep.tasks import Work, run_tasks

_INDEX_BYTES = 200
"""A sample's share of the files beside the tars, for an estimate of the room that is needed."""

_STAMP = "table.json"
"""Of a corpus from a table that holds its images: what the table was."""

DESCRIPTION = """
Turn images into a corpus: WebDataset tars of equal size with an index, in a global shuffle, on all CPUs of the
Ray cluster (or of this machine). Every image is decoded once; the bytes of valid ones stay as they are, the others
are listed with the reason in DESTINATION/quarantine.jsonl. A run that was interrupted goes on where it was when the
same command is given again, and a finished corpus is left as it is.

  SOURCE       one of these, recognised from what is there (or named with kind=):
               an image folder: one sub-folder of images for each class; also on S3
               a tar of one tar for each class (ImageNet-21k and ImageNet-1k as they are distributed), or of class
               folders; gzip too, the whole or each class tar: it is read as it is, and never unpacked to disk
               ImageNet's validation tar, or its images in one folder: with truth=FILE
               a table (.csv, .tsv, .jsonl, .json, gzip too, .parquet; several as a folder or a pattern) with a column
               of paths or of addresses (s3://; http:// with fetch=true), or in Parquet of images, and one of labels,
               perhaps one of weights, or columns of 0 and 1 for the classes;
               with labels=TABLE the SOURCE is the folder that the table's paths are relative to; COCO's JSON is one
               WebDataset tars of others (a folder, a tar or a pattern in quotes, such as
               'tars/train-{0000..0146}.tar'), or a corpus: to shard them anew
               split=train chooses one of splits that lie beside each other, which are never joined unasked
               any of them may be on S3 (s3://BUCKET/...)
  DESTINATION  a new folder, on storage that every node mounts or on S3 (s3://BUCKET/FOLDER); other tools read it, too:
               webdataset, timm, DALI's own reader, Hugging Face's datasets (by DESTINATION/README.md), and DuckDB,
               pandas and polars a table of its samples (DESTINATION/samples.parquet)

With append=true the images of SOURCE that DESTINATION does not have yet are added to it, as new shards under a new
version; the versions before stay readable as DESTINATION#1, DESTINATION#2, ...

examples:
  python data_prep/shard.py /data/winter21_whole.tar.gz /data/in21k words=/data/words.txt shard_mb=512
  python data_prep/shard.py /data/ILSVRC2012_img_val.tar /data/in1k-val \\
      truth=/data/devkit/data/ILSVRC2012_validation_ground_truth.txt
  python data_prep/shard.py /data/images.parquet /data/jft label_column=tags weight_column=confidence
"""


class ShardSettings(SourceSettings):
    """Settings of sharding."""

    destination: str
    """Folder of the corpus; made if it is not there."""
    shard_mb: float = Field(512, gt=0, le=1e9)
    """Size of a shard to aim at, in megabytes (10^6 bytes); all shards become nearly equal."""
    seed: int = Field(0, ge=0)
    """Of the shuffle that decides which image goes into which shard."""
    append: bool = False
    """Add the images that the corpus does not have yet (by their paths in the source) as a new version of it."""
    new_classes: NewClasses = "append"
    """What append does with classes that the corpus does not have: put them at the end of its list, or refuse."""
    max_failures: float = Field(0.25, ge=0, le=1)
    """Share of the images that may be damaged or impossible to get; above it the job stops, as soon as that shows."""
    min_side: int = Field(0, ge=0)
    """Leave out images with a side shorter than this, in pixels."""
    max_side: int = Field(0, ge=0)
    """Shrink images with a side longer than this to it, in pixels, and encode them again as JPEG; 0 leaves all."""
    baseline: bool = False
    """Encode JPEGs again that a hardware decoder does not take (progressive, CMYK), as baseline RGB. Not lossless."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Of images that are encoded again."""
    ending: Ending = "own"
    """Ending of the images' names in the tars: their formats' own (jpg, png, webp, ...), or jpg for all of them. Every
    reader decodes by content; but Hugging Face makes a column of each ending, and to_tuple("jpg", "cls") needs one."""
    exclude: tuple[str, ...] = ()
    """Corpora whose images must not be in this one, such as evaluation sets: exact copies and near ones (re-encoded,
    resized, gray, mirrored, slightly cropped) are left out and listed in DESTINATION/removed.jsonl."""
    dedup: bool = False
    """Leave out the same way what the source has twice; the first in sorted order stays."""
    duplicate_distance: int = Field(DEFAULT_DISTANCE, ge=0, le=MAX_DISTANCE)
    """Bits by which the 64-bit perceptual hashes of near copies may differ; 0: equal hashes only."""
    workers: int = Field(0, ge=0)
    """Shards written at a time; 0 is two for each CPU of the cluster. The corpus does not depend on it."""


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
        SourceError: the source is missing, empty, unreadable, without images, changed while it was read, or too much
            of it is damaged.
        CorpusError: the destination holds something else, or has too little room.
        SettingsError: a setting that nothing reads, or that does not go with another.
        LeaseError: another job works in the destination.
    """
    check_settings(settings)
    folder = folder_at(absolute_path(settings.destination, "destination"), "destination")
    check_places(source_folder(absolute_path(settings.source, "source")), folder)
    with held(folder):
        check_working_folders(folder)
        return _shard_into(folder, settings)


def _shard_into(folder: Folder, settings: ShardSettings) -> Corpus:
    source = find_source(settings)
    stamp = embedded_stamp(source) if not settings.append else None
    if stamp is not None:
        # such a table is copied before it is listed: not again if the corpus is finished
        stamp += f" {settings.seed} {settings.shard_mb} {_conversion(settings)}"
        stamp += f" {settings.exclude} {settings.dedup} {settings.duplicate_distance}"
        if folder.size(_STAMP) is not None and folder.read_json(_STAMP) == stamp:
            with suppress(CorpusError):
                corpus = Corpus.open(folder, version=1)
                log.info("%s is finished already (%s): nothing to do", folder, counted(len(corpus), "image"))
                write_card(corpus)
                return corpus
    corpus = shard_listing(lambda: list_source(settings, settings.workers, folder, source), folder, settings)
    if stamp is not None:
        folder.write_json(_STAMP, stamp)
    with written(folder):
        write_card(corpus)
    return corpus


def shard_listing(listed: Callable[[], Listing], folder: Folder, settings: ShardSettings) -> Corpus:
    """Shard what a function lists into a folder that the caller holds: what the settings say of the source is not read.

    Errors: as shard_corpus.
    """
    started = time.monotonic()
    if settings.append and folder.size(MANIFEST) is None:
        raise CorpusError(f"append = true: there is no finished corpus at {folder} to append to")
    listing = listed()
    report_labels(listing)
    shard_bytes = round(settings.shard_mb * 1e6)
    conversion = _conversion(settings)
    before: Corpus | None = None
    if settings.append:
        listing, before = what_is_new(listing, folder, conversion)
    search = DuplicateSearch(settings.exclude, settings.dedup, settings.duplicate_distance, before)
    listing = remove_duplicates(listing, search, folder, settings.workers)
    if before is not None and not len(listing):
        log.info("%s has all of them: nothing to do", folder)
        remove_working_folders(folder)
        return before
    if not len(listing):
        also = f", or {UNCOMPARED}" if any(reason == UNCOMPARED for _, reason in listing.left_out) else ""
        raise SourceError(f"every image of source {listing.place} is a duplicate{also}: nothing is left of it")
    if before is not None:
        plan = plan_append(listing, before, folder, shard_bytes, settings.seed, conversion, settings.new_classes)
    else:
        plan = Plan(listing, listing.class_descriptions, shard_bytes, settings.seed, conversion)
        finished = finished_before(folder, plan)
        if finished is not None:
            log.info("%s is finished already (%s): nothing to do", folder, counted(finished.num_samples, "image"))
            remove_working_folders(folder)
            return finished
    log.info(
        "%s of %s in %s (%s): %s of about %s",
        counted(len(plan.listing), "image"), counted(len(listing.classes), "class", "classes"),
        listing.place, listing.kind, counted(len(plan), "shard"),
        in_megabytes(plan.total_bytes / len(plan)),
    )  # fmt: skip
    there = finished_records(folder, [plan.name(shard) for shard in range(len(plan))], plan.plan_hash)
    missing = 1 - len(there) / len(plan)
    check_room(folder, (plan.total_bytes + _INDEX_BYTES * len(plan.listing)) * missing)
    with written(folder):
        corpus = _make_corpus(folder, plan, settings, before)
    if corpus is not before:
        log_summary(corpus, time.monotonic() - started)
    return corpus


def check_settings(settings: ShardSettings) -> None:
    """Refuse settings that do not go together.

    Raises:
        SettingsError: a setting that nothing reads, or that does not go with another.
    """
    if settings.jpeg_quality != 95 and not (settings.max_side or settings.baseline):
        raise SettingsError("jpeg_quality is not read: no image is encoded again (max_side or baseline)")
    if settings.duplicate_distance != DEFAULT_DISTANCE and not (settings.exclude or settings.dedup):
        raise SettingsError("duplicate_distance is not read: no duplicates are looked for (exclude or dedup)")
    if settings.new_classes != "append" and not settings.append:
        raise SettingsError("new_classes is not read: it is for append=true")
    if settings.max_side and settings.min_side > settings.max_side:
        raise SettingsError(f"min_side = {settings.min_side} is more than max_side = {settings.max_side}")
    if settings.dedup and settings.min_side:
        raise SettingsError(
            "dedup and min_side do not go together: of two copies the one that stays could be the one that is too "
            "small. Shard with min_side first, then shard that corpus with dedup"
        )


def _conversion(settings: ShardSettings) -> Conversion:
    return Conversion(settings.min_side, settings.max_side, settings.baseline, settings.jpeg_quality, settings.ending)


def _make_corpus(folder: Folder, plan: Plan, settings: ShardSettings, before: Corpus | None) -> Corpus:
    records = _write_shards(folder, plan, settings)
    if not any(record["samples"] for record in records):
        reasons = Counter(entry["reason"] for record in records for entry in record["quarantined"])
        remove_unfinished_corpus(folder, [record["name"] for record in records], plan.version)
        if before is not None:
            log.warning("none of the %d new images can be used: %s", len(plan.listing), reasons_in_words(reasons))
            return before
        raise SourceError(f"no image of source {plan.root} can be used: {reasons_in_words(reasons)}")
    folder.remove_unfinished()
    assemble(folder, plan, records, before)
    remove_working_folders(folder)
    return Corpus.open(folder, version=plan.version)


def _write_shards(folder: Folder, plan: Plan, settings: ShardSettings) -> list[dict[str, Any]]:
    """Write the shards that are not finished yet; returns the records of all, in their order."""
    shards = {plan.name(shard): shard for shard in range(len(plan))}
    records = begin(folder, plan, list(shards))
    failures = FailureShare(settings.max_failures, plan.left_out, len(plan.listing))
    endings = Endings()

    def look(record: dict[str, Any]) -> None:
        failures.count(record)
        endings.count(record)

    for record in records.values():
        failures.count(record)
    missing = {name: shard for name, shard in shards.items() if name not in records}
    progress = Progress(len(plan.listing), "images", "sharding")
    progress.skip(sum(plan.samples(shards[name]) for name in records))
    tasks = {name: partial(plan.task, shard, folder) for name, shard in missing.items()}
    left = sum(plan.samples(shard) for shard in missing.values())
    work = Work(left, plan.total_bytes * left / max(len(plan.listing), 1))
    records |= run_tasks(
        write_shard, tasks, folder, settings.workers, progress, lambda name: plan.samples(shards[name]), look, work=work
    )
    in_order = [records[name] for name in shards]
    if any(record["samples"] for record in in_order):
        failures.check_all(in_order)
    return in_order


if __name__ == "__main__":
    run_command(main)
