"""Kill parts of a training run at awkward moments, again and again, and see that it goes on as if nothing had been.

    python -m tests.faults [rounds=20] [hosts=1|2] [seed=0]

One run goes on through all rounds. Each round waits for its moment, kills with SIGKILL, starts the command again if
the driver was killed, and checks: the run resumes from the newest committed checkpoint. At the end the record of
samples has no gap and no repeat. Prints a table: fault, seconds to the next step, steps repeated.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.settings import SettingsError
from tests.corpora import image_folder, make_corpus
from tests.two_hosts import TwoHosts
from tests.watched_run import POLL_S, ThisMachine, WatchedRun

SCRATCH = Path("/dev/shm") / f"vitforge-faults-{os.getpid()}"
"""The node's own disk: another file system than the run's folder, so that an upload is a copy."""
SAVE_EVERY = 40
"""Steps between checkpoints."""
WORDS = [
    "pipeline/pretrain.py", "demo", "model.width=192", "model.depth=4", "model.heads=3", "data.image_size=32",
    "training.duration=100000 steps", "training.global_batch=12", "log.every=1",
    f"checkpoint.every={SAVE_EVERY} steps", "registry.name=null", "run.name=faults",
    "run.max_failures=1000", "run.cpus_per_worker=1", "data.decode_threads=1",
    f"checkpoint.scratch={SCRATCH}",
]  # fmt: skip
IMAGES = 66
"""In the corpus; no multiple of the batch, so that a step may lie in two epochs."""


@dataclass(frozen=True)
class Round:
    """What came of one fault."""

    fault: str
    step: int
    """The last step that was recorded before the run resumed."""
    resumed: int
    """The step of the checkpoint that it resumed from."""
    committed: int
    """The newest committed checkpoint before it resumed."""
    seconds: float
    """From the kill to the first step after it."""

    @property
    def repeated(self) -> int:
        """Steps that were taken twice."""
        return max(self.step - self.resumed, 0)

    def __str__(self) -> str:
        return f"{self.fault:<42} {self.step:>6} {self.resumed:>6} {self.seconds:>6.1f} {self.repeated:>6}"


HEADER = f"{'fault (SIGKILL)':<42} {'step':>6} {'from':>6} {'s':>6} {'again':>6}"


@dataclass(frozen=True)
class Fault:
    """What is killed, and when."""

    name: str
    moment: Callable[[WatchedRun], None]
    """Returns when it is to happen."""
    strike: Callable[[WatchedRun], None]


def driver(run: WatchedRun) -> None:
    """Kill the process that people started."""
    assert run.driver is not None
    run.driver.kill()
    run.driver.wait()


def one_rank(run: WatchedRun) -> None:
    """Kill one of the ranks."""
    random.choice(ranks(run)).kill()


def every_rank(run: WatchedRun) -> None:
    """Kill all the ranks."""
    for rank in ranks(run):
        rank.kill()


def ranks(run: WatchedRun) -> list:
    """The processes that train; there must be some."""
    found = run.place.ranks()
    assert found, "no ranks found"
    return found


def at_random(run: WatchedRun) -> None:
    """Some steps after the first checkpoint of this life."""
    run.wait_for_steps(SAVE_EVERY + random.randrange(2 * SAVE_EVERY))


def while_saving(run: WatchedRun) -> None:
    """A part is being written to the node's own disk."""
    run.wait_for_steps(SAVE_EVERY // 2)
    run.wait("a part being written", lambda: any(SCRATCH.glob("checkpoints-*/*")))


def while_uploading(run: WatchedRun) -> None:
    """Parts are on their way to the run's folder, and do not count yet."""
    run.wait_for_steps(SAVE_EVERY // 2)
    run.wait("an upload", run.uploading)


def just_committed(run: WatchedRun) -> None:
    """A checkpoint has begun to count."""
    run.wait_for_steps(SAVE_EVERY // 2)
    before = run.newest()
    run.wait("a committed checkpoint", lambda: run.newest() > before)


FAULTS = [
    Fault("a worker, at random", at_random, one_rank),
    Fault("the driver, at random", at_random, driver),
    Fault("every worker, at random", at_random, every_rank),
    Fault("a worker, while saving", while_saving, one_rank),
    Fault("the driver, while saving", while_saving, driver),
    Fault("a worker, while uploading", while_uploading, one_rank),
    Fault("the driver, while uploading", while_uploading, driver),
    Fault("a worker, right after a commit", just_committed, one_rank),
    Fault("the driver, right after a commit", just_committed, driver),
]


def play(run: WatchedRun, fault: Fault, timeout: float = 300) -> Round:
    """One fault, from before it to the first step after it.

    Raises:
        AssertionError: the run did not go on, or not from the newest committed checkpoint.
    """
    if not run.alive():
        run.start()
    fault.moment(run)
    resumes = len(run.resumed())
    committed = run.newest()
    fault.strike(run)
    struck = time.monotonic()
    if not run.alive():
        run.start()
        resumes = 0
    seen: list[tuple[float, int]] = []
    while True:
        now, step = time.monotonic(), run.last_step()
        if not seen or seen[-1][1] != step:
            seen.append((now, step))
        resumed = run.resumed()[resumes:]
        if not resumed:
            committed = max(committed, run.newest())
        elif step > resumed[-1] and (found := _first_after(seen, resumed[-1])):
            highest, when = found
            break
        assert run.alive(), f"{fault.name}: the run ended: {run.output()[-4000:]}"
        assert now < struck + timeout, f"{fault.name}: no step in {timeout:.0f} s: {run.output()[-4000:]}"
        time.sleep(POLL_S)
    result = Round(fault.name, highest, resumed[-1], committed, when - struck)
    assert result.resumed == committed, f"{fault.name}: resumed from {result.resumed}, committed was {committed}"
    return result


def _first_after(seen: list[tuple[float, int]], resumed: int) -> tuple[int, float] | None:
    """The highest step before the resume, and when the first step after it was recorded."""
    highest, dropped = 0, False
    for when, step in seen:
        if dropped and step > resumed:
            return highest, when
        dropped = dropped or step < highest
        highest = highest if dropped else max(highest, step)
    # The record is not cut where nothing was lost.
    after = [(when, step) for when, step in seen if step > resumed]
    return (resumed, after[0][0]) if not dropped and seen[0][1] <= resumed and after else None


class FirstHost:
    """The driver runs on the first of two hosts."""

    def __init__(self, pair: TwoHosts) -> None:
        self.pair = pair

    def start(self, *words: str, log: Path, **extra: str):
        """Start an entry point on the first host, attached to the cluster."""
        return self.pair.start(*words, log=log, **extra)

    def ranks(self) -> list:
        """The processes that train, on both hosts."""
        return [*self.pair.workers(0), *self.pair.workers(1)]


@contextmanager
def a_run(root: Path, *overrides: str) -> Iterator[WatchedRun]:
    """The run that all faults on one host befall."""
    corpus = make_corpus(image_folder(root / "images", classes=3, images=IMAGES // 3), root / "corpus")
    place = ThisMachine(root / "home")
    words = [*WORDS, f"data.corpus={corpus.path}", "run.workers=2", *overrides]
    try:
        yield WatchedRun(place, root / "home" / "runs" / "faults", words, root / "run.log")
    finally:
        place.end()
        shutil.rmtree(SCRATCH, ignore_errors=True)


def main() -> None:
    """The command."""
    rounds, hosts, seed = 20, 1, 0
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key not in ("rounds", "hosts", "seed") or not value.isdigit():
            raise SettingsError(f"{word!r}: give rounds=, hosts= or seed= a number")
        rounds, hosts, seed = (
            int(value) if key == name else old for name, old in (("rounds", rounds), ("hosts", hosts), ("seed", seed))
        )
    random.seed(seed)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"run folder: {root}\n{HEADER}", flush=True)
    results = []
    with a_run(root) as run:
        for number in range(rounds):
            results.append(play(run, FAULTS[number % len(FAULTS)]))
            print(results[-1], flush=True)


if __name__ == "__main__":
    main()
