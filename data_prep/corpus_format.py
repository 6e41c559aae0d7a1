"""The corpus: sharded images with an index, as training reads it.

A corpus is a folder (format version 1):

    manifest.json             what the corpus is; committed last; `corpus_hash` is its identity
    plan.json                 what was asked for; written first, so that a rerun knows its own unfinished work
    index.bin                 SAMPLE_DTYPE [N]; the row number is the sample id
    labels.bin, labels.ptr    many labels only: LABEL_DTYPE [K] and uint64 [N + 1], sample i has labels ptr[i]:ptr[i+1]
    shard-000000.tar          plain USTAR: KEY.jpg (or png, webp, ...) and KEY.cls, or KEY.json with many labels
    shard-000000.idx          index of the tar for DALI's own reader
    shard-000000.origins      where each sample came from, one line a sample
    shard-000000.rows.npz     the shard's part of the index, from which a rerun of sharding builds it again
    shard-000000.record.json  committed last of a shard's files; a rerun of sharding skips shards that have it
    quarantine.jsonl          images left out: {"origin", "reason"} a line
    removed.jsonl             duplicates left out, where they were looked for: see data_prep/removed.py

and, for other tools, of the newest version (data_prep/card.py; none of it is in the manifest, nothing here reads it):

    README.md                 dataset card, by which Hugging Face's datasets finds the tars and the class names
    _info.json                for timm's reader; a subset has none, for it has no tars
    samples.parquet           a row for each sample: see data_prep/sample_table.py

A subset (data_prep/subset.py) shares the shards of the corpus that it was made of: its manifest says where they are,
relative to its own folder (`shards_at`), its index has the chosen rows only, and places.bin (uint32 [N]) says which
line of its shard's .origins each of them is. A copy of it (data_prep/copy_corpus.py) has shards of its own: of each
that the subset shares, one of the same name with the subset's samples only, in the same order. `copy_of` in its
manifest says what that subset's hash is, and the bytes of those shards.

Images that are appended later come as new shards under a new version, N = 2, 3, ...: plan-00000N.json, index-00000N.bin
(which begins with the one before), labels-00000N.bin, labels-00000N.ptr and quarantine-00000N.jsonl. manifest.json is
always that of the newest version, those before are kept as manifest-000001.json, manifest-000002.json, ...; `PATH#1`
opens the first one. The ids, and the bytes, of the samples of an older version are the same in a newer one.

The tars and .idx files are what the webdataset package and DALI's own reader expect.
"""

import hashlib
import json
import posixpath
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from cluster.folders import Folder, folder_at
from cluster.storage import StorageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
INDEX = "index.bin"
LABELS = "labels.bin"
LABEL_POINTERS = "labels.ptr"
QUARANTINE = "quarantine.jsonl"
PLACES = "places.bin"
SHARDS_AT = "shards_at"
"""Key of the manifest: where the shards are, relative to the corpus's own folder; without it they are there."""
COPY_OF = "copy_of"
"""Key of the manifest: of which subset the corpus has the samples and their order, in shards of its own."""

LABEL_FORM = "label_form"
"""Key of the manifest: how labels stand in tars of others; without it as in our own, `.cls` or `.json` for many."""

ORIGINS_CHECKSUM = "origins_xxh3_128"
"""Key of a shard in the manifest: the checksum of its .origins; corpora of before it came do without."""

SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the encoded image inside its tar, bytes
        ("length", "<u4"),  # of the encoded image, bytes
        ("shard", "<u4"),  # place of the tar in the manifest's list
        ("label", "<i4"),  # the class; with many labels the heaviest; -1 without any
        ("check", "<u4"),  # low 32 bits of xxh3_64 of the encoded image
        ("width", "<u2"),  # pixels, after EXIF orientation
        ("height", "<u2"),
    ]
)
"""A row of the index, 28 bytes."""

REPAIR = "Running the same shard command again writes what is missing or cut short"
REPAIR_MANIFEST = f"Remove {MANIFEST} and run the same shard command again: it is built anew from the finished shards"
"""What would do, for messages."""


class CorpusError(StorageError):
    """A corpus that is missing, unfinished or damaged; the message names the file and says what would do."""


class ShardError(CorpusError):
    """A shard none of whose samples can be read: it is gone, or cannot be fetched."""


def write_again(tar: str) -> str:
    """What makes a shard anew."""
    return f"To write this shard again, remove {tar.removesuffix('.tar')}.record.json and run the same shard command"


def file_of_version(name: str, version: int) -> str:
    """Name of a file of a corpus (index.bin, ...) in a version of it; in the first it is the name itself."""
    stem, _, suffix = name.rpartition(".")
    return name if version == 1 else f"{stem}-{version:06d}.{suffix}"


def manifest_of_version(version: int) -> str:
    """Name of the manifest of a version that is not the newest."""
    return f"manifest-{version:06d}.json"


def image_check(data: Any) -> int:
    """The checksum kept for a sample: low 32 bits of xxh3_64 of the encoded image."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def identity(manifest: Mapping[str, Any]) -> str:
    """The `corpus_hash` that runs know a corpus by: a copy of a subset has that of the subset."""
    return str(manifest.get(COPY_OF, manifest)["corpus_hash"])


def needs_own_shards(manifest: Mapping[str, Any]) -> bool:
    """Whether its tars have other samples too: those of a subset, or of a copy of one that an older version made."""
    return PLACES in manifest["files"]


def manifest_hash(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's canonical JSON.

    `created_by` (tools, place of the source) and the shards' place are left out: they do not change what it holds.
    """
    content = {key: value for key, value in manifest.items() if key not in ("corpus_hash", "created_by", SHARDS_AT)}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def shards_folder(folder: Folder, manifest: Mapping[str, Any]) -> Folder:
    """Where the tars of a corpus are. Only a subset says where, and only it may lead out of its folder, to be read.

    Raises:
        CorpusError: it says another bucket.
    """
    if SHARDS_AT not in manifest:
        return folder
    scheme, separator, path = folder.url.rpartition("://")
    place = posixpath.normpath(posixpath.join(path, manifest[SHARDS_AT]))
    if scheme and place.split("/")[0] != path.split("/")[0]:
        raise CorpusError(f"{folder}/{MANIFEST} says that its shards are in another bucket, {scheme}://{place}")
    return folder_at(scheme + separator + place, "corpus")


def check_size(folder: Folder, name: str, size: int | None, expected: int) -> None:
    if size is None:
        raise CorpusError(f"{folder}/{name} is missing. {REPAIR}")
    if size != expected:
        raise CorpusError(
            f"{folder}/{name} has {size} bytes where the manifest says {expected}: cut short or altered. {REPAIR}"
        )
