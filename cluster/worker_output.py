"""What Ray's workers print, as the driver shows it: lines of ours as they are, all others with who printed them.

Colours are for terminals: in a file they are characters between the words.
"""

import itertools
import re
import sys
from typing import Any, TextIO

_OURS = re.compile(r"\d\d:\d\d:\d\d ")
"""How the lines of cluster/command.py's log begin."""
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class _WithoutColors:
    """A stream that is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_COLOR.sub("", text))

    def flush(self) -> None:
        self._stream.flush()


def show_plainly() -> None:
    """From now on, until Ray is shut down, show what its workers print so. Call after ray.init."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    name = "ray_print_logs"  # as Ray 2.60 calls the handler that it takes out again
    if any(there == name for there, _ in dispatcher.handlers):
        dispatcher.remove_handler(name)
        dispatcher.add_handler(name, show)


def show(data: dict[str, Any]) -> None:
    """Show some lines that one process printed.

    Args:
        data: as Ray 2.60's log monitor sends it: `lines`, `is_err`, `pid`, `ip` and more.
    """
    stream = sys.stderr if data["is_err"] else sys.stdout
    sink = stream if stream.isatty() else _WithoutColors(stream)
    for ours, lines in itertools.groupby(data["lines"], lambda line: _OURS.match(line) is not None):
        if ours:
            print(*lines, sep="\n", file=sink, flush=True)
        else:
            _show_others({**data, "lines": list(lines)}, sink)


def _show_others(data: dict[str, Any], sink: Any) -> None:
    from ray._private.ray_logging import stderr_deduplicator, stdout_deduplicator
    from ray._private.worker import print_worker_logs

    batches = [data]
    if data["pid"] != "autoscaler":
        batches = (stderr_deduplicator if data["is_err"] else stdout_deduplicator).deduplicate(data)
    for batch in batches:
        print_worker_logs(batch, sink)
