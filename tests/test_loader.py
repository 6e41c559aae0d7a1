"""Loaders on a real corpus and real DALI: the order, the slices, the pixels, every sample once."""

import re
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.corpus import Corpus
from data_prep.mixture import Mixture
from pipeline.data_config import AugmentSettings, DataSettings
from pipeline.decoding import preprocessing_of
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.workers import Worker
from tests.corpora import image_folder, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("loader")
    return make_corpus(image_folder(root / "images", classes=3, images=15), root / "corpus")


def settings(corpus, eval_resize=None, **augment) -> DataSettings:
    return DataSettings(
        corpus=str(corpus.path),
        image_size=16,
        augment=AugmentSettings(**augment),
        eval_resize=eval_resize,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        decode_threads=1,
    )


def steps(corpus, ranks, start=0, stop=9, micro=None, **values):
    """Per step: ids and images of all ranks, in order."""
    batch = 12
    size = micro or batch // ranks
    per_rank = []
    for rank in range(ranks):
        worker = Worker(rank, ranks, rank, ranks)
        loader = TrainLoader(corpus, settings(corpus, **values), 5, worker, batch, size, start, stop, "cpu")
        batches = list(loader)
        each = batch // ranks // size
        grouped = [batches[at : at + each] for at in range(0, len(batches), each)]
        per_rank.append(grouped)
    ids = [np.concatenate([b.ids for rank in per_rank for b in rank[step]]) for step in range(stop - start)]
    images = [torch.cat([b.images for rank in per_rank for b in rank[step]]) for step in range(stop - start)]
    return ids, images


def test_every_world_size_and_micro_batch_sees_the_same_samples_and_pixels(corpus):
    ids, images = steps(corpus, ranks=1, randaugment_layers=2)
    for ranks, micro in ((2, None), (4, 1)):
        other_ids, other_images = steps(corpus, ranks, micro=micro, randaugment_layers=2)
        for step in range(len(ids)):
            np.testing.assert_array_equal(ids[step], other_ids[step])
            assert torch.equal(images[step], other_images[step])


def test_an_epoch_holds_every_sample_once_and_the_next_is_in_another_order(corpus):
    ids = np.concatenate(steps(corpus, ranks=2, stop=8)[0])  # 96 = 2 epochs of 45 and 6 more
    first, second = ids[:45], ids[45:90]
    assert sorted(first) == sorted(second) == list(range(45))
    assert (first != second).any()


def test_starting_in_the_middle_equals_never_having_stopped(corpus):
    ids, images = steps(corpus, ranks=2)
    late_ids, late_images = steps(corpus, ranks=2, start=4)
    for step in range(4, 9):
        np.testing.assert_array_equal(ids[step], late_ids[step - 4])
        assert torch.equal(images[step], late_images[step - 4])


def test_labels_follow_their_images(corpus):
    loader = TrainLoader(corpus, settings(corpus), 0, Worker(), 9, 9, 0, 2, "cpu")
    for batch in loader:
        assert batch.rows.tolist() == list(range(9))
        np.testing.assert_array_equal(batch.classes, corpus.index["label"][batch.ids])
        assert batch.images.shape == (9, 3, 16, 16)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 7), (2, 8), (4, 16), (7, 3)])
def test_evaluation_counts_every_sample_once_for_any_number_of_ranks(corpus, ranks, batch):
    seen, batches = [], set()
    for rank in range(ranks):
        loader = EvalLoader(corpus, settings(corpus), Worker(rank, ranks, rank, ranks), batch, "cpu")
        mine = list(loader)
        batches.add(len(mine))
        seen += [b.ids[: b.real] for b in mine]
        assert all(len(b.images) == batch for b in mine)
    assert len(batches) == 1  # collectives need as many on each rank
    assert sorted(np.concatenate(seen).tolist()) == list(range(45))


@pytest.mark.parametrize("resize", [None, 20])
def test_evaluation_prepares_images_as_a_consumer_does(corpus, resize):
    loader = EvalLoader(corpus, settings(corpus, eval_resize=resize), Worker(), 45, "cpu")
    (batch,) = list(loader)
    prepared = preprocessing_of(settings(corpus, eval_resize=resize))
    expected = prepared([data.tobytes() for data in corpus.read(batch.ids)])
    difference = (batch.images - expected).abs() * 127.5
    assert difference.max() <= 2.0  # of 255: rounding between two passes of the filter
    assert difference.mean() < 0.5


def test_a_shard_altered_after_it_was_opened_is_named(tmp_path):
    corpus = make_corpus(image_folder(tmp_path / "images"), tmp_path / "corpus")
    tar = sorted(corpus.path.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[700:720] = bytes(20)
    tar.write_bytes(bytes(content))
    loader = TrainLoader(corpus, settings(corpus), 0, Worker(), 10, 10, 0, 3, "cpu")
    assert len(list(loader)) == 3
    assert re.search(rf"sample \d+ of {corpus.path} .*{tar.name} is damaged", loader.bad.described[0])


@dataclass
class Shape:
    """What the order needs to know of a corpus."""

    shard_sizes: list[int]
    name: str = "shape"
    label_kind: str = "single"
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    shards: None = None

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=3),
    st.sampled_from([1, 2, 6, 12, 16, 30]),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
    st.integers(0, 20),
)
@hypothesis.settings(max_examples=6, deadline=None)
def test_the_stream_is_one_for_all_world_sizes_and_from_every_step_on(shapes, batch, window, seed, start):
    mixture = Mixture([Shape(sizes) for sizes in shapes], range(1, len(shapes) + 1))  # type: ignore[misc]
    data = DataSettings(corpus="x", shuffle_window=window)
    steps = min(20, -(-2 * mixture.num_samples // batch))

    def sequence(ranks, micro, first):
        step_ids = []
        for step in range(first, steps):
            for rank in range(ranks):
                worker = Worker(rank, ranks, rank, ranks)
                loader = TrainLoader(mixture, data, seed, worker, batch, micro, step, step + 1, "cpu")
                step_ids += [loader.order.ids(loader.positions(place)) for place in range(loader.count)]
        return np.concatenate(step_ids, axis=1) if step_ids else np.empty((2, 0), np.int64)

    whole = sequence(1, batch, 0)
    for part, shape in enumerate(shapes):
        epochs, ids = whole[:, mixture.part_of(whole[1]) == part]
        for epoch in range(int(epochs.max(initial=-1)) + 1):
            own = ids[epochs == epoch] - mixture.first_ids[part]
            assert len(set(own)) == len(own)
            assert epoch == epochs.max() or len(own) == sum(shape)
    for ranks in {number for number in (2, 3, 4, 8) if batch % number == 0}:
        share = batch // ranks
        np.testing.assert_array_equal(sequence(ranks, share if ranks == 2 else 1, start), whole[:, start * batch :])


@given(st.lists(st.integers(0, 20), max_size=5, unique=True), st.integers(0, 8))
@hypothesis.settings(max_examples=20, deadline=None)
def test_windows_that_are_left_out_are_used_by_no_step(corpus, skipped, start):
    expected = [window for window in range(40) if window not in skipped][start : start + 9]
    for ranks in (1, 3):
        for rank in range(ranks):
            worker = Worker(rank, ranks, rank, ranks)
            size = 12 // ranks
            loader = TrainLoader(
                corpus, settings(corpus), 0, worker, 12, size, start, start + 9, "cpu", skipped=skipped
            )
            for step, window in enumerate(expected):
                first = 12 * window + rank * size
                assert loader.positions(step).tolist() == list(range(first, first + size))


@pytest.fixture(scope="module")
def two_parts(corpus, tmp_path_factory) -> Mixture:
    root = tmp_path_factory.mktemp("second")
    return Mixture([corpus, make_corpus(image_folder(root / "images", classes=3, images=15), root / "corpus")])


def pairs_of(mixture, ranks=1, micro=None, batch=24, steps=40, start=0, rules=2, **values):
    """[pairs, 2] the samples that are mixed with each other, step by step."""
    corpus, step_ids = mixture.parts[0], []
    data = settings(corpus, **values).model_copy(update={"rules": rules})
    loaders = [
        TrainLoader(
            mixture, data, 5, Worker(rank, ranks, rank, ranks), batch, micro or batch // ranks, start, steps, "cpu"
        )
        for rank in range(ranks)
    ]
    each = loaders[0].count // (steps - start)
    for step in range(steps - start):
        for loader in loaders:
            step_ids += [loader.order.ids(loader.positions(step * each + turn))[1] for turn in range(each)]
    return np.concatenate(step_ids).reshape(-1, 2)


def test_partners_of_a_mixture_are_of_one_part_as_often_as_chance_has_it(two_parts):
    pairs = pairs_of(two_parts, mixup=0.2)
    same = (two_parts.part_of(pairs[:, 0]) == two_parts.part_of(pairs[:, 1])).mean()
    assert 0.4 < same < 0.56  # 11 of the 23 others of a step: 0.478
    for ranks, micro in ((2, None), (3, 2), (4, None), (12, None)):
        np.testing.assert_array_equal(pairs_of(two_parts, ranks, micro, mixup=0.2), pairs)
    np.testing.assert_array_equal(pairs_of(two_parts, 2, 4, start=17, mixup=0.2), pairs[17 * 12 :])
    # The same images in every step, and every image once an epoch, as without mixing.
    plain = pairs_of(two_parts)
    assert (np.sort(plain.reshape(-1, 24), 1) == np.sort(pairs.reshape(-1, 24), 1)).all()
    assert (two_parts.part_of(plain[:, 0]) != two_parts.part_of(plain[:, 1])).all()


def test_partners_are_as_before_where_nothing_is_mixed_from_several_parts(two_parts, corpus):
    plain = pairs_of(two_parts)
    np.testing.assert_array_equal(pairs_of(two_parts, rules=1, cutmix=1.0), plain)
    single = Mixture.of(corpus)
    np.testing.assert_array_equal(pairs_of(single, mixup=0.2), pairs_of(single, rules=1, mixup=0.2))


def test_images_of_permuted_slots_are_the_same_on_every_number_of_ranks(two_parts):
    def images(ranks):
        data = settings(two_parts.parts[0], cutmix=1.0)
        loaders = [
            TrainLoader(two_parts, data, 5, Worker(r, ranks, r, ranks), 12, 12 // ranks, 0, 2, "cpu")
            for r in range(ranks)
        ]
        return torch.cat([batch.images for step in zip(*loaders, strict=True) for batch in step])

    assert torch.equal(images(1), images(2))


def test_leaving_a_loader_early_ends_its_thread(corpus):
    import threading

    loader = iter(TrainLoader(corpus, settings(corpus), 0, Worker(), 9, 9, 0, 1000, "cpu"))
    next(loader)
    assert any(thread.name == "vitforge-loader" for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name == "vitforge-loader" for thread in threading.enumerate())
