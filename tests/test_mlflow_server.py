"""Runs that are tracked by a real MLflow server: it goes away and comes back, it wants a name and password."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest

from pipeline import tracking
from tests.corpora import image_folder, make_corpus
from tests.mlflow_server import NAME, PASSWORD, TOKEN, MlflowServer, mlflow_server
from tests.ray_head import ray_head
from tests.running import REPOSITORY, environment, losses, tiny, torchrun_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tracked")
    return str(make_corpus(image_folder(root / "images", classes=3, images=8), root / "corpus").path)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MlflowServer, str]]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as both:
        yield both


@pytest.fixture
def client(tracked: tuple[MlflowServer, str]) -> mlflow.MlflowClient:
    """Past the proxy."""
    return mlflow.MlflowClient(tracked[0].uri)


def test_a_run_that_ends_while_the_server_is_away_is_completed_by_the_same_command(
    tracked: tuple[MlflowServer, str], client: mlflow.MlflowClient, corpus: str, tmp_path: Path
) -> None:
    server, _ = tracked
    words = [*tiny(60, 60)[:-1], "registry.name=small", f"data.corpus={corpus}", "run.name=a", "run.workers=null"]
    home, options = tmp_path / "home", {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    metrics = home / "runs" / "a" / "metrics.jsonl"
    process = subprocess.Popen(
        torchrun_command(1, (*words,)), cwd=REPOSITORY, env=environment(home, **options),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not losses(metrics):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    (problem,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"the model is trained, and saved in {home}/runs/a, but MLflow at {server.uri} does not answer" in problem
    assert "metric points, and 'small' has no version of this model yet. Run the same command again" in problem
    assert json.loads((home / "runs" / "a" / "result.json").read_text(encoding="utf-8"))["model"] is None
    server.start()
    run_id = json.loads((home / "runs" / "a" / "run.json").read_text(encoding="utf-8"))["mlflow_run"]
    assert client.get_run(run_id).info.status == "RUNNING"
    done = subprocess.run(
        torchrun_command(1, (*words,)), cwd=REPOSITORY, env=environment(home, **options), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training is finished already" in done.stderr
    assert json.loads(done.stdout)["model"] == "models:/small/1"
    assert client.get_run(run_id).info.status == "FINISHED"
    history = client.get_metric_history(run_id, "train/loss")
    assert {point.step: point.value for point in history} == pytest.approx(losses(metrics))
    assert len(history) == 60
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"settings.json", "first_batch.png", "curves.png"} <= names


def test_ranks_on_a_running_cluster_are_let_in_and_ray_logs_no_credential(
    tracked: tuple[MlflowServer, str], client: mlflow.MlflowClient, corpus: str, tmp_path: Path
) -> None:
    address = tracked[1].replace("://", f"://{NAME}:{quote(PASSWORD, safe='')}@")
    secrets = {"MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_TOKEN": TOKEN}
    home = tmp_path / "home"
    words = [*tiny(12, 12), f"data.corpus={corpus}", "run.name=a", "run.workers=2"]
    with ray_head(home, cpus=2) as head:
        done = subprocess.run(
            [sys.executable, *words], cwd=REPOSITORY, env={**head.variables, "RAY_ADDRESS": head.gcs, **secrets},
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        written = [path for path in head.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        logs = [path.read_bytes() for path in written if path.stat().st_size < 1 << 26]
    assert any(b"RayTrainWorker" in each for each in logs)
    own = [path.read_bytes() for path in (home / "runs" / "a").rglob("*") if path.is_file()]
    for secret in (PASSWORD, quote(PASSWORD, safe=""), TOKEN):
        assert not any(secret.encode() in each for each in [*logs, *own, done.stderr.encode(), done.stdout.encode()])
    run_id = json.loads((home / "runs" / "a" / "run.json").read_text(encoding="utf-8"))["mlflow_run"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "vitforge.layout" in run.data.tags, "rank 0 tells it"
    assert "first_batch.png" in {file.path for file in client.list_artifacts(run_id)}
    assert {point.step for point in client.get_metric_history(run_id, "train/loss")} == set(range(1, 13))


def test_points_of_an_outage_are_sent_when_the_server_is_back(
    tracked: tuple[MlflowServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = tracked
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", server.uri)
    tracking.connect(tmp_path)
    run = tracking.Run("run", None)
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1501)]
    for row in rows[:700]:
        run.metrics(int(row["step"]), {"train/loss": row["loss"]})
    run.flush()
    server.kill()
    for row in rows[700:]:
        run.metrics(int(row["step"]), {"train/loss": row["loss"]})
    run.flush(last=True)
    with pytest.raises(tracking.TrackingError, match="may lack 1,500 metric points"):
        run.complete(rows)
    server.start()
    run.complete(rows)
    run.finish()
    found = mlflow.MlflowClient().get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in found] == [(row["step"], row["loss"]) for row in rows]
    mlflow.set_tracking_uri(None)
