"""Train under random kills for a long time, and compare the result with a run that nothing happened to.

    python -m tests.soak CORPUS [minutes=30] [heldout=CORPUS] [every=150] [seed=0]

A small ViT trains with two workers; every `every` seconds on average (120 to 180 by default) a worker or the driver is
killed with SIGKILL, a killed driver is started again. Then the same command runs once more under another name, without
kills. The weights depend on the step alone, so at the same number of workers the losses of both are the same to the
last bit, and with them the accuracy; noise has no part in it. All the time the memory and the open files of the driver
and of the workers are sampled: within a life they must not grow, and a later life must not need more than an earlier.
"""

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pydantic import Field

from cluster.command import duration, run_command
from cluster.settings import Settings, parse_command
from data_prep.corpus import Corpus
from tests.running import losses
from tests.watched_run import ThisMachine, WatchedRun

WORDS = [
    "pipeline/pretrain.py", "demo", "model.name=Ti/8", "model.width=128", "model.depth=4", "model.heads=4",
    "model.mlp_dim=256", "data.image_size=32", "data.augment.mixup=0.2", "data.decode_threads=1",
    "training.global_batch=64", "training.zero_stage=2", "log.every=10", "checkpoint.every=100 steps",
    "evaluation.batch=64", "registry.name=null", "run.workers=2", "run.cpus_per_worker=1", "run.max_failures=1000",
]  # fmt: skip
GROWTH, MORE_FILES = 1.15, 8
"""How much more memory, and how many more files, a process may have at its end than when it was settled."""
SETTLED_S = 30.0
"""Seconds of stepping after which a process has all that it needs."""


@dataclass(frozen=True)
class Sample:
    """What a process held at a moment."""

    role: str
    pid: int
    seconds: float
    """Since its life began to step."""
    step: int
    memory_mb: float
    files: int


@dataclass
class Sampler:
    """Looks at the processes of a run every two seconds, from a thread of its own."""

    run: WatchedRun
    lives: dict[int, list[Sample]] = field(default_factory=dict)
    """By process."""
    _closed: threading.Event = field(default_factory=threading.Event)
    _stepping: dict[int, float] = field(default_factory=dict)

    def start(self) -> "Sampler":
        """Begin."""
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """End."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        before = 0
        while not self._closed.wait(2.0):
            step = self.run.last_step()
            moved, before = step != before, step
            driver, ranks = self.run.driver, self.run.place.ranks()
            if driver is None or driver.poll() is not None or not ranks:  # without ranks it hands over, or starts them
                continue
            for process in (psutil.Process(driver.pid), *ranks):
                try:
                    self._look(process, "driver" if process.pid == driver.pid else "worker", step, moved)
                except psutil.Error:
                    continue  # it has just ended

    def _look(self, process: psutil.Process, role: str, step: int, moved: bool) -> None:
        if process.pid not in self._stepping:
            if not moved:
                return
            self._stepping[process.pid] = time.monotonic()
        age = time.monotonic() - self._stepping[process.pid]
        memory = process.memory_full_info().uss / 1e6
        sample = Sample(role, process.pid, age, step, memory, process.num_fds())
        self.lives.setdefault(process.pid, []).append(sample)


def summary(lives: dict[int, list[Sample]]) -> list[str]:
    """A line for each process that lived long enough: what it held when settled, and at its end."""
    lines = [f"{'role':<8}{'pid':>8}{'from step':>11}{'life':>14}{'MB':>9}{'to MB':>8}{'files':>7}{'to':>5}"]
    starts: dict[str, list[Sample]] = {}
    for samples in lives.values():
        settled = [sample for sample in samples if sample.seconds >= SETTLED_S]
        if len(settled) < 5:
            continue
        first, last = settled[0], settled[-1]
        starts.setdefault(first.role, []).append(first)
        lines.append(
            f"{first.role:<8}{first.pid:>8}{samples[0].step:>11,}{duration(last.seconds):>14}{first.memory_mb:>9.0f}"
            f"{last.memory_mb:>8.0f}{first.files:>7}{last.files:>5}"
        )
    for role, firsts in starts.items():
        if len(firsts) > 1:
            lines.append(
                f"{role}: settled lives held {firsts[0].memory_mb:.0f} MB at first and {firsts[-1].memory_mb:.0f} MB "
                f"at last (median {statistics.median(s.memory_mb for s in firsts):.0f}), {firsts[0].files} and "
                f"{firsts[-1].files} files"
            )
    return lines


def growth(lives: dict[int, list[Sample]]) -> list[str]:
    """What grew too much in one life, or from the first settled life of a role to its last."""
    settled = [[sample for sample in samples if sample.seconds >= SETTLED_S] for samples in lives.values()]
    spans = [(samples[0], samples[-1]) for samples in settled if len(samples) >= 5]
    roles: dict[str, list[Sample]] = {}
    for first, _ in spans:
        roles.setdefault(first.role, []).append(first)
    spans += [(firsts[0], firsts[-1]) for firsts in roles.values()]
    return [
        f"{first.role}: from {first.memory_mb:.0f} MB and {first.files} files to {last.memory_mb:.0f} and {last.files}"
        for first, last in spans
        if last.memory_mb > GROWTH * first.memory_mb or last.files > first.files + MORE_FILES
    ]


def under_kills(run: WatchedRun, pause: float, rng: random.Random) -> list[str]:
    """Run the command to its end while parts of it are killed; returns what was killed.

    Between two kills there is a new checkpoint.
    """
    killed: list[str] = []
    saved = 0
    run.start()
    started = time.monotonic()
    due = started + rng.uniform(0.8, 1.2) * pause
    while True:
        time.sleep(0.2)
        if not run.alive():
            assert run.driver is not None
            if run.driver.returncode == 0:
                return killed
            raise AssertionError(f"the run ended by itself: {run.output()[-4000:]}")
        if time.monotonic() < due:
            continue
        ranks = run.place.ranks()
        victim = rng.choice(["worker", "driver"])
        if not ranks or run.newest() == saved:  # a machine that is slow today must still get ahead
            due = time.monotonic() + 5
            continue
        saved = run.newest()
        due = time.monotonic() + rng.uniform(0.8, 1.2) * pause
        killed.append(victim)
        print(
            f"{duration(time.monotonic() - started):>14}  step {run.last_step():,} (checkpoint {run.newest():,}): "
            f"killing {'a worker' if victim == 'worker' else 'the driver'}",
            flush=True,
        )
        if victim == "worker":
            rng.choice(ranks).kill()
        else:
            run.driver.kill()  # type: ignore[union-attr]
            run.driver.wait()  # type: ignore[union-attr]
            run.start()


def calibrate(place: ThisMachine, root: Path, words: list[str], total: float) -> int:
    """Steps that take about `total` seconds here, by a short run; a multiple of 100."""
    probe = WatchedRun(place, root / "home" / "runs" / "probe", [*words, "run.name=probe"], root / "probe.log")
    probe.start("training.duration=100000 steps")
    probe.wait("the first steps", lambda: probe.last_step() >= 20)
    first, began = probe.last_step(), time.monotonic()
    time.sleep(40)
    rate = (probe.last_step() - first) / (time.monotonic() - began)
    place.end()
    return max(100 * round(rate * total / 100), 200)


class SoakSettings(Settings):
    """What is trained, for how long, under how many kills."""

    corpus: str
    """To train on."""
    heldout: str | None = None
    """To score on; null is the same."""
    minutes: float = Field(30, gt=0)
    """That the run under kills takes, about."""
    every: float = Field(150, gt=0)
    """Seconds between two kills, on average."""
    seed: int = Field(0, ge=0)
    """Of the kills."""


def main() -> None:
    """The command."""
    given = parse_command(SoakSettings, prog="-m tests.soak", description=__doc__ or "", positionals=("corpus",))
    seconds, pause = 60 * given.minutes, given.every
    rng = random.Random(given.seed)
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    corpus = Corpus.open(given.corpus)
    place = ThisMachine(root / "home")
    words = [*WORDS, f"data.corpus={given.corpus}", f"data.heldout={given.heldout or given.corpus}"]
    print(f"{corpus.num_samples:,} images of {len(corpus.classes)} classes; files in {root}", flush=True)
    try:
        # A kill costs about half a minute in which no steps are taken.
        steps = calibrate(place, root, words, seconds * pause / (pause + 30))
        words.append(f"training.duration={steps} steps")
        runs = {
            name: WatchedRun(place, root / "home" / "runs" / name, [*words, f"run.name={name}"], root / f"{name}.log")
            for name in ("killed", "straight")
        }
        print(f"{steps:,} steps, a kill every {pause:.0f} s on average", flush=True)
        began = time.monotonic()
        sampler = Sampler(runs["killed"]).start()
        killed = under_kills(runs["killed"], pause, rng)
        sampler.close()
        took = {"killed": time.monotonic() - began}
        print(*summary(sampler.lives), sep="\n", flush=True)
        began = time.monotonic()
        straight = Sampler(runs["straight"]).start()
        runs["straight"].start()
        while runs["straight"].alive():
            time.sleep(0.5)
        straight.close()
        took["straight"] = time.monotonic() - began
        print("without kills:", *summary(straight.lives)[1:], sep="\n", flush=True)
    finally:
        place.end()
    rows = {name: losses(run.folder / "metrics.jsonl") for name, run in runs.items()}
    results = {name: json.loads((run.folder / "result.json").read_text()) for name, run in runs.items()}
    accuracy = {name: 100 * result["heldout_top1"] for name, result in results.items()}
    differing = [step for step in rows["straight"] if rows["killed"].get(step) != rows["straight"][step]]
    print(
        f"\n{killed.count('worker')} workers and {killed.count('driver')} drivers killed in "
        f"{duration(took['killed'])}; without kills {duration(took['straight'])}\n"
        f"top-1: {accuracy['killed']:.3f} % under kills, {accuracy['straight']:.3f} % without\n"
        f"losses: {len(rows['straight'])} points, "
        + ("all the same to the last bit" if not differing else f"{len(differing)} differ, from step {differing[0]} on")
    )
    if differing or sorted(rows["killed"]) != sorted(rows["straight"]):
        sys.exit("the run under kills is not the run without")
    if grown := [*growth(sampler.lives), *growth(straight.lives)]:
        sys.exit("\n".join(["memory or files grow:", *grown]))


if __name__ == "__main__":
    run_command(main)
