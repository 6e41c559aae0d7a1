"""What all ranks must have in common before they start: the run's folder, the code, the data, the libraries, room.

Each rank says what it has, and where one differs from most the message names its node and what would do.
"""

import hashlib
import importlib.metadata
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from cluster.command import log
from cluster.folders import Folder
from cluster.ray_runtime import REPOSITORY
from pipeline.corpora import some
from pipeline.workers import Worker, from_all, node

SHARED = ".shared"
"""A file in a run's folder by which the ranks see that all have the same one."""
_LIBRARIES = ("torch", "deepspeed", "numpy", "nvidia-dali-cuda130", "ray")
_CODE = "the code of Vitforge"
_WARNED = ("Python",)
"""What may differ, though it is worth knowing."""
_CURES = {
    _CODE: "bring the same version to every node (`ray job submit --working-dir` does)",
    "the data": "the nodes see different corpora under the same path: mount the same one on all",
}

_T = TypeVar("_T")


class DisagreementError(ValueError):
    """The ranks do not have the same."""


class PassingDisagreementError(DisagreementError, OSError):
    """Some ranks failed at what may pass by itself: worth another try later."""


def check_folder(folder: Folder, worker: Worker) -> None:
    """Every rank must see the run's folder: checkpoints are written there by all of them.

    Raises:
        DisagreementError: some do not.
    """
    if folder.local is None or worker.world_size == 1:
        return
    marker = folder.local / SHARED
    token = from_all(str(time.time_ns()))[0]
    if worker.leads:
        marker.write_text(token, encoding="utf-8")
    from_all(None)  # rank 0 has written
    seen = from_all((marker.exists() and marker.read_text(encoding="utf-8") == token, node()))
    blind = sorted({where for sees, where in seen if not sees})
    if blind:
        raise DisagreementError(
            f"the run's folder {folder} is not shared: {', '.join(blind)} does not see what rank 0 wrote there. Set "
            "run.home (or VITFORGE_HOME) to a folder that every node mounts, or to s3://"
        )


def on_all_ranks(attempt: Callable[[], _T]) -> _T:
    """What an attempt gives on this rank, if it succeeds on every rank; all must call it.

    Raises:
        ValueError: or OSError, as the attempt raised it, where it failed on all ranks alike.
        DisagreementError: it failed on some, or not alike; naming their nodes.
    """
    error: ValueError | OSError | None = None
    try:
        result = attempt()
    except (ValueError, OSError) as caught:
        error = caught
    outcomes = from_all((node(), None if error is None else str(error), isinstance(error, OSError)))
    failures: dict[str, set[str]] = {}
    for where, text, _ in outcomes:
        if text is not None:
            failures.setdefault(text, set()).add(where)
    if not failures:
        return result
    if error is not None and all(text == str(error) for _, text, _ in outcomes):
        raise error
    named = "; ".join(f"on {some(sorted(nodes), 8)}: {text}" for text, nodes in failures.items())
    kind = PassingDisagreementError if any(passing for _, _, passing in outcomes) else DisagreementError
    raise kind(f"not all ranks can begin: {named}") from error


def check_ranks(data: Mapping[str, str], worker: Worker) -> None:
    """Compare code, libraries and data of all ranks.

    Args:
        data: identity of each corpus by the setting that names it.

    Raises:
        DisagreementError: naming the nodes that differ from most.
    """
    mine = {_CODE: code_hash(), **versions(), "Python": platform.python_version()}
    mine |= {f"the data ({key})": identity for key, identity in data.items()}
    every = from_all((node(), mine))
    differences = []
    for what in mine:
        usual, _ = Counter(facts[what] for _, facts in every).most_common(1)[0]
        others = sorted({(where, facts[what]) for where, facts in every if facts[what] != usual})
        if not others:
            continue
        named = ", ".join(f"{where} has {value[:16]}" for where, value in others[:8])
        cure = next((text for key, text in _CURES.items() if what.startswith(key)), "install the same version on all")
        text = f"{what} is not the same on all nodes: {named}, the others have {usual[:16]}: {cure}"
        if what in _WARNED:
            log.warning("%s", text)
        else:
            differences.append(text)
    if differences:
        raise DisagreementError("; ".join(differences))


def check_room(needed: float, place: Path, worker: Worker) -> None:
    """Each rank must be able to write its part of a checkpoint.

    Args:
        needed: bytes that this rank writes.
        place: where, on this node's disk.

    Raises:
        DisagreementError: naming the nodes that have less.
    """
    free = shutil.disk_usage(place).free
    short = sorted(
        {
            (where, there)
            for where, there, wanted in from_all((node(), free, needed * worker.local_world_size))
            if there < wanted
        }
    )
    if short:
        named = ", ".join(f"{where} has {there / 2**30:.1f} GiB free" for where, there in short)
        raise DisagreementError(
            f"there is no room for a checkpoint on its way: {needed * worker.local_world_size / 2**30:.1f} GiB are "
            f"needed in {place.parent}, {named}. Make room, or set checkpoint.scratch to another disk"
        )


def code_hash() -> str:
    """A hash of our own source files: names the code also where a job runs from a copy without its history."""
    digest = hashlib.sha256()
    for room in ("cluster", "data_prep", "models", "pipeline"):
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the libraries that a run depends on, of those that are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found
