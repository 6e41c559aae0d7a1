"""What runs beside the training loop on a rank: the watch for hanging ranks, the wish to stop, lease, heartbeat."""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cluster.folders import Folder
from cluster.lease import TTL_S, Watcher, end_process
from cluster.waiting import Waiting
from pipeline.heartbeat import Heartbeat
from pipeline.stopping import Control, Every
from pipeline.watch import Watch
from pipeline.workers import Worker


class Oversight:
    """The threads of one rank, for the length of a block. Every rank must have one.

    Args:
        folder: the run's.
        lease: token of the lease that the run's driver holds; None where this process is the driver.
        limit_s: seconds that a phase of a step may take before a rank counts as hanging.

    Attributes:
        heartbeat: on rank 0; else None.
        needs_s: gives the seconds that saving and stopping would take from now on.
    """

    def __init__(
        self, worker: Worker, control: Control, folder: Folder, run: str, lease: str | None, limit_s: float
    ) -> None:
        self._control, self._reason = control, ""
        self._watch = Watch(worker, limit_s, control.hung, control.secret)
        self.needs_s: Callable[[], float] = lambda: 0.0
        self._threads = [Every(0.5, self._ask, "stop")]
        self._waiting = Waiting("the model and the data to be ready") if worker.leads else None
        """Until the first step is done."""
        self.heartbeat: Heartbeat | None = None
        if worker.leads:
            self.heartbeat = Heartbeat(folder, run, ranks=worker.world_size, restarts=control.attempt, pid=os.getpid())
            if lease is not None:
                watcher = Watcher(folder, lease)
                self._threads.append(Every(TTL_S / 6, lambda: self._check(watcher), "lease-watch"))

    @property
    def wants_stop(self) -> bool:
        """Whether this rank knows of a wish to stop."""
        return bool(self._reason)

    def begin(self) -> None:
        """The first step is about to be taken."""
        self._control.begin()

    def at(self, phase: str, step: int) -> None:
        """Say what the rank does now; all ranks go through the same phases in the same order."""
        if self._waiting and phase == "first step":
            self._waiting.what = "the first step"
        elif self._waiting and self._waiting.what == "the first step":
            self._waiting.close()
        self._watch.at(phase, step)

    def update(self, **values: Any) -> None:
        """Change what the heartbeat shows."""
        if self.heartbeat:
            self.heartbeat.update(**values)

    def follow(self, commits: Callable[[], tuple[int, float] | None]) -> None:
        """Show in the heartbeat which checkpoint was committed last: its step, and when (Unix)."""
        if self.heartbeat:
            self.heartbeat.commits = commits

    def __enter__(self) -> "Oversight":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting:
            self._waiting.close()
        for thread in self._threads:
            thread.close()
        self._watch.close()
        if self.heartbeat:
            if error:
                self.heartbeat.update(state="failed")
            self.heartbeat.close()

    def _ask(self) -> None:
        if not self._reason:
            self._reason = self._control.stop_wanted(self.needs_s()) or ""

    def _check(self, watcher: Watcher) -> None:
        reason = watcher.lost()
        if reason:
            end_process(f"{reason}: the ranks end, so that they do not write into another job's folder")
