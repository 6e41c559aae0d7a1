"""`kill -9` of the command and of its workers at random moments: run again, it ends with the same bytes."""

import gzip
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.folders import Folder, folder_at
from data_prep.corpus import Corpus
from data_prep.verify import verify
from tests.corpora import encoded
from tests.test_sources import add, class_tar

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 1200

pytestmark = pytest.mark.slow


def images(root: Path, first: int = 0, count: int = IMAGES) -> Path:
    pictures = [encoded(number, (900, 700), quality=90) for number in range(4)]
    for number in range(first, first + count):
        path = root / f"c{number % 3}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % 4] + number.to_bytes(4, "big"))
    return root


def gzip_tar(root: Path, target: Path) -> Path:
    with tarfile.open(target.with_suffix(".plain"), "w") as outer:
        for folder in sorted(root.iterdir()):
            add(outer, f"{folder.name}.tar", class_tar(folder))
    target.write_bytes(gzip.compress(target.with_suffix(".plain").read_bytes(), 1))
    return target


def parquet(root: Path, target: Path) -> Path:
    rows = [{"image": path.read_bytes(), "label": path.parent.name} for path in sorted(root.rglob("*.jpg"))]
    target.mkdir()
    for number in range(6):
        pq.write_table(pa.Table.from_pylist(rows[number::6]), target / f"{number}.parquet")
    return target


class Runs:
    """Starts the command again and again, with a cache of its own."""

    def __init__(self, cache: Path) -> None:
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.environment |= {"VITFORGE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        self.log = cache.with_suffix(".log")

    def start(self, source: Path, destination: Folder, *words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), str(source), str(destination), *words]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def finish(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait for the end; a machine so busy that Ray itself does not start in time is none of our doing."""
        for _ in range(3):
            if process.wait(400) == 0:
                return
            if "timed out during startup" not in self.log.read_text()[-3000:]:
                break
            with self.log.open("ab") as log:
                process = subprocess.Popen(process.args, env=self.environment, stdout=log, stderr=log)
        raise AssertionError(self.log.read_text()[-3000:])


def kill_something(process: "subprocess.Popen[bytes]", rng: random.Random, at: float) -> str:
    """After `at` seconds of work: the command itself, or one of its workers while it works."""
    deadline = time.monotonic() + at
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    if process.poll() is not None:
        return "nothing"
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline() and child.cmdline()[0].startswith(("ray::write_shard", "ray::_lay_down_file")):
                workers.append(child)
        except psutil.Error:
            continue
    if workers and rng.random() < 0.5:
        rng.choice(workers).kill()
        return "a worker"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return "the command"


def wait_for_work(process: "subprocess.Popen[bytes]", destination: Folder) -> None:
    """Until the run is past its start, which takes seconds in which nothing of ours happens."""
    deadline = time.monotonic() + 120
    before = set(destination.tree())
    while process.poll() is None and time.monotonic() < deadline:
        unfinished = destination.local is not None and list(destination.local.glob(".*writing*"))
        if unfinished or any(".record." in name for name in set(destination.tree()) - before):
            return
        time.sleep(0.02)


def content(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.tree()}


@pytest.mark.parametrize("kind", ["gzip tar", "parquet", "append", "s3"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, kind, s3):
    seed = int(os.environ.get("KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    print(f"KILL_SEED={seed}")
    rng = random.Random(seed)
    root = images(tmp_path / "images", count=IMAGES if kind != "append" else 50)
    runs = Runs(tmp_path / "cache")
    words = ["shard_mb=2.5", "workers=2"]
    source = {"gzip tar": gzip_tar, "parquet": parquet}.get(kind, lambda root, _: root)(root, tmp_path / "source")
    places = [folder_at(s3.bucket() if kind == "s3" else str(tmp_path / name), "test") for name in ("fresh", "killed")]
    if kind == "append":
        for place in places:
            runs.finish(runs.start(source, place, *words))
        images(root, first=1000)
        words.append("append=true")
    runs.finish(runs.start(source, places[0], *words))
    killed: list[str] = []
    for attempt in range(12):
        process = runs.start(source, places[1], *words)
        if attempt % 3:  # at other times in the start, too
            wait_for_work(process, places[1])
        if len([each for each in killed if each != "nothing"]) < 5:
            killed.append(kill_something(process, rng, rng.uniform(0, 1.5 if attempt % 3 else 8)))
        if process.poll() is None:
            process.wait(400)
        if process.returncode == 0:
            break
        time.sleep(1)
    print(kind, killed)
    assert process.returncode == 0, runs.log.read_text()[-3000:]
    assert any(each != "nothing" for each in killed)
    time.sleep(2)  # the workers of a killed command end a moment later
    runs.finish(runs.start(source, places[1], *words))  # and takes away what the last of them left
    assert content(places[1]) == content(places[0])
    assert list(verify(Corpus.open(places[1]))) == []
