"""Files of a run's folder: what their readers take from them, and paths of this machine for what wants one."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cluster.command import log
from cluster.folders import Folder
from cluster.marked_folders import temporary_folder
from cluster.records import Record, check_record
from cluster.settings import SettingsError
from cluster.storage import StorageError, parse_json

METRICS = "metrics.jsonl"
"""The record of a run's metrics, in its folder; it appears when the first step is about to be taken."""
RUN_RECORD = "run.json"
"""Which stage and parent the folder belongs to, and its MLflow run."""
INITIAL_WEIGHTS = "initial.safetensors"
"""The weights that a run starts from, where they are not drawn from its seed."""


class _RunRecord(Record):
    """What run.json must say."""

    stage: str
    parent: str | None
    parent_run: str | None = None
    architecture: dict[str, Any] | None = None
    colors: list[Annotated[list[float], Field(min_length=3, max_length=3)]] | None = None
    mlflow_run: str | None = None


class _MetricsRow(Record):
    step: Annotated[int, Field(ge=0, lt=2**53)]


def read_run_record(folder: Folder) -> dict[str, Any] | None:
    """What run.json in a run's folder says; None where there is none: the run has not begun.

    Raises:
        SettingsError: it is damaged, or another file.
    """
    if folder.size(RUN_RECORD) is None:
        return None
    try:
        record: dict[str, Any] = folder.read_json(RUN_RECORD)
    except OSError:
        raise
    except StorageError as error:
        raise SettingsError(f"{error}: bring it back, or use another run.name") from error
    check_record(_RunRecord, record, f"{folder}/{RUN_RECORD} is not that of a run", SettingsError)
    return record


def metrics_of(folder: Folder) -> list[dict[str, Any]]:
    """The rows of a run's metrics file, none where there is none; a last line that a crash cut short is left out."""
    rows: list[dict[str, Any]] = []
    content = folder.read_bytes(METRICS) if folder.size(METRICS) is not None else b""
    for line in content.splitlines():
        try:
            row = parse_json(line, METRICS)
            check_record(_MetricsRow, row, METRICS, StorageError)
        except StorageError:
            break
        rows.append(row)
    return rows


@contextmanager
def producing(folder: Folder, name: str) -> Iterator[Path]:
    """A path to write a file to; at the end of the block it is brought to the folder, whole."""
    with temporary_folder("file") as scratch:
        path = scratch / Path(name).name
        yield path
        folder.put(path, name)


class Lines:
    """A file that lines are added to. Those that a full disk does not take are kept, and written with the next ones.

    Args:
        path: the file, whole lines.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size, self._kept, self._warned = path.stat().st_size, b"", False

    def add(self, line: str) -> None:
        """Write a line, now or later."""
        self._kept += line.encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("%s: %s: what is added is kept and written later", self._path, error.strerror)

    def flush(self) -> None:
        """Write what is kept.

        Raises:
            OSError: it cannot be; it stays kept, and the file ends with a whole line.
        """
        try:
            written = 0
            while written < len(self._kept):
                written += self._file.write(self._kept[written:]) or 0
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._size += len(self._kept)
        self._kept = b""

    def close(self) -> None:
        """Add no more."""
        self._file.close()
