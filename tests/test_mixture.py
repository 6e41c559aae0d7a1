"""Mixing corpora: the schedule, the order, the classes, through the public interfaces."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import Corpus, CorpusError
from data_prep.mixture import MixedOrder, Mixture, Schedule
from data_prep.order import SampleOrder
from tests.corpora import encoded, image_folder, make_corpus

WEIGHTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32 - 1)


def counts_of(parts, number):
    """[n + 1, K] how many of the first 0, 1, ... n positions are of each part."""
    return np.concatenate([np.zeros((1, number), int), np.cumsum(parts[:, None] == np.arange(number), axis=0)])


@given(WEIGHTS, st.integers(1, 800))
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_each_part_in_its_share(weights, length):
    schedule = Schedule(weights)
    parts, turns = schedule.locate(np.arange(length))
    counts = counts_of(parts, len(weights))
    shares = np.array(weights) / sum(weights)
    distance = np.abs(counts - np.arange(length + 1)[:, None] * shares)
    assert distance.max() < schedule.bound + 1e-6
    assert schedule.bound == {1: 1, 2: 1, 3: 2, 4: 2}.get(len(weights), schedule.bound)
    assert schedule.bound <= 4
    # the turns of each part are 0, 1, 2, ...
    for part in range(len(weights)):
        assert np.array_equal(turns[parts == part], np.arange(counts[-1, part]))
    assert schedule.counts(length) == counts[-1].tolist()


@given(WEIGHTS, st.integers(0, 2**55))
@settings(max_examples=60, deadline=None)
def test_far_positions_follow_from_the_weights_alone(weights, start):
    schedule = Schedule(weights)
    somewhere = start + np.random.default_rng(0).permutation(50)
    parts, turns = schedule.locate(somewhere)
    for position, part, turn in zip(somewhere.tolist(), parts.tolist(), turns.tolist(), strict=True):
        before, after = schedule.counts(position), schedule.counts(position + 1)
        assert before[part] == turn
        assert [b - a for a, b in zip(before, after, strict=True)] == [int(k == part) for k in range(len(weights))]
        exact = [Fraction(position * weight, sum(weights)) for weight in weights]
        assert max(abs(count - share) for count, share in zip(before, exact, strict=True)) < schedule.bound


def test_weights_are_taken_as_written_and_bad_ones_refused():
    assert Schedule([Fraction("0.7"), Fraction("0.3")]).weights == [7, 3]
    assert Schedule([Fraction("1"), Fraction("0.001")]).weights == [1000, 1]
    for weights in ([], [1, 0], [1, -2]):
        with pytest.raises(ValueError, match="above 0"):
            Schedule(weights)
    with pytest.raises(ValueError, match="fewer digits"):
        Schedule([Fraction("0.123456789123"), Fraction("1")])


def test_the_schedule_is_stable_over_releases():
    parts, _ = Schedule([5, 2, 3]).locate(np.arange(20))
    assert "".join(map(str, parts)) == "20201020102020102010"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Corpus]:
    """Three corpora whose classes overlap: c0 c1 c2 / c1 c9 / c2 c0."""
    root = tmp_path_factory.mktemp("mixture")
    image_folder(root / "a" / "images", classes=3, images=10)
    for part, names, images in (("b", ("c1", "c9"), 7), ("c", ("c0", "c2"), 4)):
        for number, name in enumerate(names):
            folder = root / part / "images" / name
            folder.mkdir(parents=True)
            for place in range(images):
                (folder / f"{place}.jpg").write_bytes(
                    encoded(10_000 * ord(part) + 100 * number + place, (33, 21 + place))
                )
    return [make_corpus(root / part / "images", root / part / f"corpus-{part}", 0.004) for part in "abc"]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3), SEEDS, st.lists(st.integers(0, 3), min_size=3, max_size=3))
@settings(max_examples=4, deadline=None)
def test_each_part_is_gone_through_in_its_own_order_without_gap_or_repetition(corpora, weights, seed, windows):
    mixture = Mixture(corpora[: len(weights)], weights)
    order = MixedOrder(mixture, seed, windows[: len(weights)])
    epochs, ids = order.ids(np.arange(130))
    parts = mixture.part_of(ids)
    for part, corpus in enumerate(mixture.parts):
        own, own_epochs = ids[parts == part] - mixture.first_ids[part], epochs[parts == part]
        whole = len(own) // corpus.num_samples
        for epoch in range(whole):
            passed = slice(epoch * corpus.num_samples, (epoch + 1) * corpus.num_samples)
            assert sorted(own[passed]) == list(range(corpus.num_samples))
            assert set(own_epochs[passed]) == {epoch}
        assert len(set(own[whole * corpus.num_samples :])) == len(own) % corpus.num_samples
    somewhere = np.random.default_rng(seed).permutation(130)
    again = MixedOrder(mixture, seed, windows[: len(weights)]).ids(somewhere)
    assert np.array_equal(again[0], epochs[somewhere])
    assert np.array_equal(again[1], ids[somewhere])


@pytest.mark.parametrize("window", [0, 2])
def test_a_mixture_of_one_is_the_corpus(corpora, window):
    corpus = corpora[0]
    mixture = Mixture.of(corpus)
    plain = SampleOrder(corpus.num_samples, 3, corpus.shard_sizes, window)
    mixed = MixedOrder(mixture, 3, [window])
    assert np.array_equal(np.stack(mixed.ids(np.arange(100))), np.stack(plain.ids(np.arange(100))))
    assert mixture.corpus_hash == corpus.corpus_hash
    assert (mixture.classes, mixture.names, mixture.class_counts) == (
        corpus.classes,
        corpus.names,
        corpus.class_counts,
    )
    assert str(mixture) == str(corpus.path)
    assert mixture.num_samples == corpus.num_samples
    ids = np.array([5, 0, 7])
    assert np.array_equal(np.stack(mixture.labels_of(ids)), np.stack(corpus.labels_of(ids)))
    assert [image.tobytes() for image in mixture.read(ids)] == [image.tobytes() for image in corpus.read(ids)]


def test_two_equal_parts_are_in_unrelated_orders(corpora):
    order = MixedOrder(Mixture([corpora[0], corpora[0]]), 0, [0, 0])
    _, ids = order.ids(np.arange(60))
    first, second = ids[ids < 30], ids[ids >= 30] - 30
    assert (first == second).mean() < 0.3


def test_classes_are_merged_by_name_in_the_order_in_which_they_come(corpora):
    mixture = Mixture(corpora, [3, 2, 1])
    assert mixture.classes == ["c0", "c1", "c2", "c9"]
    assert mixture.class_counts == [14, 17, 14, 7]
    ids = np.arange(mixture.num_samples)[::-1].copy()
    rows, classes, weights = mixture.labels_of(ids)
    assert np.array_equal(rows, np.arange(len(ids)))
    assert np.array_equal(weights, np.ones(len(ids)))
    for sample, number in zip(ids.tolist(), classes.tolist(), strict=True):
        part = int(mixture.part_of([sample])[0])
        corpus = corpora[part]
        own = sample - int(mixture.first_ids[part])
        assert mixture.classes[number] == corpus.classes[int(corpus.index["label"][own])]
        assert corpus.origin(own) in mixture.describe(sample)
    images = mixture.read(ids)
    widths, heights = mixture.image_sizes(ids)
    import io

    from PIL import Image

    for image, width, height in zip(images, widths, heights, strict=True):
        assert Image.open(io.BytesIO(image.tobytes())).size == (width, height)


def test_classes_are_kept_apart_by_part(corpora):
    mixture = Mixture(corpora, classes="separate")
    assert mixture.classes == [
        "corpus-a:c0", "corpus-a:c1", "corpus-a:c2", "corpus-b:c1", "corpus-b:c9", "corpus-c:c0", "corpus-c:c2",
    ]  # fmt: skip
    assert mixture.class_counts == [10, 10, 10, 7, 7, 4, 4]
    own = [int(corpora[part].index["label"][0]) for part in range(3)]
    assert mixture.labels_of([44, 0, 30])[1].tolist() == [5 + own[2], own[0], 3 + own[1]]
    with pytest.raises(CorpusError, match="different names, got corpus-a, corpus-a"):
        Mixture([corpora[0], corpora[0]], classes="separate")
    named = Mixture([corpora[0], corpora[0]], classes="separate", names=["x", "y"])
    assert named.classes[3] == "y:c0"


def test_identity_tells_parts_weights_and_classes_apart(corpora):
    a, b, c = corpora
    mixtures = [
        Mixture([a]), Mixture([b]), Mixture([a, b]), Mixture([b, a]), Mixture([a, b], [1, 2]), Mixture([a, b, c]),
        Mixture([a, b], classes="separate"), Mixture([a, b], classes="separate", names=["x", "y"]),
    ]  # fmt: skip
    assert len({mixture.corpus_hash for mixture in mixtures}) == len(mixtures)
    assert Mixture([a, b], [2, 4]).corpus_hash == Mixture([a, b], [1, 2]).corpus_hash


def test_a_substitute_is_of_the_same_part_and_decided_by_its_numbers_alone(corpora):
    mixture = Mixture(corpora)
    for sample in (3, 33, 47):
        chosen = [mixture.substitute(sample, 5, attempt) for attempt in range(20)]
        assert chosen == [Mixture(corpora).substitute(sample, 5, attempt) for attempt in range(20)]
        assert set(mixture.part_of(chosen)) == {int(mixture.part_of([sample])[0])}
        assert len(set(chosen)) > 4
        assert chosen != [mixture.substitute(sample, 6, attempt) for attempt in range(20)]


def test_a_held_out_corpus_is_numbered_like_the_mixture(corpora):
    known = Mixture(corpora).classes
    heldout = Mixture([corpora[1]], known=known)
    assert (heldout.classes, heldout.class_counts) == (known, [0, 7, 0, 7])
    labels = corpora[1].index["label"].astype(int)
    assert heldout.labels_of(np.arange(14))[1].tolist() == [{0: 1, 1: 3}[label] for label in labels.tolist()]
    with pytest.raises(CorpusError, match="has the class 'c9', which is not known"):
        Mixture([corpora[1]], known=["c0", "c1"])
