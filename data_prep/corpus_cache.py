"""What a node keeps of corpora on object stores: their indices and labels, whole; and where shards are cached.

$VITFORGE_CACHE (or ~/.cache/vitforge)
    corpora/CORPUS_HASH/    index.bin, labels.bin, labels.ptr, ...
    shards/                 see shard_cache.py
    gzip/                   what decoding gzip tars gave, see image_tars.py
    files/                  what settings name beside a source, see small_files.py
    perceptual-hashes/      of evaluation sets, see duplicates.py
"""

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.folders import Folder
from cluster.ownership import MARK, OwnershipError, private_folder, refuse_others
from cluster.storage import StorageError

_KEPT = re.compile(r"([0-9a-f]{12,64}|perceptual-hashes-\d+-[0-9a-f]{32}|plan-[0-9a-f]{12}|room)(\.[a-z]+)?")
"""Names of what is in these folders."""
_ATTEMPTS = 3
"""How often a file is fetched that arrives with another checksum."""


def cache_folder(part: str) -> Path:
    """A folder of this node in which is kept what lies elsewhere; this user's alone, who trusts what is in it.

    Args:
        part: one of those above.

    Raises:
        StorageError: it, or the folder around it, belongs to another user or is a symbolic link.
    """
    place = os.environ.get("VITFORGE_CACHE")
    root = Path(place).expanduser().absolute() if place else Path.home() / ".cache" / "vitforge"
    try:
        if os.path.lexists(root):
            refuse_others(root, but=(0,))  # what is mounted into a container belongs to root
        else:
            private_folder(root)
        _refuse_other_files(root / part)
        return private_folder(root / part)
    except OwnershipError as error:
        raise StorageError(
            f"the cache cannot be kept there: {error}, so that others could replace what is read. Set VITFORGE_CACHE "
            "to a folder of your own on a disk of this node"
        ) from error
    except OSError:
        return root / part  # who writes there says so


def _refuse_other_files(folder: Path) -> None:
    """Refuse a folder that others may enter and that is no part of a cache: it would be closed to them.

    Raises:
        StorageError: naming what is in it.
    """
    if folder.is_symlink() or not folder.is_dir() or not folder.stat().st_mode & 0o077:
        return
    names = (path.name for path in folder.iterdir())
    others = [name for name in names if not (_KEPT.fullmatch(name) or storage.is_unfinished(name) or name == MARK)]
    if others:
        raise StorageError(
            f"{folder} is no part of a cache: it holds {min(others)!r}. Set VITFORGE_CACHE to a folder of its own"
        )


@contextmanager
def cache_written(here: Path) -> Iterator[None]:
    """Says of a failing file system, while a folder of the cache is written, that it was that.

    Raises:
        StorageError: an OSError in the block that is none of an object store.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"the cache {here} cannot be written: {error}. Set VITFORGE_CACHE to a folder on a disk of this node"
        ) from error


def fetch_files(folder: Folder, files: Mapping[str, Mapping[str, Any]], identity: str, *, check: bool) -> Path:
    """Have files of a corpus on this node.

    Args:
        folder: of the corpus.
        files: name to `bytes` and `xxh3_128`.
        identity: of the corpus.
        check: whether the content of what is here already is looked at, too.

    Returns:
        The folder they are in.

    Raises:
        StorageError: one is missing, cannot be read or is damaged where it comes from, or there is no room here.
    """
    here = cache_folder("corpora") / identity
    with cache_written(here):
        here.mkdir(parents=True, exist_ok=True)
        with (here / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a node fetches; the lock ends with it
            storage.remove_unfinished(here)
            for name, facts in files.items():
                path = here / name
                there = storage.file_size(path) == facts["bytes"]
                if not there or (check and storage.hash_file(path) != facts["xxh3_128"]):
                    _fetch(folder, name, facts["xxh3_128"], path)
    return here


def _fetch(folder: Folder, name: str, checksum: str, path: Path) -> None:
    arriving = storage.temporary_path(path)
    try:
        for _ in range(_ATTEMPTS):
            folder.get(name, arriving)
            if storage.hash_file(arriving) == checksum:
                arriving.replace(path)
                return
    finally:
        arriving.unlink(missing_ok=True)
    raise StorageError(f"{folder}/{name} is damaged: its checksum is not the manifest's")
