"""Make a corpus of WebDataset tars written by others: `python data_prep/index.py SOURCE DESTINATION`."""

import hashlib
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

from pydantic import Field

from cluster.command import Progress, absolute_path, counted, log, run_command
from cluster.folders import Folder, folder_at
from cluster.settings import Settings, parse_command
from data_prep.card import write_card
from data_prep.class_names import read_classes
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import assemble
from data_prep.corpus_format import FORMAT_VERSION, LABEL_FORM
from data_prep.corpus_jobs import (
    begin,
    check_places,
    check_room,
    finished_before,
    held,
    in_megabytes,
    log_summary,
    reasons_in_words,
    remove_unfinished_corpus,
    written,
)
from data_prep.failure_share import FailureShare
from data_prep.image_tars import refuse_compression
from data_prep.index_tars import label_extension_of, list_tars
from data_prep.index_task import IndexTask, Tar, index_tar
from data_prep.label_cells import LabelCells
from data_prep.label_report import report_corpus
from data_prep.listing import SourceError
from data_prep.recognition import source_folder
from data_prep.sample_labels import LabelForm, described
from data_prep.shard_task import finished_records, read_rows
from data_prep.small_files import file_here
from data_prep.source_settings import NoLabel
from data_prep.table_labels import LabelKind
from data_prep.tar_sample_source import form_of_tars, names_in_tars
from data_prep.tasks import Work, run_tasks

_THREADS = 16
"""That look at the tars' beginnings."""

DESCRIPTION = """
Make a corpus of WebDataset tars written by others, without writing them again: the shards of the corpus are those
very tars, hard-linked or copied, and beside them come the index, DALI's indices and the manifest. Each sample needs
an image (jpg, jpeg, png, webp, bmp or tif) and, right before or after it under the same key, a label: KEY.cls with a
class number or name, or KEY.json with {"labels": [3, 7], "weights": [1, 0.4]} (weights may be left out) or
{"label": 3}, {"class": "cat"}, ... .
Every image is decoded once; samples without a label or with a damaged image stay in the tar, are not in the index,
and are listed with the reason in DESTINATION/quarantine.jsonl. A run that was interrupted goes on where it was when
the same command is given again.

  SOURCE       a folder of .tar files, one .tar file, or a pattern in quotes such as '/data/in1k/train-*.tar'; with
               tars=copy it may be on S3
  DESTINATION  a new folder; for hard links on the same file system as the tars; with tars=copy it may be on S3

example:
  python data_prep/index.py '/data/imagenet1k-wds/train-*.tar' /data/corpora/in1k-train classes=/data/classes.txt
"""


class IndexSettings(Settings):
    """Settings of indexing."""

    source: str
    """Folder of tars, a tar, or a pattern of tars."""
    destination: str
    """Folder of the corpus; made if it is not there."""
    split: str | None = None
    """Which split, where tars of several lie in one folder: train, validation, test, or another word of their names;
    all takes the tars of all splits."""
    classes: str | None = None
    """File with one class a line, in the order of the class numbers: NAME, or NAME<tab>what people call it. Without it
    the classes are named 0, 1, ... up to the largest label."""
    labels: Literal["auto", "cls", "json"] = "auto"
    """Which member is the label: cls, json, or what the first sample has (cls of both)."""
    label_column: str | None = None
    """Key of the label in .json, such as class_id; usual keys are recognised."""
    label_delimiter: str | None = Field(None, min_length=1)
    """What stands between labels where a text holds several: a character such as ';', or space, tab, comma, semicolon,
    pipe, slash; list for lists in text; none where each text is one label as it stands."""
    labels_per_image: LabelKind = "auto"
    """One class, or many weighted labels; auto is one where the first samples have one each, and not as a list under
    `labels`."""
    no_label: NoLabel = ()
    """Labels that mean that there is none, such as -1 or unknown; one or a list."""
    tars: Literal["link", "copy"] = "link"
    """How the tars come into the corpus: as hard links, which take no room, or as copies. A linked tar must not be
    written to any more; what replaces it under its old name does no harm."""
    max_failures: float = Field(0.25, ge=0, le=1)
    """Share of the samples that may be without a label or damaged; above it the job stops, as soon as that shows."""
    workers: int = Field(0, ge=0)
    """Tars indexed at a time; 0 is two for each CPU of the cluster."""


def main() -> None:
    """The command."""
    index_corpus(
        parse_command(
            IndexSettings,
            prog="data_prep/index.py",
            description=DESCRIPTION,
            positionals=("source", "destination"),
        )
    )


@dataclass(frozen=True)
class IndexPlan:
    """Which tars are indexed, and how their labels are read."""

    root: str
    """The source as it was given."""
    tars: tuple[Tar, ...]
    form: LabelForm
    """How labels stand beside the images."""
    named_classes: tuple[list[str], list[str] | None] | None
    """Names and descriptions from a file."""
    classes: list[str]
    """Names in the order of their numbers; empty until known."""

    @property
    def version(self) -> int:
        """The first: tars are not appended."""
        return 1

    @property
    def label_kind(self) -> str:
        """ "single" or "multi"."""
        return "multi" if self.form.many else "single"

    @property
    def class_descriptions(self) -> list[str] | None:
        """What people call the classes, or None."""
        return None if self.named_classes is None else self.named_classes[1]

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """Nothing is named that is not there."""
        return ()

    @property
    def removed(self) -> None:
        """Tars of others are taken as they are."""

    @property
    def plan_hash(self) -> str:
        """Of the tars' names and sizes, the classes and the settings."""
        tars = [(tar.name, tar.size) for tar in self.tars]
        content = [FORMAT_VERSION, tars, self.form.extension, self.named_classes]
        if (form := self.form.describe()) is not None:
            content.append(form)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def describe(self) -> dict[str, Any]:
        """What is kept in plan.json and tells one plan from another."""
        return {
            "format_version": FORMAT_VERSION,
            "plan_hash": self.plan_hash,
            "settings": {"labels": self.form.extension},
            **({LABEL_FORM: self.form.describe()} if self.form.describe() is not None else {}),
            "shards": len(self.tars),
            "source": {"kind": "WebDataset tars", "tars": len(self.tars), "bytes": sum(tar.size for tar in self.tars)},
        }


def index_corpus(settings: IndexSettings) -> Corpus:
    """Index WebDataset tars as a corpus, or finish doing so; returns it opened.

    Raises:
        SourceError: there are no tars, one is damaged or cannot be linked, or no sample can be used.
        CorpusError: the destination holds something else, or has too little room.
        LeaseError: another job works in the destination.
    """
    source = absolute_path(settings.source, "source")
    folder = folder_at(absolute_path(settings.destination, "destination"), "destination")
    check_places(source_folder(source), folder)
    with held(folder):
        return _index_into(folder, source, settings)


def _index_into(folder: Folder, source: str, settings: IndexSettings) -> Corpus:
    started = time.monotonic()
    plan = _make_plan(settings, source)
    finished = finished_before(folder, plan)
    if finished is not None:
        log.info("%s is finished already (%s): nothing to do", folder, counted(finished.num_samples, "image"))
        write_card(finished)
        return finished
    if settings.tars == "copy":
        there = finished_records(folder, [tar.name for tar in plan.tars], plan.plan_hash)
        check_room(folder, sum(tar.size for tar in plan.tars if tar.name not in there))
    else:
        _check_links(folder, plan.tars)
    with written(folder):
        corpus = _make_corpus(folder, plan, settings)
        write_card(corpus)
    log_summary(corpus, time.monotonic() - started)
    return corpus


def _check_links(folder: Folder, tars: tuple[Tar, ...]) -> None:
    if folder.local is None or tars[0].folder.local is None:
        raise SourceError(f"{tars[0]} cannot be hard-linked into {folder}: give tars=copy")
    place = next(place for place in (folder.local, *folder.local.parents) if place.is_dir())
    paths = [tar.folder.local / tar.name for tar in tars if tar.folder.local is not None]
    elsewhere = next((path for path in paths if path.stat().st_dev != place.stat().st_dev), None)
    if elsewhere is not None:
        raise SourceError(
            f"{elsewhere} cannot be hard-linked into {folder}: that is another file system. Give tars=copy, or a "
            f"destination on the same one"
        )


def _make_corpus(folder: Folder, plan: IndexPlan, settings: IndexSettings) -> Corpus:
    names = [tar.name for tar in plan.tars]
    records = begin(folder, plan, names)
    tasks = {
        tar.name: partial(
            IndexTask, folder, tar, plan.plan_hash, plan.form,
            None if plan.named_classes is None else len(plan.named_classes[0]), settings.tars == "copy",
        )
        for tar in plan.tars
        if tar.name not in records
    }  # fmt: skip
    progress = Progress(len(names), "tars", "indexing")
    progress.skip(len(records))
    failures = FailureShare(settings.max_failures, (), 0)
    for record in records.values():
        failures.count(record)
    work = Work(bytes=sum(tar.size for tar in plan.tars if tar.name in tasks))
    records |= run_tasks(
        index_tar, tasks, folder, settings.workers, progress, lambda name: 1, failures.count, work=work
    )
    in_order = [records[name] for name in names]
    if not any(record["samples"] for record in in_order):
        reasons = Counter(entry["reason"] for record in in_order for entry in record["quarantined"])
        remove_unfinished_corpus(folder, names)
        raise SourceError(
            f"no sample of source {plan.root} can be used: {reasons_in_words(reasons) or 'there is none'}"
        )
    failures.check_all(in_order)
    folder.remove_unfinished()
    if plan.named_classes is None:
        largest = max(_largest(folder, record["name"]) for record in in_order)
        if largest < 0:
            remove_unfinished_corpus(folder, names)
            raise SourceError(f"no sample of source {plan.root} has a label")
        plan = replace(plan, classes=[str(number) for number in range(largest + 1)])
    assemble(folder, plan, in_order)
    corpus = Corpus.open(folder)
    report_corpus(corpus, plan.root)
    return corpus


def _largest(folder: Folder, name: str) -> int:
    """The largest class number of a shard, -1 where no sample has a label."""
    rows, labels = read_rows(folder, name)
    numbers = rows["label"] if labels is None else labels.rows["class"]
    return int(numbers.max()) if len(numbers) else -1


def _make_plan(settings: IndexSettings, source: str) -> IndexPlan:
    tars = list_tars(source, settings.split)
    named = None
    if settings.classes is not None:
        named = read_classes(file_here(settings.classes, "classes"))
    with ThreadPoolExecutor(_THREADS) as pool:
        beginnings = pool.map(lambda tar: tar.folder.read_bytes(tar.name, 0, min(tar.size, 8)), tars)
        for tar, beginning in zip(tars, beginnings, strict=True):
            refuse_compression(beginning, str(tar), gzip=False)
    extension = settings.labels if settings.labels != "auto" else label_extension_of(tars)
    places = [(tar.folder, tar.name) for tar in tars]
    cells = LabelCells.of(settings.label_delimiter)
    form = LabelForm(extension, key=settings.label_column, no_label=settings.no_label, cells=cells)
    form = form_of_tars(places, form, settings.labels_per_image)
    if form.names is not None:
        named = named or (names_in_tars(places, form), None)
        form = replace(form, names=tuple(named[0]))
    size = sum(tar.size for tar in tars)
    log.info("%s in %s, %s, %s", counted(len(tars), "tar"), source, in_megabytes(size), described(form))
    return IndexPlan(source, tars, form, named, named[0] if named else [])


if __name__ == "__main__":
    run_command(main)
