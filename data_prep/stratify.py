"""Random subsets of a set whose classes keep their shares, each subset inside the next larger one.

How many images of a class the first t of N are is a question of apportionment. With quotas q = t * n / N for a class of
n images, every total gets floor(q) or ceil(q) of each class, never fewer than a smaller total gets. That this is always
possible follows from the chairman assignment problem (R. Tijdeman, 1980); that taking what is due the earliest gets
there, from its view as a schedule (G. Steiner, S. Yeomans, "Level Schedules for Mixed-Model, Just-in-Time Processes",
1993): the j-th image of a class may be taken from the first total with ceil(q) >= j on, and must be at the first with
floor(q) >= j.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.order import OF_SUBSET, Permutation


def apportion(sizes: NDArray[np.int64], totals: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    """How many of each class are in the subset of each total.

    Args:
        sizes: images of each class, [C].
        totals: images in each subset, ascending, at most sum(sizes).
        seed: decides between classes that are due at the same time.

    Returns:
        For each total int64 [C]: with sum `total`, at most 1 away from the class's share (floor or ceil of it), and
        nowhere less than for a smaller total.
    """
    whole = int(sizes.sum())
    ties = Permutation(max(len(sizes), 1), seed, use=OF_SUBSET, part=1)(np.arange(len(sizes)))
    taken = np.zeros(len(sizes), np.int64)
    result = []
    for total in totals:
        assert 0 <= total <= whole, (total, whole)
        least, most = total * sizes // whole, -(-total * sizes // whole)
        taken = np.maximum(taken, least)
        may_have_more = np.flatnonzero(taken < most)
        due = -(-(taken[may_have_more] + 1) * whole // sizes[may_have_more])
        first = may_have_more[np.lexsort((ties[may_have_more], due))][: total - int(taken.sum())]
        taken[first] += 1
        assert taken.sum() == total
        result.append(taken.copy())
    return result


def random_places(strata: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The place of each of N samples in a random order of its stratum (int64 [N], each in 0..C-1)."""
    count = len(strata)
    shuffled = Permutation(max(count, 1), seed, use=OF_SUBSET)(np.arange(count))
    order = np.lexsort((shuffled, strata))
    starts = np.cumsum(np.bincount(strata)) - np.bincount(strata)
    places = np.empty(count, np.int64)
    places[order] = np.arange(count) - starts[strata[order]]
    return places
