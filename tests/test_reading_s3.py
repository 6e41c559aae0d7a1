"""Training and evaluation from an object store: the same samples as from a disk, every shard fetched once an epoch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.folders import Folder, folder_at
from cluster.storage import StorageError
from data_prep.corpus import Corpus
from data_prep.mixture import Mixture
from pipeline.corpora import describe_order, shuffle_windows
from pipeline.data_config import DataSettings
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.workers import Worker
from tests.corpora import image_folder, make_corpus
from tests.s3_server import S3Server

BATCH, WINDOW = 6, 3


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("reading-s3")
    return make_corpus(image_folder(root / "source", classes=3, images=60), root / "corpus", shard_mb=0.044)


@pytest.fixture
def there(local: Corpus, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """The corpus on S3; this node's cache is empty."""
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    folder = folder_at(s3.bucket() + "/corpora/small", "test")
    for name in local.folder.tree():
        if Path(name).suffix in (".tar", ".json", ".jsonl", ".bin", ".origins") and ".record." not in name:
            folder.put(local.path / name, name)
    s3.faults.requests.clear()
    return folder


def data(corpus: Corpus, windows: float = 2, **values) -> DataSettings:
    """Settings whose cache holds that many windows of WINDOW shards."""
    largest = max(shard["bytes"] for shard in corpus.manifest["shards"])
    return DataSettings(
        corpus=corpus.url,
        image_size=16,
        cache_gb=windows * WINDOW * largest / 1e9,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        decode_threads=1,
        **values,
    )


def on_s3(there: Folder, settings: DataSettings) -> Corpus:
    return Corpus.open(there, cache_bytes=round(settings.cache_gb * 1e9))


def stream(corpora, settings, steps, start=0, batch=BATCH):
    """ids and images of each step, over ranks that go in step, each with a corpus of its own."""
    ranks = len(corpora)
    loaders = [
        TrainLoader(
            corpus, settings, 5, Worker(rank, ranks, rank, ranks), batch, batch // ranks, start, start + steps, "cpu"
        )
        for rank, corpus in enumerate(corpora)
    ]
    found = []
    for batches in zip(*loaders, strict=True):
        found.append((np.concatenate([b.ids for b in batches]), torch.cat([b.images for b in batches])))
    return found, loaders


def same(one, other):
    assert len(one) == len(other)
    for (ids, images), (other_ids, other_images) in zip(one, other, strict=True):
        np.testing.assert_array_equal(ids, other_ids)
        assert torch.equal(images, other_images)


def fetched(s3: S3Server) -> Counter[str]:
    return Counter(request.split()[1].rpartition("/")[2] for request in s3.faults.requests if _is_shard(request))


def _is_shard(request: str) -> bool:
    return request.startswith("GET") and request.split()[1].endswith(".tar")


def test_windows_are_chosen_by_the_cache_and_every_shard_is_fetched_once_an_epoch(local, there, s3):
    settings = data(local)
    readers = [on_s3(there, settings) for _ in range(2)]
    assert shuffle_windows(Mixture.of(readers[0]), settings) == [WINDOW]
    assert shuffle_windows(Mixture.of(local), settings) == [0]
    epochs, shards = 2, len(local.shard_sizes)
    assert shards == 4 * WINDOW
    # Small batches: at any real size a window has many more of them than the ranks are apart.
    steps = epochs * local.num_samples // 2
    found, _ = stream(readers, settings, steps, batch=2)
    expected, _ = stream([local], data(local, shuffle_window=WINDOW), steps, batch=2)
    same(found, expected)
    counts = fetched(s3)
    assert len(counts) == shards
    # what the second epoch begins with may still be there from the first
    assert max(counts.values()) <= epochs
    assert sum(counts.values()) > 1.5 * shards


def test_a_run_that_goes_on_reads_from_its_window_on(local, there, s3):
    settings = data(local)
    late, _ = stream([on_s3(there, settings)], settings, 2, start=3)
    expected, _ = stream([local], data(local, shuffle_window=WINDOW), 2, start=3)
    same(late, expected)
    assert len(fetched(s3)) < len(local.shard_sizes)


def test_faults_of_the_network_change_nothing(local, there, s3):
    s3.faults.rates = {"slow_down": 0.15, "reset": 0.08, "lost_answer": 0.08, "short": 0.15}
    settings = data(local)
    found, loaders = stream([on_s3(there, settings)], settings, 5)
    assert s3.faults.injected.total() > 5
    expected, _ = stream([local], data(local, shuffle_window=WINDOW), 5)
    same(found, expected)
    assert loaders[0].bad.count == 0


def test_a_shard_that_is_gone_from_the_store_is_replaced_by_few_others(local, there, s3):
    settings = data(local)
    reader = on_s3(there, settings)
    lost = local.manifest["shards"][4]["name"]
    there.remove(lost)
    s3.faults.requests.clear()
    found, loaders = stream([reader], settings, local.num_samples // BATCH)
    gone = np.flatnonzero(local.index["shard"] == 4)
    ids = np.concatenate([ids for ids, _ in found])
    assert loaders[0].bad.count == len(gone)
    assert lost in loaders[0].bad.described[0]
    expected, _ = stream([local], data(local, shuffle_window=WINDOW), local.num_samples // BATCH)
    due = np.concatenate([ids for ids, _ in expected])
    replaced = np.isin(due, gone)
    np.testing.assert_array_equal(ids[~replaced], due[~replaced])
    assert len(set(local.index["shard"][ids[replaced]])) == 1  # one other shard
    assert fetched(s3)[lost] <= 3


def test_a_cache_below_a_window_is_refused_with_a_size_that_does(local, there):
    settings = data(local, windows=0.7, shuffle_window=WINDOW)
    with pytest.raises(StorageError, match=r"two shuffle windows of 3 shards needs .* cache_gb=0.01"):
        TrainLoader(on_s3(there, settings), settings, 0, Worker(), BATCH, BATCH, 0, 1, "cpu")
    free = data(local, windows=2, shuffle_window=0)
    with pytest.raises(StorageError, match=r"to shuffle all images at once needs"):
        TrainLoader(on_s3(there, free), free, 0, Worker(), BATCH, BATCH, 0, 1, "cpu")


def test_evaluation_reads_every_shard_once_and_makes_room_again(local, there, s3, tmp_path):
    settings = data(local)
    reader = on_s3(there, settings)
    seen = [batch.ids[: batch.real] for batch in EvalLoader(reader, settings, Worker(), 16, "cpu")]
    assert np.concatenate(seen).tolist() == list(range(local.num_samples))
    assert set(fetched(s3).values()) == {1}
    assert [path.stat().st_size for path in (tmp_path / "cache" / "shards").glob("plan-*")] == [0]


def test_how_well_windows_mix_is_measured(local):
    mixture = Mixture.of(local)
    settings = data(local, shuffle_window=WINDOW)
    loader = TrainLoader(local, settings, 0, Worker(), BATCH, BATCH, 0, 1, "cpu")
    text = describe_order(mixture, loader.order, loader.windows, BATCH)
    assert text is not None
    assert f"in windows of 3 of its {len(local.shard_sizes)} shards" in text
    assert "of the pairs in a batch are of one shard" in text
    freely = TrainLoader(local, data(local), 0, Worker(), BATCH, BATCH, 0, 1, "cpu")
    assert describe_order(mixture, freely.order, freely.windows, BATCH) is None
