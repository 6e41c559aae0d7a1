"""Folders on a real S3 server, with and without the faults of networks, beside the same on a local disk."""

import logging
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkProcess, SpawnProcess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from cluster import s3_connection, s3_objects
from cluster.command import log
from cluster.folders import Folder, LocalFolder, folder_at
from cluster.s3_connection import PATIENCE, SECRETS, ObjectStoreError
from cluster.storage import StorageError
from tests.s3_server import PAGE, SECRET_KEY, S3Server

ANY = re.compile(".*")


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return LocalFolder(tmp_path / "a" / "b")
    return folder_at(request.getfixturevalue("s3").bucket() + "/a/b/", "test")


@pytest.fixture
def remote(s3: S3Server) -> Folder:
    return folder_at(s3.bucket() + "/runs/one", "test")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE, "1.5")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large objects that are small: S3 takes parts of 5 MiB and more."""
    monkeypatch.setattr(s3_objects, "PART", 5 << 20)
    monkeypatch.setattr(s3_objects, "RANGE", 1 << 20)


def some_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def uploads(s3: S3Server, folder: Folder) -> list[str]:
    """Keys of uploads that have begun and not ended."""
    bucket = folder.url.split("/")[2]
    return [each["Key"] for each in s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


def test_a_folder_that_is_not_there(folder: Folder) -> None:
    assert folder.names() == []
    assert folder.folders() == []
    assert folder.tree() == {}
    assert folder.size("a") is None
    folder.remove_tree(ANY)
    folder.remove_unfinished()
    with pytest.raises(StorageError, match=r"b/a cannot be read"):
        folder.read_bytes("a")


def test_files_and_folders(folder: Folder, tmp_path: Path) -> None:
    folder.write_bytes("one", b"first")
    folder.write_bytes("one", b"1")
    folder.child("deep").child("er").write_bytes("two", b"22")
    folder.write_bytes("deep/three", b"")
    with folder.writing("four") as sink:
        sink.write(b"44")
        sink.write(memoryview(b"44"))
    assert folder.names() == ["four", "one"]
    assert folder.folders() == ["deep"]
    assert folder.tree() == {"deep/er/two": 2, "deep/three": 0, "four": 4, "one": 1}
    assert folder.size("deep/er/two") == 2
    assert folder.read_bytes("four") == b"4444"
    assert folder.read_bytes("deep/three") == b""
    folder.write_json("facts.json", {"b": 1, "a": ["ü"]})
    assert folder.read_json("facts.json") == {"a": ["ü"], "b": 1}
    folder.write_bytes("facts.json", b"{")
    with pytest.raises(StorageError, match=r"facts\.json is damaged"):
        folder.read_json("facts.json")
    folder.remove("one")
    folder.remove("one")
    folder.child("deep").remove_tree(ANY)
    assert folder.tree() == {"facts.json": 1, "four": 4}
    assert folder_at(folder.url, "test") == folder


def test_a_folder_does_not_reach_into_its_neighbours(folder: Folder) -> None:
    neighbour = folder_at(folder.url + "-2", "test")
    neighbour.write_bytes("kept", b"x")
    folder.write_bytes("gone", b"x")
    folder.remove_tree(ANY)
    assert folder.tree() == {}
    assert neighbour.tree() == {"kept": 1}


def test_parts_of_files(folder: Folder) -> None:
    content = some_bytes(100)
    folder.write_bytes("x", content)
    assert folder.read_bytes("x", 10) == content[10:]
    assert folder.read_bytes("x", 10, 20) == content[10:30]
    assert folder.read_bytes("x", 99, 1) == content[99:]
    assert folder.read_bytes("x", 5, 0) == b""
    for offset, length in ((90, 20), (200, 1)):
        with pytest.raises(StorageError, match=r"x ends before byte .*: it was cut short"):
            folder.read_bytes("x", offset, length)


def test_a_file_is_read_from_any_place(folder: Folder) -> None:
    content = some_bytes(100_000)
    folder.write_bytes("x", content)
    with folder.open("x") as file:
        assert file.read(10) == content[:10]
        assert file.seek(-100, 2) == 99_900
        assert file.read() == content[-100:]
        file.seek(50_000)
        assert file.read(40_000) == content[50_000:90_000]
        assert file.read() == content[90_000:]
        assert file.read() == b""
        file.seek(3)
        assert file.read(2) == content[3:5]
    before = folder.stamp("x")
    assert folder.stamp("x") == before
    folder.write_bytes("x", content[::-1])
    assert folder.stamp("x") != before
    for ask in (folder.open, folder.stamp):
        with pytest.raises(StorageError, match="none cannot be read"):
            ask("none")


def test_there_and_back(folder: Folder, tmp_path: Path) -> None:
    for size in (0, 1, 3_000_000):
        content = some_bytes(size)
        (tmp_path / "here").write_bytes(content)
        folder.child("in").write_bytes("made", b"")
        folder.put(tmp_path / "here", "in/file")
        assert (tmp_path / "here").exists()
        folder.get("in/file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        folder.put(tmp_path / "here", "in/moved", move=True)
        assert not (tmp_path / "here").exists()
        assert folder.read_bytes("in/moved") == content
    with pytest.raises(StorageError, match="in/none cannot be read"):
        folder.get("in/none", tmp_path / "none")
    assert not list(tmp_path.glob("*none*"))


def test_what_fails_leaves_nothing(folder: Folder) -> None:
    folder.write_bytes("x", b"before")

    def write() -> None:
        with folder.writing("x") as sink:
            assert sink.write(b"after") == 5
            raise RuntimeError("thought better")

    with pytest.raises(RuntimeError, match="thought better"):
        write()
    assert folder.read_bytes("x") == b"before"
    assert folder.names() == ["x"]


def test_of_two_writers_one_swaps(folder: Folder) -> None:
    assert folder.swap("lease", b"first", None)
    assert not folder.swap("lease", b"second", None)
    assert not folder.swap("lease", b"second", b"other")
    assert not folder.swap("none", b"second", b"first")
    assert folder.read_bytes("lease") == b"first"
    for number in range(5):
        before = folder.read_bytes("lease")
        barrier = threading.Barrier(4)

        def contend(name: int, before: bytes = before, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return folder.swap("lease", f"{name} {before!r}".encode(), before)

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(contend, range(4)))
        assert won.count(True) == 1, number
        assert folder.read_bytes("lease") == f"{won.index(True)} {before!r}".encode()


def test_large_objects_go_in_parts(remote: Folder, small_parts: None, s3: S3Server, tmp_path: Path) -> None:
    content = some_bytes(12_000_000)
    (tmp_path / "x").write_bytes(content)
    remote.put(tmp_path / "x", "put")
    with remote.writing("written") as sink:
        for at in range(0, len(content), 700_000):
            sink.write(content[at : at + 700_000])
    assert sum(" /" in request and "partNumber" in request for request in s3.faults.requests) == 6
    assert remote.tree() == {"put": len(content), "written": len(content)}
    assert remote.read_bytes("written") == content
    remote.get("put", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert remote.read_bytes("put", 999_999, 5_000_000) == content[999_999:5_999_999]
    assert uploads(s3, remote) == []


def test_faults_that_pass_change_nothing(remote: Folder, small_parts: None, s3: S3Server, tmp_path: Path) -> None:
    s3.faults.rates = {"slow_down": 0.1, "reset": 0.05, "lost_answer": 0.05, "short": 0.1}
    for number in range(4):
        content = some_bytes(6_000_000 + number, number)
        (tmp_path / "x").write_bytes(content)
        remote.put(tmp_path / "x", f"{number}/put")
        remote.write_bytes(f"{number}/written", content)
        remote.get(f"{number}/written", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        assert remote.read_bytes(f"{number}/put", 1000, 3_000_000) == content[1000:3_001_000]
    assert len(remote.tree()) == 8
    assert min(s3.faults.injected[kind] for kind in s3.faults.rates) > 0
    s3.faults.rates = {}
    assert uploads(s3, remote) == []


def test_a_swap_whose_answer_is_lost_is_known_to_have_won(remote: Folder, s3: S3Server) -> None:
    s3.faults.rates, s3.faults.only, s3.faults.limit = {"lost_answer": 1.0}, "^PUT", 1
    assert remote.swap("lease", b"mine", None)
    s3.faults.limit = 2
    assert remote.swap("lease", b"mine again", b"mine")
    assert not remote.swap("lease", b"too late", b"mine")
    assert s3.faults.injected["lost_answer"] == 2
    assert remote.read_bytes("lease") == b"mine again"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("slow_down", "SlowDown"),
        ("reset", "does not answer|the connection to .* failed"),
        ("short", "cut short"),
        ("stall", "no answer from .* in time"),
    ],
)
def test_what_stays_broken_is_one_error_that_names_the_object(
    remote: Folder, s3: S3Server, tmp_path: Path, kind: str, says: str
) -> None:
    remote.write_bytes("x", b"content")
    s3.faults.rates = {kind: 1.0}
    with pytest.raises(ObjectStoreError, match=rf"^s3://bucket-\d+/runs/one/x: .*({says})") as caught:
        remote.get("x", tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_whoever_is_interrupted_leaves_nothing(remote: Folder, small_parts: None, s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(some_bytes(11_000_000))

    def for_ever(function: Callable[[], None]) -> None:
        while True:
            function()

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError("enough")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        s3.faults.latency = 0.3
        for attempt in (lambda: remote.put(tmp_path / "x", "x"), lambda: remote.get("there", tmp_path / "y")):
            remote.write_bytes("there", b"content")
            signal.setitimer(signal.ITIMER_REAL, 0.5)  # before the third request in a row, which completes an upload
            with pytest.raises(InterruptedError, match="enough"):
                for_ever(attempt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    s3.faults.latency = 0
    deadline = time.monotonic() + 20
    while uploads(s3, remote) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert uploads(s3, remote) == []
    assert remote.names() == ["there"]
    assert [path.name for path in tmp_path.iterdir()] in (["x"], ["x", "y"], ["y", "x"])


@pytest.mark.usefixtures("impatient")
def test_an_upload_that_stays_broken_leaves_nothing(
    remote: Folder, small_parts: None, s3: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(some_bytes(11_000_000))
    s3.faults.rates, s3.faults.only = {"slow_down": 1.0}, "partNumber=2"
    with pytest.raises(ObjectStoreError, match=r"runs/one/x: .*SlowDown"):
        remote.put(tmp_path / "x", "x")
    with pytest.raises(ObjectStoreError, match=r"runs/one/y: .*SlowDown"):
        remote.write_bytes("y", (tmp_path / "x").read_bytes())
    assert uploads(s3, remote) == []
    assert remote.tree() == {}


def test_what_a_killed_writer_leaves_is_removed(remote: Folder, s3: S3Server) -> None:
    client, bucket = s3.client(), remote.url.split("/")[2]
    client.create_multipart_upload(Bucket=bucket, Key="runs/one/x")
    client.create_multipart_upload(Bucket=bucket, Key="runs/one/deep/x")
    client.create_multipart_upload(Bucket=bucket, Key="runs/two/x")
    remote.remove_unfinished()
    assert sorted(uploads(s3, remote)) == ["runs/one/deep/x", "runs/two/x"]
    s3.faults.rates, s3.faults.only = {"denied": 1.0}, r"^GET .*[?&]uploads"
    remote.remove_unfinished()  # who may not look for them can do without
    assert s3.faults.injected["denied"] == 1
    s3.faults.clear()
    remote.remove_tree(ANY)
    assert uploads(s3, remote) == ["runs/two/x"]


def test_only_files_of_our_names_are_removed(folder: Folder) -> None:
    ours = re.compile(r"part-\d+|deep/part-\d+")
    for name in ("part-1", "deep/part-2", "deep/part-3.jpg", "deeper/part-4", "photo.jpg"):
        folder.write_bytes(name, b"x")
    folder.swap("part-5", b"x", None)
    folder.remove_tree(ours)
    assert list(folder.tree()) == ["deep/part-3.jpg", "deeper/part-4", "photo.jpg"]
    folder.child("deep").remove_tree(re.compile(r"part-3\.jpg"))
    assert folder.folders() == ["deeper"]
    if folder.local is not None:
        assert sorted(path.name for path in folder.local.iterdir()) == ["deeper", "photo.jpg"]


def test_more_objects_than_one_answer_lists(remote: Folder, s3: S3Server) -> None:
    client, bucket = s3.client(), remote.url.split("/")[2]
    names = [f"{number:04d}" for number in range(2 * PAGE + 3)]
    for name in names:
        client.put_object(Bucket=bucket, Key=f"runs/one/{name}", Body=b"")
    assert remote.names() == names
    assert list(remote.tree()) == names
    remote.remove_tree(ANY)
    assert remote.names() == []


def test_an_object_that_changes_while_it_is_read_comes_from_one_version(
    remote: Folder, small_parts: None, s3: S3Server
) -> None:
    old, new = some_bytes(3_000_000, 1), some_bytes(3_000_000, 2)
    remote.write_bytes("x", old)
    s3.faults.latency = 0.2
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(remote.read_bytes, "x")
        while not any(request.startswith("GET") for request in s3.faults.requests):
            pass
        s3.client().put_object(Bucket=remote.url.split("/")[2], Key="runs/one/x", Body=new)
        assert reading.result() in (old, new)


def test_errors_for_people(s3: S3Server, remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="there is no bucket 'none' at http"):
        folder_at("s3://none/x", "test").size("x")
    with pytest.raises(StorageError, match="there is no bucket 'none' at http"):
        folder_at("s3://none/x", "test").names()
    with pytest.raises(StorageError, match="corpus = 's3:///x' names no bucket"):
        folder_at("s3:///x", "corpus")
    with pytest.raises(StorageError, match="gs:// cannot be used here"):
        folder_at("gs://a/x", "corpus")
    s3.faults.rates = {"denied": 1.0}
    with pytest.raises(StorageError, match="runs/one/x cannot be reached: access denied by http") as caught:
        remote.write_bytes("x", b"")
    assert not isinstance(caught.value, OSError)  # no other attempt would help
    with pytest.raises(StorageError, match="access denied"):
        remote.size("x")
    s3.faults.clear()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"profile .nobody. could not be found"):
        remote.names()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(StorageError, match="there are no credentials: set AWS_ACCESS_KEY_ID"):
        remote.names()


def test_an_endpoint_that_never_answered_is_not_waited_for_long(
    remote: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_connection, "_FIRST_CONTACT", 1.0)  # of 60 seconds' patience
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ObjectStoreError, match=r"http://127.0.0.1:9 does not answer: check AWS_ENDPOINT_URL"):
        remote.names()


def test_a_password_in_the_endpoint_is_not_shown(
    remote: Folder, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:9")
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9") as caught:
        remote.names()
    assert "hush" not in str(caught.value)


def test_profiles_and_regions(s3: S3Server, remote: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in s3.env:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {s3.endpoint}\nregion = eu-west-1\n")
    (tmp_path / "keys").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    remote.write_bytes("x", b"by profile")
    assert remote.read_bytes("x") == b"by profile"


def _write_in_child(folder: Folder, name: str) -> None:
    folder.write_bytes(name, folder.read_bytes("parent"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_and_threads(remote: Folder, method: Literal["fork", "spawn"]) -> None:
    remote.write_bytes("parent", b"p")  # the connection is there before the fork
    process = (ForkProcess if method == "fork" else SpawnProcess)(target=_write_in_child, args=(remote, "child"))
    process.start()
    process.join()
    assert process.exitcode == 0
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: remote.write_bytes(f"{number:02d}", b"%d" % number), range(32)))
        assert list(pool.map(lambda number: remote.read_bytes(f"{number:02d}"), range(32))) == [
            b"%d" % number for number in range(32)
        ]
    assert "child" in remote.names()


def test_credentials_travel_with_the_folder(s3: S3Server, remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pickle.dumps(remote)
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")  # so that what arrives is taken back after the test
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    os.environ.pop("AWS_SECRET_ACCESS_KEY")
    os.environ.pop("AWS_ACCESS_KEY_ID")
    arrived = pickle.loads(packed)
    assert arrived == remote
    arrived.write_bytes("x", b"")
    assert SECRET_KEY not in repr(arrived) + str(arrived) + repr(vars(arrived))


def test_credentials_are_in_no_message(
    s3: S3Server, remote: Folder, impatient: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "SlowDown")  # a server that says a secret is not repeated
    s3.faults.rates = {"slow_down": 1.0}
    with caplog.at_level(logging.INFO), pytest.raises(ObjectStoreError) as caught:
        remote.write_bytes("x", b"")
    assert "trying again" in caplog.text
    assert "SlowDown" not in caplog.text + str(caught.value)
    assert SECRET_KEY not in caplog.text + str(caught.value)
