"""Labels of tables, whether these name their images or hold them: what is refused, and what is said of them."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cluster.command import log
from data_prep.columns import MAX_WEIGHT
from data_prep.listing import SourceError


def numbers_among(labels: Sequence[str], names: Sequence[str], where: str) -> NDArray[np.int64]:
    """The numbers that labels are of the classes that a table names, int64 [labels].

    Raises:
        SourceError: one is none.
    """
    strange = [label for label in labels if not (label.isdigit() and int(label) < len(names))]
    if strange:
        raise SourceError(
            f"{where}: its labels are not numbers of the {len(names)} classes it names, for example not {strange[0]!r}"
        )
    return np.array([int(label) for label in labels], np.int64)


def checked_order(
    images: NDArray[np.int64],
    numbers: NDArray[np.int64],
    weights: NDArray[np.float64],
    nameless: int | None,
    complain: Callable[[int, str], NoReturn],
) -> NDArray[np.int64]:
    """What sorts labels by image and class, int64 [K]; labels that cannot be are refused.

    Args:
        images: of the labels, [K].
        numbers: their classes, [K].
        weights: [K].
        nameless: the first label that is empty, if one is.
        complain: raises SourceError for a label (0..K - 1) and what is wrong with it.
    """
    if nameless is not None:
        complain(nameless, "has no name")
    wrong = np.flatnonzero(~((weights >= 0) & (weights <= MAX_WEIGHT)))
    if len(wrong):
        number = f"a number not below 0 up to {MAX_WEIGHT:.2g}"
        complain(int(wrong[0]), f"has weight {weights[wrong[0]]}: {number} is needed")
    order = np.lexsort((numbers, images))  # stable
    same = np.flatnonzero((np.diff(images[order]) == 0) & (np.diff(numbers[order]) == 0))
    if len(same):
        complain(int(order[same[0] + 1]), "stands twice")
    return order


def say_chosen(many: bool, where: str) -> None:
    """Say what labels_per_image=auto took a table for."""
    log.info(
        "%s: %s (labels_per_image=auto)", where,
        "many labels an image" if many else "one label an image, and no weights: one class each",
    )  # fmt: skip
