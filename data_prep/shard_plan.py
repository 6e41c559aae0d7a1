"""What goes into which shard: a function of the listing and the settings alone, before anything is written."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cluster.folders import Folder
from data_prep.columns import Labels, Strings
from data_prep.convert import Conversion
from data_prep.corpus import FORMAT_VERSION
from data_prep.listing import Listing
from data_prep.order import OF_SOURCE, Permutation
from data_prep.removed import Removed
from data_prep.source_reader import Images
from data_prep.tar_headers import BLOCK

_BYTES_BESIDE_IMAGE = 3 * BLOCK + BLOCK // 2
"""In a tar: two headers, the label's block, and half a block of padding on average."""


@dataclass(frozen=True)
class ShardTask:
    """All that is needed to write one shard, small enough to be sent to a worker."""

    folder: Folder
    """Of the corpus."""
    name: str
    """Of the tar."""
    plan_hash: str
    first_position: int
    """Planned position of the shard's first image among all images; the keys count from it."""
    names: Strings
    sizes: NDArray[np.uint64]
    images: Images
    labels: NDArray[np.int32] | Labels
    conversion: Conversion


@dataclass(frozen=True)
class Appended:
    """The corpus to which the shards of a plan are added."""

    version: int
    """Of the corpus that comes out."""
    corpus_hash: str
    """Of the one that was there."""
    first_shard: int
    """Number of the first new shard."""
    first_position: int
    """From which the keys of the new samples count."""


class Plan:
    """Which image of a listing goes into which shard, and in which order.

    All images are shuffled together (so that every shard is a sample of the whole) and cut by bytes into shards of
    nearly equal size, the last one too.

    Args:
        listing: of the source.
        class_descriptions: what people call the classes, or None.
        shard_bytes: size to aim at.
        seed: of the shuffle.
        conversion: what is done to images.
        appended: to which corpus the shards are added, or None for one of its own.
    """

    def __init__(
        self, listing: Listing, class_descriptions: list[str] | None, shard_bytes: int, seed: int,
        conversion: Conversion | None = None, appended: Appended | None = None,
    ) -> None:  # fmt: skip
        self.listing = listing
        self.class_descriptions = class_descriptions
        self.conversion = conversion or Conversion()
        self.appended = appended
        self.settings = {"seed": seed, "shard_bytes": shard_bytes, **self.conversion.describe()}
        if listing.removed is not None:
            self.settings["duplicates"] = listing.removed.settings
        self.order = _shuffled(len(listing), seed)
        ends = np.cumsum(listing.sizes[self.order] + np.uint64(_BYTES_BESIDE_IMAGE))
        total = int(ends[-1])
        self.total_bytes = total
        """Expected size of all tars."""
        count = max(1, round(total / shard_bytes))
        cuts = np.searchsorted(ends, np.arange(1, count) * (total / count), side="left") + 1
        # a shard without images can only come from an image larger than a shard: it is dropped
        self.bounds = np.unique(np.concatenate([[0], cuts, [len(listing)]]))
        """Shard k has the planned positions bounds[k]..bounds[k + 1] - 1."""
        self.plan_hash = self._hash()

    @property
    def version(self) -> int:
        """Of the corpus that comes out."""
        return self.appended.version if self.appended is not None else 1

    @property
    def label_kind(self) -> str:
        """ "single" or "multi"."""
        return "multi" if isinstance(self.listing.labels, Labels) else "single"

    @property
    def root(self) -> str:
        """Where the source lies."""
        return self.listing.place

    @property
    def classes(self) -> list[str]:
        """Names in the order of their numbers."""
        return self.listing.classes

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """Images that are named but cannot be had: (path, reason)."""
        return self.listing.left_out

    @property
    def removed(self) -> Removed | None:
        """Duplicates that were taken out of the source."""
        return self.listing.removed

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.bounds) - 1

    def name(self, shard: int) -> str:
        """Name of a shard's tar."""
        return f"shard-{shard + (self.appended.first_shard if self.appended else 0):06d}.tar"

    def samples(self, shard: int) -> int:
        """Images planned for a shard."""
        return int(self.bounds[shard + 1] - self.bounds[shard])

    def task(self, shard: int, folder: Folder) -> ShardTask:
        """The work of writing one shard into a corpus folder."""
        listing = self.listing
        rows = self.order[self.bounds[shard] : self.bounds[shard + 1]]
        return ShardTask(
            folder,
            self.name(shard),
            self.plan_hash,
            int(self.bounds[shard]) + (self.appended.first_position if self.appended else 0),
            listing.names.take(rows),
            listing.sizes[rows],
            listing.images.take(rows),
            listing.labels.take(rows) if isinstance(listing.labels, Labels) else listing.labels[rows],
            self.conversion,
        )

    def describe(self) -> dict[str, Any]:
        """What is kept in plan.json and tells one plan from another."""
        description: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "plan_hash": self.plan_hash,
            "settings": self.settings,
            "shards": len(self),
            "source": {"kind": self.listing.kind, "images": len(self.listing)},
        }
        if self.appended is not None:
            description["appended"] = asdict(self.appended)
        return description

    def _hash(self) -> str:
        listing, digest = self.listing, xxhash.xxh3_128()
        columns = [listing.names.content, listing.names.pointers, listing.sizes]
        if isinstance(listing.labels, Labels):
            columns += [listing.labels.rows, listing.labels.pointers]
        else:
            columns.append(listing.labels)
        for column in columns:
            digest.update(np.ascontiguousarray(column).view(np.uint8).data)
        content = {
            "format_version": FORMAT_VERSION,
            "label_kind": self.label_kind,
            "settings": self.settings,
            "classes": listing.classes,
            "class_descriptions": self.class_descriptions,
            "left_out": listing.left_out,
            "columns": digest.hexdigest(),
        }
        if self.appended is not None:
            content["appended"] = asdict(self.appended)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _shuffled(size: int, seed: int) -> NDArray[np.int64]:
    permutation = Permutation(size, seed, use=OF_SOURCE)
    order = np.empty(size, np.int64)
    for start in range(0, size, 1 << 20):  # in pieces: the arithmetic takes several times the memory of its result
        end = min(start + (1 << 20), size)
        order[start:end] = permutation(np.arange(start, end))
    return order
