"""Wishes to stop: they come as signals or from the clock, and reach the ranks through whoever started them."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

import psutil

from cluster.command import TIME_OVER, duration, log
from cluster.stop_signals import StopSignals


class Control(Protocol):
    """What the ranks can ask of, and tell, whoever started them."""

    attempt: int
    """How often the ranks were started before, by the same command."""
    secret: bytes | None
    """What the ranks know each other by; None where who started them has no safe way to tell it."""

    def begin(self) -> None:
        """The first step is about to be taken: from now on there may be something to save."""

    def stop_wanted(self, needs_s: float) -> str | None:
        """Why this rank should save and stop, or None. It may take a moment: ask from a thread.

        Args:
            needs_s: seconds that saving and stopping would take from now on, as far as this rank knows.
        """

    def hung(self, message: str) -> None:
        """Leave word why this rank ends itself. It may take a moment, and must not fail."""


class TimeLimit:
    """The end of a command's time: it is asked to stop as long before as saving and stopping may take.

    Args:
        limit_s: seconds from the command's start.
        pid: the process whose start counts as the command's.

    Attributes:
        needs_s: seconds that saving and stopping would take, as the ranks say.
    """

    def __init__(self, limit_s: float, signals: StopSignals, pid: int) -> None:
        self.needs_s = 0.0
        self._limit_s, self._signals = limit_s, signals
        age_s = max(time.time() - psutil.Process(pid).create_time(), 0.0)
        self._ends = time.monotonic() - age_s + limit_s
        self._slack_s = min(max(_SLACK * limit_s, _SLACK_S[0]), _SLACK_S[1])
        self._over = False

    def look(self) -> None:
        """Stop the command if it is time; from any thread."""
        left = self._ends - time.monotonic()
        if left < self.needs_s + self._slack_s and not self._over:
            self._over = True
            self._signals.expire(
                TIME_OVER,
                f"run.stop_after = {duration(self._limit_s)} will be over in {duration(max(left, 0))}, and saving and "
                f"stopping may take {duration(self.needs_s + self._slack_s)}",
            )


_SLACK, _SLACK_S = 0.2, (5.0, 60.0)
"""What a time limit leaves for all that is not measured (the ends of the ranks, of Ray and of the tracking run): a
share of the limit, and the least and the most of it in seconds."""


class SignalControl:
    """The control of ranks that receive the signals themselves (torchrun).

    A torchrun that is killed leaves its ranks behind: they would go on with nobody to see to them, and keep their GPUs
    and the run from the next one. So they stop when the process that started them is gone.

    Args:
        limit: where the command's time is limited.
    """

    attempt = 0
    secret: bytes | None = None

    def __init__(self, signals: StopSignals, limit: TimeLimit | None = None) -> None:
        self._signals, self._limit, self._parent = signals, limit, os.getppid()

    def begin(self) -> None:
        self._signals.begun = True

    def stop_wanted(self, needs_s: float) -> str | None:
        if self._limit:
            self._limit.needs_s = needs_s
        if os.getppid() != self._parent:
            log.info("saving and stopping: torchrun (process %d) is gone", self._parent)
            return "torchrun is gone"
        return self._signals.reason if self._signals.requested else None

    def hung(self, message: str) -> None:
        """Nobody to tell: the log has it."""


class Every:
    """Calls a function every so many seconds in a thread of its own, until it is closed.

    An exception of the function is logged, once for each message, and it is called again.
    """

    def __init__(self, seconds: float, function: Callable[[], object], name: str) -> None:
        self._seconds, self._function = seconds, function
        self._closed = threading.Event()
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=f"vitforge-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._function()
            except Exception as error:
                what = f"{self._thread.name}: {type(error).__name__}: {error}"
                if what not in self._said:
                    self._said.add(what)
                    log.log(logging.WARNING, "%s", what)
            if self._closed.wait(self._seconds):
                return

    def close(self) -> None:
        """Stop calling; returns when a call that is under way has ended, or after ten seconds."""
        self._closed.set()
        self._thread.join(timeout=10)
