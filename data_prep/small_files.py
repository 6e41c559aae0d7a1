"""Files that settings name beside the source (words, classes, truth, ...), wherever they lie."""

import hashlib
from pathlib import Path

from cluster import storage
from cluster.command import absolute_path, log
from cluster.folders import folder_at
from data_prep.corpus_cache import cache_folder


def file_here(place: str, key: str) -> Path:
    """The path of such a file on this machine; one on an object store is brought to the cache first.

    Args:
        place: as the user gave it.
        key: the setting, for messages.

    Raises:
        StorageError: it is on an object store and cannot be had, or of a scheme that is not supported.
    """
    place = absolute_path(place, key)
    if not place.startswith("s3://"):
        return storage.local_path(place, key)
    above, _, name = place.rpartition("/")
    folder = folder_at(above, key)
    identity = hashlib.sha256(f"{place} {folder.stamp(name)}".encode()).hexdigest()[:16]
    path = cache_folder() / "files" / identity / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.get(name, path)
    log.info("%s = %s is read as %s", key, place, path)
    return path
