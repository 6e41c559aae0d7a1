"""Copies a part of a corpus into shards of its own: of each shard that the part shares, its own samples only.

Sample ids, their order and the sizes of the shards stay, so that a run that began on the part goes on with the copy.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cluster import storage
from cluster.command import Progress, log
from cluster.folders import Folder, at_hand
from data_prep.columns import LABEL_DTYPE, Labels
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import assemble
from data_prep.corpus_format import COPY_OF, FORMAT_VERSION, LABEL_FORM, PLACES, CorpusError, image_check
from data_prep.corpus_jobs import check_room
from data_prep.sample_labels import LabelForm, forms_of, label_of
from data_prep.shard_task import commit_shard, finished_records
from data_prep.tar_headers import BLOCK, Member, TarError, iterate_members, padding
from data_prep.tasks import Work, run_tasks
from data_prep.webdataset_tars import (
    TarSample,
    UnusableSample,
    dali_index,
    dali_index_line,
    iterate_samples,
)

_BYTES_BESIDE_IMAGE = 4 * BLOCK
"""In a tar and in the files beside it, for an estimate of the room that is needed."""


@dataclass(frozen=True)
class PartPlan:
    """What the copy of a part is made of."""

    part: Corpus

    @property
    def version(self) -> int:
        """The first: a part has no versions."""
        return 1

    @property
    def plan_hash(self) -> str:
        """Of the part that is copied."""
        content = [FORMAT_VERSION, "copy of a part", self.part.corpus_hash]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @property
    def root(self) -> str:
        """Where the corpus lies that the part is one of, as far as that is known."""
        return str(self.part.manifest["created_by"].get("source", ""))

    @property
    def label_kind(self) -> str:
        """ "single" or "multi"."""
        return self.part.label_kind

    @property
    def classes(self) -> list[str]:
        """Names in the order of their numbers."""
        return self.part.classes

    @property
    def class_descriptions(self) -> list[str] | None:
        """What people call the classes, or None."""
        return self.part.class_descriptions

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """A part leaves nothing out."""
        return ()

    @property
    def removed(self) -> None:
        """Nor does it remove duplicates."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the part."""
        manifest = self.part.manifest
        return {
            "plan_hash": self.plan_hash,
            "settings": manifest.get("settings", {}),
            "source": manifest["source"],
            COPY_OF: {"corpus_hash": self.part.corpus_hash, "shard_bytes": self.part.window_bytes},
            **({LABEL_FORM: manifest[LABEL_FORM]} if LABEL_FORM in manifest else {}),
        }


@dataclass(frozen=True)
class _PartTask:
    """All that is needed to write one shard."""

    source: Folder
    """Where the tar lies that the part shares."""
    destination: Folder
    name: str
    plan_hash: str
    rows: NDArray[np.void]
    """SAMPLE_DTYPE [N] of the samples to copy, in their order."""
    labels: NDArray[np.int64] | Labels
    num_classes: int
    forms: tuple[LabelForm, ...]
    """How labels stand in the tar."""
    origins: list[str]


def copy_part(part: Corpus, destination: Folder, workers: int) -> dict[str, Any]:
    """Write the shards of a part that are not there yet, and last the manifest; returns that.

    Args:
        part: to copy.
        destination: a folder that the caller holds.
        workers: shards at a time; 0 for what the cluster has CPUs for.

    Raises:
        CorpusError: a shard of the part is damaged, or there is too little room.
        StorageError: the storage fails.
    """
    plan = PartPlan(part)
    shards = {shard["name"]: number for number, shard in enumerate(part.manifest["shards"])}
    samples = part.shard_sizes
    destination.remove(PLACES)  # of an unfinished copy by an older version
    records = finished_records(destination, list(shards), plan.plan_hash)
    progress = Progress(part.num_samples, "images", "copying")
    if records:
        progress.skip(sum(samples[shards[name]] for name in records))
        log.info("%d of %d shards are there already", len(records), len(shards))
    image_bytes = int(part.index["length"].sum(dtype=np.int64))
    missing = 1 - sum(samples[shards[name]] for name in records) / part.num_samples
    check_room(destination, (image_bytes + _BYTES_BESIDE_IMAGE * part.num_samples) * missing)
    first_ids = np.concatenate([[0], np.cumsum(samples)])
    tasks = {
        name: partial(_task, plan, destination, number, int(first_ids[number]))
        for name, number in shards.items()
        if name not in records
    }
    work = Work(part.num_samples, image_bytes * missing, decodes=False)
    records |= run_tasks(
        _write_shard, tasks, destination, workers, progress, lambda name: samples[shards[name]], work=work
    )
    return assemble(destination, plan, [records[name] for name in shards])


def _task(plan: PartPlan, destination: Folder, shard: int, first_id: int) -> _PartTask:
    part = plan.part
    facts = part.manifest["shards"][shard]
    ids = np.arange(first_id, first_id + facts["samples"])
    of_row, classes, weights = part.labels_of(ids)
    labels: NDArray[np.int64] | Labels = classes
    if part.label_kind == "multi":
        rows = np.empty(len(classes), LABEL_DTYPE)
        rows["class"], rows["weight"] = classes, weights
        labels = Labels(rows, np.searchsorted(of_row, np.arange(len(ids) + 1)).astype(np.int64))
    lines = part.read_origins(shard)
    origins = [lines[place] for place in part.places_of(ids).tolist()]
    return _PartTask(
        part.shards_folder, destination, facts["name"], plan.plan_hash, part.index[ids], labels, len(part.classes),
        forms_of(part.manifest), origins,
    )  # fmt: skip


def _write_shard(task: _PartTask) -> dict[str, Any]:
    """Copy the samples of a shard with all of their members; done twice, it gives the same bytes.

    Raises:
        CorpusError: the tar is damaged, or two of its samples would become one.
        OSError: the storage fails; worth another try.
    """
    with at_hand(task.source, task.name) as path:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise storage.unreadable(path, error) from error
        try:
            return _copy_samples(task, descriptor)
        except TarError as error:
            raise CorpusError(str(error)) from error
        finally:
            os.close(descriptor)


def _copy_samples(task: _PartTask, descriptor: int) -> dict[str, Any]:
    where = f"{task.source}/{task.name}"
    starts: dict[int, int] = {}
    members = _with_starts(iterate_members(descriptor, 0, os.fstat(descriptor).st_size, where), starts)
    wanted = set(task.rows["offset"].tolist())
    found = {sample.image().offset: sample for sample in iterate_samples(members) if _image_at(sample, wanted)}
    rows = task.rows.copy()
    rows["shard"] = 0
    digest, size, lines, key = xxhash.xxh3_128(), 0, [], None
    with task.destination.building(task.name) as file:
        for place, row in enumerate(task.rows):
            sample = found.get(int(row["offset"]))
            content = {} if sample is None else _read(descriptor, sample)
            label_at = None if sample is None else _label_as_written(task, place, sample, content)
            if sample is None or label_at is None:
                raise CorpusError(
                    f"{where} is damaged: its sample with the image at byte {row['offset']} is not what the index "
                    "says. Look at the whole corpus with data_prep/verify.py"
                )
            if sample.key == key:
                raise CorpusError(
                    f"{where} has two samples of the key {os.fsdecode(key)!r}, which lie side by side in the copy, "
                    "where every reader takes them for one: shard the part anew instead, with data_prep/shard.py"
                )
            key = sample.key
            moved: dict[int, Member] = {}
            for _, member in sample.members:
                start = starts[member.offset]  # of its headers
                piece = _bytes_of(descriptor, start, member.offset - start) + content[member.offset]
                piece += bytes(padding(member.size))
                moved[member.offset] = member._replace(offset=size + member.offset - start)
                digest.update(piece)
                storage.write_fully(file, piece)
                size += len(piece)
            image, label = moved[sample.image().offset], moved[label_at]
            rows["offset"][place] = image.offset
            lines.append(dali_index_line((image, label)))
        end = bytes(2 * BLOCK)
        digest.update(end)
        storage.write_fully(file, end)
        size += len(end)
    return commit_shard(
        task.destination, task.name, task.plan_hash, rows, task.labels if isinstance(task.labels, Labels) else None,
        task.origins, (), dali_index(lines), size, digest.hexdigest(),
    )  # fmt: skip


def _with_starts(members: Iterable[Member], starts: dict[int, int]) -> Iterator[Member]:
    """The members of a tar; notes where the headers of each begin, which may be several (long names)."""
    end = 0
    for member in members:
        starts[member.offset] = end
        end = member.offset + member.size + padding(member.size)
        yield member


def _image_at(sample: TarSample, offsets: set[int]) -> bool:
    try:
        return sample.image().offset in offsets
    except UnusableSample:
        return False


def _read(descriptor: int, sample: TarSample) -> dict[int, bytes]:
    """The content of each of a sample's members, by its offset."""
    return {member.offset: _bytes_of(descriptor, member.offset, member.size) for _, member in sample.members}


def _bytes_of(descriptor: int, offset: int, size: int) -> bytes:
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more  # one call reads 2 GiB at most
    return content


def _label_as_written(task: _PartTask, place: int, sample: TarSample, content: Mapping[int, bytes]) -> int | None:
    """Where the label of a sample begins; None where image or label are not those of the index."""
    row = task.rows[place]
    try:
        label, pairs = label_of(sample, lambda member: content[member.offset], task.forms, task.num_classes)
    except UnusableSample:
        return None
    if isinstance(task.labels, Labels):
        expected = [(int(number), float(weight)) for number, weight in task.labels[place].tolist()]
    else:
        expected = [(int(task.labels[place]), 1.0)]
    same_labels = [(number, float(np.float32(weight))) for number, weight in pairs] == expected
    image = content[sample.image().offset]
    are_whole = same_labels and len(image) == row["length"] and image_check(image) == row["check"]
    return label.offset if are_whole else None
