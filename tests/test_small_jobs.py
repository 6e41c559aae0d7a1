"""Jobs that are less work than the start of Ray are done without it, with the same bytes, errors and ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.command import Progress
from cluster.folders import LocalFolder
from cluster.storage import StorageError
from data_prep import tasks
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.listing import SourceError
from data_prep.tasks import Work, run_tasks, takes_ray
from tests.corpora import image_folder
from tests.running import REPOSITORY, environment
from tests.test_sharding import shard


def command(home: Path, *words: object) -> str:
    """What a command says that ends well."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPOSITORY, env=environment(home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_small_corpus_is_sharded_indexed_and_copied_without_ray_and_has_the_same_bytes(ray, tmp_path):
    source = image_folder(tmp_path / "images", classes=3, images=8)
    (source / "c1" / "damaged.jpg").write_bytes(b"no image")
    there = command(tmp_path, "data_prep/shard.py", source, tmp_path / "corpus", "shard_mb=0.01", "dedup=true")
    assert "Ray" not in there
    assert "1 image is left out" in there
    on_ray = shard(source, tmp_path / "on-ray", dedup=True, workers=1)
    left = {"manifest.json"}  # it has the command
    here = bytes_of(tmp_path / "corpus")
    assert {k: v for k, v in here.items() if k not in left} == {
        k: v for k, v in bytes_of(on_ray.path).items() if k not in left
    }
    assert "Ray" not in command(tmp_path, "data_prep/copy_corpus.py", tmp_path / "corpus", tmp_path / "copy")
    copy_corpus(CopySettings(source=str(tmp_path / "corpus"), destination=str(tmp_path / "copy-on-ray")))
    assert bytes_of(tmp_path / "copy") == bytes_of(tmp_path / "copy-on-ray") == here
    assert "Ray" not in command(tmp_path, "data_prep/index.py", tmp_path / "corpus", tmp_path / "indexed")
    assert "is whole" in command(tmp_path, "data_prep/verify.py", tmp_path / "indexed")


def test_what_is_for_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not takes_ray(Work(500, 60e6))
    assert takes_ray(Work(1_281_167, 146e9))
    assert takes_ray(Work(500, 60e6), workers=2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert takes_ray(Work(500, 60e6))


def misbehave(task: str) -> dict[str, Any]:
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "source":
        raise SourceError("image 7 is gone")
    if task == "bug":
        raise KeyError("a bug")
    print("what a library prints")
    return {"sizes": {}, "pid": os.getpid()}


def run(folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    made = {name: (lambda name=name: name) for name in names}
    progress = Progress(len(names), "images", "sharding")
    return run_tasks(misbehave, made, LocalFolder(folder), 0, progress, lambda name: 1, work=Work())


def test_errors_of_its_processes_are_those_of_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "takes_ray", lambda work, workers: False)
    records = run(tmp_path, "a", "b", "c", "d")
    assert sorted(records) == ["a", "b", "c", "d"]
    assert os.getpid() not in {record["pid"] for record in records.values()}
    with pytest.raises(StorageError, match=r"dies in .* cannot be made: its process ended 5 times \(SIGKILL\)"):
        run(tmp_path, "a", "dies")
    with pytest.raises(SourceError, match="image 7 is gone"):
        run(tmp_path, "source", "a")
    with pytest.raises(KeyError) as raised:
        run(tmp_path, "bug")
    assert "in misbehave" in raised.value.__notes__[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_it_with_its_processes_and_it_goes_on_when_started_again(tmp_path, number):
    source = image_folder(tmp_path / "images", classes=4, images=250)
    words = [sys.executable, "data_prep/shard.py", str(source), str(tmp_path / "corpus"), "shard_mb=0.02"]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=environment(tmp_path), stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "corpus").glob("*.record.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "corpus").glob("*.record.json")}
    assert f"{len(finished)} of " in command(tmp_path, *words[1:])
    assert {name: (tmp_path / "corpus" / name).stat().st_ino for name in finished} == finished
