"""Before any test imports Ray: how it authenticates is read from the environment at its import."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cluster.ray_runtime
from tests import s3_server as server_module

assert cluster.ray_runtime.REPOSITORY


@pytest.fixture(scope="session")
def s3_server() -> Iterator[server_module.S3Server]:
    """A real S3 server on loopback, behind a proxy that makes faults (`.faults`)."""
    with server_module.s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_server: server_module.S3Server, monkeypatch: pytest.MonkeyPatch) -> server_module.S3Server:
    """The S3 server, without faults, for this process and those that it starts: `.bucket()` makes a fresh bucket."""
    s3_server.faults.clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def ray(s3_server: server_module.S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for all tests that do not test its start; its workers know the S3 server, and cache in a test folder."""
    variables = {**s3_server.env, "VITFORGE_CACHE": str(tmp_path_factory.mktemp("ray") / "cache")}
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            running.enter_context(cluster.ray_runtime.ray_session())
        yield


@contextmanager
def _own_mlflow() -> Iterator[None]:
    """MLflow 3.17 writes the address that it is told into the environment, where the next test would find it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        if name not in before:
            del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="module")
def mlflow_of_the_module() -> Iterator[None]:
    """What the fixtures of a module tell MLflow is unsaid at the module's end."""
    with _own_mlflow():
        yield


@pytest.fixture(autouse=True)
def own_mlflow() -> Iterator[None]:
    """What a test tells MLflow is unsaid at its end."""
    with _own_mlflow():
        yield


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What the project's own log has said in this test, when it is called."""
    monkeypatch.setattr(logging.getLogger("vitforge"), "propagate", True)
    caplog.set_level(logging.INFO, "vitforge")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Take out Hypothesis's clock of garbage collections.

    Before Python 3.12 a collection that runs Python code while several threads parse (numpy.load does) ends in
    "SystemError: AST constructor recursion depth mismatch" (CPython issue 106905).
    """
    gc.callbacks.clear()
