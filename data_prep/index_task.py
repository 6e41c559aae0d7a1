"""Indexes one WebDataset tar written by others: the work of one Ray task. Done twice, it gives the same bytes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cluster import storage
from cluster.folders import Folder, at_hand
from data_prep.columns import Labels
from data_prep.corpus_format import SAMPLE_DTYPE, image_check
from data_prep.decoder_process import refuse_deadly
from data_prep.image_check import MAX_BYTES, TOO_MANY_BYTES, UnusableImage, check_image
from data_prep.label_weights import scaled
from data_prep.listing import SourceError
from data_prep.origin_lines import one_line
from data_prep.sample_labels import LabelForm, NoClass
from data_prep.shard_task import commit_shard
from data_prep.tar_headers import TarError, iterate_members
from data_prep.webdataset_tars import (
    TarSample,
    UnusableSample,
    dali_index,
    dali_index_line,
    iterate_samples,
)


@dataclass(frozen=True)
class Tar:
    """A tar of somebody else."""

    folder: Folder
    name: str
    size: int
    """When it was listed, bytes."""

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class IndexTask:
    """All that is needed to index one tar."""

    folder: Folder
    """Of the corpus."""
    source: Tar
    """Its name is that of the shard."""
    plan_hash: str
    form: LabelForm
    """How the labels stand in it."""
    num_classes: int | None
    """How many classes there are, or None where the labels are to say."""
    copy: bool
    """Whether the corpus gets a copy of the tar and not a hard link."""


def index_tar(task: IndexTask) -> dict[str, Any]:
    """Put a tar into the corpus, check its samples, write what belongs beside it and last its record.

    Samples without a label or with an image that does not decode stay in the tar, but not in the index.

    Raises:
        SourceError: the tar is gone, damaged, has changed since it was listed, or cannot be linked.
        OSError: the file system fails; worth another try.
    """
    with _placed(task) as path:
        return _index(task, path)


def _index(task: IndexTask, path: Path) -> dict[str, Any]:
    columns: list[tuple[int, int, int, int, int, int, int]] = []
    labels: list[list[tuple[int, float]]] = []
    origins: list[str] = []
    index_lines: list[bytes] = []
    quarantined: list[tuple[str, str]] = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size != task.source.size:
            raise SourceError(
                f"{task.source} changed while it was indexed: it had {task.source.size} bytes, now {size}"
            )
        for sample in iterate_samples(iterate_members(descriptor, 0, size, str(task.source))):
            try:
                row, pairs, line = _read_sample(descriptor, sample, task)
            except NoClass as reason:
                raise SourceError(f"{task.source}, sample {one_line(sample.key)}: {reason}") from None
            except (UnusableSample, UnusableImage) as reason:
                quarantined.append((f"{task.source.name}/{one_line(sample.members[0][1].name)}", str(reason)))
                continue
            columns.append(row)
            labels.append(pairs)
            origins.append(f"{task.source.name}/{one_line(sample.image().name)}")
            index_lines.append(line)
    except TarError as error:
        raise SourceError(str(error)) from error
    finally:
        os.close(descriptor)
    return commit_shard(
        task.folder, task.source.name, task.plan_hash,
        np.array(columns, SAMPLE_DTYPE), Labels.of(labels) if task.form.many else None,
        origins, quarantined, dali_index(index_lines),
        size, storage.hash_file(path),
    )  # fmt: skip


def _read_sample(
    descriptor: int, sample: TarSample, task: IndexTask
) -> tuple[tuple[int, int, int, int, int, int, int], list[tuple[int, float]], bytes]:
    """A sample's row of the index, its labels, and its line in DALI's index."""
    image, label = sample.image(), sample.label(task.form.extension)
    pairs = task.form.labels(_read(descriptor, label.offset, label.size), task.num_classes)
    _check_weights(pairs, f"{task.source}, {one_line(label.name)}")
    if image.size > MAX_BYTES:
        raise UnusableImage(TOO_MANY_BYTES)
    data = _read(descriptor, image.offset, image.size)
    refuse_deadly(data)
    facts = check_image(data)
    heaviest = max(pairs, key=lambda pair: (pair[1], -pair[0]))[0] if pairs else -1
    row = (image.offset, image.size, 0, heaviest, image_check(data), facts.width, facts.height)
    return row, pairs, dali_index_line((image, label))


def _check_weights(pairs: list[tuple[int, float]], where: str) -> None:
    weights = np.array([weight for _, weight in pairs])

    def complain(label: int, what: str) -> NoReturn:
        raise SourceError(
            f"{where}: label {pairs[label][0]} {what}. Tars are indexed as they are: to write them anew with weights "
            f"that are scaled, shard them (python data_prep/shard.py SOURCE DESTINATION weight_scale=...)"
        )

    scaled(weights, 1, complain)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(descriptor, size, offset)):  # one call reads 2 GiB at most
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


@contextmanager
def _placed(task: IndexTask) -> Iterator[Path]:
    """Bring the tar into the corpus under its own name; gives where it can be read on this node."""
    name, local = task.source.name, task.folder.local
    if task.source.folder.local is None:
        with at_hand(task.source.folder, name) as path:
            task.folder.put(path, name)
            yield path
        return
    try:
        source = (task.source.folder.local / name).resolve(strict=True)
    except FileNotFoundError:
        raise SourceError(
            f"{task.source} is not there on node {os.uname().nodename}: it must be mounted at the same path on every "
            f"node of the cluster"
        ) from None
    if task.copy:
        task.folder.put(source, name)
        yield source if local is None else local / name
        return
    assert local is not None
    path = local / name
    if not (path.exists() and path.samefile(source)):
        _link(task, source, path)
    yield path


def _link(task: IndexTask, source: Path, path: Path) -> None:
    temporary = storage.temporary_path(path)
    try:
        os.link(source, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SourceError(
            f"{task.source} cannot be hard-linked into {task.folder} ({error.strerror}): give tars=copy, or a "
            f"destination on the same file system"
        ) from error
    storage.sync_folder(path.parent)
