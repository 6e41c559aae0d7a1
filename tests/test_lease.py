"""The lease on a run's folder: one job at a time, and a dead one does not block it."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from cluster.folders import LocalFolder
from cluster.lease import FILE, Lease, LeaseError, Watcher
from tests.running import REPOSITORY

HOLDER = """
import sys, time
from pathlib import Path
from cluster.command import set_up_logging
from cluster.folders import LocalFolder
from cluster.lease import Lease
set_up_logging()
with Lease(LocalFolder(Path(sys.argv[1])), ttl_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    return LocalFolder(tmp_path / "run")


@pytest.fixture
def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder.url, "1.5"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(folder: LocalFolder, **changes: object) -> dict[str, object]:
    """Make the record say that another machine holds the lease."""
    record = {**folder.read_json(FILE), "host": "elsewhere", "boot": "other", **changes}
    folder.write_json(FILE, record)
    return record


def test_a_second_job_is_refused_and_a_killed_one_replaced_at_once(folder, holder):
    with pytest.raises(LeaseError, match=f"another job works in .*process {holder.pid} on"):
        Lease(folder, ttl_s=300).__enter__()
    holder.kill()
    holder.wait()
    with Lease(folder, ttl_s=300) as lease:  # far longer than the test may take: it did not wait for it
        assert json.loads(folder.read_bytes(FILE))["token"] == lease.token


def test_a_lease_that_was_given_back_is_free_at_once(folder):
    with Lease(folder, ttl_s=300):
        pass
    with Lease(folder, ttl_s=300):
        pass


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[]", b'{"token": ""}', b'"' * 3])
def test_a_lease_that_names_nobody_is_free(folder, content):
    folder.write_bytes(FILE, content)
    with Lease(folder, ttl_s=1.5):
        pass


def test_a_holder_elsewhere_is_waited_for_and_replaced_only_if_it_does_not_renew(folder):
    with Lease(folder, ttl_s=300):
        record = elsewhere(folder)
    elsewhere(folder, **record)
    reasons: list[str] = []
    with Lease(folder, reasons.append, ttl_s=0.5) as lease:
        assert json.loads(folder.read_bytes(FILE))["token"] == lease.token
        elsewhere(folder, token="theirs")
        refused = threading.Event()

        def renew() -> None:
            while not refused.wait(0.3):
                elsewhere(folder, token="theirs", counter=time.monotonic())

        renewal = threading.Thread(target=renew)
        renewal.start()
        with pytest.raises(LeaseError, match="on elsewhere"):
            Lease(folder, ttl_s=300).__enter__()
        refused.set()
        renewal.join()
    assert ["on elsewhere" in reason for reason in reasons] == [True]


def test_a_holder_that_was_held_up_stops_when_its_lease_is_another_s(folder, holder):
    holder.send_signal(signal.SIGSTOP)
    elsewhere(folder)
    with Lease(folder, ttl_s=1.5):
        holder.send_signal(signal.SIGCONT)
        _, errors = holder.communicate(timeout=30)
        assert holder.returncode == 1
        assert "is lost: it belongs to process" in errors


def test_a_rank_sees_that_its_job_is_gone(folder, holder):
    token = json.loads(folder.read_bytes(FILE))["token"]
    watcher = Watcher(folder, token, ttl_s=1.0)
    assert watcher.lost() is None
    assert "belongs to" in (Watcher(folder, "another").lost() or "")
    holder.kill()
    holder.wait()
    assert "is gone" in (watcher.lost() or "")
    elsewhere(folder)  # where its process cannot be looked at, it is the renewal that is missing
    assert watcher.lost() is None
    time.sleep(1.2)
    assert watcher.lost() is None  # nobody looked meanwhile: this process may have been stopped, and the holder with it
    deadline = time.monotonic() + 30
    while not (why := watcher.lost()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "did not renew" in (why or "")


def test_a_lease_that_leaves_no_file_is_held_by_one_of_many_at_a_time(folder):
    held = threading.Lock()
    taken: list[bool] = []

    def work() -> None:
        until = time.monotonic() + 60
        for _ in range(5):
            while time.monotonic() < until:
                try:
                    with Lease(folder, ttl_s=300, leaves_file=False):
                        taken.append(held.acquire(blocking=False))
                        held.release()
                        break
                except LeaseError:
                    time.sleep(0.01)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert taken == [True] * 20
    assert list(folder.local.iterdir()) == []
