"""What the benchmarks of loading and training share: CPU time, contenders in turn, one form of table."""

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass
class Times:
    """What a contender took in each round."""

    wall: list[float] = field(default_factory=list)
    """Seconds."""
    cpu: list[float] = field(default_factory=list)
    """CPU-seconds of all threads and child processes."""


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and of its living worker processes."""
    uses = [psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children()]
    return time.process_time() + sum(used.user + used.system for used in uses)


def rest(looks: int = 5) -> float:
    """Wait until no other thread and no worker runs or wants to, however busy the machine is; since when that is so."""

    def busy() -> bool:
        mine = threading.get_native_id()
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        threads = [thread for process in processes for thread in Path(f"/proc/{process}/task").iterdir()]
        states = ((thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads)
        return any(state in "RD" for thread, state in zip(threads, states, strict=True) if thread.name != str(mine))

    quiet, since = 0, time.perf_counter()
    while quiet < looks:
        time.sleep(0.01)
        if busy():
            quiet, since = 0, time.perf_counter()
        else:
            quiet += 1
    return since


def rounds_in_turn(contenders: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, Times]:
    """Run contenders in turn, so that what else the machine does meets all alike; the first round does not count.

    A contender that works ahead is waited for: every round holds the making of as many images as it takes.
    """
    times = {name: Times() for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            rest()
            cpu, wall = cpu_seconds(), time.perf_counter()
            run()
            looking = time.thread_time()
            finished = rest()
            looking = time.thread_time() - looking
            if number:
                times[name].wall.append(finished - wall)
                times[name].cpu.append(cpu_seconds() - cpu - looking)
    return times


def print_times(times: Mapping[str, Times], images: int) -> None:
    """A table of the medians, `images` being those of one round."""
    print(f"{'':32} {'images/s':>9} {'images per CPU-second':>22} {'CPU-ms/image':>13}")
    for name, each in times.items():
        wall, cpu = statistics.median(each.wall), statistics.median(each.cpu)
        print(f"{name:32} {images / wall:9,.1f} {images / cpu:22,.1f} {1e3 * cpu / images:13.3f}")
    print()


def print_ratio(times: Mapping[str, Times], ours: str, theirs: str, note: str) -> None:
    """How many times as fast ours is: the median over rounds, and its range in CPU time."""
    cpu = [b / a for a, b in zip(times[ours].cpu, times[theirs].cpu, strict=True)]
    wall = [b / a for a, b in zip(times[ours].wall, times[theirs].wall, strict=True)]
    print(
        f"{ours} / {theirs}: {statistics.median(cpu):.2f}x per CPU-second ({min(cpu):.2f} to {max(cpu):.2f}), "
        f"{statistics.median(wall):.2f}x in wall time ({note})"
    )
