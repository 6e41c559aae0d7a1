"""Kill parts of a training run at awkward moments, again and again, and see that it goes on as if nothing had been.

    python -m tests.faults [rounds=20] [hosts=1] [seed=0]

One run goes on through all rounds: with `hosts=1` two workers on this machine, with `hosts=2` an elastic run on two
hosts made of network namespaces. Each round waits for its moment, strikes (with SIGKILL, where nothing else is said),
starts the command again if the driver was killed, and checks that the run resumes from the newest committed checkpoint.
At the end the record of samples has no gap, and no repeat but for the steps taken again. Prints a table.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from pydantic import Field

from cluster.command import run_command
from cluster.settings import Settings, parse_command
from tests import sample_record
from tests.corpora import image_folder, make_corpus
from tests.two_hosts import TwoHosts, two_hosts, why_not
from tests.watched_run import POLL_S, ThisMachine, WatchedRun, command_line, in_a_second

SCRATCH = Path("/dev/shm") / f"vitforge-faults-{os.getpid()}"
"""The node's own disk: another file system than the run's folder, so that an upload is a copy."""
SAVE_EVERY = 20
"""Steps between checkpoints."""
BATCH = 12
IMAGES = 66
"""In the corpus; no multiple of the batch, so that a step may lie in two epochs."""
WORDS = [
    "pipeline/pretrain.py", "demo", "model.width=128", "model.depth=3", "model.heads=2", "data.image_size=32",
    "training.duration=1000000 steps", f"training.global_batch={BATCH}", "training.ema=0.999", "log.every=1",
    "log.samples=true", f"checkpoint.every={SAVE_EVERY} steps", "checkpoint.keep=3", "registry.name=null",
    "run.name=faults", "run.max_failures=20", "run.cpus_per_worker=1", "data.decode_threads=1",
    "run.hang_timeout_s=30",
]  # fmt: skip


@dataclass(frozen=True)
class Round:
    """What came of one fault."""

    fault: str
    step: int
    """The last step that was recorded before the run resumed."""
    resumed: int
    """The step of the checkpoint that it resumed from."""
    seconds: float
    """From the strike to the first step after it."""
    ranks: int
    """How many trained then."""

    @property
    def repeated(self) -> int:
        """Steps that were taken twice."""
        return max(self.step - self.resumed, 0)

    def __str__(self) -> str:
        return (
            f"{self.fault:<46} {self.step:>6} {self.resumed:>6} {self.seconds:>8.1f} {self.repeated:>6} {self.ranks:>6}"
        )


HEADER = f"{'fault':<46} {'step':>6} {'from':>6} {'seconds':>8} {'again':>6} {'ranks':>6}"


@dataclass(frozen=True)
class Fault:
    """What is done, and when."""

    name: str
    moment: Callable[[WatchedRun], None]
    """Returns when it is to happen."""
    strike: Callable[[WatchedRun], None]
    overrides: tuple[str, ...] = ()
    """Settings of the command that is started after it."""


# ---- moments -----------------------------------------------------------------------------------------------------


def at_random(run: WatchedRun) -> None:
    """Some steps after the start of this life."""
    run.wait_for_steps(SAVE_EVERY // 2 + random.randrange(2 * SAVE_EVERY))


def while_saving(run: WatchedRun) -> None:
    """A part is being written to the node's own disk."""
    run.wait_for_steps(SAVE_EVERY // 2)
    run.wait("a part being written", lambda: any(SCRATCH.glob("vitforge-checkpoints-*/rank-*")), poll=0.001)


def while_uploading(run: WatchedRun) -> None:
    """Parts are on their way to the run's folder, and do not count yet."""
    run.wait_for_steps(SAVE_EVERY // 2)
    run.wait("an upload", run.uploading, poll=0.001)


def just_committed(run: WatchedRun) -> None:
    """A checkpoint has begun to count."""
    run.wait_for_steps(SAVE_EVERY // 2)
    before = run.newest()
    run.wait("a committed checkpoint", lambda: run.newest() > before, poll=0.001)


def while_starting(run: WatchedRun) -> None:
    """The ranks are there and have not resumed yet: they build the engine, or read the checkpoint into it."""
    run.wait_for_steps(SAVE_EVERY // 2)
    driver(run)
    run.start()
    run.wait("the ranks", run.place.ranks)
    time.sleep(random.uniform(1, 6))


def while_converting(run: WatchedRun) -> None:
    """Another number of ranks reads what the old ones saved."""
    run.wait_for_steps(SAVE_EVERY + 1)
    other = 1 if len(ranks(run)) == 2 else 2
    driver(run)
    run.start(f"run.workers={other}")
    # It reads the parts and says at the end of it that it resumed: the first part is opened before.
    run.wait("the parts being read", lambda: run.resumed() or reading(run), poll=0.001)


def reading(run: WatchedRun) -> bool:
    """Whether a rank has a part of a checkpoint open."""
    for process in run.place.ranks():
        for number in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                if str(run.folder / "checkpoints") in str(number.readlink()):
                    return True
            except OSError:
                continue  # closed in the meantime
    return False


# ---- strikes -----------------------------------------------------------------------------------------------------


def ranks(run: WatchedRun) -> list[psutil.Process]:
    """The processes that train; there must be some."""
    found = run.place.ranks()
    assert found, "no ranks found"
    return found


def driver(run: WatchedRun) -> None:
    """Kill the process that people started."""
    assert run.driver is not None
    if isinstance(run.place, ThisMachine):
        run.place.family()  # to be found at the end, should they not end by themselves
    run.driver.kill()
    run.driver.wait()


def one_rank(run: WatchedRun) -> None:
    """Kill one of the ranks."""
    random.choice(ranks(run)).kill()


def every_rank(run: WatchedRun) -> None:
    """Kill all the ranks."""
    for rank in ranks(run):
        rank.kill()


def freeze_a_rank(run: WatchedRun) -> None:
    """Stop a rank without ending it, as a broken driver or a dead mount does."""
    random.choice(ranks(run)).suspend()


ONE_HOST = [
    Fault("a worker, at random", at_random, one_rank),
    Fault("the driver, at random", at_random, driver),
    Fault("a worker, while saving", while_saving, one_rank),
    Fault("the driver, while uploading", while_uploading, driver),
    Fault("a worker, right after a commit", just_committed, one_rank),
    Fault("the driver, while the ranks start", while_starting, driver),
    Fault("a worker, while 1 rank reads what 2 saved", while_converting, one_rank, ("run.workers=1",)),
    Fault("the driver, while 2 ranks read what 1 saved", while_converting, driver, ("run.workers=2",)),
    Fault("every worker, at random", at_random, every_rank),
    Fault("the driver, while saving", while_saving, driver),
    Fault("a worker, while uploading", while_uploading, one_rank),
    Fault("the driver, right after a commit", just_committed, driver),
    Fault("a worker hangs (SIGSTOP)", at_random, freeze_a_rank),
]


def two_host_faults(pair: TwoHosts) -> list[Fault]:
    """What befalls hosts. Those that take the second one away are followed by its return."""

    def raylet(_: WatchedRun) -> None:
        pair.kill_raylet(1)

    def cut(_: WatchedRun) -> None:
        pair.cut()

    def drained(_: WatchedRun) -> None:
        pair.drain(1, 60)

    def back(_: WatchedRun) -> None:
        pair.restore()
        pair.start_node(1)

    def its_rank(_: WatchedRun) -> None:
        pair.workers(1)[0].kill()

    def alone(run: WatchedRun) -> None:
        run.wait_for_steps(SAVE_EVERY // 2)

    returned = Fault("  the second host is there again", alone, back)
    return [
        Fault("the raylet of the second host, at random", at_random, raylet),
        returned,
        Fault("the worker on the second host, at random", at_random, its_rank),
        Fault("the raylet of the second host, while uploading", while_uploading, raylet),
        returned,
        Fault("the driver, at random", at_random, driver),
        Fault("the link between the hosts is cut", at_random, cut),
        returned,
        Fault("the second host is drained with notice", at_random, drained),
        returned,
    ]


# ---- the rounds --------------------------------------------------------------------------------------------------


def play(run: WatchedRun, fault: Fault, timeout: float = 900) -> Round:
    """One fault, from before it to the first step after it.

    Raises:
        AssertionError: the run did not go on, or not from the newest committed checkpoint.
    """
    if not run.alive():
        run.start(*fault.overrides)
    run.wait("the first checkpoint", run.newest)  # without one there is nothing to resume from
    fault.moment(run)
    committed = run.newest()
    struck = time.monotonic()
    since = in_a_second()
    with ThreadPoolExecutor(1) as pool:  # hosts come and go slowly: the run may save and resume meanwhile
        striking = pool.submit(fault.strike, run)
        if fault.strike in (driver, one_rank, every_rank):
            striking.result()
            struck = time.monotonic()
        if not run.alive():
            run.start(*fault.overrides)
        seen: list[tuple[float, int]] = []
        said = struck
        while True:
            now, step = time.monotonic(), run.last_step()
            if not seen or seen[-1][1] != step:
                seen.append((now, step))
            resumed = run.resumed(since)
            if not resumed:
                committed, said = max(committed, run.newest()), now
            elif step > resumed[-1] and (found := _first_after(seen, resumed[-1], said)):
                highest, when = found
                break
            assert run.alive(), f"{fault.name}: the run ended: {run.output()[-4000:]}"
            assert now < struck + timeout, f"{fault.name}: no step in {timeout:.0f} s: {run.output()[-4000:]}"
            time.sleep(POLL_S)
        striking.result()
    if isinstance(run.place, ThisMachine):
        deadline = time.monotonic() + 60  # Ray's agents look for their raylet every few seconds
        while orphans := run.place.orphans():
            left = [command_line(process).strip() for process in orphans]
            assert time.monotonic() < deadline, f"{fault.name}: of the killed driver there are still {left}"
            time.sleep(0.5)
    assert resumed[-1] == committed, f"{fault.name}: resumed from {resumed[-1]}, committed was {committed}"
    return Round(fault.name, highest, resumed[-1], when - struck, len(ranks(run)))


def _first_after(seen: list[tuple[float, int]], resumed: int, said: float) -> tuple[int, float] | None:
    """The highest step before the resume, and when the first step after it was recorded.

    Args:
        seen: (when, last step in the record), at each change.
        resumed: step of the checkpoint.
        said: until when the run had not said that it resumed. Ranks take steps for a moment after their driver died.
    """
    highest, dropped = 0, False
    for when, step in seen:
        if dropped and step > resumed:
            return highest, when
        dropped = dropped or step < highest
        highest = highest if dropped else max(highest, step)
    # The record is not cut where nothing was lost.
    after = [(when, step) for when, step in seen if step > resumed and when > said]
    return (resumed, after[0][0]) if not dropped and seen[0][1] <= resumed and after else None


class FirstHost:
    """The driver runs on the first of two hosts."""

    def __init__(self, pair: TwoHosts) -> None:
        self.pair = pair

    def start(self, *words: str, log: Path, **extra: str):
        """Start an entry point on the first host, attached to the cluster."""
        return self.pair.start(*words, log=log, **extra)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, on both hosts."""
        return [*self.pair.workers(0), *self.pair.workers(1)]


@contextmanager
def a_run(root: Path, *overrides: str) -> Iterator[WatchedRun]:
    """The run that all faults on one host befall; its corpus is beside it."""
    corpus = make_corpus(image_folder(root / "images", classes=3, images=IMAGES // 3), root / "corpus")
    place = ThisMachine(root / "home")
    words = [*WORDS, f"data.corpus={corpus.path}", f"checkpoint.scratch={SCRATCH}", "run.workers=2", *overrides]
    try:
        yield WatchedRun(place, root / "home" / "runs" / "faults", words, root / "run.log")
    finally:
        place.end()
        shutil.rmtree(SCRATCH, ignore_errors=True)


@contextmanager
def a_run_on_two_hosts(root: Path, *overrides: str) -> Iterator[tuple[TwoHosts, WatchedRun]]:
    """The elastic run that all faults on two hosts befall."""
    corpus = make_corpus(image_folder(root / "images", classes=3, images=IMAGES // 3), root / "corpus")
    words = [
        *WORDS, f"data.corpus={corpus.path}", "checkpoint.scratch=/dev/shm/vitforge", "run.workers=1-2",
        "run.resize_check_s=5", *overrides,
    ]  # fmt: skip
    with two_hosts(root / "pair") as pair:
        folder = root / "pair" / "home" / "runs" / "faults"
        yield pair, WatchedRun(FirstHost(pair), folder, words, root / "run.log")


def check_record(run: WatchedRun, results: list[Round]) -> str:
    """The record of samples up to the newest checkpoint, against the corpus and the rounds.

    Raises:
        AssertionError: it has a gap or a repeat.
    """
    last = run.newest()
    starts = [result.resumed for result in results]
    every = sorted({*starts, *run.every_resumed})
    sample_record.check(run.folder / "samples", IMAGES, BATCH, every, last)
    return f"samples: {last:,} steps of {BATCH}, {last * BATCH // IMAGES:,} whole epochs, no gap and no repeat"


class FaultSettings(Settings):
    """What is played."""

    rounds: int = Field(20, gt=0)
    """Faults, in the order of the list, from its start again after its end."""
    hosts: Literal[1, 2] = 1
    """2: on two hosts made of network namespaces, which needs root."""
    seed: int = Field(0, ge=0)
    """Of the moments and of the choice of a worker."""


def main() -> None:
    """The command."""
    given = parse_command(FaultSettings, prog="-m tests.faults", description=__doc__ or "")
    random.seed(given.seed)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"files in {root}\n{HEADER}", flush=True)
    results: list[Round] = []

    def rounds(run: WatchedRun, faults: list[Fault]) -> None:
        for number in range(given.rounds):
            results.append(play(run, faults[number % len(faults)]))
            print(results[-1], flush=True)
        print(check_record(run, results), flush=True)

    if given.hosts == 1:
        with a_run(root) as run:
            rounds(run, ONE_HOST)
        return
    reason = why_not()
    if reason:
        sys.exit(f"two hosts need network namespaces: {reason}")
    with a_run_on_two_hosts(root) as (pair, run):
        rounds(run, two_host_faults(pair))


if __name__ == "__main__":
    run_command(main)
