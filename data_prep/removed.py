"""What was taken out of a listing because it is there already, or is in an evaluation set."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.command import counted
from data_prep.left_out import RemovedImage, read_lines

REMOVED = "removed.jsonl"
"""File beside the manifest: one line an image that was removed, see `Removed.lines`."""
UNCOMPARED = "could not be had when duplicates were looked for"
"""The reason for which an image is left out that another day may give."""


@dataclass(frozen=True)
class Removed:
    """Duplicates that were removed from a source."""

    settings: dict[str, Any]
    """What was asked for; it decides the corpus together with the rest of the plan."""
    lines: bytes
    """JSON lines, in the order of the source: `row` (of what was compared: an append compares what is new) and `origin`
    of the image; `reason`, "exact" (the same bytes) or "near", or UNCOMPARED and nothing more; `corpus`, the
    corpus_hash of the one that it is a duplicate of an image of, or null for the source itself; `of`, the origin of
    that image, which may itself be listed; for near ones the `distance` of the hashes, in bits, the `similarity` of the
    shapes, and whether one is the other `mirrored`."""
    places: dict[str, str]
    """Where the excluded corpora lie, by their corpus_hash."""

    @cached_property
    def _entries(self) -> list[RemovedImage]:
        return list(read_lines(RemovedImage, self.lines.splitlines(), REMOVED))

    @property
    def rows(self) -> NDArray[np.int64]:
        """Of the images in the listing, ascending."""
        return np.array([entry.row for entry in self._entries], np.int64)

    @property
    def unseen(self) -> list[tuple[str, str]]:
        """Origin and reason of those that could not be compared with others, and so are left out."""
        return [(entry.origin, UNCOMPARED) for entry in self._entries if entry.reason == UNCOMPARED]

    @property
    def counts(self) -> dict[str, int]:
        """How many were removed: in all, and for which reason."""
        entries = [entry for entry in self._entries if entry.reason != UNCOMPARED]
        inside = sum(entry.corpus is None for entry in entries)
        exact = sum(entry.reason == "exact" for entry in entries)
        mirrored = sum(entry.mirrored for entry in entries)
        total = len(entries)
        return {
            "images": total,
            "inside_the_source": inside,
            "of_excluded_corpora": total - inside,
            "exact": exact,
            "near": total - exact,
            "mirrored": mirrored,
        }


def removed_in_words(counts: dict[str, int]) -> str:
    """What was removed, by `Removed.counts`."""
    return (
        f"{counted(counts['images'], 'duplicate')} {'is' if counts['images'] == 1 else 'are'} removed: "
        f"{counts['of_excluded_corpora']:,} of images in excluded "
        f"corpora, {counts['inside_the_source']:,} of earlier images of the source; {counts['exact']:,} exact, "
        f"{counts['near']:,} near ({counts['mirrored']:,} mirrored)"
    )
