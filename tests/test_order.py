"""The order of samples and the counter-based generator, through their public interfaces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_prep.counter_rng import philox4x32, uniform
from data_prep.order import Permutation, SampleOrder

SIZES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123 1.14, tests/kat_vectors, the lines "philox4x32 10"
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF,) * 4,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(key, counter, expected):
    assert philox4x32(key[0] | key[1] << 32, *counter).tolist() == list(expected)


def test_uniform_is_a_function_of_the_sample_alone():
    ids = np.array([5, 2**40 + 1, 17, 5])
    epochs = np.array([0, 1, 2, 3])
    together = uniform(9, epochs, ids, stream=3, n=7)
    assert together.shape == (4, 7)
    for row, (epoch, sample) in enumerate(zip(epochs, ids, strict=True)):
        np.testing.assert_array_equal(together[row], uniform(9, int(epoch), [sample], stream=3, n=7)[0])
    np.testing.assert_array_equal(together[:, :4], uniform(9, epochs, ids, stream=3, n=4))
    others = [(8, 0, 5, 3), (9, 1, 5, 3), (9, 0, 6, 3), (9, 0, 5, 4), (9, 0, 5 + 2**32, 3)]
    for seed, epoch, sample, stream in others:
        assert not np.isin(uniform(seed, epoch, [sample], stream, 7), together[0]).any()


def test_uniform_is_uniform_and_uncorrelated():
    numbers = uniform(1, 0, np.arange(20_000), stream=0, n=3)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(np.concatenate([numbers.T, np.roll(numbers, 1, axis=0).T]))
    assert np.abs(correlation - np.eye(6)).max() < 0.03


@given(SIZES, SEEDS, st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_permutation_is_a_bijection(size, seed, epoch):
    permutation = Permutation(size, seed, epoch)
    elements = permutation(np.arange(size))
    assert np.array_equal(np.sort(elements), np.arange(size))
    some = np.random.default_rng(0).integers(0, size, 5)
    assert np.array_equal(permutation(some), elements[some])


@pytest.mark.parametrize(("size", "draws"), [(3, 300), (10, 1000), (100, 1000)])
def test_permutation_favours_no_place(size, draws):
    counts = np.zeros((size, size))
    pairs = np.zeros((size, size))
    for seed in range(draws):
        elements = Permutation(size, seed)(np.arange(size))
        counts[np.arange(size), elements] += 1
        pairs[elements[0], elements[1]] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    assert pairs.trace() == 0
    assert stats.chisquare(off_diagonal).pvalue > 1e-4


def test_permutation_looks_random_at_scale():
    size = 14_200_000
    elements = Permutation(size, 0)(np.arange(200_000))
    assert len(np.unique(elements)) == 200_000
    assert stats.kstest(elements / size, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(elements[:-1], elements[1:])[0, 1]) < 0.01
    assert stats.kstest((np.diff(elements) % size) / size, "uniform").pvalue > 1e-4
    next_epoch = Permutation(size, 0, 1)(np.arange(200_000))
    assert abs(np.corrcoef(elements, next_epoch)[0, 1]) < 0.01


def test_order_is_stable_over_releases():
    """Resuming an old run under new code must find the same samples: these numbers never change."""
    assert SampleOrder(10, seed=0).ids(np.arange(10))[1].tolist() == [4, 6, 7, 8, 3, 1, 2, 5, 0, 9]
    assert SampleOrder(10, 0, [4, 1, 3, 2], window=2).ids(np.arange(10))[1].tolist() == [6, 5, 4, 7, 2, 3, 9, 0, 8, 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), SEEDS, st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_order_visits_every_sample_once_an_epoch_and_seeks(shard_sizes, seed, window):
    total = sum(shard_sizes)
    order = SampleOrder(total, seed, shard_sizes, window)
    epochs, ids = order.ids(np.arange(2 * total))
    assert np.array_equal(epochs, np.repeat([0, 1], total))
    assert np.array_equal(np.sort(ids[:total]), np.arange(total))
    assert np.array_equal(np.sort(ids[total:]), np.arange(total))
    # any slicing, in any order, sees the same: what makes it independent of ranks and resumable
    somewhere = np.random.default_rng(seed % 2**32).permutation(2 * total)
    again = SampleOrder(total, seed, shard_sizes, window).ids(somewhere)
    assert np.array_equal(again[0], epochs[somewhere])
    assert np.array_equal(again[1], ids[somewhere])


def test_windows_hold_whole_shards():
    shard_sizes = np.array([7, 11, 3, 8, 5, 9, 2])
    shard_of = np.repeat(np.arange(7), shard_sizes)
    for epoch in range(3):
        order = SampleOrder(int(shard_sizes.sum()), 3, shard_sizes.tolist(), window=3)
        total = order.num_samples
        seen = shard_of[order.ids(epoch * total + np.arange(total))[1]]
        firsts = list(dict.fromkeys(seen.tolist()))
        windows = [firsts[:3], firsts[3:6], firsts[6:]]
        start = 0
        for shards in windows:
            size = int(shard_sizes[shards].sum())
            assert set(seen[start : start + size]) == set(shards)
            start += size


def test_epochs_and_seeds_differ():
    places = np.arange(1000)
    first = SampleOrder(1000, 0).ids(places)[1]
    assert (SampleOrder(1000, 0).ids(1000 + places)[1] == first).mean() < 0.02
    assert (SampleOrder(1000, 1).ids(places)[1] == first).mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0, "seed": 0}, "without samples"),
        ({"num_samples": 5, "seed": -1}, "seed = -1"),
        ({"num_samples": 5, "seed": 0, "window": 2}, "every shard"),
        ({"num_samples": 5, "seed": 0, "window": -2, "shard_sizes": [5]}, "window = -2"),
        ({"num_samples": 5, "seed": 0, "window": 1, "shard_sizes": [2, 2]}, "4 samples"),
    ],
)
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(**arguments)
