"""Wishes to stop: they come as signals to a process, and reach the ranks through whoever started them."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from cluster.command import log

STOPPED = 128 + signal.SIGTERM
"""Exit status of a command that saved and stopped because it was told to."""


class Control(Protocol):
    """What the ranks can ask of, and tell, whoever started them."""

    attempt: int
    """How often the ranks were started before, by the same command."""
    secret: bytes | None
    """What the ranks know each other by; None where who started them has no safe way to tell it."""

    def begin(self) -> None:
        """The first step is about to be taken: from now on there may be something to save."""

    def stop_wanted(self) -> str | None:
        """Why this rank should save and stop, or None. It may take a moment: ask from a thread."""

    def hung(self, message: str) -> None:
        """Leave word why this rank ends itself. It may take a moment, and must not fail."""


class StopSignal:
    """SIGTERM as a wish to save and stop. A second one ends the process at once; so does the first before `begun`.

    Attributes:
        requested: set by the first signal.
        begun: to be set when there is something to save.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.begun = threading.Event()

    def install(self) -> None:
        """Handle the signal from now on. Ray replaces the handler when it starts: install it again then."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested.is_set() or not self.begun.is_set():
            sys.exit(128 + number)
        self.requested.set()
        log.warning("told to stop: the run is saved first; a second signal stops it at once")


class SignalControl:
    """The control of ranks that receive the signals themselves (torchrun).

    A torchrun that is killed leaves its ranks behind: they would go on with nobody to see to them, and keep their GPUs
    and the run from the next one. So they stop when the process that started them is gone.
    """

    attempt = 0
    secret: bytes | None = None

    def __init__(self, signals: StopSignal) -> None:
        self._signals, self._parent = signals, os.getppid()

    def begin(self) -> None:
        self._signals.begun.set()

    def stop_wanted(self) -> str | None:
        if os.getppid() != self._parent:
            return f"torchrun (process {self._parent}) is gone"
        return "told to stop" if self._signals.requested.is_set() else None

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
