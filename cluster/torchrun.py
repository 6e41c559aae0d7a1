"""torchrun with all of its options, whose ends are those of our commands.

torchrun itself answers Ctrl-C, SIGHUP and SIGTERM with stack traces and status 1, gives its ranks 30 seconds, does not
let nohup keep SIGHUP away, and adds a report of some 30 lines to every error of a rank. Here the ranks are handed the
signal and have the time that their save takes; a second signal ends them at once. The exit status is the one that the
ranks left with.

example:
  python cluster/torchrun.py --nproc-per-node 8 pipeline/pretrain.py vit-b16-imagenet21k data.corpus=/mnt/corpora/in21k
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import logging
import os

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cluster.command import TIME_OVER, USER_ERROR, run_command
from cluster.stop_signals import STOP, STOPPED, hand_on_to_children

_SAID = {USER_ERROR, TIME_OVER, *STOPPED}
"""Statuses of ranks that have said why they ended."""


def main() -> None:
    """Run the ranks."""
    words = run.parse_args(sys.argv[1:])
    if "LOGLEVEL" not in os.environ:
        # What they report of ranks that end is said below, or by the ranks.
        for name in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    if words.nproc_per_node != "1":
        # What torchrun 2.13 sets, and says in a banner of four lines.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    words.signals_to_handle = "SIGQUIT"  # those that are left to it end the ranks after 30 s
    hand_on_to_children()
    try:
        run.run(words)
    except ChildFailedError as error:
        raise SystemExit(_status(error.failures)) from None


def _status(failures: dict[int, ProcessFailure]) -> int:
    """The exit status of the rank that failed first; says why it ended if that was not said."""
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode not in _SAID:
        how = f"was ended by {first.signal_name()}" if first.exitcode < 0 else f"left with status {first.exitcode}"
        print(f"error: rank {rank} (process {first.pid}) {how}", file=sys.stderr, flush=True)
    return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode


if __name__ == "__main__":
    run_command(main)
