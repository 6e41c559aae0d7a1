"""What runs on Ray survive: `ray job stop`, a driver or a helper that is killed. (Hosts and ranks: test_faults.py.)"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.marked_folders import remove_left_behind
from tests.corpora import image_folder, make_corpus
from tests.ray_head import RayHead, ray_head
from tests.running import REPOSITORY, environment, losses, tiny, torchrun
from tests.watched_run import ThisMachine, WatchedRun, command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STEPS = 600
TINY = tiny(STEPS, 100)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("on_ray")
    return str(make_corpus(image_folder(root / "images", classes=3, images=20), root / "corpus").path)


@pytest.fixture(scope="module")
def straight(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of two ranks that nothing happens to."""
    home = tmp_path_factory.mktemp("straight")
    done = torchrun(2, home, *TINY, f"data.corpus={corpus}", "run.name=a", "run.workers=null")
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(home / "runs" / "a" / "metrics.jsonl")


@pytest.fixture
def head(tmp_path: Path) -> Iterator[RayHead]:
    with ray_head(tmp_path / "home", cpus=2) as cluster:
        yield cluster


def wait_for(what: Callable[[], object], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps_of(metrics: Path) -> int:
    return max(losses(metrics), default=0)


def test_ray_job_stop_saves_and_the_same_command_goes_on(
    head: RayHead, corpus: str, straight: dict[int, float], tmp_path: Path
) -> None:
    words = [
        "--working-dir", ".", "--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}', "--no-wait",
        "--submission-id",
    ]  # fmt: skip
    command = ["--", "python", *TINY, f"data.corpus={corpus}", "run.name=a", "run.workers=2"]
    submitted = head.job("submit", *words, "first", *command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    metrics = tmp_path / "home" / "runs" / "a" / "metrics.jsonl"
    wait_for(lambda: "ray_vitforge_step{" in (text := head.metrics()) and 'run="a"' in text)
    wait_for(lambda: steps_of(metrics) >= 20)
    assert head.job("stop", "first").returncode == 0
    logs = head.job("logs", "first").stdout
    stopped = re.search(r"stopped at step (\d+) of 600, which is saved", logs)
    assert stopped, logs[-4000:]
    taken = steps_of(metrics)
    assert 20 <= taken == int(stopped[1]) < STEPS
    again = head.job("submit", *words[:-2], *words[-1:], "second", *command)
    assert again.returncode == 0
    wait_for(lambda: "succeeded" in head.job("status", "second").stdout)
    assert "resumed from" in head.job("logs", "second").stdout
    assert losses(metrics) == straight


def test_a_killed_driver_leaves_no_rank_behind_and_a_rerun_goes_on(
    corpus: str, straight: dict[int, float], tmp_path: Path
) -> None:
    words = [sys.executable, *TINY, f"data.corpus={corpus}", "run.name=a", "run.workers=2"]
    (temporary := tmp_path / "tmp").mkdir()
    home = environment(tmp_path, TMPDIR=str(temporary), RAY_TMPDIR="/tmp")  # Ray's sockets need a short path
    options = {"cwd": REPOSITORY, "env": home, "stderr": subprocess.STDOUT, "text": True}
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    wait_for(lambda: steps_of(metrics) >= 120)
    ranks = [
        p for p in psutil.Process(driver.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(ranks) == 2
    driver.kill()
    driver.wait()
    left = list(temporary.glob("vitforge-*/vitforge-ray-*"))
    assert len(left) == 1, "the killed driver's records"
    again = subprocess.run(words, stdout=subprocess.PIPE, timeout=600, **options)  # type: ignore[call-overload]
    assert again.returncode == 0, again.stdout[-4000:]
    assert not any(rank.is_running() for rank in ranks)
    assert "is dead; going on in its place" in again.stdout
    assert losses(metrics) == straight
    assert list(temporary.glob("vitforge-*/vitforge-ray-*")) == []
    for root in temporary.glob("vitforge-*"):
        remove_left_behind(root)
        assert list(root.iterdir()) == [], "what the killed ranks had"


def test_the_mailbox_may_be_killed(corpus: str, straight: dict[int, float], tmp_path: Path) -> None:
    words = [*TINY, f"data.corpus={corpus}", "run.name=a", "run.workers=2"]
    place = ThisMachine(tmp_path)
    run = WatchedRun(place, tmp_path / "runs" / "a", words, tmp_path / "log")

    def kill(name: str) -> None:
        found = [process for process in place.family() if command_line(process).startswith(f"ray::{name}")]
        assert len(found) == 1
        found[0].kill()

    try:
        # Nobody notices a mailbox that dies, and a wish to stop still reaches the ranks.
        run.start()
        run.wait_for_steps(100)
        kill("Mailbox")
        run.wait_for_steps(20)
        assert run.driver is not None
        run.driver.terminate()
        assert run.driver.wait(120) == 128 + signal.SIGTERM, run.output()[-4000:]
        stopped = run.last_step()
        assert f"stopped at step {stopped} of 600, which is saved" in run.output()
        # A run whose mailbox died before its end ends all the same.
        run.start()
        run.wait_for_steps(20)
        kill("Mailbox")
        assert run.driver.wait(600) == 0, run.output()[-4000:]
    finally:
        place.end()
    said = run.output()
    assert "crash 1" not in said
    assert "Traceback" not in said
    assert losses(run.folder / "metrics.jsonl") == straight
