"""Corpora on a real S3 server: the same bytes and the same samples as on a local disk, whatever the network does."""

import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.folders import Folder, LocalFolder, folder_at
from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.verify import verify
from pipeline.data_config import DataSettings
from pipeline.loader import TrainLoader
from pipeline.workers import Worker
from tests.corpora import encoded, image_folder, make_corpus
from tests.running import REPOSITORY, environment, script
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

PASSING = {"slow_down": 0.15, "reset": 0.08, "lost_answer": 0.08, "short": 0.15}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("s3") / "source", classes=3, images=12)
    (root / "c1" / "broken.JPEG").write_bytes(encoded(1)[:50])
    return root


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(source, tmp_path_factory.mktemp("s3") / "corpus")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def uploaded(local: Corpus, s3: S3Server) -> Folder:
    """The local corpus, put on S3."""
    folder = folder_at(s3.bucket() + "/corpora/small", "test")
    for name in local.folder.tree():
        folder.put(local.path / name, name)
    return folder


def content(folder: Folder) -> dict[str, bytes]:
    """The bytes of every file but plan.json, which has not the plan where a test has made the corpus."""
    return {name: folder.read_bytes(name) for name in folder.tree() if name != "plan.json"}


def samples(corpus: Corpus) -> list[bytes]:
    return [image.tobytes() for image in corpus.read(np.arange(len(corpus)))]


def flip(folder: Folder, name: str, offset: int) -> None:
    damaged = bytearray(folder.read_bytes(name))
    damaged[offset] ^= 0xFF
    folder.write_bytes(name, bytes(damaged))


def test_the_same_corpus_is_made_on_s3_whatever_the_network_does(
    ray: None, source: Path, local: Corpus, s3: S3Server
) -> None:
    s3.faults.rates, s3.faults.latency = PASSING, 0.002
    place = s3.bucket() + "/corpora/small"
    corpus = shard_corpus(ShardSettings(source=str(source), destination=place, shard_mb=0.01))
    assert s3.faults.injected.total() > 5
    assert corpus.corpus_hash == local.corpus_hash
    assert samples(corpus) == samples(local)
    assert [corpus.origin(sample) for sample in range(len(corpus))] == [local.origin(k) for k in range(len(local))]
    assert not list(verify(corpus))
    s3.faults.clear()
    assert content(corpus.folder) == content(local.folder)

    shard_corpus(ShardSettings(source=str(source), destination=place, shard_mb=0.01))  # it is finished
    written = [request for request in s3.faults.requests if request.startswith(("PUT", "POST", "DELETE"))]
    assert not [request for request in written if not request.endswith("/lease.json")]

    corpus.folder.remove("manifest.json")
    corpus.folder.remove("shard-000001.record.json")
    corpus.folder.write_bytes("shard-000002.tar", b"cut")
    s3.faults.clear()
    again = shard_corpus(ShardSettings(source=str(source), destination=place, shard_mb=0.01))
    assert content(again.folder) == content(local.folder)
    tars = {request.rpartition("/")[2] for request in s3.faults.requests if re.match(r"PUT .*\.tar$", request)}
    assert tars == {"shard-000001.tar", "shard-000002.tar"}


@pytest.mark.slow
def test_a_store_that_stays_broken_is_one_error(source: Path, s3: S3Server, tmp_path: Path) -> None:
    place = s3.bucket() + "/corpora/small"
    s3.faults.rates, s3.faults.only = {"slow_down": 1.0}, r"PUT .*shard-000001\.tar"
    command = ("data_prep/shard.py", str(source), place, "shard_mb=0.01")
    done = script(tmp_path, *command, VITFORGE_S3_PATIENCE="0.5")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{place}/shard-000001.tar" in errors[0]
    assert "SlowDown" in errors[0]
    assert "Traceback" not in done.stderr
    s3.faults.clear()
    done = script(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "shards are finished already" in done.stderr


@pytest.mark.slow
def test_no_credentials_in_what_commands_leave(source: Path, s3: S3Server, tmp_path: Path, cache: Path) -> None:
    place = s3.bucket() + "/corpora/small"
    s3.faults.rates = {"slow_down": 0.3}
    command = ("data_prep/shard.py", str(source), place, "shard_mb=0.01", "workers=2")  # so that Ray is started
    with tempfile.TemporaryDirectory() as ray:  # whose sockets need a short path
        done = script(tmp_path, *command, RAY_TMPDIR=ray)
        logs = {path.name: path.read_bytes() for path in Path(ray).rglob("*") if path.is_file()}
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("runtime_env_agent") for name in logs)
    s3.faults.clear()
    seen = [done.stdout.encode(), done.stderr.encode(), *content(folder_at(place, "test")).values(), *logs.values()]
    seen += [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert not any(secret.encode() in each for each in seen)


def test_reading_goes_on_through_faults(uploaded: Folder, local: Corpus, s3: S3Server) -> None:
    s3.faults.rates, s3.faults.latency = PASSING, 0.01
    corpus = Corpus.open(uploaded.url)
    order = np.random.default_rng(0).permutation(len(corpus))
    assert [image.tobytes() for image in corpus.read(order)] == [image.tobytes() for image in local.read(order)]
    assert corpus.classes == local.classes
    np.testing.assert_array_equal(corpus.index, local.index)


def test_training_sees_the_same_stream_through_faults(uploaded: Folder, local: Corpus, s3: S3Server) -> None:
    s3.faults.rates, s3.faults.latency = PASSING, 0.01
    largest = max(shard["bytes"] for shard in local.manifest["shards"])
    remote = Corpus.open(uploaded.url, cache_bytes=5 * largest)  # of ten shards: they come and go
    streams = []
    for corpus in (local, remote):
        settings = DataSettings(
            corpus=corpus.url, image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, decode_threads=1, shuffle_window=2
        )
        loader = TrainLoader(corpus, settings, 5, Worker(), 12, 12, 2, 11, "cpu")
        streams.append([(batch.ids, batch.images.clone()) for batch in loader])
    for (ids, images), (remote_ids, remote_images) in zip(*streams, strict=True):
        np.testing.assert_array_equal(ids, remote_ids)
        assert torch.equal(images, remote_images)
    fetched = [request for request in s3.faults.requests if request.startswith("GET") and ".tar" in request]
    assert len(fetched) > len(local.shard_sizes)
    assert s3.faults.injected.total() > 5


def test_a_damaged_copy_is_fetched_again_and_a_damaged_shard_is_named(
    uploaded: Folder, local: Corpus, cache: Path
) -> None:
    corpus = Corpus.open(uploaded.url)
    whole = samples(corpus)
    row = corpus.index[3]
    copy = corpus.shards.path(int(row["shard"]))
    with copy.open("r+b") as file:
        file.seek(int(row["offset"]) + 5)
        file.write(b"damage")
    assert samples(corpus) == whole
    assert copy.read_bytes() == (local.path / corpus.manifest["shards"][int(row["shard"])]["name"]).read_bytes()

    name = corpus.manifest["shards"][int(row["shard"])]["name"]
    flip(uploaded, name, int(row["offset"]) + 5)
    problems = list(verify(Corpus.open(uploaded.url)))  # though this node has a good copy
    assert any("its checksum is not the manifest's" in problem for problem in problems)
    assert any("sample 3 (member " in problem and f"{uploaded}/{name}" in problem for problem in problems)
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match=f"{uploaded}/{name} is damaged"):
        samples(Corpus.open(uploaded.url))


def test_an_index_that_arrives_damaged_is_refused(uploaded: Folder, cache: Path) -> None:
    corpus = Corpus.open(uploaded.url)
    with (corpus.path / "index.bin").open("r+b") as file:
        file.write(b"damage")
    assert len(Corpus.open(uploaded.url).index) == len(corpus)  # the copy is put right
    np.testing.assert_array_equal(Corpus.open(uploaded.url).index["shard"][:2], [0, 0])
    flip(uploaded, "index.bin", 5)
    Corpus.open(uploaded.url)  # this node has the right one
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match=r"corpora/small/index\.bin is damaged"):
        Corpus.open(uploaded.url)


def test_opening_what_is_not_whole(uploaded: Folder, s3: S3Server) -> None:
    with pytest.raises(CorpusError, match=r"no corpus at s3://bucket-\d+/none: manifest.json is missing; make one"):
        Corpus.open(uploaded.url.replace("corpora/small", "none"))
    uploaded.remove("shard-000001.tar")
    with pytest.raises(CorpusError, match=r"small/shard-000001\.tar is missing"):
        Corpus.open(uploaded.url)
    uploaded.remove("manifest.json")
    with pytest.raises(CorpusError, match="its sharding has not finished"):
        Corpus.open(uploaded.url)


def test_a_pickled_corpus_opens_on_a_node_without_credentials(uploaded: Folder, local: Corpus, tmp_path: Path) -> None:
    (tmp_path / "corpus.pickle").write_bytes(pickle.dumps(Corpus.open(uploaded.url)))
    program = """
import pickle, sys, pathlib
corpus = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
sys.stdout.buffer.write(b"".join(image.tobytes() for image in corpus.read(range(len(corpus)))))
"""
    kept = {name: value for name, value in environment(tmp_path).items() if "KEY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "corpus.pickle")],
        cwd=REPOSITORY, env={**kept, "VITFORGE_CACHE": str(tmp_path / "other")}, capture_output=True,
    )  # fmt: skip
    assert done.stdout == b"".join(samples(local)), done.stderr


@pytest.mark.slow
def test_tools_on_s3(uploaded: Folder, local: Corpus, s3: S3Server, tmp_path: Path) -> None:
    done = script(tmp_path, "data_prep/verify.py", uploaded.url)
    assert done.returncode == 0, done.stderr
    assert f"{uploaded} is whole" in done.stderr
    done = script(tmp_path, "data_prep/show.py", uploaded.url, f"output={tmp_path}", "images=4")
    assert done.returncode == 0, done.stderr
    assert f"{uploaded}: 36 images" in done.stdout
    assert (tmp_path / "small-images.png").stat().st_size > 1000

    place = uploaded.url.replace("small", "indexed")
    done = script(tmp_path, "data_prep/index.py", str(local.path), place)
    assert "cannot be hard-linked" in done.stderr
    done = script(tmp_path, "data_prep/index.py", str(local.path), place, "tars=copy")
    assert done.returncode == 0, done.stderr
    assert samples(Corpus.open(place)) == samples(local)
    assert LocalFolder(local.path).tree()["shard-000000.tar"] == folder_at(place, "test").size("shard-000000.tar")
