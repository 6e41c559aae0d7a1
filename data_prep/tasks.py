"""Does the work of a job piece by piece, in Ray tasks or, where that is less than the start of Ray, in processes here.

Either way a piece is tried again where storage fails and where a process ends on it, and the results are the same.
"""

import heapq
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.command import Progress, log
from cluster.folders import Folder
from cluster.launch_environment import ray_address
from cluster.storage import StorageError
from data_prep.corpus_jobs import GO_ON, in_megabytes
from data_prep.decoder_process import guarded
from data_prep.listing import SourceError
from data_prep.task_processes import TaskProcessEndedError, TaskProcesses

_ATTEMPTS = 4
"""To write a shard where the storage fails."""
_PROCESSES, _CAREFUL_PROCESSES = 2, 3
"""That may end on a shard, before each of its images is decoded in a process of its own, and then."""
_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
"""Seconds before a shard is tried again that could not be written: a failing disk or network may need time."""
_START_S = 8.0
"""Seconds that Ray takes to start, with its workers, on two idle cores."""
_IMAGE_S, _BYTES_A_SECOND = 0.5e-3, 25e6
"""Seconds of a core for every image, and bytes of images that it decodes a second."""


@dataclass(frozen=True)
class Work:
    """How much there is to do."""

    images: int = 0
    bytes: float = 0.0
    decodes: bool = True
    """Whether images are decoded; what is only copied is ten times as fast."""

    @property
    def seconds(self) -> float:
        """Of one core, roughly."""
        return self.images * _IMAGE_S + self.bytes / (_BYTES_A_SECOND * (1 if self.decodes else 10))


def takes_ray(work: Work, workers: int = 0) -> bool:
    """Whether work is for Ray: on a cluster, where a number of workers was asked for, and where its start is worth it.

    Args:
        workers: that the user asked for; 0 leaves it to us.
    """
    if workers or ray_address() is not None:
        return True
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # it has been started
        return True
    return work.seconds / (os.cpu_count() or 1) > _START_S


@contextmanager
def session(work: Work, workers: int) -> Iterator[None]:
    """Ray for the length of a block in which several calls of `run_tasks` do some work, if it is for Ray."""
    if not takes_ray(work, workers):
        yield
        return
    from cluster.ray_runtime import ray_session  # before ray: it sets what ray reads when it is imported

    with ray_session():
        yield


class _Executor(Protocol):
    """Does tasks elsewhere."""

    at_once: int

    def start(self, task: Any, careful: bool) -> Any:
        """Begin a task; gives what it is known by."""

    def wait(self, running: list[Any], timeout: float | None) -> list[Any]:
        """One that has ended, or none after `timeout` seconds."""

    def result(self, one: Any) -> dict[str, Any]:
        """What it returned.

        Raises:
            TaskProcessEndedError: too many processes ended on it.
            Exception: what it raised.
        """


class _RayTasks:
    """Tasks of a Ray cluster, which starts them again where a node or worker dies."""

    def __init__(self, function: Callable[[Any], dict[str, Any]], workers: int, decodes: bool) -> None:
        import ray

        def carefully(task: Any) -> dict[str, Any]:
            with guarded() if decodes else nullcontext():
                return function(task)

        options = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        self._ray = ray
        self._remote = ray.remote(max_retries=_PROCESSES - 1, **options)(function)
        self._careful = ray.remote(max_retries=_CAREFUL_PROCESSES - 1, **options)(carefully)
        self._running: set[Any] = set()
        self.at_once = workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def start(self, task: Any, careful: bool) -> Any:
        one = (self._careful if careful else self._remote).remote(task)
        self._running.add(one)
        return one

    def wait(self, running: list[Any], timeout: float | None) -> list[Any]:
        done, _ = self._ray.wait(running, num_returns=1, timeout=timeout)
        return list(done)

    def result(self, one: Any) -> dict[str, Any]:
        self._running.discard(one)
        try:
            record: dict[str, Any] = self._ray.get(one)
            return record
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (SourceError, OSError, StorageError)):
                raise error.cause from error
            raise  # of the function itself
        except self._ray.exceptions.RayError as error:
            raise TaskProcessEndedError(str(error).splitlines()[0]) from error

    def close(self) -> None:
        """Cancel what is running: on a cluster it would go on after this process."""
        for one in self._running:
            self._ray.cancel(one, force=True)


class _LocalTasks:
    """Tasks of processes of this machine."""

    def __init__(self, function: Callable[[Any], dict[str, Any]], count: int, decodes: bool) -> None:
        self._processes = TaskProcesses(function, count)
        self._decodes = decodes
        self.at_once = count

    def start(self, task: Any, careful: bool) -> Any:
        tries = _CAREFUL_PROCESSES if careful else _PROCESSES
        return self._processes.start(task, tries, careful and self._decodes)

    def wait(self, running: list[Any], timeout: float | None) -> list[Any]:
        return self._processes.wait(running, timeout)[:1]

    def result(self, one: Any) -> dict[str, Any]:
        record: dict[str, Any] = one.result()
        return record

    def close(self) -> None:
        self._processes.close()


def run_tasks(
    function: Callable[[Any], dict[str, Any]],
    tasks: Mapping[str, Callable[[], Any]],
    folder: Folder,
    workers: int,
    progress: Progress,
    units: Callable[[str], int],
    look: Callable[[dict[str, Any]], None] = lambda record: None,
    *,
    work: Work,
) -> dict[str, dict[str, Any]]:
    """Do the work of shards, a bounded number at a time, and show how it goes.

    Args:
        function: takes a task and returns the shard's record; done twice it must give the same files.
        tasks: for the name of each shard what makes its task, called when its turn has come: a task may be large.
        folder: of the corpus.
        workers: shards at a time; 0 for what there are CPUs for.
        progress: the caller's; its time counts from when the workers are there.
        units: how much of the progress the shard of a name is.
        look: is shown each record; what it raises ends the work.
        work: how much the tasks are, and whether the function decodes images, of which one may end its process.

    Returns:
        The records of the shards, by name.

    Raises:
        SourceError: the source is at fault.
        StorageError: the storage failed in several attempts, or in a way that no other attempt cures.
    """
    if not tasks:
        return {}
    with session(work, workers):
        executor: _RayTasks | _LocalTasks
        if takes_ray(work, workers):
            executor = _RayTasks(function, workers, work.decodes)
        else:
            executor = _LocalTasks(function, min(os.cpu_count() or 1, len(tasks)), work.decodes)
        progress.started, progress.at_once = time.monotonic(), min(executor.at_once, len(tasks))
        with closing(executor):
            return _run(executor, tasks, folder, progress, units, look, work.decodes)


def _run(
    executor: _Executor,
    tasks: Mapping[str, Callable[[], Any]],
    folder: Folder,
    progress: Progress,
    units: Callable[[str], int],
    look: Callable[[dict[str, Any]], None],
    decodes: bool,
) -> dict[str, dict[str, Any]]:
    deadly: set[str] = set()
    records: dict[str, dict[str, Any]] = {}
    running: dict[Any, str] = {}
    failures: Counter[str] = Counter()
    again: list[tuple[float, str]] = []  # (when, name), the earliest first
    done_bytes, note = 0, ""
    waiting = iter(tasks)
    while True:
        while again and len(running) < executor.at_once and again[0][0] <= time.monotonic():
            name = heapq.heappop(again)[1]
            running[executor.start(tasks[name](), name in deadly)] = name
        while len(running) + len(again) < executor.at_once and (following := next(waiting, None)) is not None:
            running[executor.start(tasks[following](), False)] = following
        if not running and not again:
            progress.finish(note)
            return records
        patience = max(0.0, again[0][0] - time.monotonic()) if again else None
        if not running:
            time.sleep(patience or 0)
            continue
        done = executor.wait(list(running), patience)
        if not done:
            continue
        name = running.pop(done[0])
        try:
            records[name] = executor.result(done[0])
        except TaskProcessEndedError as error:
            if name in deadly:
                raise StorageError(
                    f"{name} in {folder} cannot be made: its process ended {_PROCESSES + _CAREFUL_PROCESSES} "
                    f"times ({error}){', and no image is known to be the reason' if decodes else ''}. Nodes "
                    f"end, or memory is not enough (workers=N has fewer at a time). {GO_ON}"
                ) from error
            log.warning(
                "%s: its process ended %d times (%s); again%s", name, _PROCESSES, error,
                ", with its images decoded in another process" if decodes else "",
            )  # fmt: skip
            deadly.add(name)
            heapq.heappush(again, (time.monotonic(), name))
            continue
        except OSError as error:
            failures[name] += 1
            if failures[name] == _ATTEMPTS:
                raise StorageError(
                    f"{name} in {folder} could not be written in {_ATTEMPTS} attempts: {error}. {GO_ON}"
                ) from error
            pause = random.uniform(0.5, 1) * min(_LONGEST_PAUSE, _PAUSE * 4 ** failures[name])
            log.warning("%s could not be written (%s), again in %.0f s", name, error, pause)
            heapq.heappush(again, (time.monotonic() + pause, name))
            continue
        look(records[name])
        done_bytes += sum(records[name]["sizes"].values())
        note = f"{in_megabytes(done_bytes / max(time.monotonic() - progress.started, 1e-9))}/s"
        progress.update(units(name), note)
