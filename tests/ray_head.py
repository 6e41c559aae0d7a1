"""A Ray cluster on this machine as `ray start` makes it, in token mode on loopback, with any number of nodes."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.running import REPOSITORY, environment, free_port

RAY = str(Path(sys.executable).with_name("ray"))


class RayHead:
    """The cluster.

    Attributes:
        variables: environment of its users.
        address: of its job interface.
    """

    def __init__(self, home: Path, cpus: int) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.variables = environment(home, **token)
        self.variables["PATH"] = f"{Path(sys.executable).parent}:{self.variables['PATH']}"
        self.folder = Path("/tmp") / f"vf-{os.getpid()}-{secrets.token_hex(3)}"  # Ray's sockets need a short path
        self.port, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._node(
            cpus, "--head", "--port", str(self.port), "--dashboard-host", "127.0.0.1", "--dashboard-port",
            str(dashboard), "--temp-dir", str(self.folder),
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while self.job("list").returncode:
            assert time.monotonic() < deadline, "the cluster did not start"
            time.sleep(1)

    def join(self, cpus: int) -> "subprocess.Popen[bytes]":
        """Another node, on this machine too."""
        return self._node(cpus, "--address", f"127.0.0.1:{self.port}")

    def _node(self, cpus: int, *words: str) -> "subprocess.Popen[bytes]":
        command = [RAY, "start", *words, "--num-cpus", str(cpus), "--block"]
        node = subprocess.Popen(
            command, env=self.variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._nodes.append(node)
        return node

    def job(self, verb: str, *words: str, timeout: float = 900) -> "subprocess.CompletedProcess[str]":
        """`ray job VERB` in the repository."""
        line = [RAY, "job", verb, "--address", self.address, *words]
        return subprocess.run(line, cwd=REPOSITORY, env=self.variables, capture_output=True, text=True, timeout=timeout)

    def end(self, node: "subprocess.Popen[bytes]") -> None:
        """End a node with all of its processes, as when a machine is switched off."""
        try:
            children = psutil.Process(node.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        node.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        node.wait()

    def close(self) -> None:
        """End all of it."""
        for node in self._nodes[::-1]:
            self.end(node)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def ray_head(home: Path, cpus: int) -> Iterator[RayHead]:
    """A cluster for the length of a block."""
    head = RayHead(home, cpus)
    try:
        yield head
    finally:
        head.close()
