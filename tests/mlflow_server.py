"""A real MLflow server on loopback, behind a proxy that lets in only who has a name and password or a token."""

import base64
import http.client
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from tests.running import free_port

MLFLOW = str(Path(sys.executable).with_name("mlflow"))
NAME, PASSWORD, TOKEN = "me", "hush-p@ss/w0rd", "hush-token-of-the-server"


class MlflowServer:
    """The server; it can be killed and started again, with what it had.

    Args:
        folder: of its database, artifacts and log.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Where it is, without authentication."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [MLFLOW, "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
                 "--artifacts-destination", str(self._folder / "artifacts")],
                env={**kept, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, cwd=self._folder, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "log").read_text(encoding="utf-8")[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def kill(self) -> None:
        """End it at once, with its workers."""
        if self._process is not None:
            family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
            for process in family:
                process.kill()
            self._process.wait()
            self._process = None


class _Door(BaseHTTPRequestHandler):
    """Passes on what has a credential of ours, and refuses the rest as MLflow's own authentication does."""

    protocol_version = "HTTP/1.1"
    target: int

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        basic = base64.b64encode(f"{NAME}:{PASSWORD}".encode()).decode()
        allowed = self.headers.get("Authorization") in (f"Basic {basic}", f"Bearer {TOKEN}")
        if not allowed and self.path != "/health":
            self._send(401, {"WWW-Authenticate": 'Basic realm="mlflow"'}, b"You are not authenticated.")
            return
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
            connection.request(self.command, self.path, body, headers | {"Connection": "close"})
            answer = connection.getresponse()
            self._send(answer.status, dict(answer.getheaders()), answer.read())
        except OSError:
            self._send(502, {}, b"The server is away.")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _answer  # noqa: N815

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[MlflowServer, str]]:
    """A running server and the address of the proxy before it."""
    server = MlflowServer(folder)
    server.start()
    door = ThreadingHTTPServer(("127.0.0.1", 0), type("Door", (_Door,), {"target": server._port}))
    threading.Thread(target=door.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{door.server_port}"
    finally:
        door.shutdown()
        door.server_close()
        server.kill()
