"""What MLflow has of a run after restarts: every point once, none lost."""

import fcntl
import os
import re
import threading
import traceback
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlflow
import pytest

from cluster.folders import LocalFolder, folder_at
from cluster.storage import StorageError
from cluster.waiting import EVERY_S
from pipeline import mlflow_environment, tracking
from pipeline.stage import home_folder


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


def test_at_the_end_mlflow_gets_what_it_lacks_or_the_run_is_not_finished(home, failing_server):
    """What waited in a process that is gone, and what was sent and never answered for, is in the record."""
    record = tracking.MetricsFile(LocalFolder(home), 0)
    run = tracking.Run("run", None)
    for step in range(1, 1501):
        record.write(step, {"loss": float(step), "learning_rate": None})
        if step <= 700 and step != 350:  # one that was lost between others
            run.metrics(step, {"train/loss": float(step)})
    run.metrics(1500, {"train/loss": 1500.0})
    run.flush()
    rows = tracking.metrics_of(LocalFolder(home))
    ranks = tracking.Run("", run.run_id)
    works, ranks.client = ranks.client, mlflow.MlflowClient(failing_server)
    lacks = pytest.raises(tracking.TrackingError, match=r"does not answer .*may lack 1,500 metric points")
    with lacks, tracking.closing(ranks, drop=bool):
        ranks.complete(rows)
    assert mlflow.get_run(run.run_id).info.status == "RUNNING"
    ranks.client = works
    with tracking.closing(ranks, drop=bool):
        ranks.complete(rows)
    assert sorted(history(run, "train/loss")) == [(step, float(step)) for step in range(1, 1501)]
    assert mlflow.get_run(run.run_id).info.status == "FINISHED"


def test_points_that_were_taken_without_an_answer_are_not_sent_twice(home, monkeypatch):
    run = tracking.Run("run", None)
    send = run.client.log_batch

    def lost_answer(*arguments, **options):
        send(*arguments, **options)
        raise ConnectionError("reset")

    monkeypatch.setattr(run.client, "log_batch", lost_answer)
    run.metrics(1, {"train/loss": 1.0})
    run.flush()
    monkeypatch.undo()
    run.metrics(2, {"train/loss": 2.0})
    run.flush(last=True)
    assert history(run, "train/loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("name", ["a?b", "a%25b", "%3F", "a?mode=memory", "x%2Fy"])
def test_a_folder_that_the_database_would_not_be_in_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("VITFORGE_HOME", str(tmp_path / name))
    for command in (lambda: home_folder(""), lambda: tracking.connect(tmp_path / name)):
        with pytest.raises(ValueError, match="cannot hold MLflow's database"):
            command()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert home_folder("") == tmp_path / name


@pytest.mark.parametrize("name", ["a %b#c;d&e=f'g\"h+ü@i:j"])
def test_everything_is_in_the_folder_whatever_it_is_called(tmp_path, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path / "homes" / name
    uri = tracking.connect(home)
    run = tracking.Run("run", None)
    (tmp_path / "file.txt").write_text("content")
    run.artifact(tmp_path / "file.txt")
    run.finish()
    assert [path.name for path in (tmp_path / "homes").iterdir()] == [name]
    assert (home / "mlflow.db").stat().st_size > 0
    assert [path.parts[-1] for path in (home / "mlartifacts").rglob("*.txt")] == ["file.txt"]
    downloaded = mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="file.txt")
    assert open(downloaded, encoding="utf-8").read() == "content"  # noqa: PTH123, SIM115
    assert tracking.connect(home, uri) == uri, "as the ranks do"


def test_credentials_of_a_servers_address_go_where_nothing_shows_them(home, monkeypatch, failing_server):
    address = failing_server.replace("http://", "http://me:p%40ss%2Fword@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(tracking.TrackingError) as caught:
        tracking.connect(home)
    shown = "".join(traceback.format_exception(caught.value))
    assert f"MLflow at {failing_server} does not answer" in shown
    assert "ss/word" not in shown
    assert "ss%2Fword" not in shown
    assert (
        os.environ["MLFLOW_TRACKING_URI"] == mlflow.get_tracking_uri() == tracking.open_command(home) == failing_server
    )
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss/word")


def test_a_line_that_a_crash_cut_short_is_left_out(home):
    path = home / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in tracking.metrics_of(LocalFolder(path.parent))] == [1]


def test_a_run_that_the_store_does_not_have_is_named(home):
    deleted = tracking.Run("run", None)
    mlflow.MlflowClient().delete_run(deleted.run_id)
    for number in ("0123456789abcdef0123456789abcdef", deleted.run_id):
        with pytest.raises(tracking.LostRunError, match=rf"has no run {number}[^$]*give run.new_tracking=true"):
            tracking.Run("", number)


@pytest.mark.parametrize("damage", [b"", b"SQLite format 3\0", b"nothing of a database" * 1000])
def test_a_database_that_is_damaged_or_lost_is_said_to_be_with_what_would_do(home, monkeypatch, damage):
    """Empty, it is as good as new, and lacks the run."""
    number = tracking.Run("run", None).run_id
    database = home / "mlflow.db"
    other = home / "other"
    other.mkdir()
    (other / "mlflow.db").write_bytes(damage and damage + database.read_bytes()[len(damage) : 8192])
    expected = ".damaged`\\), and runs that have begun go on with run.new_tracking=true" if damage else "has no run"

    def go_on():
        tracking.connect(other)
        tracking.Run("", number)

    with pytest.raises(ValueError, match=expected) as caught:
        go_on()
    assert "run.new_tracking=true" in str(caught.value)


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


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """Works in a folder of its own, with no variable of MLflow set."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite+pysqlite:///sub/m.db?timeout=20", "sqlite+pysqlite:///{here}/sub/m.db?timeout=20"),
        ("./mlruns", "{here}/mlruns"),
        ("file:mlruns", "file:{here}/mlruns"),
        *((same, same) for same in ("sqlite:////srv/m.db", "http://127.0.0.1:5000", "file:///srv/mlruns", "/srv/mlruns",
                                    "postgresql://u:p@h/db", "databricks", "databricks://profile")),
    ],
)  # fmt: skip
def test_a_store_named_by_a_relative_path_is_the_same_for_workers_in_other_folders(moved, monkeypatch, named, meant):
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(variable, named)
    assert mlflow_environment.tracking_uri() == meant.format(here=moved)
    assert os.environ["MLFLOW_TRACKING_URI"] == os.environ["MLFLOW_REGISTRY_URI"] == meant.format(here=moved)


def test_a_database_that_workers_cannot_find_is_refused(moved, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///:memory:")
    with pytest.raises(ValueError, match="in the memory of one process"):
        tracking.connect(moved)
    (moved / "working_dir_files").mkdir()
    monkeypatch.chdir(moved / "working_dir_files")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI = 'mlflow\.db' is relative, but this job"):
        tracking.connect(moved)


def test_the_experiment_that_the_environment_names_gets_the_runs(moved, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    uri = tracking.connect(moved)
    client = mlflow.MlflowClient(uri)
    assert (
        client.get_experiment(client.get_run(tracking.Run("usual", None).run_id).info.experiment_id).name == "vitforge"
    )
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ  # MLflow sets it, for processes with other wishes too
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    tracking.connect(moved)
    named = client.get_run(tracking.Run("named", None).run_id).info.experiment_id
    assert client.get_experiment(named).name == "mine"
    assert client.get_experiment(named).artifact_location == (moved / "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", named)
    tracking.connect(moved)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    tracking.connect(moved)
    assert client.get_run(tracking.Run("numbered", None).run_id).info.experiment_id == named
    assert os.environ["MLFLOW_EXPERIMENT_ID"] == named

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with pytest.raises(ValueError, match="name two experiments"):
        tracking.connect(moved)
    client.delete_experiment(named)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    with pytest.raises(ValueError, match="was deleted: restore it"):
        tracking.connect(moved)
    for number in ("4711", "none"):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
        with pytest.raises(ValueError, match=f"MLFLOW_EXPERIMENT_ID={number}: MLflow has no experiment"):
            tracking.connect(moved)


def test_a_run_that_somebody_made_for_us_is_used_and_never_deleted(home, monkeypatch):
    made = mlflow.MlflowClient().create_run("0", run_name="theirs").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    run = tracking.Run("ours", None, {"a": 1}, {"vitforge.stage": "pretrain"})
    assert run.run_id == made
    run.delete()
    run.finish()
    found = mlflow.get_run(made)
    assert (found.info.status, found.info.lifecycle_stage) == ("FINISHED", "active")
    assert found.data.params == {"a": "1"}
    assert found.data.tags["vitforge.stage"] == "pretrain"
    with pytest.raises(ValueError, match=f"MLFLOW_RUN_ID={made} names a run .* begun with other settings"):
        tracking.Run("another", None, {"a": 2})
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(ValueError, match="MLflow has no run of that number"):
        tracking.Run("another", None)


def test_a_wait_for_mlflow_is_said(tmp_path, messages):
    held = (tmp_path / ".mlflow.lock").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)  # another process makes the tables, for longer than a person likes to wonder
    threading.Timer(EVERY_S + 0.5, held.close).start()
    tracking.connect(tmp_path)
    assert re.search("waiting for MLflow at sqlite:.* to answer \\(5 s\\)", messages())
