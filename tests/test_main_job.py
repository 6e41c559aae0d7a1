"""The main job as users run it: the demo, the same as a submitted Ray job, and workers that are killed."""

import json
import os
import subprocess
import sys
import time

import mlflow
import psutil
import pytest

from tests.corpora import image_folder, make_corpus
from tests.ray_head import ray_head
from tests.running import REPOSITORY, environment, losses, script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_the_demo_reaches_its_accuracy_and_a_rerun_repeats_nothing(tmp_path):
    home = tmp_path / "demo"
    done = script(tmp_path, "pipeline/demo.py", f"home={home}", timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "of the held-out digits are right" in done.stdout
    for picture in ("first_batch.png", "curves.png"):
        assert (home / "runs" / "demo-finetune" / picture).stat().st_size > 10_000
    before = (home / "runs" / "demo-pretrain" / "metrics.jsonl").stat().st_mtime_ns
    again = script(tmp_path, "pipeline/demo.py", f"home={home}", timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("is finished already") == 5  # three corpora, two runs
    assert (home / "runs" / "demo-pretrain" / "metrics.jsonl").stat().st_mtime_ns == before
    assert json.loads((home / "runs" / "demo-finetune" / "result.json").read_text())["model"] == "models:/digits/2"


@pytest.fixture
def head(tmp_path):
    """Submits a job to a cluster, and waits for it."""
    with ray_head(tmp_path / "home", cpus=4) as cluster:
        yield lambda *words: cluster.job("submit", "--working-dir", ".", "--", *words)


def test_the_main_job_through_ray_job_submit(head, tmp_path):
    refused = head("python", "data_prep/shard.py", "images", "corpus")
    assert refused.returncode != 0
    assert "is relative, but this job runs in a temporary copy" in refused.stdout + refused.stderr
    done = head("python", "pipeline/demo.py", f"home={tmp_path / 'demo'}")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    for part in ("sharding 720/720 images (100 %)", "step 562/562, loss", "of the held-out digits are right"):
        assert part in output
    scored = head(
        "python", "pipeline/evaluate.py", "models:/digits@champion", str(tmp_path / "demo" / "corpora" / "heldout"),
        f"home={tmp_path / 'demo'}", "workers=2",
    )  # fmt: skip
    assert scored.returncode == 0, (scored.stdout + scored.stderr)[-5000:]
    assert '"images": 358' in scored.stdout


def test_a_killed_worker_is_started_again_and_the_run_ends_as_if_nothing_had_been(tmp_path):
    corpus = make_corpus(image_folder(tmp_path / "images", classes=3, images=20), tmp_path / "corpus")
    home = tmp_path / "home"
    words = [
        "pipeline/pretrain.py",
        "demo",
        f"data.corpus={corpus.path}",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "training.duration=300 steps",
        "training.global_batch=12",
        "log.every=1",
        "checkpoint.every=50 steps",
        "registry.name=null",
    ]
    # What a shell may hold: paths from where it stands, and what MPI has left. The ranks have another working folder.
    straight = script(
        home, *words, "run.name=straight",
        MLFLOW_TRACKING_URI=f"sqlite:///{os.path.relpath(tmp_path / 'mine.db', REPOSITORY)}",
        MLFLOW_EXPERIMENT_NAME="mine", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_RANK="0",
    )  # fmt: skip
    assert straight.returncode == 0, straight.stderr[-3000:]
    assert "crash" not in straight.stderr
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mine.db'}")
    tracked = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert [run.info.run_name for run in tracked] == ["straight"]
    assert "train/loss" in tracked[0].data.metrics
    process = subprocess.Popen(
        [sys.executable, *words, "run.name=killed"],
        cwd=REPOSITORY, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = home / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and max(losses(metrics), default=0) < 120:
        time.sleep(0.02)
    workers = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in p.name() + " ".join(p.cmdline())
    ]
    assert len(workers) == 2, workers
    workers[0].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    assert "starting the ranks again" in output
    assert "resumed from" in output
    assert losses(metrics) == losses(home / "runs" / "straight" / "metrics.jsonl")
