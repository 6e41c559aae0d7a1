"""Files that settings name beside the source (words, classes, truth, ...), wherever they lie."""

import hashlib
from pathlib import Path

from cluster.command import absolute_path, log
from cluster.folders import file_at
from data_prep.corpus_cache import cache_folder, cache_written


def file_here(place: str, key: str) -> Path:
    """The path of such a file on this machine; one on an object store is brought to the cache first.

    Args:
        place: as the user gave it.
        key: the setting, for messages.

    Raises:
        StorageError: it is on an object store and cannot be had, or of a scheme that is not supported.
    """
    folder, name = file_at(absolute_path(place, key), key)
    if folder.local is not None:
        return folder.local / name
    identity = hashlib.sha256(f"{folder}/{name} {folder.stamp(name)}".encode()).hexdigest()[:16]
    path = cache_folder("files") / identity / name
    with cache_written(path.parent):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.get(name, path)
    log.info("%s = %s is read as %s", key, place, path)
    return path


def file_stamp(place: str, key: str) -> str:
    """What becomes another when such a file is written again. Errors: as `file_here`, or it is missing."""
    folder, name = file_at(absolute_path(place, key), key)
    return folder.stamp(name)


def file_beside(place: str, name: str, key: str) -> str | None:
    """Where on an object store a file of this name lies beside such a file; None if it does not, or for local ones."""
    folder, _ = file_at(absolute_path(place, key), key)
    return f"{folder}/{name}" if folder.local is None and folder.size(name) is not None else None
