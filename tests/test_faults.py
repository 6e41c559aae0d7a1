"""What kills, fills, cuts and refuses, on whole runs: each ends in a run that goes on as if nothing had been, or in one
clear error, and never in a damaged newest checkpoint. `python -m tests.faults` plays many more rounds.
"""

import os
import random
import subprocess

import pytest

from cluster.folders import folder_at
from pipeline.tracking import metrics_of
from tests import faults
from tests.corpora import image_folder, make_corpus
from tests.faults import Fault, a_run, a_run_on_two_hosts, check_record, play
from tests.running import losses, tiny, torchrun
from tests.two_hosts import why_not
from tests.watched_run import committed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TINY = [*tiny(50, 10), "run.workers=null"]


def named(known: list[Fault], *names: str) -> list[Fault]:
    by_name = {fault.name: fault for fault in known}
    return [by_name[name] for name in names]


def test_killed_at_awkward_moments_a_run_loses_only_what_came_after_its_checkpoint(tmp_path):
    random.seed(0)
    with a_run(tmp_path) as run:
        chosen = named(
            faults.ONE_HOST,
            "a worker, while saving",
            "the driver, while uploading",
            "a worker, right after a commit",
            "a worker, while 1 rank reads what 2 saved",
        )
        results = [play(run, fault) for fault in chosen]
        assert [result.ranks for result in results] == [2, 2, 2, 1]
        assert all(result.repeated <= 3 * faults.SAVE_EVERY for result in results)
        check_record(run, results)


@pytest.mark.skipif(why_not() is not None, reason=f"two hosts need network namespaces: {why_not()}")
def test_a_run_outlives_a_host_and_grows_when_it_is_back(tmp_path):
    random.seed(0)
    with a_run_on_two_hosts(tmp_path) as (pair, run):
        chosen = named(
            faults.two_host_faults(pair),
            "the raylet of the second host, at random",
            "  the second host is there again",
            "the link between the hosts is cut",
            "  the second host is there again",
            "the second host is drained with notice",
        )
        results = [play(run, fault) for fault in chosen]
        assert [result.ranks for result in results] == [1, 2, 1, 2, 1]
        assert [results[place].repeated for place in (1, 3, 4)] == [0, 0, 0]  # these were told in time
        check_record(run, results)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    return make_corpus(image_folder(root / "images", classes=3, images=20), root / "corpus").path


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """The losses of a run that nothing happens to."""
    home = tmp_path_factory.mktemp("straight")
    done = torchrun(1, home, *TINY, f"data.corpus={corpus}", "run.name=a")
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(home / "runs" / "a" / "metrics.jsonl")


def test_s3_that_refuses_and_resets_delays_a_run_and_one_that_stays_away_ends_it_with_one_error(
    corpus, straight, s3, tmp_path
):
    home = f"{s3.bucket()}/vitforge"
    words = [*TINY, f"data.corpus={corpus}", "run.name=a", f"run.home={home}"]
    run = folder_at(home, "run.home").child("runs/a")

    def recorded() -> dict[int, float]:
        return {row["step"]: row["loss"] for row in metrics_of(run) if "loss" in row}

    s3.faults.rates = {"denied": 1.0}
    s3.faults.only = r"^(PUT|POST) .*/step-000000(30|40|50).*rank-"
    stopped = torchrun(1, tmp_path, *words)
    assert stopped.returncode != 0
    # one that fails costs a warning, as the next may do better: two in a row end the run
    assert "error: the checkpoint of step 40 could not be written" in stopped.stderr, stopped.stderr[-6000:]
    names = run.child("checkpoints").tree()
    assert sorted(name[:13] for name in names if name.endswith("manifest.json")) == ["step-00000010", "step-00000020"]
    s3.faults.only = ""
    s3.faults.rates = {"slow_down": 0.15, "reset": 0.1, "lost_answer": 0.05}
    done = torchrun(1, tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stderr
    assert sum(s3.faults.injected.values()) > 10
    assert recorded() == straight


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_is_one_clear_error_and_with_room_again_the_run_goes_on(corpus, straight, tmp_path):
    place = tmp_path / "runs" / "a" / "checkpoints"
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk here: {mounted.stderr.decode().strip()}")
    words = [*TINY, f"data.corpus={corpus}", "run.name=a", "checkpoint.keep=10"]
    try:
        stopped = torchrun(1, tmp_path, *words)
        assert stopped.returncode != 0
        assert "error: the checkpoint of step" in stopped.stderr, stopped.stderr[-3000:]
        assert "No space left" in stopped.stderr
        assert "make room" in stopped.stderr
        before = committed(place)
        assert before
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
        done = torchrun(1, tmp_path, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"step-{before[-1]:08d}" in done.stderr.split("resumed from", 1)[1][:300]
        assert losses(tmp_path / "runs" / "a" / "metrics.jsonl") == straight
    finally:
        subprocess.run(["umount", str(place)], check=True)
