"""Ctrl-C, a terminal that is closed and SIGTERM end every command in one way, and let one that trains save first.

The first signal ends the command, or is a wish to save and stop where there is something to save; a second one ends
it at once. The exit status is 128 + the signal's number, as a shell has it.
"""

import contextlib
import os
import signal
import stat
import threading
import time
from types import FrameType

from cluster.launch_environment import LaunchError, leads, under_torchrun

NAMES = {
    signal.SIGINT: "by Ctrl-C (SIGINT)",
    signal.SIGHUP: "by the end of its terminal (SIGHUP)",
    signal.SIGTERM: "by SIGTERM",
}
"""The signals that end a command, as messages name them."""
STOPPED = {128 + number for number in NAMES}
"""The exit statuses of commands that one of them ended."""
TOGETHER_S = 1.0
"""Seconds in which several signals are one event. A shell that loses its terminal sends SIGHUP, and the kernel sends it
again when the shell ends; `timeout` sends SIGTERM to the command and to its process group; systemd sends both."""
_AT_ONCE_S = 3.0
"""Seconds that children have to end at the second signal."""


class StopSignals:
    """The signals of this process.

    Attributes:
        begun: to be true while there is something to save. Otherwise the first signal ends the process.
        requested: true since the first signal, or `expire`.
        reason: why, once it was requested.
        status: exit status of a command that was stopped so.
        leaving: true since a signal that ends the process by raising SystemExit.
    """

    def __init__(self) -> None:
        # No threading.Event: a handler that sets one waits for ever for a lock, if it comes while the main thread
        # waits for the same event.
        self.begun = self.requested = False
        self.reason, self.status = "", 0
        self.leaving = self._asked = self._watching = self._early = False
        self._expired = ""
        self._ended: int | None = None

    def install(self, early: bool = False) -> None:
        """Handle the signals from now on, in the main thread. What replaces the handlers (Ray): install them again.

        Args:
            early: nothing is open yet that would have to be closed.

        A signal that the process was started to ignore (SIGHUP, by nohup) stays ignored. Not under torchrun, which
        takes the signals in any case and ends ranks that do not heed them.
        """
        self._early = early
        for number in NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN or under_torchrun():
                signal.signal(number, self._handle)
        signal.signal(signal.SIGALRM, self._expire)
        if not self._watching:
            self._watching = True
            arrived, arrives = os.pipe()
            os.set_blocking(arrives, False)
            signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # its signals are not ours
            threading.Thread(target=self._watch, args=(arrived,), name="vitforge-signals", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Sleep, at most until the command is told to stop; returns whether it is."""
        until = time.monotonic() + seconds
        while not self.requested and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        return self.requested

    def expire(self, status: int, reason: str) -> None:
        """What a first signal does, for another reason; to be called from any thread, once."""
        self._expired = reason
        self.status = self.status or status
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    def end(self, status: int) -> None:
        """The command has come to its end: a signal changes nothing of its status any more, and only hurries it."""
        self._ended = status

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_dead_terminal()
        if not self._asked:
            self._asked = True
            how = NAMES[signal.Signals(number)]
            self._request(128 + number, f"the command was told to stop {how}", how)

    def _expire(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self._request(self.status, self._expired, f"because {self._expired}")

    def _request(self, status: int, reason: str, how: str) -> None:
        self.status, self.reason = self.status or status, self.reason or reason
        self.requested = True
        if not self.begun:
            say(f"stopped {how}")
            if self._early:
                os._exit(self.status)  # libraries make an ImportError of what is raised while they are imported
            self.leaving = True
            raise SystemExit(self.status)
        say(f"told to stop {how}: the run is saved first; another signal ends it at once")

    def _watch(self, arrived: int) -> None:
        """End the process at the second signal, whatever it does: Python's handlers wait while a library computes.

        Nothing is closed then. A killed command is what the next one, and Ray, must be ready for anyway.
        """
        first: float | None = None
        while True:
            number = os.read(arrived, 1)[0]
            if number not in NAMES:
                continue
            if self._ended is not None:
                os._exit(self._ended)
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= TOGETHER_S:
                say(f"ended at once {NAMES[signal.Signals(number)]}: what was saved before is as it was")
                os._exit(self.status or 128 + number)


STOP = StopSignals()
"""Those of this process: it has one set of handlers."""


def hand_on_to_children() -> None:
    """From now on this process waits for its children, which a signal is handed on to, and ends as they do.

    Where it has none, a signal ends it. The second one ends the children at once, those too that do not heed it.
    """
    import psutil

    told: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if number == signal.SIGHUP:
            leave_dead_terminal()
        children = psutil.Process().children()
        if not children:
            say(f"stopped {NAMES[signal.Signals(number)]}")
            raise SystemExit(128 + number)
        send(children, number)
        if told is None:
            told = time.monotonic()
        elif time.monotonic() - told >= TOGETHER_S:
            threading.Timer(_AT_ONCE_S, send, (children, signal.SIGKILL)).start()

    def send(children: "list[psutil.Process]", number: int) -> None:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    signal.set_wakeup_fd(-1)
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def say(line: str) -> None:
    """Write a line to standard error, also from a signal's handler, where a stream may be in the midst of writing.

    Of several ranks the first speaks.
    """
    with contextlib.suppress(LaunchError):
        if not leads():
            return
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%H:%M:%S')} {line}\n".encode())


def leave_dead_terminal() -> None:
    """Write to nowhere what would go to a terminal that is gone: it would fail, now and when Python ends."""
    for number in (1, 2):
        if terminal_is_gone(number):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def terminal_is_gone(number: int) -> bool:
    """Whether a file number is that of a terminal that was closed."""
    try:
        return stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number) and not _is_null(number)
    except OSError:
        return False


def _is_null(number: int) -> bool:
    return os.fstat(number).st_rdev == os.stat(os.devnull).st_rdev  # noqa: PTH116
