"""Two hosts on one machine: network namespaces with a link between them, a Ray node on each, token mode.

What differs from two machines: they share the cores and the file system (so a run's folder is shared by itself).
Each has its own loopback, address, hostname, /tmp/ray and /dev/shm. Only what runs in our own namespaces is ever
ended.
"""

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.running import REPOSITORY, environment

PORT = 6379
INTERFACE = "eth0"
"""The name of the link on both hosts, as machines of one kind have it."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
RAY = str(Path(sys.executable).with_name("ray"))


def why_not() -> str | None:
    """Why this machine cannot play two hosts, or None if it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    missing = [tool for tool in ("ip", "nsenter", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    name = f"vf{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    inside = ["ip", "netns", "exec", name, "unshare", "-m", "-u", "mount", "--make-rprivate", "/"]
    mounted = subprocess.run(inside, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"no mount namespaces here: {mounted.stderr.strip()}" if mounted.returncode else None


@dataclass
class Host:
    """One of the two."""

    number: int
    namespace: str
    folder: Path
    """Its /tmp/ray."""
    variables: dict[str, str]
    holder: subprocess.Popen[bytes]
    """Keeps its namespaces; what runs on the host enters those."""
    node: subprocess.Popen[bytes] | None = None
    """`ray start --block`."""

    @property
    def address(self) -> str:
        return ADDRESSES[self.number]

    def command(self, *words: str) -> list[str]:
        """A command line that runs `words` on this host."""
        return ["nsenter", "-t", str(self.holder.pid), "-n", "-m", "-u", f"--wd={REPOSITORY}", *words]

    def start(self, *words: str, log: Path, **extra: str) -> "subprocess.Popen[bytes]":
        """Start a command on this host, its output appended to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(*words), cwd=REPOSITORY, env={**self.variables, **extra}, stdout=file, stderr=file
            )

    def run(self, *words: str, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        """A command on this host, to its end."""
        return subprocess.run(
            self.command(*words), cwd=REPOSITORY, env=self.variables, capture_output=True, text=True, timeout=timeout
        )

    def processes(self) -> list[psutil.Process]:
        """Every process on this host but its holder."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout
        found = []
        for pid in map(int, listed.split()):
            if pid != self.holder.pid:
                with suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        return found

    def find(self, what: str) -> list[psutil.Process]:
        """The processes on this host whose command line holds `what`."""
        found = []
        for process in self.processes():
            try:
                if what in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue  # it has just ended
        return found


@dataclass
class TwoHosts:
    """Both, with the link between them."""

    folder: Path
    hosts: list[Host]
    cpus: int

    @property
    def log(self) -> Path:
        """What the Ray nodes say."""
        return self.folder / "ray.log"

    def start_node(self, number: int) -> None:
        """Start Ray on a host: the head on the first, a node that joins it on the second; waits until it is there."""
        host = self.hosts[number]
        end_processes(host)
        words = [RAY, "start", "--node-ip-address", host.address, "--num-cpus", str(self.cpus), "--block"]
        if number == 0:
            words += ["--head", "--port", str(PORT), "--dashboard-host", "127.0.0.1"]
        else:
            words += ["--address", f"{ADDRESSES[0]}:{PORT}"]
        host.node = host.start(*words, log=self.log)
        self.wait_for_nodes({ADDRESSES[0], host.address})

    def wait_for_nodes(self, addresses: set[str], timeout: float = 90) -> None:
        """Until the head knows exactly these nodes as alive."""
        deadline = time.monotonic() + timeout
        while (found := self.alive()) != addresses:
            said = self.log.read_text()[-3000:] if self.log.exists() else ""
            assert time.monotonic() < deadline, f"nodes {found}, waited for {addresses}: {said}"
            time.sleep(0.5)

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head holds for alive."""
        return {address for address, _ in self.nodes()}

    def nodes(self) -> list[tuple[str, str]]:
        """Address and Ray's id of the nodes that the head holds for alive."""
        code = (
            "import sys; from ray._raylet import GcsClient\n"
            "try:\n"
            f"    nodes = GcsClient(address='{ADDRESSES[0]}:{PORT}').get_all_node_info(timeout=5).values()\n"
            "except Exception as error:\n"
            "    sys.exit(str(error))\n"
            "print(*(f'{n.node_manager_address} {n.node_id.hex()}' for n in nodes if n.state == 0), sep='\\n')\n"
        )
        done = self.hosts[0].run(sys.executable, "-c", code)
        return [(address, name) for address, name in (line.split() for line in done.stdout.splitlines() if line)]

    def kill_raylet(self, number: int) -> None:
        """`kill -9` of a host's raylet: Ray's way of losing a machine."""
        found = self.hosts[number].find("raylet/raylet")
        assert len(found) == 1, found
        found[0].kill()

    def cut(self) -> None:
        """Take the link between the hosts down."""
        self._link("down")

    def restore(self) -> None:
        """Bring the link up again."""
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.hosts[1].namespace, "link", "set", INTERFACE, state], check=True)

    def drain(self, number: int, seconds: int) -> None:
        """Tell a host's node that it will be taken away in `seconds`, as a cloud does with spot machines."""
        names = dict(self.nodes())
        done = self.hosts[0].run(
            RAY, "drain-node", "--address", f"{ADDRESSES[0]}:{PORT}", "--node-id", names[ADDRESSES[number]],
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the test takes this machine away",
            "--deadline-remaining-seconds", str(seconds),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, *words: str, log: Path, **extra: str) -> "subprocess.Popen[bytes]":
        """Start one of our commands under Python on the first host, attached to the cluster."""
        address = f"{ADDRESSES[0]}:{PORT}"
        return self.hosts[0].start(sys.executable, *words, log=log, RAY_ADDRESS=address, **extra)

    def workers(self, number: int) -> list[psutil.Process]:
        """The ranks on a host."""
        return self.hosts[number].find("RayTrainWorker")


def end_processes(host: Host) -> None:
    """Kill what runs on a host."""
    for process in host.processes():
        try:
            process.kill()
        except psutil.Error:
            continue
    if host.node is not None:
        host.node.wait()
        host.node = None


@contextmanager
def two_hosts(folder: Path, cpus: int = 1, ray: bool = True, **extra: str) -> Iterator[TwoHosts]:
    """Both hosts, for the length of a `with` block.

    Args:
        folder: for what they keep; VITFORGE_HOME is `home` inside it, on both.
        cpus: Ray's logical CPUs a host.
        ray: start Ray on them.
        extra: environment variables on both.
    """
    with _alone():
        yield from _pair(folder, cpus, ray, extra)


@contextmanager
def _alone() -> Iterator[None]:
    """One pair at a time on this machine: `ray start` looks for others at its address in the table of processes, where
    it sees those of all network namespaces (Ray 2.60)."""
    with (Path(tempfile.gettempdir()) / "vitforge-two-hosts.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pair(folder: Path, cpus: int, ray: bool, extra: dict[str, str]) -> Iterator[TwoHosts]:
    name = f"vf{os.getpid()}{secrets.token_hex(2)}"
    namespaces = [f"{name}h{number}" for number in range(2)]
    variables = environment(folder / "home", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), **extra)
    pair = TwoHosts(folder, [], cpus)
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
        # The names of links are the machine's until they are inside: at most 15 characters.
        ends = [f"vf{secrets.token_hex(4)}{number}" for number in range(2)]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for namespace, end, address in zip(namespaces, ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", namespace, "name", INTERFACE)
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", INTERFACE, "up")
        for number, namespace in enumerate(namespaces):
            # Ray's sockets need a short path: it is /tmp/ray for the host.
            temporary = folder / f"host{number}"
            temporary.mkdir(parents=True)
            Path("/tmp/ray").mkdir(exist_ok=True)
            inside = (
                f"hostname host{number} && mount --make-rprivate / && mount --bind {temporary} /tmp/ray && "
                "mount -t tmpfs -o size=2g tmpfs /dev/shm && echo ready && exec sleep infinity"
            )
            holder = subprocess.Popen(
                ["ip", "netns", "exec", namespace, "unshare", "-m", "-u", "bash", "-c", inside],
                stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            assert holder.stdout is not None
            pair.hosts.append(Host(number, namespace, temporary, dict(variables), holder))
            assert holder.stdout.readline() == b"ready\n"
        if ray:
            pair.start_node(0)
            pair.start_node(1)
        yield pair
    finally:
        for host in pair.hosts:
            end_processes(host)
            host.holder.send_signal(signal.SIGKILL)
            host.holder.wait()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
