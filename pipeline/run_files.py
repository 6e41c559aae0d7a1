"""Files of a run's folder, for what wants a path of this machine: the folder may be on an object store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.folders import Folder
from cluster.marked_folders import temporary_folder

METRICS = "metrics.jsonl"
"""The record of a run's metrics, in its folder; it appears when the first step is about to be taken."""
INITIAL_WEIGHTS = "initial.safetensors"
"""The weights that a run starts from, where they are not drawn from its seed."""


@contextmanager
def producing(folder: Folder, name: str) -> Iterator[Path]:
    """A path to write a file to; at the end of the block it is brought to the folder, whole."""
    with temporary_folder("file") as scratch:
        path = scratch / Path(name).name
        yield path
        folder.put(path, name)
