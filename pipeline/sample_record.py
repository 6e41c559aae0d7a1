"""Which samples every rank used in every step: a record to look for faults with."""

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.folders import Folder
from cluster.settings import SettingsError
from pipeline.run_files import Lines


class SampleRecord:
    """RUN/samples/rank-NNNNN.jsonl: {"step": the step's number from 1, "ids": sample ids in order}, a line a step.

    Steps that are repeated after a crash stand there again.

    Args:
        folder: the run's.

    Raises:
        SettingsError: it is no folder of a file system.
    """

    def __init__(self, folder: Folder, rank: int) -> None:
        if folder.local is None:
            raise SettingsError(f"log.samples = true appends to files, which {folder} cannot: set it to false")
        path: Path = folder.local / "samples" / f"rank-{rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        if whole[2]:
            os.truncate(path, len(whole[0] + whole[1]))  # a row that a crash cut short
        self._lines = Lines(path)

    def write(self, step: int, ids: list[NDArray[np.int64]]) -> None:
        """Add a step that was taken, with the ids of its micro-batches."""
        self._lines.add(json.dumps({"step": step, "ids": np.concatenate(ids).tolist()}))
