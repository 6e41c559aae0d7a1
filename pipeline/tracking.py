"""MLflow: where it keeps things, one run a stage, metrics in batches, and pictures.

A server is used where MLFLOW_TRACKING_URI names one; otherwise a SQLite file and a folder under HOME.
"""

import fcntl
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from cluster.command import log
from cluster.folders import Folder, LocalFolder, at_hand
from cluster.marked_folders import MarkedFolder
from cluster.redact import without_credentials
from cluster.storage import StorageError, write_bytes
from cluster.waiting import Waiting
from pipeline import mlflow_environment
from pipeline.run_files import METRICS, Lines, metrics_of

FLUSH_SECONDS = 5.0
MAX_BATCH = 1000
"""Metric points that MLflow takes in one call."""


class TrackingError(ValueError, ConnectionError):
    """MLflow does not answer, or not as it should; worth another try later."""


class LostRunError(ValueError):
    """MLflow no longer has a run; the message says what would do."""


def connect(home: Path, uri: str | None = None) -> str:
    """Point MLflow at its store; returns the tracking URI.

    Args:
        home: folder of the SQLite file and the artifacts, where no server is named.
        uri: what a process before this one connected to; None takes MLFLOW_TRACKING_URI, else the file.

    Returns:
        The URI without credentials. A user and password of a server's address go to MLFLOW_TRACKING_USERNAME and
        MLFLOW_TRACKING_PASSWORD, so that no message or log of a library has them.

    Raises:
        TrackingError: the server does not answer.
        ValueError: the folder cannot be used, or the file of the process before is not on this machine.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # that is for the result alone
    import mlflow

    # The store makes its tables on first use, and says so at length.
    for chatty in ("alembic", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # traces of what it raises as well
    if uri is not None and (file := _database(uri)) and not file.exists():
        raise ValueError(
            f"MLflow's database {file} is not on node {platform.node()}, where it is written to: name a server by "
            "MLFLOW_TRACKING_URI, or put VITFORGE_HOME where all nodes see it"
        )
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        _take_credentials_out(variable)
    named = mlflow_environment.tracking_uri()
    if uri is None or (named and without_credentials(named) == uri):
        uri = named or database_uri(home)
    said = without_credentials(uri)
    with Waiting(f"MLflow at {said} to answer"):
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = (home / ".mlflow.lock").open("wb")
            # Two processes that make the tables of one new file at once leave it broken.
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{home} cannot be used ({error.strerror}): set run.home or VITFORGE_HOME to another"
            ) from error
        try:
            with lock:
                mlflow.set_tracking_uri(uri)
                if named is None:
                    # MLflow writes it there itself; what the user said must stay apart from what we chose.
                    os.environ.pop("MLFLOW_TRACKING_URI", None)
                place = (home / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
                mlflow_environment.use_experiment(mlflow_environment.experiment(mlflow.MlflowClient(), place))
        except mlflow_environment.MlflowEnvironmentError:
            raise
        except Exception as error:  # MLflow lets those of SQLAlchemy, alembic and requests through
            cure = _cure(uri, "check MLFLOW_TRACKING_URI")
            raise TrackingError(
                f"MLflow at {said} does not answer as it should ({_first_line(error)}): {cure}"
            ) from error
    return said


def _database(uri: str) -> Path | None:
    """The file of a tracking store that is one of SQLite."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])) if uri.startswith("sqlite:///") else None


def _cure(uri: str, otherwise: str) -> str:
    """What would do for a store that fails."""
    file = _database(uri)
    if file is None or not file.exists():
        return otherwise
    return (
        f"where {file} is damaged, put a copy of it back; or move it away (`mv {file} {file}.damaged`), and runs that "
        "have begun go on with run.new_tracking=true, which gives each a new tracking run with all of its metrics. A "
        "finished run registers its model anew when it is started so"
    )


def database_uri(home: Path) -> str:
    """The address of the SQLite file in a folder.

    Raises:
        ValueError: the folder's name has what SQLAlchemy would end or change the path at.
    """
    path = str(home / "mlflow.db")
    if "?" in path or unquote(path) != path:
        # Escaped, they would do for SQLAlchemy 2.1, but MLflow 3.17 makes a folder of the escaped name too.
        raise ValueError(
            f"{home} cannot hold MLflow's database: '?', and '%' with two digits behind it, mean something else in its "
            "address. Set run.home or VITFORGE_HOME to a folder without them, or MLFLOW_TRACKING_URI to a server"
        )
    return f"sqlite:///{path}"


def _take_credentials_out(variable: str) -> None:
    """Move a user and password from a server's address in the environment to the variables that MLflow has for them."""
    address = os.environ.get(variable, "")
    user, separator, host = address.partition("://")[2].partition("/")[0].rpartition("@")
    name, colon, password = user.partition(":")
    if not address.lower().startswith(("http://", "https://")) or not (separator and name and colon and password):
        return
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(name))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(password))
    os.environ[variable] = urlunsplit(urlsplit(address)._replace(netloc=host))


def open_command(home: Path) -> str:
    """The command that opens MLflow's pages on what was tracked."""
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        return without_credentials(server)
    mlflow = Path(sys.executable).with_name("mlflow")
    return shlex.join([str(mlflow), "ui", "--backend-store-uri", database_uri(home)])


class Run:
    """One MLflow run, new or continued.

    Args:
        name: shown in MLflow.
        run_id: the run to continue; None starts one.
        settings: logged as parameters by dotted name (of a new run); without credentials, as the tags.
        tags: set on the run.
        parent: run id of the stage before this one.

    Raises:
        TrackingError: MLflow does not answer.
        LostRunError: it has no run `run_id`.
    """

    def __init__(
        self,
        name: str,
        run_id: str | None,
        settings: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
    ) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()
        self._ours = True
        """Whether we made the run."""
        if run_id is None:
            # Not mlflow.parentRunId, under which MLflow's list of runs folds a fine-tuning away.
            links = {"vitforge.parent_run": parent} if parent else {}
            run_id = self._begin(name, {**(tags or {}), **links, "mlflow.source.name": "vitforge"}, settings or {})
        else:
            try:
                self.client.update_run(run_id, status="RUNNING")
            except Exception as error:  # as in `connect`
                where = f"MLflow at {without_credentials(mlflow.get_tracking_uri())}"
                if not self._lost(run_id, error):
                    raise TrackingError(
                        f"{where} does not go on with run {run_id} ({_first_line(error)}): "
                        + _cure(mlflow.get_tracking_uri(), "put it right, then run the same command again")
                    ) from error
                raise LostRunError(
                    f"{where} has no run {run_id} (any more, perhaps), with which this run was begun: set "
                    f"MLFLOW_TRACKING_URI to what it was then, restore it (`mlflow runs restore --run-id {run_id}`), "
                    "or give run.new_tracking=true, which goes on with a new one that gets all of the metrics"
                ) from error
        self.run_id: str = run_id
        self._waiting: list[tuple[str, float, int, int]] = []
        """What MLflow was not told of yet: metric, value, milliseconds since the epoch, step."""
        self._flushed = time.monotonic()
        self._pause = FLUSH_SECONDS
        self._known: dict[str, int] = {}
        """The last step that MLflow has of each metric, as far as it was asked."""

    def _lost(self, run_id: str, error: Exception) -> bool:
        """Whether what MLflow says of a run is that there is none, or that it was deleted."""
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return True
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except Exception:  # as in `connect`; the first one is what is said
            return False

    def _begin(self, name: str, tags: Mapping[str, str], settings: Mapping[str, Any]) -> str:
        """Make the run, or begin with the one that somebody has made for us; returns its number."""
        from mlflow.entities import Param, RunTag

        run_id = mlflow_environment.run_id(self.client)
        if run_id is None:
            experiment = mlflow_environment.experiment(self.client, None)
            run_id = self.client.create_run(experiment.experiment_id, run_name=name, tags=tags).info.run_id
        else:
            self._ours = False
            log.info("tracked as the run that MLFLOW_RUN_ID names: %s", run_id)
            self.client.update_run(run_id, status="RUNNING")
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        params = [Param(key, str(value)[:6000]) for key, value in flatten(settings)]
        try:
            for start in range(0, len(params), 100):
                self.client.log_batch(run_id, params=params[start : start + 100])
        except Exception as error:  # as in `connect`
            if self._ours or getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            raise ValueError(
                f"MLFLOW_RUN_ID={run_id} names a run of MLflow that was begun with other settings "
                f"({_first_line(error)}): unset it, and this run gets one of its own"
            ) from error
        return run_id

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send what the run's own record has and MLflow lacks: points that died with a process before this one."""
        self._add(rows)
        self.flush()

    def complete(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send all that the run's own record has and MLflow lacks, at the end of a run.

        Raises:
            TrackingError: MLflow does not take it; the message says how many points it may lack.
        """
        import mlflow
        from mlflow.entities import Metric

        self._waiting.clear()  # the record has all of them
        self._known.clear()
        self._add(rows)
        missing, self._waiting = self._waiting, []
        try:
            self.client.get_run(self.run_id)
            for name in {name for name, *_ in missing}:
                there = {point.step for point in self.client.get_metric_history(self.run_id, name)}
                missing = [point for point in missing if point[0] != name or point[3] not in there]
            while missing:
                batch = [Metric(*point) for point in missing[:MAX_BATCH]]
                self.client.log_batch(self.run_id, metrics=batch)
                del missing[:MAX_BATCH]
        except Exception as error:
            where = f"MLflow at {without_credentials(mlflow.get_tracking_uri())}"
            raise TrackingError(
                f"{where} does not answer ({_first_line(error)}), and may lack {len(missing):,} metric points"
            ) from error

    def _add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        now = int(time.time() * 1000)
        for row in rows:
            self._waiting += [
                (metric_name(key), value, now, row["step"])
                for key, value in row.items()
                if key != "step" and value is not None and value == value
            ]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of a step. Steps that MLflow has already are left as they are."""
        now = int(time.time() * 1000)
        self._waiting += [(key, value, now, step) for key, value in values.items() if value == value]
        if time.monotonic() - self._flushed > self._pause:
            self.flush()

    def flush(self, last: bool = False) -> None:
        """Send what waits. A server that does not answer costs a warning, not the run: a later flush tries again.

        Args:
            last: ask even a server that did not answer a moment ago.
        """
        silent = self._pause > FLUSH_SECONDS and time.monotonic() - self._flushed < self._pause
        if silent and not last:  # each question costs a minute then, and ranks that wait for one count as hanging
            return
        try:
            while self._waiting:
                self._send(self._waiting[:MAX_BATCH])
                del self._waiting[:MAX_BATCH]
        except Exception as error:
            self._pause = min(2 * self._pause, 300.0)
            self._flushed = time.monotonic()
            self._known.clear()  # it may have taken what it did not answer to
            log.warning("MLflow did not take the metrics (%s); they are kept and sent later", _first_line(error))
            return
        self._pause = FLUSH_SECONDS
        self._flushed = time.monotonic()

    def _send(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Send those of some points that MLflow does not have."""
        from mlflow.entities import Metric

        batch, known = [], dict(self._known)
        for key, value, now, step in points:
            if key not in known:
                history = self.client.get_metric_history(self.run_id, key)
                known[key] = self._known[key] = max((point.step for point in history), default=-1)
            if step > known[key]:
                known[key] = step
                batch.append(Metric(key, value, now, step))
        if batch:
            self.client.log_batch(self.run_id, metrics=batch)
        self._known = known

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file with the run."""
        try:
            self.client.log_artifact(self.run_id, str(path), folder)
        except Exception as error:
            log.warning("MLflow did not take %s (%s); the run's folder has it", path.name, _first_line(error))

    def missing_artifacts(self, folder: Folder, names: Sequence[str]) -> None:
        """Store those of some files of the run's folder that MLflow does not have."""
        try:
            there = {info.path for info in self.client.list_artifacts(self.run_id)}
        except Exception as error:
            log.warning("MLflow did not say which files it has (%s)", _first_line(error))
            return
        for name in names:
            if name not in there and folder.size(name) is not None:
                with at_hand(folder, name) as path:
                    self.artifact(path)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        try:
            self.client.set_tag(self.run_id, key, without_credentials(value))
        except Exception as error:
            log.warning("MLflow did not take the tag %s = %s (%s)", key, value, _first_line(error))

    def tags(self) -> dict[str, str]:
        """The run's tags; none where MLflow does not answer."""
        try:
            return dict(self.client.get_run(self.run_id).data.tags)
        except Exception as error:
            log.warning("MLflow did not say which tags the run has (%s)", _first_line(error))
            return {}

    def finish(self, status: str = "FINISHED") -> None:
        """Send what waits and close the run with FINISHED, FAILED or KILLED."""
        self.flush(last=True)
        try:
            self.client.set_terminated(self.run_id, status)
        except Exception as error:
            log.warning(
                "MLflow did not take that the run is %s (%s); the same command tells it again",
                status,
                _first_line(error),
            )

    def delete(self) -> None:
        """Take the run out of MLflow's pages, if we made it."""
        if not self._ours:
            return
        try:
            self.client.delete_run(self.run_id)
        except Exception as error:
            log.warning("MLflow did not delete the run (%s)", _first_line(error))


@contextmanager
def closing(run: Run, drop: Callable[[], bool]) -> Iterator[Run]:
    """Finish a run when the block ends: FAILED with an exception, KILLED with an interrupt, else FINISHED.

    After a TrackingError it stays as it is.

    Args:
        drop: asked when a ValueError ends the block; if true nothing was done yet, and the run is deleted.
    """
    try:
        yield run
    except TrackingError:
        raise  # MLflow does not answer: the same command closes the run
    except Exception as error:
        run.finish("FAILED")
        if isinstance(error, ValueError) and drop():
            run.delete()
        raise
    except BaseException:
        run.finish("KILLED")
        raise
    run.finish()


class MetricsFile:
    """The run's own record of its metrics: RUN/metrics.jsonl, a line a step.

    A restart drops what was recorded after its checkpoint, so that every step stands once. On an object store the
    record is written on this machine, and brought there by `publish`.

    Args:
        folder: the run's.
        step: optimizer steps that the restart has behind it.
    """

    def __init__(self, folder: Folder, step: int) -> None:
        self._folder = folder
        self._scratch = None if folder.local else MarkedFolder("metrics")
        self._path = (self._scratch.path if self._scratch else Path(str(folder.local))) / METRICS
        self._begin(metrics_of(folder), step)
        self.publish(must=True)  # a folder without the record is that of a run that did nothing

    def _begin(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        content = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        write_bytes(self._path, content.encode())
        self._lines = Lines(self._path)

    def go_back(self, step: int) -> None:
        """Drop what was recorded after a step: those that follow it are taken again."""
        self._lines.close()
        self._begin(metrics_of(LocalFolder(self._path.parent)), step)
        self.publish()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the values of a step."""
        self._lines.add(json.dumps({"step": step, **values}))

    def publish(self, must: bool = False) -> None:
        """Bring what was written to the run's folder, if it is not there already.

        Args:
            must: storage that fails is an error. Otherwise it costs a warning: a later call brings all of it.
        """
        try:
            self._lines.flush()
            if self._scratch is None:
                return
            self._folder.put(self._path, METRICS)
        except (OSError, StorageError) as error:
            if must:
                raise
            log.warning("the record of the metrics was not stored (%s); the next checkpoint tries again", error)

    def close(self) -> None:
        """Write no more."""
        self._lines.close()
        if self._scratch:
            self._scratch.close()


def metric_name(key: str) -> str:
    """The name in MLflow of a key of the metrics file."""
    return key if "/" in key else f"train/{key}"


def add_scores(run_id: str, values: Mapping[str, float]) -> None:
    """Record scores with a run that has ended, as it is; a store that does not take them costs a warning."""
    import mlflow
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    try:
        client = mlflow.MlflowClient()
        client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in values.items()])
    except Exception as error:
        log.warning("MLflow did not take the scores (%s)", _first_line(error))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    if lines[0].startswith("(raised as a result of Query-invoked autoflush"):  # SQLAlchemy 2.1 says what only then
        lines = lines[1:] or lines
    return without_credentials(lines[0])
