"""What checkpoints cost, and what a restart is made of.

    python -m tests.bench_checkpoints [width=384] [depth=6] [rounds=3]

The stall is measured from outside: the record of metrics has a row a step, and a step that saves is late by what the
save kept it from; its share is that of an interval of one minute. Once with the upload behind the training, once with
it in the way. The restart: two workers on this machine, one of them killed, then the driver; from the kill to the first
step after it, split at what the log and the processes show.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from pydantic import Field

from cluster.command import run_command
from cluster.settings import Settings, parse_command
from tests.corpora import image_folder, make_corpus
from tests.watched_run import ThisMachine, WatchedRun

INTERVAL_S = 60.0
"""A sensible interval between checkpoints: what dies costs half of it on average."""
EVERY = 25
"""Steps between the checkpoints that are measured."""


class BenchSettings(Settings):
    """What is measured."""

    width: int = Field(384, gt=0)
    """Of the model."""
    depth: int = Field(6, gt=0)
    """Blocks."""
    rounds: int = Field(3, gt=0)
    """Saves that are measured, and restarts."""


def stall(run: WatchedRun, rounds: int) -> tuple[float, float, float]:
    """Seconds of a step, seconds that a save adds to the steps from it to the next save, and seconds to the commit."""
    run.wait_for_steps(EVERY + 5)
    seen: dict[int, float] = {}
    commits: list[float] = []
    newest, first = run.newest(), run.last_step() + 1
    while (step := run.last_step()) < first + (rounds + 1) * EVERY:
        assert run.alive(), run.output()[-3000:]
        now = time.monotonic()
        if step >= first and step not in seen:
            seen[step] = now
        if (found := run.newest()) > newest:
            newest = found
            if found in seen:
                commits.append(now - seen[found])
        time.sleep(0.001)
    gaps = {step: seen[step] - seen[step - 1] for step in seen if step - 1 in seen}
    usual = statistics.median(gap for step, gap in gaps.items() if step % EVERY not in (0, 1, 2, 3, 4, 5))
    saves = [step for step in seen if step % EVERY == 0 and step + EVERY - 2 in seen]
    added = [sum(gaps.get(near, usual) - usual for near in range(step, step + EVERY - 1)) for step in saves]
    return usual, statistics.median(added), statistics.median(commits) if commits else float("nan")


def restart(run: WatchedRun, whole: bool) -> dict[str, float]:
    """Seconds from the kill of a worker (or the driver: `whole`) to each stage of the way back."""
    run.wait_for_steps(EVERY + 10)
    before = {process.pid for process in run.place.ranks()}
    ranks, resumes = run.place.ranks(), len(run.resumed())
    assert run.driver is not None
    began = time.monotonic()
    if whole:
        run.driver.kill()
        run.driver.wait()
        run.start()
        resumes = 0
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
        if len(run.resumed()) > resumes:
            note("engine built, checkpoint loaded")
            step = run.resumed()[-1]
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
        "model.heads=6", f"model.mlp_dim={4 * given.width}", "data.image_size=32", "training.global_batch=16",
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
            usual, added, commit = stall(run, given.rounds)
            files = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
            size = files / max(len(run.committed()), 1)
            print(
                f"upload {name}: a step {usual:.3f} s, a checkpoint of {size / 1e6:.0f} MB adds {added:.3f} s "
                f"({100 * added / INTERVAL_S:.2f} % at one a minute), committed {commit:.2f} s after its step",
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
