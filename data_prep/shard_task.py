"""Writes one shard: the work of one Ray task. Done twice, it gives the same bytes."""

import io
import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from cluster.folders import Folder
from cluster.records import Component, Count, Digest, Record, check_record
from cluster.storage import StorageError
from data_prep.columns import LABEL_DTYPE, Labels
from data_prep.convert import convert
from data_prep.corpus_format import ORIGINS_CHECKSUM, SAMPLE_DTYPE, CorpusError, image_check, write_again
from data_prep.decoder_process import refuse_deadly
from data_prep.image_check import MAX_BYTES, TOO_MANY_BYTES, UnusableImage, check_image
from data_prep.origin_lines import one_line
from data_prep.shard_plan import ShardTask
from data_prep.tar_shards import ShardWriter

SHARD_FILES = (".tar", ".idx", ".origins", ".rows.npz")
"""Suffixes of a shard's files beside its record."""

_RECORDS_AT_ONCE = 16
"""Records that are read at a time: on an object store each waits for the network."""

_PARSING = threading.Lock()


class _Quarantined(Record):
    origin: str
    reason: str


class _ShardRecord(Record):
    """What a shard's record must say."""

    name: Component
    plan_hash: str
    samples: Count
    xxh3_128: Digest
    origins_xxh3_128: Digest | None = None
    sizes: dict[str, Count]
    quarantined: list[_Quarantined]
    converted: Count = 0
    endings: dict[str, Count] = Field(default_factory=dict)


def record_name(name: str) -> str:
    """Of the record of the shard whose tar has this name."""
    return shard_file(name, ".record.json")


def shard_file(name: str, suffix: str) -> str:
    """Name of a file of the shard whose tar has this name."""
    return name.removesuffix(".tar") + suffix


def remove_shard(folder: Folder, name: str) -> None:
    """Remove a shard's files, the record first, so that no record is ever without its files."""
    for file in (record_name(name), *(shard_file(name, suffix) for suffix in SHARD_FILES)):
        folder.remove(file)


def finished_records(folder: Folder, names: Sequence[str], plan_hash: str) -> dict[str, dict[str, Any]]:
    """The records, by name, of those shards that an earlier run finished under the same plan.

    Raises:
        OSError: an object store went on failing.
    """
    there = folder.tree()

    def record_of(name: str) -> dict[str, Any] | None:
        if record_name(name) not in there:
            return None
        try:
            record: dict[str, Any] = folder.read_json(record_name(name))
            known = check_record(_ShardRecord, record, f"{folder}/{record_name(name)}", CorpusError)
        except OSError:
            raise
        except StorageError:  # damaged: the shard is written again
            return None
        intact = all(there.get(shard_file(name, suffix)) == known.sizes.get(suffix) for suffix in SHARD_FILES)
        return record if known.plan_hash == plan_hash and known.name == name and intact else None

    with ThreadPoolExecutor(_RECORDS_AT_ONCE) as pool:
        records = pool.map(record_of, names)
        return {name: record for name, record in zip(names, records, strict=True) if record is not None}


def write_shard(task: ShardTask) -> dict[str, Any]:
    """Read, check and write the images of a shard, its other files, and last its record, which is returned.

    Images that do not decode are left out and listed in the record with the reason.

    Raises:
        SourceError: an image is gone or has changed since it was listed, or the source is not there.
        OSError: the file system fails; worth another try.
    """
    columns: list[tuple[int, int, int, int, int, int, int]] = []
    kept: list[int] = []
    origins: list[str] = []
    quarantined: list[tuple[str, str]] = []
    endings: Counter[str] = Counter()
    with task.folder.building(task.name) as file:
        writer = ShardWriter(file, "json" if isinstance(task.labels, Labels) else "cls")
        done = converted = 0
        for images in task.images.groups(task.names, task.sizes):
            for place, read in enumerate(images, done):
                origin = one_line(task.names[place])
                try:
                    if isinstance(read, UnusableImage):
                        raise read
                    refuse_deadly(read)
                    image, facts = convert(read, check_image(read), task.conversion)
                    converted += image is not read
                    if len(image) > MAX_BYTES:
                        raise UnusableImage(TOO_MANY_BYTES)
                except UnusableImage as reason:
                    quarantined.append((origin, str(reason)))
                    continue
                label, heaviest = _label(task, place)
                ending = task.conversion.name_ending(facts.extension)
                endings[ending] += 1
                offset = writer.add(f"{task.first_position + place:09d}", ending, image, label)
                columns.append((offset, len(image), 0, heaviest, image_check(image), facts.width, facts.height))
                kept.append(place)
                origins.append(origin)
            writer.flush()  # the memory of this group is used again
            done += len(images)
        writer.finish()
    rows = np.array(columns, SAMPLE_DTYPE)
    labels = task.labels.take(np.array(kept, np.int64)) if isinstance(task.labels, Labels) else None
    return commit_shard(
        task.folder, task.name, task.plan_hash, rows, labels, origins, quarantined, writer.dali_index,
        writer.size, writer.checksum, converted, endings,
    )  # fmt: skip


def commit_shard(
    folder: Folder,
    name: str,
    plan_hash: str,
    rows: NDArray[np.void],
    labels: Labels | None,
    origins: Sequence[str],
    quarantined: Sequence[tuple[str, str]],
    dali_index: bytes,
    size: int,
    checksum: str,
    converted: int = 0,
    endings: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Write what belongs beside a tar that is in its place, last the record, which is returned.

    Args:
        folder, name: of the tar.
        plan_hash: of the plan that it is a part of.
        rows: SAMPLE_DTYPE [N]; the column `shard` need not be set.
        labels: of the N images if they have many each.
        origins: [N] where each image came from, one line each.
        quarantined: (origin, reason) of images left out.
        dali_index: content of the .idx file.
        size, checksum: of the tar, bytes and xxh3_128.
        converted: how many images were encoded again.
        endings: how many images are stored under which ending, where that is known.
    """
    contents = {
        ".idx": dali_index,
        ".origins": "".join(f"{origin}\n" for origin in origins).encode(),
        ".rows.npz": _rows_file(rows, labels),
    }
    for suffix, content in contents.items():
        folder.write_bytes(shard_file(name, suffix), content)
    record = {
        "name": name,
        "plan_hash": plan_hash,
        "samples": len(rows),
        "xxh3_128": checksum,
        ORIGINS_CHECKSUM: xxhash.xxh3_128_hexdigest(contents[".origins"]),
        "sizes": {".tar": size, **{suffix: len(content) for suffix, content in contents.items()}},
        "quarantined": [{"origin": origin, "reason": reason} for origin, reason in quarantined],
        **({"converted": converted} if converted else {}),
        **({"endings": dict(sorted(endings.items()))} if endings else {}),
    }
    folder.write_json(record_name(name), record)
    return record


def read_rows(folder: Folder, name: str) -> tuple[NDArray[np.void], Labels | None]:
    """A finished shard's part of the index (its column `shard` is not set) and, with many labels, its labels.

    Raises:
        CorpusError: the file is damaged.
    """
    file = shard_file(name, ".rows.npz")
    content = folder.read_bytes(file)
    try:
        # numpy parses a file's header as Python, which several threads cannot do at a time in Python 3.11
        with _PARSING, np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            rows = arrays["rows"]
            labels = Labels(arrays["labels"], arrays["pointers"]) if "labels" in arrays else None
    except Exception as error:  # numpy's and zipfile's readers raise whatever their parsing runs into
        raise CorpusError(f"{folder}/{file} is damaged ({error}). {write_again(name)}") from error
    fits = rows.dtype == SAMPLE_DTYPE and rows.ndim == 1
    if labels is not None:
        pointers = labels.pointers
        fits &= labels.rows.dtype == LABEL_DTYPE and labels.rows.ndim == 1 and pointers.dtype == np.int64
        fits &= pointers.shape == (len(rows) + 1,) and pointers[0] == 0 and pointers[-1] == len(labels.rows)
        fits = bool(fits) and bool((np.diff(pointers) >= 0).all())
    if not fits:
        raise CorpusError(f"{folder}/{file} is damaged: it is not the rows of a shard. {write_again(name)}")
    return rows, labels


def _rows_file(rows: NDArray[np.void], labels: Labels | None) -> bytes:
    buffer = io.BytesIO()
    if labels is None:
        np.savez(buffer, rows=rows)
    else:
        np.savez(buffer, rows=rows, labels=labels.rows, pointers=labels.pointers)
    return buffer.getvalue()


def _label(task: ShardTask, place: int) -> tuple[bytes, int]:
    """What is written beside an image, and its (heaviest) class."""
    if not isinstance(task.labels, Labels):
        number = int(task.labels[place])
        return b"%d" % number, number
    labels = task.labels[place]
    weights = [float(str(weight)) for weight in labels["weight"]]  # 0.4 and not 0.4000000059604645
    content = {"labels": labels["class"].tolist(), "weights": weights}
    heaviest = int(labels["class"][np.argmax(labels["weight"])]) if len(labels) else -1
    return json.dumps(content).encode(), heaviest
