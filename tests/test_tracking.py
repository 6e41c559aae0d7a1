"""What MLflow has of a run after restarts: every point once, none lost."""

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlflow
import pytest

from cluster.folders import LocalFolder, folder_at
from cluster.storage import StorageError
from pipeline import tracking


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking.connect(tmp_path)
    return tmp_path


def history(run, key):
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run.run_id, key)]


def test_a_restart_sends_what_was_lost_and_repeats_nothing(home):
    path = home / "metrics.jsonl"
    first = tracking.Run("run", None, {"a": {"b": 1}})
    record = tracking.MetricsFile(LocalFolder(home), 0)
    for step in (10, 20, 30):
        record.write(step, {"loss": step / 10})
        if step < 30:  # the last point dies with its process
            first.metrics(step, {"train/loss": step / 10})
    record.write(25, {"heldout/top1": 0.5})
    first.metrics(25, {"heldout/top1": 0.5})
    first.flush()
    assert [step for step, _ in history(first, "train/loss")] == [10, 20]

    # It comes back from a checkpoint at step 20, and takes the steps to 30 again.
    again = tracking.Run("", first.run_id)
    record = tracking.MetricsFile(LocalFolder(home), 20)
    again.catch_up(tracking.metrics_of(LocalFolder(path.parent)))
    for step in (25, 30):
        values = {"heldout/top1": 0.5} if step == 25 else {"train/loss": 3.0}
        record.write(step, {key.removeprefix("train/"): value for key, value in values.items()})
        again.metrics(step, values)
    again.finish()
    assert history(again, "train/loss") == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert history(again, "heldout/top1") == [(25, 0.5)]
    assert [row["step"] for row in tracking.metrics_of(LocalFolder(path.parent))] == [10, 20, 25, 30]
    run = mlflow.get_run(again.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a.b": "1"}


def test_points_in_the_record_that_mlflow_never_got_are_sent_at_the_start(home):
    path = home / "metrics.jsonl"
    record = tracking.MetricsFile(LocalFolder(home), 0)
    run = tracking.Run("run", None)
    for step in range(1, 6):
        record.write(step, {"loss": float(step)})
    run.catch_up(tracking.metrics_of(LocalFolder(path.parent)))
    assert history(run, "train/loss") == [(step, float(step)) for step in range(1, 6)]


def test_a_line_that_a_crash_cut_short_is_left_out(home):
    path = home / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in tracking.metrics_of(LocalFolder(path.parent))] == [1]


def test_a_run_that_the_store_does_not_have_is_named(home):
    with pytest.raises(ValueError, match="has no run 0123456789abcdef0123456789abcdef"):
        tracking.Run("", "0123456789abcdef0123456789abcdef")


class Unwell(BaseHTTPRequestHandler):
    """A server that is there and cannot answer, as one that is being restarted."""

    def do_POST(self):
        self.send_error(503)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture(params=["dead", "unwell"])
def failing_server(request, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = HTTPServer(("127.0.0.1", 0), Unwell)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    if request.param == "dead":
        server.shutdown()
        server.server_close()
    yield f"http://127.0.0.1:{server.server_port}"
    if request.param == "unwell":
        server.shutdown()
        server.server_close()


def test_a_server_that_does_not_answer_is_a_failure_that_is_tried_again(home, failing_server):
    """The ranks are started again after an OSError, and it is one message to whoever starts the command."""
    run = tracking.Run("run", None)
    mlflow.set_tracking_uri(failing_server)
    with pytest.raises(OSError, match=f"MLflow at {failing_server} does not go on with run {run.run_id}") as caught:
        tracking.Run("", run.run_id)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(OSError, match=f"MLflow at {failing_server} does not answer as it should") as caught:
        tracking.connect(home, failing_server)
    assert isinstance(caught.value, ValueError)


def test_a_server_that_does_not_answer_is_asked_once_and_not_for_every_metric(home, monkeypatch):
    """Each question to one that is silent costs a minute, and ranks that wait for one count as hanging."""
    asked = []

    class Counting(Unwell):
        def do_POST(self):
            asked.append(self.path)
            self.send_error(503)

        do_GET = do_POST  # noqa: N815

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = HTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = tracking.Run("run", None)
    works, run.client = run.client, mlflow.MlflowClient(f"http://127.0.0.1:{server.server_port}")
    for step in (1, 2):
        run.metrics(step, {"heldout/loss": 1.0 / step, "heldout/top1": 0.5, "heldout/top5": 0.75})
        run.flush()
    assert len(asked) == 1
    run.flush(last=True)
    assert len(asked) == 2
    server.shutdown()
    server.server_close()
    run.client = works
    run.finish()
    assert history(run, "heldout/loss") == [(1, 1.0), (2, 0.5)]
    assert history(run, "heldout/top5") == [(1, 0.75), (2, 0.75)]


def test_storage_that_fails_at_a_save_costs_a_warning_and_no_row(s3, messages):
    folder = folder_at(s3.bucket() + "/run", "run.home")
    record = tracking.MetricsFile(folder, 0)
    s3.faults.rates, s3.faults.only = {"denied": 1.0}, "PUT .*metrics"
    for step in range(1, 5):
        record.write(step, {"loss": float(step)})
    record.publish()
    assert "the record of the metrics was not stored" in messages()
    record.go_back(3)
    record.write(4, {"loss": 0.5})
    with pytest.raises(StorageError, match="access denied"):
        record.publish(must=True)
    assert tracking.metrics_of(folder) == []
    s3.faults.clear()
    record.publish()
    assert [(row["step"], row["loss"]) for row in tracking.metrics_of(folder)] == [(1, 1), (2, 2), (3, 3), (4, 0.5)]


def test_a_block_that_ends_badly_closes_its_run(home):
    for error, drop, status, stage in (
        (RuntimeError(), True, "FAILED", "active"),
        (ValueError(), False, "FAILED", "active"),
        (ValueError(), True, "FAILED", "deleted"),
        (KeyboardInterrupt(), True, "KILLED", "active"),
    ):
        run = tracking.Run("run", None)
        with pytest.raises(type(error)), tracking.closing(run, drop=partial(bool, drop)):
            raise error
        info = mlflow.get_run(run.run_id).info
        assert (info.status, info.lifecycle_stage) == (status, stage)


def test_a_database_of_another_machine_is_not_made_anew(home):
    with pytest.raises(ValueError, match=r"database /elsewhere/mlflow.db is not on node .* MLFLOW_TRACKING_URI"):
        tracking.connect(home, "sqlite:////elsewhere/mlflow.db")
    assert tracking.connect(home, f"sqlite:///{home / 'mlflow.db'}")
