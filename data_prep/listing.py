"""A listing: what there is to shard, named but not opened, in columns that hold tens of millions of images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_prep.columns import Labels, Strings
from data_prep.removed import Removed
from data_prep.source_reader import Images, SourceError

__all__ = ["Listing", "SourceError", "looks_like_image"]

_IMAGE_SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif .jp2 .ppm .pgm".split()
)
"""What makes a file a candidate, beside having no suffix; whether it is an image is judged by its content."""


@dataclass(frozen=True)
class Listing:
    """The images of a source in sorted order, N of them: the same images give the same listing wherever they lie."""

    kind: str
    """What the source is, in words: "image folder", "tar of class tars", ..."""
    place: str
    """The source, as people write it."""
    classes: list[str]
    """Names in the order of their numbers."""
    names: Strings
    """Where each image comes from, relative to the source where that is possible, bytes [N]."""
    sizes: NDArray[np.uint64]
    """Bytes of each image, [N]; an assumption where it must be fetched to know."""
    images: Images
    """Where their bytes are, N of them."""
    labels: NDArray[np.int32] | Labels
    """The class of each image, int32 [N], or many labels for each."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Images that are named but are not sharded: (name, reason)."""
    class_descriptions: list[str] | None = None
    """What people call the classes, where the source says so."""
    removed: Removed | None = None
    """Duplicates that were taken out."""

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: NDArray[np.int64], left_out: Sequence[tuple[str, str]] = ()) -> "Listing":
        """Some of the images (int64 [K]), in that order; why others are left out is added to what is known."""
        labels = self.labels.take(rows) if isinstance(self.labels, Labels) else self.labels[rows]
        return replace(
            self,
            names=self.names.take(rows),
            sizes=self.sizes[rows],
            images=self.images.take(rows),
            labels=labels,
            left_out=(*self.left_out, *left_out),
        )


_JUNK = frozenset((b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found"))
"""Folders that systems leave among people's files; some hold small copies of the images."""


def is_junk(path: bytes) -> bool:
    """Whether a file or folder is hidden, or lies in a hidden folder or one that a system left there."""
    return any(part in _JUNK or (part.startswith(b".") and part != b".") for part in path.split(b"/"))


def looks_like_image(name: bytes) -> bool:
    """Whether a file's name is that of an image, or says nothing; hidden files are never images."""
    base = name.rsplit(b"/", 1)[-1]
    _, dot, suffix = base.rpartition(b".")
    return not base.startswith(b".") and (not dot or (b"." + suffix).lower() in _IMAGE_SUFFIXES)
