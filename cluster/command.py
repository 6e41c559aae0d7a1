"""What every command has around it: readable errors, exit codes, logging, paths, progress."""

import atexit
import errno
import gc
import io
import logging
import os
import stat
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from cluster import stop_signals
from cluster.launch_environment import LaunchError, describe, launch, leads
from cluster.redact import printable, without_credentials

log = logging.getLogger("vitforge")

_LONGEST_MESSAGE = 8000
"""Characters of an error that are shown."""
USER_ERROR = 2
"""Exit status for what the user can put right; anything unforeseen leaves with 1 and a stack trace."""
TIME_OVER = 75
"""Exit status of a run that saved and ended because its time was over (EX_TEMPFAIL of sysexits.h: try again)."""
_FIRST_SAYS_S = 5.0
_LONGEST_PART, _LONGEST_PATH = 255, 4096
"""Bytes of a name in a path and of a path, on every file system in use."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk, and of a user's share of it that is used up."""
EXIT_STATUSES = f"""exit status: 0 done, {USER_ERROR} something that you can put right, 1 anything else; 129, 130 or 143
stopped by SIGHUP, Ctrl-C or SIGTERM (a stage that trains saves first, a second one ends it at once);
{TIME_OVER} saved and stopped because of run.stop_after"""
"""For --help."""


class LogFormatter(logging.Formatter):
    """The time of day and a message, without credentials, in one line whatever names from outside stand in it.

    A warning and an error say that they are one.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        kind = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        record.message = kind + printable(without_credentials(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return shown(super().formatException(ei))


def shown(text: str) -> str:
    """A message of several lines as it may be shown: without credentials and control characters."""
    return printable(without_credentials(text), keep="\n")


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the project's log to standard error, one line an event, with the time of day."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Ray's workers show INFO: "generated new fontManager"


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run an entry point: a ValueError is the user's to put right and is shown as one message, exit status 2.

    With VITFORGE_TRACEBACK=1 the stack trace is shown too.
    """
    set_up_logging()
    sys.excepthook = _show_trace
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for ends nothing
    # Python's last act is to search every object of every library for garbage, which takes seconds for nothing.
    atexit.register(gc.freeze)
    stop_signals.STOP.install()
    status = 1
    try:
        if not leads():
            log.setLevel(logging.ERROR)
        if found := describe():
            log.info("%s", found)
        main()
        status = 0
    except BaseException as error:
        status = _status_of(error)
    finally:
        stop_signals.STOP.end(status)
    sys.exit(status)


def _status_of(error: BaseException) -> int:
    """The exit status of a command that an exception ended, after saying what is to be said of it.

    Raises:
        BaseException: this one, where its stack trace is to be shown.
    """
    if stop_signals.STOP.leaving:
        return stop_signals.STOP.status  # whatever a library made of the exception that was to end it
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, BrokenPipeError) and not isinstance(error, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `... --help | head`: nobody reads on
        return 0
    if number == errno.EIO and stop_signals.terminal_is_gone(sys.stdout.fileno()):
        stop_signals.leave_dead_terminal()  # nobody reads what was to be printed
        return 0
    if not isinstance(error, ValueError) and number not in NO_ROOM:
        raise error
    if os.environ.get("VITFORGE_TRACEBACK") == "1":
        print(shown(traceback.format_exc()), file=sys.stderr)
    if _follows():
        time.sleep(_FIRST_SAYS_S)  # torchrun ends this rank meanwhile, if the first one of its node fails too
    print(shown(f"error{_where()}: {_message(error)}"), file=sys.stderr, flush=True)
    return USER_ERROR


def _follows() -> bool:
    """Whether another rank of this node is likely to say the same."""
    try:
        return launch().local_rank > 0
    except LaunchError:
        return False


def _message(error: BaseException) -> str:
    if isinstance(error, ValueError) or not isinstance(error, OSError):
        text = str(error)  # what it is about may be of any length
        return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}: make room, then run the same command again"


def _show_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's trace of what nobody foresaw; messages of libraries hold what they were given, addresses too."""
    print(shown("".join(traceback.format_exception(kind, error, trace)).rstrip("\n")), file=sys.stderr, flush=True)


def _where() -> str:
    """Which of several nodes this is, under torchrun: what is wrong may be so on this one only."""
    try:
        found = launch()
    except LaunchError:  # the message itself says all that is known
        return ""
    if found.world_size <= found.local_world_size:
        return ""
    return f" on {os.uname().nodename} (rank {found.rank})"


def in_unpacked_job() -> bool:
    """Whether this process runs in the temporary folder that `ray job submit --working-dir` unpacks into."""
    return "working_dir_files" in Path.cwd().parts


def absolute_path(path: str, key: str) -> str:
    """`path` made absolute (`~` expanded; a URI stays as it is).

    Raises:
        ValueError: a relative path inside a submitted Ray job, whose folder is deleted with the job; a path that no
            file system takes; the home of a user whom nobody knows.
    """
    if "://" in path:
        return path
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{key} = {path[:_LONGEST_PART]!r}: this machine knows no user {path.partition('/')[0][1:200]!r}. Write "
            "./~NAME for a folder that is called so"
        ) from None
    longest = max((len(os.fsencode(part)) for part in expanded.parts), default=0)
    if longest > _LONGEST_PART or len(os.fsencode(str(expanded))) >= _LONGEST_PATH or "\0" in path:
        raise ValueError(
            f"{key} = {path[:60]!r}... cannot be a path: a name in one has at most {_LONGEST_PART} bytes (here "
            f"{longest:,}), all of it fewer than {_LONGEST_PATH:,} ({len(os.fsencode(path)):,}), and no zero character"
        )
    if not expanded.is_absolute() and in_unpacked_job():
        raise ValueError(
            f"{key} = {path!r} is relative, but this job runs in a temporary copy of the working folder that is "
            "deleted afterwards: give an absolute path that every node of the cluster sees"
        )
    return str(Path(os.path.abspath(expanded)))


def home_path() -> str:
    """$VITFORGE_HOME, else ~/vitforge, made absolute: where runs and other results lie unless a command is told.

    Raises:
        ValueError: as absolute_path.
    """
    return absolute_path(os.environ.get("VITFORGE_HOME", "") or "~/vitforge", "VITFORGE_HOME")


def check_folder(folder: Path, key: str) -> None:
    """Refuse a place where no folder of ours can be, before anything is written there.

    Args:
        folder: absolute.
        key: the setting that names it, for the message.

    Raises:
        ValueError: it is, or lies in, what is no folder, or where this user may not write.
    """
    for place in (folder, *folder.parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{key} = {str(folder)!r}: {place} cannot be looked at ({error.strerror})") from error
        another = f"set {key} to a folder"
        if not stat.S_ISDIR(mode):
            raise ValueError(f"{key} = {str(folder)!r}: {place} is a file, and no folder: {another}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{key} = {str(folder)!r}: this user may not write to {place}: {another} of yours")
        return


class Progress:
    """A log line now and then for long work: share done, rate, time left.

    The time left is not shown before it can be known: what comes first (processes that start, caches that are cold, as
    many pieces as are worked on at a time) says little of the rest, and is left out of its rate.

    Args:
        total: how many units there are.
        unit: what is counted, in the plural ("images").
        label: what is being done ("sharding").
        every: seconds between lines.
        at_once: pieces that are worked on at a time, each of which is counted when it is done.
    """

    def __init__(self, total: int, unit: str, label: str, every: float = 5.0, at_once: int = 1) -> None:
        self.total, self.unit, self.label, self.every = total, unit, label, every
        self.at_once = at_once
        self.done = 0
        self.counted = 0
        self.started = time.monotonic()
        self._last = self.started
        self._pieces = 0
        self._warm: tuple[int, float] | None = None
        """Units and time when the first pieces were done."""

    @property
    def rate(self) -> float:
        """Units a second since the start, without those that were skipped."""
        return self.counted / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from what was done after the first pieces; None before as many again are done."""
        if self._warm is None or self._pieces < 2 * self.at_once or self.counted == self._warm[0]:
            return None
        return (self.total - self.done) * (time.monotonic() - self._warm[1]) / (self.counted - self._warm[0])

    def skip(self, count: int) -> None:
        """Count units that were finished by an earlier run: they are done but say nothing of the rate."""
        self.done += count

    def update(self, count: int, note: str = "") -> None:
        """Count `count` more units; log a line if one is due. `note` is appended to it."""
        self.done += count
        self.counted += count
        self._pieces += 1
        now = time.monotonic()
        if self._pieces == self.at_once:
            self._warm = self.counted, now
        if now - self._last >= self.every and self.done < self.total:
            self._last = now
            log.info("%s", self.line(note))

    def finish(self, note: str = "") -> None:
        """Log the last line."""
        log.info("%s", self.line(note))

    def line(self, note: str = "") -> str:
        """The progress line as it stands."""
        share = 100 * self.done / self.total if self.total else 100
        text = f"{self.label} {self.done:,}/{self.total:,} {self.unit} ({share:.0f} %), {in_figures(self.rate)}/s"
        if self.done < self.total and (left := self.seconds_left) is not None:
            text += f", {duration(left)} left"
        return f"{text}, {note}" if note else text


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things: 1 shard, 1,281,167 images.

    Args:
        many: the plural, where it is not `one` with an s.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def in_figures(rate: float) -> str:
    """A number as people read it, with at least two figures that count: 12,345, 7.3, 0.04."""
    return f"{rate:,.0f}" if rate >= 9.95 or rate == 0 else f"{rate:.1f}" if rate >= 0.95 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Seconds as people read them: `42 s`, `3 min 20 s`, `5 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
