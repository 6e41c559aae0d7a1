"""How many ranks a start takes: the most that the terms allow and the cluster has room for now."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.command import duration, log
from cluster.settings import SettingsError

if TYPE_CHECKING:
    from cluster.capacity import Node

_SAY_EVERY_S = 60.0
_SETTLE_S = 8.0
"""Seconds for a cluster to take back what ranks had that have just ended."""
_ASK_EVERY_S = 5.0
_ASK_LESS_S = 60.0
"""Seconds after which an autoscaler is asked for less: it grants a request as a whole or not at all."""


@dataclass(frozen=True)
class Terms:
    """How many ranks, and what is done when they do not come to their end.

    Attributes:
        workers: fewest and most ranks; None takes every GPU, or 1 without one.
        cpus_per_worker: logical CPUs a rank; None shares the cluster's.
        max_failures: crashes in a row, without progress between them, after which no more starts are made.
        timeout_s: for collective operations.
        resize_check_s: seconds between looks for room for more ranks.
        wait_s: seconds to wait for room for the fewest.
        interface: network interface of the ranks; None chooses it.
        section: what the names of these settings begin with, for messages: empty for evaluation, where they have no
            section, and ranks no range.
    """

    workers: tuple[int, int] | None = None
    cpus_per_worker: int | None = None
    max_failures: int = 0
    timeout_s: int = 600
    resize_check_s: float = 60.0
    wait_s: float = 0.0
    interface: str | None = None
    section: str = "run."


@dataclass(frozen=True)
class Crew:
    """The ranks of one start."""

    ranks: int
    cpus: int
    gpu: bool


class Recruiter:
    """Finds crews for the starts of one stage.

    Args:
        check: refuses a number of ranks by raising ValueError.
        pause: waits so many seconds; raises what should end the waiting.
    """

    def __init__(self, terms: Terms, check: Callable[[int], None], pause: Callable[[float], None]) -> None:
        self.terms, self.check, self._pause = terms, check, pause
        self._gpu: bool | None = None
        self._asked: float | None = None
        """When the autoscaler was asked last."""
        self._hoped = 0
        """Ranks that there should be room for: as many as before, or as there was seen to be room for."""

    def recruit(self, first: bool) -> Crew:
        """The largest crew within the terms that there is room for now; waits for room for the smallest.

        Args:
            first: it is the first start.

        Raises:
            ValueError: the cluster is too small for the smallest crew, or was for as long as we may wait; from
                `check`, where there is room for no number of ranks that it takes.
        """
        from cluster import capacity

        began = time.monotonic()
        say = began + 5
        grows = capacity.grows()
        while True:
            total = capacity.total_nodes()
            fewest, most, gpu = self._bounds(total, first)
            # The list of nodes lags behind what happened to them; before the first start nothing has yet.
            free = capacity.free_nodes()
            if not first:
                free = capacity.answering(free)
            crew = self._largest(free, fewest, most, gpu)
            waited = time.monotonic() - began
            if crew is not None:
                # What the ranks before had is given back one by one.
                possible = self._largest(total, crew.ranks, most, gpu) or crew
                if crew.ranks < min(self._hoped, possible.ranks) and waited < _SETTLE_S:
                    self._pause(0.2)
                    continue
                if crew.ranks < most:
                    log.info("room for %d rank(s) of at most %d", crew.ranks, most)
                self._hoped, self._gpu = crew.ranks, gpu
                return crew
            hopeless = first and not grows and self._largest(total, fewest, most, gpu) is None
            if hopeless or waited > self.terms.wait_s:
                for fitting in self._fitting(total if hopeless else free, fewest, most, gpu):
                    self.check(fitting.ranks)
                raise SettingsError(self._no_room(total, free, fewest, gpu, waited))
            # What ranks before have not given back yet looks like others' use, and would be asked for twice.
            if grows and (first or waited > _SETTLE_S):
                wishes = [(most, gpu), (fewest, gpu)]
                if self._gpu is None and not any(node.cpus or node.gpus for node in total):
                    wishes = [(most, True), (fewest, True), (fewest, False)]  # no node shows yet what they have
                self._ask(*wishes[min(int(waited / _ASK_LESS_S), len(wishes) - 1)], total, free)
            if time.monotonic() > say:
                say = time.monotonic() + _SAY_EVERY_S
                fits = next(self._fitting(free, fewest, most, gpu), None)
                log.info(
                    "waiting for room for %s: %d node(s) with %d CPUs and %d GPUs free; %s more at most",
                    f"more than {fits.ranks} rank(s), which do not split the batch" if fits else f"{fewest} rank(s)",
                    len(free),
                    sum(node.cpus for node in free),
                    sum(node.gpus for node in free),
                    duration(self.terms.wait_s - waited),
                )
            self._pause(0.5)

    def larger(self, crew: Crew, places: list[str]) -> int | None:
        """More ranks than a crew has, if there is room for them beside it; else None.

        Args:
            places: the node of each of its ranks.
        """
        from cluster import capacity

        total = capacity.total_nodes()
        _, most, gpu = self._bounds(total)
        least = crew.ranks
        if most <= least or len(places) < least:
            return None
        whole = [
            capacity.Node(
                node.id,
                node.host,
                node.cpus + places.count(node.id) * crew.cpus,
                node.gpus + places.count(node.id) * gpu,
            )
            for node in capacity.free_nodes()
        ]
        found = self._largest(whole, least, most, gpu)
        if found is None or found.ranks <= least:
            if capacity.grows():
                self._ask(most, gpu, total, whole)
            return None
        found = self._largest(capacity.answering(whole), least, most, gpu)
        if found is None or found.ranks <= least:
            return None
        self._hoped = found.ranks
        return found.ranks

    def _bounds(self, total: "list[Node]", first: bool = False) -> tuple[int, int, bool]:
        """Fewest and most ranks, and whether each has a GPU."""
        gpus = int(sum(node.gpus for node in total))
        # What began on GPUs does not go on without them.
        gpu = gpus > 0 if self._gpu is None else self._gpu
        if self.terms.workers is not None:
            return *self.terms.workers, gpu
        every = max(gpus, 1)
        return (every if first else 1), every, gpu

    def _largest(self, nodes: "list[Node]", fewest: int, most: int, gpu: bool) -> Crew | None:
        """The largest crew that fits on some nodes and that `check` takes."""
        for crew in self._fitting(nodes, fewest, most, gpu):
            with suppress(ValueError):
                self.check(crew.ranks)
                return crew
        return None

    def _fitting(self, nodes: "list[Node]", fewest: int, most: int, gpu: bool) -> Iterator[Crew]:
        """The crews that fit on some nodes, from the largest."""
        for ranks in range(most, fewest - 1, -1):
            cpus = self.terms.cpus_per_worker or max(1, int(sum(node.cpus for node in nodes)) // ranks)
            while self.terms.cpus_per_worker is None and cpus > 1 and _places(nodes, cpus, gpu) < ranks:
                cpus -= 1  # nodes of different sizes: an even share of the whole need not fit on each
            if _places(nodes, cpus, gpu) >= ranks:
                yield Crew(ranks, cpus, gpu)

    def _ask(self, ranks: int, gpu: bool, total: "list[Node]", free: "list[Node]") -> None:
        """Ask the autoscaler for room for so many ranks beside what others use.

        Ray Train asks for the ranks that it starts: one request takes the place of the other.
        """
        from cluster import capacity

        if self._asked is not None and time.monotonic() - self._asked < _ASK_EVERY_S:
            return
        self._asked = time.monotonic()
        each: dict[str, float] = {"CPU": self.terms.cpus_per_worker or 1, **({"GPU": 1} if gpu else {})}
        left = {node.id: node for node in free}
        used = [
            {"CPU": node.cpus - left[node.id].cpus, "GPU": node.gpus - left[node.id].gpus}
            for node in total
            if node.id in left
        ]
        capacity.request([each] * ranks + [bundle for bundle in used if any(bundle.values())])

    def close(self) -> None:
        """Take back what the autoscaler was asked for, by this driver or one that was killed before it.

        It would keep nodes for it for ever. A job that still waits for its own asks again within seconds.
        """
        from cluster import capacity

        if self._asked is not None or capacity.grows():
            capacity.request([])

    def _no_room(self, total: "list[Node]", free: "list[Node]", fewest: int, gpu: bool, waited: float) -> str:
        cpus = self.terms.cpus_per_worker or 1
        section = self.terms.section
        each = f"{cpus} CPU(s){' and a GPU' if gpu else ''} each"
        cores, gpus = int(sum(node.cpus for node in total)), int(sum(node.gpus for node in total))
        if _places(total, cpus, gpu) < fewest:
            still = f", which did not grow enough in {duration(waited)}" if waited > 1 else ""
            ranged = f", or a range such as {section}workers=1-{fewest}" if section else ""
            return (
                f"{section}workers = {fewest} with {each} do not fit on the cluster ({len(total)} node(s), {cores} "
                f"CPUs, {gpus} GPUs){still}: use fewer workers, or a smaller {section}cpus_per_worker{ranged}"
            )
        return (
            f"there was no room for {fewest} rank(s) with {each} for {duration(waited)} ({len(free)} node(s), "
            f"{sum(node.cpus for node in free):g} CPUs and {sum(node.gpus for node in free):g} GPUs free): wait for "
            f"other jobs to end, raise {section}wait_s, or use fewer workers"
        )


def _places(nodes: "list[Node]", cpus: int, gpu: bool) -> int:
    return sum(node.room(cpus, gpu) for node in nodes)
