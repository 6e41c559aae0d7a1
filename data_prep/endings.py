"""What several endings of images mean for other readers of the tars, said while they are written."""

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.command import log


def for_readers(endings: Iterable[str]) -> str:
    """Endings as webdataset and DALI take several: jpg;png;webp."""
    return ";".join(endings)


def in_words(endings: Mapping[str, int]) -> str:
    """How many images have which ending."""
    return ", ".join(f"{count:,} {ending}" for ending, count in endings.items())


class Endings:
    """Says it once, as soon as a shard's record shows it, when the images have more than one ending."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def count(self, record: Mapping[str, Any]) -> None:
        """Look at the record of a shard that was written just now."""
        before = len(self._seen)
        self._seen |= set(record.get("endings", ()))
        if before < 2 <= len(self._seen):
            log.warning(
                "the images have several endings (%s): webdataset and DALI are to be told %r instead of 'jpg', and "
                "Hugging Face makes a column of each. ending=jpg, in a new destination, gives all of them one; every "
                "reader decodes by content",
                " and ".join(sorted(self._seen)), for_readers(sorted(self._seen)),
            )  # fmt: skip
