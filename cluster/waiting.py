"""Says what a command waits for, every few seconds of every long wait: a person sees that it goes on."""

import threading
import time
from types import TracebackType

from cluster.command import duration, log

EVERY_S = 5.0


class Waiting:
    """Says "waiting for WHAT (10 s)" every 5 s, from now until it is closed, or for the length of a `with` block.

    Args:
        what: is waited for, as in "waiting for Ray to start".
        every: seconds between lines.

    Attributes:
        what: may be changed when something else is waited for.
    """

    def __init__(self, what: str, every: float = EVERY_S) -> None:
        self.what = what
        self._every, self._began = every, time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._say, name="vitforge-waiting", daemon=True).start()

    def _say(self) -> None:
        while not self._over.wait(self._every):
            log.info("waiting for %s (%s)", self.what, duration(time.monotonic() - self._began))

    def close(self) -> None:
        """It is there. May be called again."""
        self._over.set()

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
