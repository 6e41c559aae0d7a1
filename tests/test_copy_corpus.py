"""Copying corpora between local disk and a real S3 server."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.folders import Folder, LocalFolder, folder_at
from cluster.lease import FILE as LEASE
from cluster.lease import Lease, LeaseError
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError
from data_prep.corpus_jobs import held
from data_prep.index import IndexSettings, index_corpus
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.subset import SubsetSettings, make_parts
from data_prep.verify import verify
from tests.corpora import image_folder, make_corpus
from tests.running import REPOSITORY, environment
from tests.s3_server import S3Server


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("copy")
    return make_corpus(image_folder(root / "source"), root / "corpus")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))


pytestmark = pytest.mark.usefixtures("ray")


def content(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.tree()}


def copy(source: object, destination: object) -> Corpus:
    return copy_corpus(CopySettings(source=str(source), destination=str(destination), workers=2))


def writes(s3: S3Server) -> set[str]:
    """Names of the objects that were written, without the lease."""
    requests = [request.split("?")[0] for request in s3.faults.requests]
    return {request.rpartition("/")[2] for request in requests if request.startswith("PUT")} - {LEASE}


def test_there_and_back_in_spite_of_faults(corpus: Corpus, s3: S3Server, tmp_path: Path) -> None:
    s3.faults.rates = {"slow_down": 0.1, "reset": 0.05, "lost_answer": 0.05, "short": 0.1}
    there = copy(corpus, s3.bucket() + "/there")
    elsewhere = copy(there, s3.bucket() + "/elsewhere")
    back = copy(elsewhere, tmp_path / "back")
    again = copy(back, tmp_path / "again")
    assert s3.faults.injected.total() > 5
    s3.faults.clear()
    for each in (there, elsewhere, back, again):
        assert content(each.folder) == content(corpus.folder)


def test_only_what_is_missing_is_copied(corpus: Corpus, s3: S3Server) -> None:
    there = copy(corpus, s3.bucket() + "/there")
    s3.faults.clear()
    copy(corpus, there)
    assert not writes(s3)
    there.folder.remove("manifest.json")
    there.folder.write_json("copying.json", {"corpus_hash": corpus.corpus_hash})
    there.folder.remove("shard-000001.tar")
    there.folder.write_bytes("index.bin", b"cut")
    s3.faults.clear()
    assert content(copy(corpus, there).folder) == content(corpus.folder)
    assert writes(s3) == {"manifest.json", "copying.json", "shard-000001.tar", "index.bin"}
    there.folder.remove("shard-000002.tar")  # of a finished copy
    assert content(copy(corpus, there).folder) == content(corpus.folder)


def test_a_destination_with_something_else_is_left_alone(corpus: Corpus, tmp_path: Path, s3: S3Server) -> None:
    other = make_corpus(image_folder(tmp_path / "source", images=4), tmp_path / "other")
    before = content(other.folder)
    with pytest.raises(CorpusError, match="holds another corpus"):
        copy(corpus, other)
    assert content(other.folder) == before
    place = folder_at(s3.bucket() + "/photos", "test")
    place.write_bytes("holiday.txt", b"precious")
    with pytest.raises(CorpusError, match=r"was not made by copying \(it has 'holiday\.txt'\)"):
        copy(corpus, place)
    with pytest.raises(ValueError, match="lies inside the source"):
        copy(corpus, corpus.path / "copy")
    with pytest.raises(CorpusError, match="no corpus at s3://"):
        copy(place, tmp_path / "new")
    assert place.tree() == {"holiday.txt": 8}


@pytest.mark.parametrize("origin", ["local", "s3"])
def test_damage_is_not_copied(corpus: Corpus, s3: S3Server, tmp_path: Path, origin: str) -> None:
    source: Folder = LocalFolder(tmp_path / "source") if origin == "local" else folder_at(s3.bucket() + "/x", "test")
    for name, data in content(corpus.folder).items():
        source.write_bytes(name, data)
    damaged = bytearray(source.read_bytes("shard-000001.tar"))
    damaged[700] ^= 1
    source.write_bytes("shard-000001.tar", bytes(damaged))
    for number, destination in enumerate((tmp_path / "copy", s3.bucket() + "/copy")):
        with pytest.raises(CorpusError, match=rf"{source}/shard-000001\.tar is damaged"):
            copy(source, destination)
        assert "shard-000001.tar" not in folder_at(str(destination), "test").names(), number
        with pytest.raises(CorpusError, match=r"manifest\.json is missing"):
            Corpus.open(str(destination))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_one_job_at_a_time_works_in_a_destination(corpus: Corpus, s3: S3Server, tmp_path: Path, place: str) -> None:
    destination = folder_at(str(tmp_path / "a" / "b") if place == "local" else s3.bucket() + "/b", "test")
    source = image_folder(tmp_path / "source", classes=2, images=3)
    jobs = [
        lambda: copy(corpus, destination),
        lambda: shard_corpus(ShardSettings(source=str(source), destination=destination.url)),
        lambda: index_corpus(IndexSettings(source=corpus.url, destination=destination.url, tars="copy")),
        lambda: make_parts(SubsetSettings(corpus=corpus.url, destination=destination.url, holdout=0.1)),
    ]
    with Lease(destination):
        for job in jobs:
            with pytest.raises(LeaseError, match=r"another job works in .* or give another destination"):
                job()
        assert destination.tree().keys() == {LEASE}
    with held(corpus.folder):  # the lease of a source does not travel
        assert content(copy(corpus, destination).folder).keys() == content(corpus.folder).keys() - {LEASE}
    assert LEASE not in destination.tree()
    if destination.local is not None:
        assert not [path for path in destination.local.iterdir() if path.name.startswith(".")]
        with pytest.raises(CorpusError, match="no corpus at"):
            copy(source, tmp_path / "x" / "y")
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_killed_copy_goes_on(corpus: Corpus, s3: S3Server, tmp_path: Path) -> None:
    place, chance = s3.bucket() + "/there", random.Random(0)
    command = [sys.executable, "data_prep/copy_corpus.py", corpus.url, place]
    killed = 0
    s3.faults.latency = 0.15
    for _ in range(4):
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(tmp_path), stderr=subprocess.PIPE, start_new_session=True
        )
        until = len(s3.faults.requests) + chance.randrange(5, 40)
        while process.poll() is None and len(s3.faults.requests) < until:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
    assert killed >= 2
    assert content(copy(corpus, place).folder) == content(corpus.folder)


def test_a_shard_damaged_later_is_copied_again_once_it_is_removed(corpus: Corpus, tmp_path: Path) -> None:
    there = copy(corpus, tmp_path / "there")
    tar = there.path / "shard-000001.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    assert any("shard-000001.tar" in problem for problem in verify(Corpus.open(there.url)))
    tar.unlink()
    again = copy(corpus, tmp_path / "there")
    assert not list(verify(again))
    assert content(again.folder) == content(corpus.folder)
