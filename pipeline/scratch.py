"""A folder on a node's own disk for files on their way elsewhere, and what happens where it is full."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from cluster.command import NO_ROOM
from cluster.marked_folders import MarkedFolder, TemporaryFolderError, temporary_files_in
from cluster.ownership import OwnershipError
from cluster.settings import SettingsError

_OTHER_FILES = 1 << 18
"""Bytes of a package beside the weights, at most: code, MLflow's own files, an example."""
_FULL = ("No space left on device", "Disk quota exceeded", "database or disk is full")
"""What libraries say that raise errors of their own: safetensors, MLflow, SQLite."""


class Scratch(MarkedFolder):
    """A folder of this process alone, where checkpoint.scratch says.

    Args:
        place: where such folders are; empty takes the one of this user in the system's temporary folder.
        purpose: what it is for; part of its name, for people.

    Raises:
        SettingsError: it cannot be made.
    """

    def __init__(self, place: str, purpose: str) -> None:
        try:
            super().__init__(purpose, Path(place) if place else None)
        except (OwnershipError, TemporaryFolderError) as error:
            raise SettingsError(f"{error}, or checkpoint.scratch to a folder on this node's own disk") from error
        except OSError as error:
            raise SettingsError(
                f"{place} cannot be used for files on their way ({error.strerror}): set "
                "checkpoint.scratch to a folder on this node's own disk"
            ) from error


@contextmanager
def temporary_files(place: str, purpose: str) -> Iterator[None]:
    """Has all temporary files of this process in a `Scratch` for the length of a block, those of libraries too."""
    with closing(Scratch(place, purpose)) as scratch, temporary_files_in(scratch.path):
        yield


@contextmanager
def room_for_hand_over(place: str, weights: float, home: Path) -> Iterator[None]:
    """Says of a full disk, while a model is handed over, that it is that, and what to do.

    Args:
        place: checkpoint.scratch.
        weights: bytes of the model.
        home: folder of the tracking database.

    Raises:
        SettingsError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        here = Path(place or tempfile.gettempdir())
        raise SettingsError(
            "no space is left to hand the model over; it is trained, and its checkpoint is whole. Have "
            f"{_in_words(2 * weights)} free in {here} (it has {_in_words(_free(here))}), or set checkpoint.scratch to "
            f"a folder on another disk, and have {_in_words(weights)} free where models are kept ({home} has "
            f"{_in_words(_free(home))}); then run the same command again, which hands the model over"
        ) from error


def check_package_room(place: str, weights: float, kept: Path | None) -> None:
    """Refuse a disk that a model's package will not fit on, before anything is trained.

    Args:
        place: checkpoint.scratch, where MLflow makes a copy beside ours.
        weights: bytes of the model.
        kept: folder of this machine in which packages are kept, if they are.

    Raises:
        SettingsError: it has too little room.
    """
    needs: list[tuple[Path, float, str]] = [
        (
            Path(place or tempfile.gettempdir()),
            2 * (weights + _OTHER_FILES),
            "set checkpoint.scratch to a folder on another disk",
        )
    ]
    if kept is not None:
        needs.append((kept, weights + _OTHER_FILES, "set run.home or VITFORGE_HOME to a folder on another disk"))
    wanted: dict[int, float] = {}
    for folder, needed, advice in needs:
        device = _existing(folder).stat().st_dev
        wanted[device] = wanted.get(device, 0) + needed
        if _free(folder) < wanted[device]:
            raise SettingsError(
                f"there is no room for the model's package: {_in_words(wanted[device])} are needed in {folder}, "
                f"{_in_words(_free(folder))} are free. Make room, or {advice}"
            )


@contextmanager
def room_to_read(what: str) -> Iterator[None]:
    """Says of a full temporary folder, while something is fetched to it, that it is that.

    Raises:
        SettingsError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise SettingsError(
            f"{what} cannot be read: no space is left in {tempfile.gettempdir()}. Make room there, or set TMPDIR (when "
            "fine-tuning checkpoint.scratch) to a folder on another disk"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether an error, or what it came of, is a disk without room."""
    seen: list[BaseException] = []
    following: Sequence[BaseException | None] = [error]
    while following:
        new = [each for each in following if each is not None and each not in seen]
        seen += new
        following = [cause for each in new for cause in (each.__cause__, each.__context__)]
    return any(getattr(each, "errno", None) in NO_ROOM or any(what in str(each) for what in _FULL) for each in seen)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _in_words(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
