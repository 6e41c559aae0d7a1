"""Finds the rank that hangs, says which it is and where, and ends the ranks so that they can be started again.

A collective that one rank does not join makes all wait, and none can say for whom. So each rank has a thread that
tells rank 0 every second what it is doing. A rank that stops telling is silent: its process is stopped, or its machine
is gone. One that tells but does not move on is stuck; of several that wait, those that are furthest behind are meant.
Rank 0 judges all, the others judge rank 0.

The ranks know each other by a secret (cluster/authenticated_channel.py). A verdict names ranks, not processes: each
machine's ranks find in their own process table which of its processes those are (pipeline/rank_processes.py).
"""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from cluster.authenticated_channel import Client, Server, new_secret
from cluster.command import duration, log
from pipeline.rank_processes import RankMark, end_ranks
from pipeline.stopping import Every
from pipeline.workers import Worker, from_all, listening_address, node

HUNG = 71
"""Exit status of a rank that was ended because one of them hung."""
LONG = 4
"""How many times longer than a step some phases may take without a sign: starting, the first step, saving."""
_SILENT_S = 60.0
"""Seconds without a sign of life, however short or long the limit for a step is."""
_LONG_PHASES = ("start", "first step", "checkpoint")
_HEARD_S = 3.0
"""Seconds in which every rank that runs has heard a verdict, and those that it names have said where they are."""


@dataclass(frozen=True)
class Sign:
    """What a rank tells every second."""

    beat: int
    """Counts the signs."""
    moves: int
    """Counts the phases: all ranks go through the same ones."""
    phase: str
    step: int
    node: str
    pid: int
    """For people: what is done never depends on it."""

    @classmethod
    def parse(cls, values: Any) -> "Sign":
        """The sign in a message.

        Raises:
            ValueError, TypeError: it holds none.
        """
        sign = cls(**values)
        for field in dataclasses.fields(sign):
            if type(getattr(sign, field.name)) is not field.type:
                raise ValueError(f"{field.name} of a sign is {getattr(sign, field.name)!r}")
        return sign

    def __str__(self) -> str:
        return f"on {self.node} (process {self.pid}), in {self.phase} of step {self.step}"


class Watch:
    """The watch of one rank; every rank must make one.

    Args:
        limit_s: seconds that a phase of a step may take.
        told: is given the verdict before this rank ends; it must not fail.
        secret: of the ranks, from who started them; None lets rank 0 make one, and tell it through the process group.
    """

    def __init__(
        self, worker: Worker, limit_s: float, told: Callable[[str], None], secret: bytes | None = None
    ) -> None:
        self.worker, self.limit_s, self._told = worker, limit_s, told
        self._silent_s = min(_SILENT_S, limit_s)
        self._phase, self._step, self._moves, self._beat = "start", 0, 0, 0
        self._seen: dict[int, tuple[Sign, float, float]] = {}
        """Of each rank that is judged here: its last sign, when it last beat and when it last moved, by our clock."""
        self._judged = time.monotonic()
        self._board: _Board | None = None
        """On rank 0."""
        self._server: Server | None = None
        self._client: Client | None = None
        self._secret = b""
        self._mark: RankMark | None = None
        if worker.world_size > 1:
            self._connect(secret)
        self._thread = Every(1.0, self._look, "watch")

    def _connect(self, secret: bytes | None) -> None:
        """Become one of those that watch each other. Every rank must call it."""
        offer: tuple[tuple[str, int], bytes] | None = None
        host = listening_address(self.worker)
        if self.worker.leads:
            made = new_secret()
            self._board = _Board(self.worker.world_size, self._sign())
            self._server = Server(host, secret or made, self._board.exchange, self.worker.world_size)
            offer = self._server.address, made
        address, made = from_all(offer)[0]
        self._secret = secret or made
        self._mark = RankMark(self._secret, self.worker.rank)
        if not self.worker.leads:
            self._client = Client(address, self._secret, max(1.0, self._silent_s / 4))
            self._exchange(self._client)
        dist.barrier()

    def at(self, phase: str, step: int) -> None:
        """Say what this rank does now. All ranks must go through the same phases in the same order."""
        self._phase, self._step = phase, step
        self._moves += 1

    def close(self) -> None:
        """Stop watching."""
        self._thread.close()
        for part in (self._client, self._server, self._mark):
            if part is not None:
                part.close()

    def _sign(self) -> Sign:
        self._beat += 1
        return Sign(self._beat, self._moves, self._phase, self._step, node(), os.getpid())

    def _look(self) -> None:
        signs: dict[int, Sign] = {}
        if self._client is not None:
            # A connection that failed is made anew the next time.
            with contextlib.suppress(OSError):
                signs = {0: self._exchange(self._client)}
        else:
            mine = self._sign()
            signs = self._board.signs(mine) if self._board is not None else {0: mine}
        self._note(signs)
        self._judge()

    def _exchange(self, client: Client) -> Sign:
        """Tell rank 0 what this rank does; returns what rank 0 does. A verdict ends this process."""
        answer = client.ask({"rank": self.worker.rank, "sign": dataclasses.asdict(self._sign())})
        if answer["verdict"] is not None:
            message, ranks = answer["verdict"]
            if self.worker.rank in ranks:
                _say_where(message)
            else:
                time.sleep(_HEARD_S)
            self._end(ranks)
        return Sign.parse(answer["leader"])

    def _note(self, signs: dict[int, Sign]) -> None:
        now = time.monotonic()
        for rank, sign in signs.items():
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
        if self.worker.rank in ranks:
            _say_where(message)  # before the others end this process
        if self._board is not None:
            self._board.verdict = message, ranks
            time.sleep(_HEARD_S)
        self._end(ranks)

    def _end(self, ranks: list[int]) -> None:
        """End this process, and those of the hanging ranks on this machine that cannot do it themselves."""
        if self._secret:
            end_ranks(self._secret, ranks)
        os._exit(HUNG)


def _say_where(message: str) -> None:
    """Write a verdict and the stacks of this process's threads to standard error."""
    print(f"{message}; its threads:", file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()


class _Board:
    """What the ranks have told, on rank 0."""

    def __init__(self, ranks: int, mine: Sign) -> None:
        self._signs, self._lock = {0: mine}, threading.Lock()
        self._ranks = ranks
        self.verdict: tuple[str, list[int]] | None = None

    def signs(self, mine: Sign) -> dict[int, Sign]:
        """The last sign of each rank, after rank 0's own was put in."""
        with self._lock:
            self._signs[0] = mine
            return dict(self._signs)

    def exchange(self, told: Any) -> dict[str, Any]:
        """Take the sign of a rank; the answer has rank 0's, and the verdict."""
        rank, sign = told["rank"], Sign.parse(told["sign"])
        if rank not in range(1, self._ranks):
            raise ValueError(f"there is no rank {rank!r} to tell anything")
        with self._lock:
            self._signs[rank] = sign
            return {"leader": dataclasses.asdict(self._signs[0]), "verdict": self.verdict}
