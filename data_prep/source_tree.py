"""Looks into a source without listing all of it: the folders and files at a place, in a folder, on S3 or in a tar."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import islice

from cluster.folders import Folder
from data_prep.listing import is_junk, looks_like_image

_PER_FOLDER = 200
"""Files of a folder that are looked at: enough to see what is in it."""
_DEPTH = 4


class SourceTree(ABC):
    """Folders and files of a source, without hidden ones; paths are relative to it, "" is the source itself."""

    @abstractmethod
    def folders(self, path: str = "") -> list[str]:
        """Names of the folders directly in one, sorted."""

    @abstractmethod
    def files(self, path: str = "") -> list[str]:
        """Names of files directly in a folder, sorted; in tars the first few."""

    def head(self, path: str, length: int) -> bytes | None:
        """The first bytes of a file; None where they cannot be had without reading the whole source."""
        return None

    def images(self, path: str = "") -> list[str]:
        """Those of the files that are images by their names' endings."""
        return [name for name in self.files(path) if is_image_name(name)]


class FolderTree(SourceTree):
    """Of a folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._names: dict[str, list[str]] = {}

    def folders(self, path: str = "") -> list[str]:
        return [name for name in self._at(path).folders() if not is_junk(os.fsencode(name))]

    def files(self, path: str = "") -> list[str]:
        if path not in self._names:
            self._names[path] = [name for name in self._at(path).names() if not is_junk(os.fsencode(name))]
        return self._names[path]

    def images(self, path: str = "") -> list[str]:
        local = self._at(path).local
        if local is None or path in self._names:
            return super().images(path)
        try:
            with os.scandir(local) as entries:  # a class may have millions of them
                return list(islice((entry.name for entry in entries if is_image_name(entry.name)), _PER_FOLDER))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def head(self, path: str, length: int) -> bytes | None:
        return self.folder.read_bytes(path, 0, min(length, self.folder.size(path) or 0))

    def _at(self, path: str) -> Folder:
        return self.folder.child(path) if path else self.folder


class TarTree(SourceTree):
    """Of the members of a tar."""

    def __init__(self, paths: Iterable[bytes]) -> None:
        self._folders: dict[str, dict[str, None]] = {}
        self._files: dict[str, list[str]] = {}
        for path in paths:
            if is_junk(path):
                continue
            parts = os.fsdecode(path).split("/")
            if len(parts) <= _DEPTH:
                kept = self._files.setdefault("/".join(parts[:-1]), [])
                if len(kept) < _PER_FOLDER:
                    kept.append(parts[-1])
            for depth in range(min(len(parts) - 1, _DEPTH)):
                self._folders.setdefault("/".join(parts[:depth]), {})[parts[depth]] = None

    def folders(self, path: str = "") -> list[str]:
        return sorted(self._folders.get(path, {}))

    def files(self, path: str = "") -> list[str]:
        return sorted(self._files.get(path, []))


def is_image_name(name: str) -> bool:
    """Whether a file's name has an image's ending."""
    return "." in name and looks_like_image(os.fsencode(name))
