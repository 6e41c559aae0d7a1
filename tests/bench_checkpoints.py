"""What checkpoints cost, and what a restart is made of.

    python -m tests.bench_checkpoints [width=384] [depth=6] [rounds=8]

The stall is measured from outside: the record of metrics has a row a step, and the half of the steps between two saves
that begins with one takes longer than the other half by what the save costs, be it waiting or cores that the upload
takes. Beside it stands what the training loop says that it waited. The share is that of an interval of one minute. Once
with the upload behind the training, once with it in the way. The restart: two workers on this machine, one of them
killed, then the driver; from the kill to the first step after it, split at what the log and the processes show.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from cluster.command import run_command
from cluster.folders import LocalFolder
from cluster.settings import Settings, parse_command
from pipeline.tracking import metrics_of
from tests.corpora import image_folder, make_corpus
from tests.watched_run import ThisMachine, WatchedRun, in_a_second

INTERVAL_S = 60.0
"""A sensible interval between checkpoints: what dies costs half of it on average."""
EVERY = 60
"""Steps between the checkpoints that are measured."""


class BenchSettings(Settings):
    """What is measured."""

    width: int = Field(384, gt=0)
    """Of the model."""
    depth: int = Field(6, gt=0)
    """Blocks."""
    rounds: int = Field(8, gt=0)
    """Saves that are measured."""


@dataclass
class Stall:
    """What checkpoints cost, in seconds.

    Attributes:
        step: a step between two saves.
        added: by each save to the steps after it.
        counted: what the training loop itself says that it waited, for each save.
        commits: from the step of each checkpoint until it counts.
    """

    step: float
    added: list[float]
    counted: list[float]
    commits: list[float]


def stall(run: WatchedRun, rounds: int) -> Stall:
    """Compare the half of the steps from one save to the next that begins with it with the half without one."""
    run.wait_for_steps(5)
    run.wait("the first checkpoint", run.newest)
    seen: dict[int, float] = {}
    commits: list[float] = []
    newest = run.newest()
    first = newest + EVERY
    while (step := run.last_step()) < first + rounds * EVERY:
        assert run.alive(), run.output()[-3000:]
        now = time.monotonic()
        seen.setdefault(step, now)
        if (found := run.newest()) > newest:
            newest = found
            if newest >= first and newest in seen:
                commits.append(now - seen[newest])
        time.sleep(0.001)
    gaps = {step: seen[step] - seen[step - 1] for step in seen if step - 1 in seen}
    half = EVERY // 2
    shares = {row["step"]: row["checkpoint_stall"] for row in metrics_of(LocalFolder(run.folder)) if "loss" in row}
    usual, added, counted = [], [], []
    for save in range(first, first + rounds * EVERY, EVERY):
        with_save, without = range(save, save + half), range(save + half, save + 2 * half)
        if all(step in gaps for step in range(save, save + 2 * half)):
            added.append(sum(gaps[step] for step in with_save) - sum(gaps[step] for step in without))
            counted.append(sum(shares[step] * gaps[step] for step in with_save))
            usual += [gaps[step] for step in without]
    assert added, "no two saves with all the steps between them were seen"
    return Stall(statistics.median(usual), added, counted, commits)


def restart(run: WatchedRun, whole: bool) -> dict[str, float]:
    """Seconds from the kill of a worker (or the driver: `whole`) to each stage of the way back."""
    run.wait_for_steps(EVERY + 10)
    ranks = run.place.ranks()
    before = {process.pid for process in ranks}
    assert run.driver is not None
    began = time.monotonic()
    since = in_a_second()
    if whole:
        run.driver.kill()
        run.driver.wait()
        run.start()
    else:
        ranks[-1].kill()
    moments: dict[str, float] = {}
    crashes = run.output().count("starting the ranks again")

    def note(name: str) -> None:
        moments.setdefault(name, time.monotonic() - began)

    step = None
    while "first step" not in moments:
        assert run.alive(), run.output()[-3000:]
        output = run.output()
        if whole and "Ray runs on" in output:
            note("Ray is up")
        if not whole and output.count("starting the ranks again") > crashes:
            note("crash noticed")
        if {process.pid for process in run.place.ranks()} - before:
            note("processes of the new ranks")
        if resumed := run.resumed(since):
            note("engine built, checkpoint loaded")
            step = resumed[-1]
        if step is not None and "engine built, checkpoint loaded" in moments and run.last_step() > step:
            note("first step")
        time.sleep(0.02)
    return moments


def main() -> None:
    """The command."""
    given = parse_command(BenchSettings, prog="-m tests.bench_checkpoints", description=__doc__ or "")
    root = Path(tempfile.mkdtemp(prefix="bench-checkpoints-"))
    corpus = make_corpus(image_folder(root / "images", classes=3, images=40), root / "corpus")
    words = [
        "pipeline/pretrain.py", "demo", f"model.width={given.width}", f"model.depth={given.depth}",
        "model.heads=6", f"model.mlp_dim={4 * given.width}", "data.image_size=32", "training.global_batch=4",
        "training.duration=100000 steps", "log.every=1", f"checkpoint.every={EVERY} steps", "registry.name=null",
        "run.workers=2", "run.cpus_per_worker=1", "run.max_failures=100", "data.decode_threads=1",
        f"data.corpus={corpus.path}",
    ]  # fmt: skip
    place = ThisMachine(root / "home")
    print(f"2 workers on {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}", flush=True)
    try:
        for name, overrides in (("behind", ()), ("in the way", ("checkpoint.background=false",))):
            run_name = name.replace(" ", "-")
            folder = root / "home" / "runs" / run_name
            run = WatchedRun(place, folder, [*words, f"run.name={run_name}", *overrides], root / f"{run_name}.log")
            run.start()
            cost = stall(run, given.rounds)
            files = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
            size = files / max(len(run.committed()), 1)
            added, counted = statistics.median(cost.added), statistics.median(cost.counted)
            print(
                f"upload {name}: a step {cost.step:.3f} s; a checkpoint of {size / 1e6:.0f} MB adds {added:.2f} s "
                f"({min(cost.added):.2f} to {max(cost.added):.2f} in {len(cost.added)}), "
                f"{100 * added / INTERVAL_S:.2f} % at one a minute; training waited {counted:.2f} s of them, "
                f"{100 * counted / INTERVAL_S:.2f} %; it counts {statistics.median(cost.commits):.2f} s after its step",
                flush=True,
            )
            if name == "behind":
                for whole in (False, True):
                    moments = restart(run, whole)
                    print(f"restart after the kill of {'the driver' if whole else 'a worker'}:")
                    last = 0.0
                    for what, seconds in moments.items():
                        print(f"  {seconds:6.1f} s  {what} (+{seconds - last:.1f})")
                        last = seconds
            place.end()
    finally:
        place.end()


if __name__ == "__main__":
    run_command(main)
