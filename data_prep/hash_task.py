"""Describes images for the search for duplicates: the work of one Ray task. Done twice, it gives the same bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.folders import Folder
from data_prep.columns import Strings
from data_prep.corpus import Corpus
from data_prep.image_check import UnusableImage
from data_prep.perceptual_hash import DESCRIPTOR, UNSEEN, describe_images
from data_prep.source_reader import Images

_BATCH = 64


class ImagesToDescribe(Protocol):
    """Images that can be read one batch after the other."""

    def batches(self) -> Iterator[Sequence[memoryview | UnusableImage]]:
        """The encoded images; the reason in place of one that cannot be had."""


@dataclass(frozen=True)
class PartOfListing:
    """Images of a source."""

    images: Images
    names: Strings
    sizes: NDArray[np.uint64]

    def batches(self) -> Iterator[Sequence[memoryview | UnusableImage]]:
        """Errors: as Images.groups."""
        return self.images.groups(self.names, self.sizes)


@dataclass(frozen=True)
class PartOfCorpus:
    """Samples first..end - 1 of a corpus."""

    corpus: Corpus
    first: int
    end: int

    def batches(self) -> Iterator[Sequence[memoryview | UnusableImage]]:
        """Errors: as Corpus.read."""
        for start in range(self.first, self.end, _BATCH):
            yield [image.data for image in self.corpus.read(np.arange(start, min(start + _BATCH, self.end)))]


@dataclass(frozen=True)
class HashTask:
    """All that is needed to describe a run of images."""

    folder: Folder
    """Where the descriptors go."""
    name: str
    """Of their file: DESCRIPTOR [count], nothing else."""
    part: ImagesToDescribe


def describe_part(task: HashTask) -> dict[str, Any]:
    """Read and describe images and write their descriptors; returns how many bytes of images were read.

    Images that do not decode are like no other: sharding quarantines them. Those that could not be had are marked:
    sharding might have them, and nothing would be known of what they look like.

    Raises:
        SourceError: the source is not there, or has changed.
        OSError: the storage fails; worth another try.
    """
    described, size = [], 0
    for images in task.part.batches():
        had = [image for image in images if not isinstance(image, UnusableImage)]
        size += sum(map(len, had))
        descriptors = np.zeros(len(images), DESCRIPTOR)  # a content of zeros: no image, and no duplicate of another
        descriptors[[not isinstance(image, UnusableImage) for image in images]] = describe_images(had)
        descriptors["content"][[isinstance(image, UnusableImage) and image.may_pass for image in images]] = UNSEEN
        described.append(descriptors)
    task.folder.write_bytes(task.name, np.concatenate(described).tobytes())
    return {"sizes": {"images": size}}
