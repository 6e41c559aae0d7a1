"""A command in a terminal of its own: what is typed there, what is shown, and what happens when it is closed."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import threading
import time
from pathlib import Path


class Terminal:
    """A command as the foreground job of a pseudo-terminal.

    Attributes:
        pid: of the command.
        shown: what the terminal has shown so far.
    """

    def __init__(self, words: list[str], folder: Path, variables: dict[str, str]) -> None:
        self.shown, self._open = "", True
        self._status: int | None = None
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            try:
                for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)  # shells let what they start in the background ignore them
                os.chdir(folder)
                os.execvpe(words[0], words, variables)
            finally:
                os._exit(127)
        fcntl.fcntl(self._master, fcntl.F_SETFD, fcntl.FD_CLOEXEC)  # a terminal that another holds open does not close
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last process has left the terminal, or it was closed
            while self._open:
                if select.select([self._master], [], [], 0.05)[0]:
                    self.shown += os.read(self._master, 65536).decode(errors="replace").replace("\r\n", "\n")

    def press(self, keys: str) -> None:
        """Type: "\\x03" is Ctrl-C, which the terminal turns into SIGINT for the whole foreground group."""
        os.write(self._master, keys.encode())

    def send(self, number: signal.Signals) -> None:
        """A signal to the whole process group, as `timeout` and a shell that ends send it."""
        os.killpg(self.pid, number)

    def close(self) -> None:
        """Close the terminal: SIGHUP to its session's leader, and whatever is written there fails from now on."""
        self._open = False
        self._thread.join(10)
        os.close(self._master)

    def wait(self, seconds: float = 60) -> int:
        """The command's exit status, as a shell has it.

        Raises:
            AssertionError: it has not ended by then.
        """
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, self.shown[-4000:]
            time.sleep(0.02)
        self._thread.join(5)
        return status

    def poll(self) -> int | None:
        """The command's exit status; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code
        return self._status

    def kill(self) -> None:
        """End what is left of it."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait(20)
        if self._open:
            self.close()
