"""Makes one corpus of finished shards: the index, the labels, the quarantine list, and last the manifest."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from cluster import storage
from cluster.ahead import ahead
from cluster.folders import Folder
from data_prep.columns import LABEL_DTYPE, Labels
from data_prep.corpus import Corpus
from data_prep.corpus_format import (
    COPY_OF,
    FORMAT_VERSION,
    INDEX,
    LABEL_FORM,
    LABEL_POINTERS,
    LABELS,
    MANIFEST,
    ORIGINS_CHECKSUM,
    QUARANTINE,
    file_of_version,
    manifest_hash,
    manifest_of_version,
)
from data_prep.manifest import newest_version
from data_prep.removed import REMOVED, Removed
from data_prep.shard_task import read_rows, remove_shard

_AHEAD = 16
_FROM_PLAN = ("plan_hash", "settings", "source", COPY_OF, LABEL_FORM)
"""Keys of a manifest that the plan describes."""
_PIECE = 4 << 20
_T = TypeVar("_T")
_U = TypeVar("_U")


class CorpusPlan(Protocol):
    """What a corpus is made of, as far as its manifest and its rerun need to know."""

    @property
    def version(self) -> int:
        """Of the corpus that comes out: 1, or more where shards are appended."""

    @property
    def plan_hash(self) -> str:
        """Of all that decides what the corpus holds."""

    @property
    def root(self) -> str | Path:
        """Where the source lies."""

    @property
    def label_kind(self) -> str:
        """ "single" or "multi"."""

    @property
    def classes(self) -> list[str]:
        """Names in the order of their numbers."""

    @property
    def class_descriptions(self) -> list[str] | None:
        """What people call the classes, or None."""

    @property
    def left_out(self) -> Sequence[tuple[str, str]]:
        """Images that are named but cannot be had: (path, reason)."""

    @property
    def removed(self) -> Removed | None:
        """Duplicates that were taken out of the source."""

    def describe(self) -> dict[str, Any]:
        """What is kept in plan.json: at least plan_hash, settings and source (its kind and counts).

        The manifest has these of it, and `copy_of`.
        """


class HashedFile:
    """A file that is written in order and hashed on the way."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._context = folder.writing(name)
        self._file = self._context.__enter__()
        self._digest = xxhash.xxh3_128()
        self.size = 0

    def write(self, content: bytes) -> None:
        self._digest.update(content)
        self.size += len(content)
        storage.write_fully(self._file, content)

    def write_all(self, path: Path) -> None:
        """Write the content of a file."""
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                self.write(piece)

    def close(self) -> dict[str, Any]:
        """Commit the file; returns what the manifest says of it."""
        self._context.__exit__(None, None, None)
        return {"bytes": self.size, "xxh3_128": self._digest.hexdigest()}


def _commit(folder: Folder, version: int, manifest: dict[str, Any]) -> None:
    """Write the manifest of a version; manifest.json stays that of the newest, and older ones are kept."""
    newest = newest_version(folder) or version  # one that is cut short is replaced
    if newest < version:
        folder.write_json(manifest_of_version(newest), folder.read_json(MANIFEST))
    folder.write_json(manifest_of_version(version) if newest > version else MANIFEST, manifest)


def assemble(
    folder: Folder, plan: CorpusPlan, records: Sequence[dict[str, Any]], before: Corpus | None = None
) -> dict[str, Any]:
    """Write what belongs to the corpus as a whole, the manifest last; returns the manifest.

    Args:
        folder: of the corpus, with all shards finished.
        plan: what was sharded.
        records: of all shards of the plan, in their order.
        before: the version that they are appended to.
    """
    names = {name: file_of_version(name, plan.version) for name in (INDEX, LABELS, LABEL_POINTERS, QUARANTINE)}
    filled = [record for record in records if record["samples"]]
    classes = plan.classes
    counts = np.zeros(len(classes), np.int64)
    labels_so_far = 0
    files: dict[str, Any] = {}
    many = plan.label_kind == "multi"
    index = HashedFile(folder, names[INDEX])
    label_rows = HashedFile(folder, names[LABELS]) if many else None
    pointers = HashedFile(folder, names[LABEL_POINTERS]) if many else None
    if before is not None:
        counts[: len(before.classes)] = before.class_counts
        for file, name in ((index, INDEX), (label_rows, LABELS), (pointers, LABEL_POINTERS)):
            if file is not None:
                file.write_all(before.path / before.file_name(name))
        labels_so_far = label_rows.size // LABEL_DTYPE.itemsize if label_rows is not None else 0
    elif pointers is not None:
        pointers.write(np.zeros(1, "<u8").tobytes())
    shards_before = before.manifest["shards"] if before is not None else []
    parts = ahead(lambda record: read_rows(folder, record["name"]), filled, _AHEAD, _AHEAD + 1)
    for number, (rows, labels) in enumerate(parts):
        rows["shard"] = len(shards_before) + number
        index.write(rows.tobytes())
        if isinstance(labels, Labels) and label_rows is not None and pointers is not None:
            label_rows.write(labels.rows.tobytes())
            pointers.write((labels.pointers[1:] + labels_so_far).astype("<u8").tobytes())
            labels_so_far += len(labels.rows)
            counts += np.bincount(labels.rows["class"], minlength=len(classes))
        else:
            counts += np.bincount(rows["label"], minlength=len(classes))
    files[names[INDEX]] = index.close()
    if label_rows is not None and pointers is not None:
        files[names[LABELS]], files[names[LABEL_POINTERS]] = label_rows.close(), pointers.close()

    quarantined = [
        *({"origin": origin, "reason": reason} for origin, reason in plan.left_out),
        *(entry for record in records for entry in record["quarantined"]),
    ]
    quarantine = HashedFile(folder, names[QUARANTINE])
    if before is not None:
        quarantine.write_all(before.path / before.file_name(QUARANTINE))
    for entry in quarantined:
        quarantine.write((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    files[names[QUARANTINE]] = quarantine.close()
    if plan.removed is not None:
        removed = HashedFile(folder, file_of_version(REMOVED, plan.version))
        removed.write(plan.removed.lines)
        files[file_of_version(REMOVED, plan.version)] = removed.close()
    converted = sum(record.get("converted", 0) for record in records)

    # Shards of before it came stay without: one that is written again must not change what the corpus is.
    all_know = all(ORIGINS_CHECKSUM in record for record in filled)
    shards = [
        *shards_before,
        *(
            {
                "name": record["name"],
                "samples": record["samples"],
                "bytes": record["sizes"][".tar"],
                "xxh3_128": record["xxh3_128"],
                **({ORIGINS_CHECKSUM: record[ORIGINS_CHECKSUM]} if all_know else {}),
            }
            for record in filled
        ),
    ]
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "label_kind": plan.label_kind,
        "classes": classes,
        "class_descriptions": plan.class_descriptions,
        "class_counts": counts.tolist(),
        "num_samples": sum(record["samples"] for record in filled) + (before.num_samples if before else 0),
        "num_bytes": sum(record["sizes"][".tar"] for record in filled)
        + (before.manifest["num_bytes"] if before else 0),
        "quarantined": len(quarantined) + (before.manifest["quarantined"] if before else 0),
        "shards": shards,
        "files": files,
        **{key: value for key, value in plan.describe().items() if key in _FROM_PLAN},
        "created_by": {
            "source": str(plan.root),
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pillow", "simplejpeg")},
        },
    }
    if converted:
        manifest["converted"] = converted
    if plan.removed is not None:
        manifest["removed"] = plan.removed.counts
        manifest["created_by"]["excluded"] = plan.removed.places
    if before is not None:
        manifest["version"] = plan.version
        if LABEL_FORM in before.manifest:
            manifest[LABEL_FORM] = before.manifest[LABEL_FORM]
        manifest["appended_to"] = {"corpus_hash": before.corpus_hash, "shards": len(shards_before)}
    manifest["corpus_hash"] = manifest_hash(manifest)
    _commit(folder, plan.version, manifest)
    for record in records:
        if not record["samples"]:  # every image was quarantined; a tar without samples is one that readers stumble over
            remove_shard(folder, record["name"])
    return manifest
