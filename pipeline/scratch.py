"""A folder on a node's own disk for files on their way elsewhere; what killed processes left is cleared away."""

from pathlib import Path

from cluster.ownership import MarkedFolder, OwnershipError
from cluster.settings import SettingsError


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
        except OwnershipError as error:
            raise SettingsError(
                f"{error}: what this user keeps there could be read and replaced. Set checkpoint.scratch to a folder "
                "on this node's own disk, or TMPDIR to a temporary folder of your own"
            ) from error
        except OSError as error:
            raise SettingsError(
                f"{place or error.filename} cannot be used for checkpoints on their way ({error.strerror}): set "
                "checkpoint.scratch to a folder on this node's own disk"
            ) from error
