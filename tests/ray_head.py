"""A Ray cluster on this machine as `ray start --head` makes it: in token mode, on loopback."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.running import REPOSITORY, environment, free_port

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class RayHead:
    """The cluster."""

    variables: dict[str, str]
    """Environment of its users."""
    address: str
    """Of its job interface."""
    metrics_port: int
    """Where its node shows its metrics to Prometheus."""
    gcs: str
    """For RAY_ADDRESS."""
    folder: Path
    """Of its sessions, with all that it logs."""

    def metrics(self) -> str:
        """What Prometheus would read; nothing where the node does not answer yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def job(self, verb: str, *words: str, timeout: float = 900) -> "subprocess.CompletedProcess[str]":
        """`ray job VERB` in the repository; a busy machine's is asked again."""
        deadline = time.monotonic() + 120
        line = [RAY, "job", verb, "--address", self.address, *words]
        while True:
            done = subprocess.run(
                line, cwd=REPOSITORY, env=self.variables, capture_output=True, text=True, timeout=timeout
            )
            busy = ("Failed to connect to Ray at address", "please try again later")
            if time.monotonic() > deadline or not any(text in done.stderr for text in busy):
                return done
            time.sleep(1)


@contextmanager
def ray_head(home: Path, cpus: int) -> Iterator[RayHead]:
    """A cluster for the length of a block. On a very busy machine Ray's node gives up on its own agent: tried again."""
    for last in (False, False, True):
        with _head(home, cpus) as head:
            if last or head.job("submit", "--", "true").returncode == 0:
                yield head
                return


@contextmanager
def _head(home: Path, cpus: int) -> Iterator[RayHead]:
    variables = environment(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    variables["RAY_agent_register_timeout_ms"] = "300000"  # a busy machine takes long, and the node would give up
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    ports, metrics_port = [str(free_port()) for _ in range(3)], free_port()
    options = [
        "--port", ports[0], "--dashboard-host", "127.0.0.1", "--dashboard-port", ports[1],
        "--dashboard-agent-listen-port", ports[2], "--metrics-export-port", str(metrics_port),
        "--num-cpus", str(cpus),
    ]  # fmt: skip
    with started(options, variables, Path(os.devnull)) as folder:
        yield RayHead(variables, f"http://127.0.0.1:{ports[1]}", metrics_port, f"127.0.0.1:{ports[0]}", folder)


@contextmanager
def started(options: list[str], variables: dict[str, str], log: Path) -> Iterator[Path]:
    """`ray start --head` with some options, for the length of a block, which ends what it started; gives its folder."""
    folder = Path("/tmp") / f"vf-{os.getpid()}-{secrets.token_hex(3)}"  # Ray's sockets need a short path
    command = [RAY, "start", "--head", *options, "--temp-dir", str(folder), "--block"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
    try:
        yield folder
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)
