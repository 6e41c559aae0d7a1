"""Weights of labels as a loss can use them: the target of a class is between 0 and 1.

Beyond that the sigmoid loss has no lower bound: it falls for ever as the logits grow, and the model says 1.0 of
everything. A corpus may hold any finite weight (a confidence in per cent, a count of votes). What trains or scores asks
here, of the sparse labels in the host's memory, so that no step waits for the device.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError
from data_prep.mixture import Mixture

_SLACK = 1e-5
"""Of sums of weights that are rounded to fp32."""
_AT_ONCE = 1 << 16
"""Labels, or samples, that are looked at in one go."""


class LabelWeightError(CorpusError):
    """A weight that no target can have."""


def check_weights(corpus: Mixture) -> None:
    """Look at the weights of all labels of a corpus, or of all parts of a mixture, before anything is trained.

    Raises:
        LabelWeightError: naming the first sample with one below 0 or above 1, and what would do.
    """
    for part in corpus.parts:
        if part.label_kind == "multi":
            check_corpus_weights(part)


def check_corpus_weights(corpus: Corpus) -> None:
    """As `check_weights`, of one corpus with many labels an image."""
    first: tuple[int, int, float] | None = None
    largest = 0.0
    for start in range(0, corpus.num_samples, _AT_ONCE):
        ids = np.arange(start, min(start + _AT_ONCE, corpus.num_samples))
        rows, classes, weights = corpus.labels_of(ids)
        largest = max(largest, float(weights.max(initial=0)))
        wrong = np.flatnonzero(~_fit(weights))
        if len(wrong) and first is None:
            at = int(wrong[0])
            first = int(ids[rows[at]]), int(classes[at]), float(weights[at])
    if first is not None:
        sample, number, weight = first
        raise LabelWeightError(_message(corpus, sample, corpus.classes[number], weight, largest))


def _fit(weights: NDArray[Any]) -> NDArray[np.bool_]:
    return (weights >= 0) & (weights <= 1 + _SLACK)


def check_batch_weights(
    corpus: Mixture,
    ids: NDArray[np.int64],
    rows: NDArray[np.int64],
    classes: NDArray[np.int64],
    weights: NDArray[np.float32],
) -> None:
    """The same for the labels of a batch, those that an image has twice added up, as `dense_targets` does.

    Args:
        ids: [B], the samples.
        rows, classes, weights: [K], as `labels_of` gives them.

    Raises:
        LabelWeightError: naming the sample.
    """
    if _fit(weights).all() and len(np.unique(keys := rows * len(corpus.classes) + classes)) == len(keys):
        return
    keys, places = np.unique(rows * len(corpus.classes) + classes, return_inverse=True)
    sums = np.bincount(places, weights)
    wrong = np.flatnonzero(~_fit(sums))
    if len(wrong):
        row, number = divmod(int(keys[wrong[0]]), len(corpus.classes))
        which = int(corpus.part_of(ids[row : row + 1])[0])
        part, sample = corpus.parts[which], int(ids[row] - corpus.first_ids[which])
        raise LabelWeightError(_message(part, sample, corpus.classes[number], float(sums[wrong[0]]), float(sums.max())))


def _message(corpus: Corpus, sample: int, name: str, weight: float, largest: float) -> str:
    cure = "shard the images again without weights below 0"
    if weight > 1:
        scale = "0.01" if 2 < largest <= 100 else f"{1 / largest:.3g}"
        cure = (
            f"`python data_prep/shard.py {corpus.url} NEW_FOLDER weight_scale={scale}` makes a corpus of the same "
            "images with weights of so many times these"
        )
    return (
        f"{corpus}: sample {sample} ({corpus.origin(sample)}) has the class {name!r} with weight {weight:g}. Targets "
        "are within 0 and 1: beyond that the loss has no bound, and the model learns to say 1.0 of everything. "
        f"{cure[0].upper() + cure[1:]}"
    )
