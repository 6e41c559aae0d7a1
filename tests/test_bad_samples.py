"""Samples that go bad after sharding: replaced, counted, the same for all world sizes, never a batch lost."""

import logging

import numpy as np
import pytest
import torch

from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError
from data_prep.mixture import Mixture
from pipeline.loader import EvalLoader, TrainLoader, check_bad
from pipeline.workers import Worker
from tests.corpora import image_folder, make_corpus, overwrite
from tests.test_loader import settings

BATCH, STEPS = 12, 9
HTML = b"<html><body>503 Slow Down</body></html>"


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("clean")
    return make_corpus(image_folder(root / "images", classes=3, images=15), root / "corpus")


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return make_corpus(image_folder(tmp_path / "images", classes=3, images=15), tmp_path / "corpus")


def opened(corpus: Corpus) -> Corpus:
    return Corpus.open(str(corpus.path), check="sizes")


def stream(corpus, ranks=1, start=0, micro=None, batch=BATCH, stop=STEPS, **values):
    """[ids], [images], [classes] of each step over all ranks, and the loaders."""
    ids, images, classes, loaders = [], [], [], []
    per_rank = []
    for rank in range(ranks):
        size = micro or batch // ranks
        worker = Worker(rank, ranks, rank, ranks)
        loader = TrainLoader(corpus, settings(corpus, **values), 5, worker, batch, size, start, stop, "cpu")
        batches = list(loader)
        assert len(batches) == (stop - start) * (batch // ranks // size)
        assert all(len(each.images) == size for each in batches)
        each = batch // ranks // size
        per_rank.append([batches[at : at + each] for at in range(0, len(batches), each)])
        loaders.append(loader)
    for step in range(stop - start):
        parts = [part for rank in per_rank for part in rank[step]]
        ids.append(np.concatenate([part.ids for part in parts]))
        images.append(torch.cat([part.images for part in parts]))
        classes.append(np.concatenate([part.classes for part in parts]))
    return ids, images, classes, loaders


def same(one, other, first=0):
    for place in range(len(other[0])):
        np.testing.assert_array_equal(one[0][first + place], other[0][place])
        assert torch.equal(one[1][first + place], other[1][place])
        np.testing.assert_array_equal(one[2][first + place], other[2][place])


def spoil(corpus: Corpus, kind: str) -> set[int]:
    """Damages a corpus; which samples cannot be shown then."""
    if kind == "flipped":
        for sample in (7, 30):
            image = bytearray(corpus.read([sample])[0].tobytes())
            image[len(image) // 2] ^= 1
            overwrite(corpus, sample, bytes(image))
        return {7, 30}
    if kind == "undecodable":
        beginning = corpus.read([40])[0].tobytes()[:200]
        overwrite(corpus, 3, HTML, own_checksum=True)
        overwrite(corpus, 4, bytes(10**6), own_checksum=True)
        overwrite(corpus, 40, beginning + bytes(10**6), own_checksum=True)
        return {3, 4, 40}
    shard = 1
    (corpus.path / corpus.manifest["shards"][shard]["name"]).unlink()
    return set(np.flatnonzero(corpus.index["shard"] == shard).tolist())


@pytest.mark.parametrize("kind", ["flipped", "undecodable", "gone"])
def test_bad_samples_are_replaced_alike_for_every_world_size_and_after_a_restart(clean, corpus, kind, caplog):
    logging.getLogger("vitforge").propagate = True
    whole = stream(clean)
    reader = opened(corpus)
    bad = spoil(corpus, kind)
    assert bad
    assert len(bad) < 45 / 2
    reader = reader if kind == "gone" else opened(corpus)
    one = stream(reader)
    due = 0
    for step in range(STEPS):
        was_bad = np.isin(whole[0][step], list(bad))
        due += int(was_bad.sum())
        np.testing.assert_array_equal(one[0][step][~was_bad], whole[0][step][~was_bad])
        assert torch.equal(one[1][step][torch.tensor(~was_bad)], whole[1][step][torch.tensor(~was_bad)])
        assert not np.isin(one[0][step], list(bad)).any()
        np.testing.assert_array_equal(one[2][step], clean.index["label"][one[0][step]])  # with their own labels
    assert due > len(bad)
    (loader,) = one[3]
    assert loader.bad.count == due
    assert 0 < len(loader.bad.described) <= len(bad)
    assert all(str(corpus.path) in text and ".JPEG" in text for text in loader.bad.described)
    for ranks, micro in ((2, None), (4, 1)):
        other = stream(reader, ranks, micro=micro)
        same(one, other)
        assert sum(each.bad.count for each in other[3]) == due
    same(one, stream(reader, ranks=2, start=4), first=4)


def test_the_substitute_of_a_bad_sample_may_be_bad_too(clean, corpus):
    mixture = Mixture.of(clean)
    chain = [7]
    while len(chain) < 4:
        follower = next(c for c in (mixture.substitute(chain[0], 5, k) for k in range(40)) if c not in chain)
        chain.append(follower)
    for sample in chain:
        overwrite(corpus, sample, HTML)
    ids = np.concatenate(stream(opened(corpus), stop=4)[0])
    assert not np.isin(ids, chain).any()
    assert len(ids) == 48


def test_a_corpus_of_which_nothing_can_be_read_is_one_error(corpus):
    reader = opened(corpus)
    for tar in corpus.path.glob("*.tar"):
        tar.unlink()
    with pytest.raises(CorpusError, match=r"sample \d+ of .* cannot be read, and neither can any of"):
        stream(reader)


def test_substitutes_of_a_mixture_stay_in_their_part(tmp_path, corpus):
    other = make_corpus(image_folder(tmp_path / "more", classes=2, images=10), tmp_path / "other")
    overwrite(other, 5, HTML)
    mixture = Mixture([corpus, opened(other)], [1, 1])
    loader = TrainLoader(mixture, settings(corpus), 5, Worker(), BATCH, BATCH, 0, 6, "cpu")
    batches = list(loader)
    assert loader.bad.count > 0
    for batch, position in zip(batches, range(0, 72, 12), strict=True):
        assert np.array_equal(
            mixture.part_of(batch.ids), mixture.schedule.locate(np.arange(position, position + 12))[0]
        )
        assert 50 not in batch.ids
    assert str(other.path) in loader.bad.described[0]


@pytest.mark.parametrize("kind", ["flipped", "undecodable", "gone"])
@pytest.mark.parametrize(("ranks", "batch"), [(1, 7), (2, 8), (7, 3)])
def test_evaluation_leaves_bad_samples_out(corpus, kind, ranks, batch):
    reader = opened(corpus)
    bad = spoil(corpus, kind)
    reader = reader if kind == "gone" else opened(corpus)
    seen, numbers, count = [], set(), 0
    for rank in range(ranks):
        loader = EvalLoader(reader, settings(corpus), Worker(rank, ranks, rank, ranks), batch, "cpu")
        mine = list(loader)
        numbers.add(len(mine))
        seen += [each.ids[: each.real] for each in mine]
        assert all(len(each.images) == batch and not np.isin(each.ids, list(bad)).any() for each in mine)
        count += loader.bad.count
    assert len(numbers) == 1
    assert sorted(np.concatenate(seen).tolist()) == sorted(set(range(45)) - bad)
    assert count == len(bad)


def test_too_many_bad_samples_stop_a_run_by_name(corpus):
    for sample in range(12):
        overwrite(corpus, sample, HTML)
    loader = TrainLoader(opened(corpus), settings(corpus), 5, Worker(), 9, 9, 0, 5, "cpu")
    assert len(list(loader)) == 5
    assert check_bad(loader, 45_000, 0.001) == 12
    assert check_bad(loader, 45, 0.5) == 12
    with pytest.raises(CorpusError, match=r"12 of 45 samples .* max_bad_share = 0.001 allows(.|\n)*sample \d+ of"):
        check_bad(loader, 45, 0.001)
    some = TrainLoader(opened(corpus), settings(corpus), 5, Worker(), 9, 9, 0, 3, "cpu")
    list(some)
    assert check_bad(some, 27, 0.0) == some.bad.count < 11  # a few are always allowed
