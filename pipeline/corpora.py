"""The corpora of a run: opened, mixed, checked against each other; how they are shuffled."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from cluster.command import absolute_path, in_figures
from cluster.settings import SettingsError
from data_prep.checked_rows import Checks
from data_prep.corpus import Corpus
from data_prep.mixture import MixedOrder, Mixture
from data_prep.shard_cache import ShardCache
from data_prep.target_weights import check_weights
from pipeline.data_config import DataSettings

WINDOW_BYTES = 8 * 10**9
"""Largest window that is chosen where none is set: the first batch waits for it."""


def open_corpora(
    data: DataSettings, check: Literal["content", "sizes"] = "content", checks: Checks | None = None
) -> tuple[Mixture, Mixture | None]:
    """What a stage trains on, and its held-out corpus with the classes numbered alike.

    Args:
        data: names them.
        check, checks: see `Corpus.open`.

    Raises:
        ValueError: one of them is missing or damaged, or their classes differ; with `check="content"`, a label has a
            weight that no target can have.
    """

    def opened(place: str, key: str) -> Corpus:
        cache_bytes = round(data.cache_gb * 1e9)
        return Corpus.open(absolute_path(place, key), check, cache_bytes=cache_bytes, checks=checks)

    if data.mixture is None:
        assert data.corpus is not None
        corpus = Mixture.of(opened(data.corpus, "data.corpus"))
    else:
        parts = [opened(part.corpus, "data.mixture") for part in data.mixture]
        # A weight is taken as the decimal number that was written.
        weights = [Fraction(repr(part.weight)) for part in data.mixture]
        names = [part.name or own.name for part, own in zip(data.mixture, parts, strict=True)]
        corpus = Mixture(parts, weights, data.mixture_classes, names)
    if check == "content":
        check_weights(corpus)
    if data.heldout is None:
        return corpus, None
    heldout = opened(data.heldout, "data.heldout")
    if heldout.label_kind != corpus.label_kind:
        raise SettingsError(
            f"data.heldout = {data.heldout!r} has {heldout.label_kind} labels, the training images "
            f"{corpus.label_kind}: shard both the same way"
        )
    # Of a mixture, the classes of one part will do.
    fits = set(heldout.classes) <= set(corpus.classes) if data.mixture else heldout.classes == corpus.classes
    if not fits:
        raise SettingsError(
            f"data.heldout = {data.heldout!r} has other classes than the training images "
            f"({len(heldout.classes)}: {some(heldout.classes)}; not {len(corpus.classes)}: {some(corpus.classes)}): "
            "shard both from the same class names"
        )
    scored = Mixture([heldout], known=corpus.classes)
    if check == "content":
        check_weights(scored)
    return corpus, scored


def checks_of(*mixtures: Mixture | None) -> Checks:
    """What ranks need to read the indices of corpora as they were looked at here."""
    parts = [part for mixture in mixtures if mixture is not None for part in mixture.parts]
    return {name: checks for part in parts for name, checks in part.checks.items()}


def with_places(data: DataSettings, corpus: Mixture, heldout: Mixture | None) -> DataSettings:
    """The settings with the places of the corpora as every worker understands them."""
    places = [part.place for part in corpus.parts]
    changes: dict[str, object] = {"heldout": heldout.parts[0].place if heldout else None}
    if data.mixture is None:
        changes["corpus"] = places[0]
    else:
        changes["mixture"] = tuple(
            part.model_copy(update={"corpus": place}) for part, place in zip(data.mixture, places, strict=True)
        )
    return data.model_copy(update=changes)


def shuffle_windows(corpus: Mixture, data: DataSettings) -> list[int]:
    """The shuffle window of each part, in shards; 0 shuffles all of its images.

    Where none is set, a corpus on a disk is shuffled as a whole, and one on an object store in windows of which the
    cache holds two. The same settings and corpora give the same windows on any node.
    """
    if data.shuffle_window is not None:
        return [data.shuffle_window] * len(corpus.parts)
    remote = [part.folder.local is None for part in corpus.parts]
    budget = min(WINDOW_BYTES, data.cache_gb * 1e9 / (2 * max(sum(remote), 1)))
    windows = []
    for part, elsewhere in zip(corpus.parts, remote, strict=True):
        sizes = part.window_bytes
        windows.append(min(len(sizes), max(1, int(budget // max(sizes)))) if elsewhere else 0)
    return windows


def check_cache(corpus: Mixture, windows: Sequence[int]) -> None:
    """Refuse a cache on this node that cannot hold a window of each part on an object store.

    Raises:
        StorageError: naming what would do: room for two, so that one is fetched while the other is read.
    """
    held = [(part.shards, window) for part, window in zip(corpus.parts, windows, strict=True)]
    caches = [(shards, window) for shards, window in held if isinstance(shards, ShardCache)]
    needed = sum(sum(sorted(shards.sizes)[-window:]) for shards, window in caches)
    for shards, window in caches:
        if shards.limit < needed:
            what = f"two shuffle windows of {window} shards" if window else "to shuffle all images at once"
            shards.check_room(2 * needed if window else needed, what)


def describe_order(corpus: Mixture, order: MixedOrder, windows: Sequence[int], global_batch: int) -> str | None:
    """How well windows mix, measured on a global batch in the middle of an epoch; None where all is shuffled freely.

    A batch of a full shuffle would have as many classes as independent draws give on average.
    """
    if not any(windows):
        return None
    middle = corpus.num_samples // 2
    ids = order.ids(np.arange(middle, middle + global_batch))[1]
    counts = np.unique(corpus.shards_of(ids), return_counts=True)[1].astype(np.float64)
    together = (counts * (counts - 1)).sum() / max(1, global_batch * (global_batch - 1))
    shares = [weight / sum(corpus.schedule.weights) for weight in corpus.schedule.weights]
    freely = sum(
        share**2 * float(((np.array(part.shard_sizes) / part.num_samples) ** 2).sum())
        for share, part in zip(shares, corpus.parts, strict=True)
    )
    classes = len(np.unique(corpus.labels_of(ids)[1]))
    free_classes = float((1 - (1 - corpus.class_shares) ** global_batch).sum())
    shuffled = " and ".join(
        f"{part} in windows of {window} of its {len(part.shard_sizes):,} shards" if window else f"{part} as a whole"
        for part, window in zip(corpus.parts, windows, strict=True)
    )
    return (
        f"shuffling {shuffled}: {in_figures(100 * together)} % of the pairs in a batch are of one shard "
        f"({in_figures(100 * freely)} % if all were shuffled as a whole), a batch has {classes:,} classes "
        f"({free_classes:,.0f})"
    )


def some(names: Sequence[str], count: int = 5) -> str:
    """The first of many names, for messages."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
