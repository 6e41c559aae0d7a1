"""Finds the rank that hangs, says which it is and where, and ends the ranks so that they can be started again.

A collective that one rank does not join makes all wait, and none can say for whom. So each rank has a thread that
writes what it is doing into a small store of rank 0 every second. A rank that stops writing is silent: its process
is stopped, or its machine is gone. One that writes but does not move on is stuck; of several that wait, those that
are furthest behind are meant. Rank 0 judges all, the others judge rank 0.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from cluster.command import duration, log
from cluster.ownership import HERE
from pipeline.stopping import Every
from pipeline.workers import Worker, from_all

HUNG = 71
"""Exit status of a rank that was ended because one of them hung."""
LONG = 4
"""How many times longer than a step some phases may take without a sign: starting, the first step, saving."""
_SILENT_S = 60.0
"""Seconds without a sign of life, however short or long the limit for a step is."""
_LONG_PHASES = ("start", "first step", "checkpoint")
_PLACE = " ".join(HERE.values())


@dataclass(frozen=True)
class Sign:
    """What a rank writes every second."""

    beat: int
    """Counts the signs."""
    moves: int
    """Counts the phases: all ranks go through the same ones."""
    phase: str
    step: int
    node: str
    place: str
    """Where process numbers mean what they mean on this rank."""
    pid: int

    def __str__(self) -> str:
        return f"on {self.node} (process {self.pid}), in {self.phase} of step {self.step}"


class Watch:
    """The watch of one rank; every rank must make one.

    Args:
        limit_s: seconds that a phase of a step may take.
        told: is given the verdict before this rank ends; it must not fail.
    """

    def __init__(self, worker: Worker, limit_s: float, told: Callable[[str], None]) -> None:
        self.worker, self.limit_s, self._told = worker, limit_s, told
        self._silent_s = min(_SILENT_S, limit_s)
        self._phase, self._step, self._moves, self._beat = "start", 0, 0, 0
        self._seen: dict[int, tuple[Sign, float, float]] = {}
        """Of each rank that is judged here: its last sign, when it last beat and when it last moved, by our clock."""
        self._judged = time.monotonic()
        self._store: Any = None
        if worker.world_size > 1:
            timeout = datetime.timedelta(seconds=max(5.0, self._silent_s / 3))
            host = os.environ["MASTER_ADDR"]
            if worker.leads:
                self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
                self._store.set("verdict", "")
            port = from_all(self._store.port if worker.leads else 0)[0]
            self._connect: Callable[[], Any] = lambda: dist.TCPStore(host, port, is_master=False, timeout=timeout)
            if not worker.leads:
                self._store = self._connect()
            self._store.set(f"sign/{worker.rank}", self._sign())
            dist.barrier()
        self._threads = [Every(1.0, self._look, "watch")]
        if not worker.leads:
            # Connecting anew to a process that is stopped may never return: judging it must not wait for that.
            self._threads.append(Every(1.0, self._judge, "judge"))

    def at(self, phase: str, step: int) -> None:
        """Say what this rank does now. All ranks must go through the same phases in the same order."""
        self._phase, self._step = phase, step
        self._moves += 1

    def close(self) -> None:
        """Stop watching."""
        for thread in self._threads:
            thread.close()

    def _sign(self) -> str:
        self._beat += 1
        sign = Sign(self._beat, self._moves, self._phase, self._step, HERE["host"], _PLACE, os.getpid())
        return json.dumps(asdict(sign))

    def _look(self) -> None:
        mine = self._sign()
        signs: dict[int, str] = {self.worker.rank: mine}
        try:
            if self._store is not None:
                self._store.set(f"sign/{self.worker.rank}", mine)
                if self.worker.leads:
                    keys = [f"sign/{rank}" for rank in range(self.worker.world_size)]
                    signs = dict(enumerate(text.decode() for text in self._store.multi_get(keys)))
                else:
                    verdict, leader = (text.decode() for text in self._store.multi_get(["verdict", "sign/0"]))
                    signs = {0: leader}
                    if verdict:
                        self._end(*json.loads(verdict))
        except (RuntimeError, OSError):
            # A connection that failed once may be out of step with its answers: a new one is made.
            with contextlib.suppress(RuntimeError, OSError):
                if not self.worker.leads:
                    self._store = self._connect()
        self._note(signs)
        if self.worker.leads:
            self._judge()

    def _note(self, signs: dict[int, str]) -> None:
        now = time.monotonic()
        for rank, text in signs.items():
            sign = Sign(**json.loads(text))
            last, beaten, moved = self._seen.get(rank, (None, now, now))
            if last is None or sign.beat != last.beat:
                beaten = now
            if last is None or sign.moves != last.moves:
                moved = now
            self._seen[rank] = (sign, beaten, moved)

    def _judge(self) -> None:
        now = time.monotonic()
        away, self._judged = now - self._judged, now
        if away > self._silent_s / 2:  # this process was stopped, and the others with it, perhaps
            self._seen = {rank: (sign, beat + away, moved + away) for rank, (sign, beat, moved) in self._seen.items()}
        judged = {rank: seen for rank, seen in self._seen.items() if self.worker.leads or rank == 0}
        silent = [rank for rank, (_, beaten, _) in judged.items() if now - beaten > self._silent_s]
        stuck = [
            rank
            for rank, (sign, _, moved) in judged.items()
            if now - moved > self.limit_s * (LONG if sign.phase in _LONG_PHASES else 1)
        ]
        if silent:
            since = max(now - judged[rank][1] for rank in silent)
            self._condemn(silent, f"gave no sign of life for {duration(since)}")
        elif stuck and self.worker.leads:
            since = max(now - judged[rank][2] for rank in stuck)
            behind = min(sign.moves for sign, _, _ in judged.values())
            ranks = [rank for rank, (sign, _, _) in judged.items() if sign.moves == behind]
            self._condemn(ranks, f"did not move on for {duration(since)}")

    def _condemn(self, ranks: list[int], what: str) -> None:
        named = "; ".join(f"rank {rank} {self._seen[rank][0]}" for rank in ranks[:8])
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        message = (
            f"{named}{more} {what} (run.hang_timeout_s = {self.limit_s:g}): the ranks are ended, to go on from the "
            "newest checkpoint"
        )
        log.error("%s", message)
        self._told(message)
        processes = [(self._seen[rank][0].place, self._seen[rank][0].pid) for rank in ranks]
        if self._store is not None and self.worker.leads:
            with contextlib.suppress(RuntimeError, OSError):
                self._store.set("verdict", json.dumps([message, processes]))
                time.sleep(3)  # the others read it before the store is gone
        self._end(message, processes)

    def _end(self, message: str, processes: list[tuple[str, int]]) -> None:
        """End this process, and those of the hanging ranks on this machine that cannot do it themselves."""
        for place, pid in processes:
            if place != _PLACE:
                continue
            if pid == os.getpid():
                print(f"{message}; its threads:", file=sys.stderr)
                faulthandler.dump_traceback(file=sys.stderr)
                sys.stderr.flush()
            else:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        os._exit(HUNG)
