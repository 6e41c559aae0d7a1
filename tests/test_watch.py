"""The watch of the ranks: what it says and ends, and that nobody else can make it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.authenticated_channel import new_secret
from pipeline.rank_processes import RankMark, end_ranks
from pipeline.watch import HUNG
from tests.running import REPOSITORY, environment, torchrun_command
from tests.two_hosts import ADDRESSES, two_hosts, why_not

STRANGER = str(REPOSITORY / "tests" / "stranger.py")
REFUSED = ["ChannelError", "ChannelError", "32 bytes", "32 bytes", "32 bytes"]
"""What a stranger gets: the random number that each connection begins with, and no answer."""

RANKS = """
import json, os, sys, time
from pathlib import Path
import psutil
from pipeline.watch import Watch
from pipeline.workers import join

def listening():
    return {tuple(one.laddr) for one in psutil.Process().net_connections("inet") if one.status == "LISTEN"}

worker = join(60)
before = listening()
(Path(sys.argv[1]) / f"others{worker.rank}").write_text(json.dumps(sorted(before)))
watch = Watch(worker, float(sys.argv[2]), print)
watch.at("computing", 7)
folder = Path(sys.argv[1])
(folder / f"rank{worker.rank}.new").write_text(json.dumps([os.getpid(), sorted(listening() - before)]))
(folder / f"rank{worker.rank}.new").rename(folder / f"rank{worker.rank}")
while not (folder / "end").exists():
    time.sleep(0.1)
    if not (folder / f"hang{worker.rank}").exists():
        watch.at("computing", 7)
watch.close()
"""


def until(what: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def two_ranks(
    folder: Path, limit_s: float = 300
) -> Iterator[tuple["subprocess.Popen[str]", list[int], tuple[str, int]]]:
    """Two ranks that watch each other: torchrun, their processes, and where rank 0 listens for the other."""
    script = folder / "ranks.py"
    script.write_text(RANKS)
    process = subprocess.Popen(
        torchrun_command(2, (str(script), str(folder), str(limit_s))),
        cwd=REPOSITORY, env=environment(folder, PYTHONPATH=str(REPOSITORY)), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until(lambda: (folder / "rank0").exists() and (folder / "rank1").exists(), process)
        (first, listening), (second, nowhere) = (json.loads((folder / f"rank{rank}").read_text()) for rank in range(2))
        assert nowhere == []
        assert len(listening) == 1
        yield process, [first, second], tuple(listening[0])
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                child.kill()
        process.kill()
        process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_can_neither_read_nor_end_the_ranks(tmp_path: Path) -> None:
    with two_ranks(tmp_path) as (process, _, (host, port)):
        assert host == "127.0.0.1"
        for rank in range(2):  # nor do the sockets of the process group leave this machine
            assert {there for there, _ in json.loads((tmp_path / f"others{rank}").read_text())} <= {"127.0.0.1"}
        silent = [subprocess.Popen([sys.executable, "-c", SILENT, host, str(port)], stdin=subprocess.PIPE)]
        done = subprocess.run([sys.executable, STRANGER, str(REPOSITORY), host, str(port)], capture_output=True)
        assert json.loads(done.stdout) == REFUSED, done.stderr
        (tmp_path / "end").touch()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        for one in silent:
            one.communicate(b"")


SILENT = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); sys.stdin.read()"


def test_a_rank_that_does_not_move_on_is_named_and_says_where_it_is(tmp_path: Path) -> None:
    with two_ranks(tmp_path, limit_s=3) as (process, pids, _):
        (tmp_path / "hang1").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"rank 1 on {os.uname().nodename} (process {pids[1]}), in computing of step 7 did not move on for" in output
    assert "its threads:" in output
    assert "ranks.py" in output.split("its threads:")[1]
    assert f"exitcode  : {HUNG}" in output
    assert not any(psutil.pid_exists(pid) for pid in pids)


def marked(secret: bytes, rank: int, user: int | None = None) -> "subprocess.Popen[str]":
    """A process that waits, with the mark of a rank."""
    code = (
        "import os, sys\n"
        "from pipeline.rank_processes import RankMark\n"
        "mark = RankMark(bytes.fromhex(sys.argv[1]), int(sys.argv[2]))\n"
        "len(sys.argv) > 3 and os.setuid(int(sys.argv[3]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", code, secret.hex(), str(rank), *([] if user is None else [str(user)])]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_only_processes_that_know_the_secret_are_ended() -> None:
    secret, others = new_secret(), new_secret()
    mark = RankMark(secret, 3)  # this process itself is never ended by itself
    hung, stopped, another, stranger = marked(secret, 3), marked(secret, 5), marked(secret, 4), marked(others, 3)
    processes = [hung, stopped, another, stranger]
    if os.geteuid() == 0:
        processes.append(marked(secret, 3, user=65534))
    stopped.send_signal(signal.SIGSTOP)
    try:
        assert sorted(end_ranks(secret, [3, 5, 6])) == sorted([hung.pid, stopped.pid])
        assert [hung.wait(10), stopped.wait(10)] == [-signal.SIGKILL] * 2
        for process in processes[2:]:
            process.communicate("", timeout=10)
            assert process.returncode == 0
    finally:
        mark.close()
        for process in processes:
            process.kill()


REASON = why_not()


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=f"two hosts need network namespaces: {REASON}")
def test_between_hosts_it_listens_on_their_network_alone_and_a_stranger_there_gets_nothing(tmp_path: Path) -> None:
    script, log = tmp_path / "ranks.py", tmp_path / "log"
    script.write_text(RANKS)
    with two_hosts(tmp_path / "pair", ray=False, PYTHONPATH=str(REPOSITORY)) as pair:
        nodes = [
            host.start(
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number),
                "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29411",
                str(script), str(tmp_path), "300", log=log,
            )
            for number, host in enumerate(pair.hosts)
        ]  # fmt: skip
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"rank{rank}").exists() for rank in range(2)):
            assert all(node.poll() is None for node in nodes), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        _, [[host, port]] = json.loads((tmp_path / "rank0").read_text())
        assert host == ADDRESSES[0]
        for there in pair.hosts:
            done = there.run(sys.executable, STRANGER, str(REPOSITORY), host, str(port))
            assert json.loads(done.stdout) == REFUSED, done.stderr
        (tmp_path / "end").touch()
        assert [node.wait(60) for node in nodes] == [0, 0], log.read_text()
