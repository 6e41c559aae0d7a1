"""Weights of labels: targets of a loss, 0 to 1. What is above makes the sigmoid's loss unbounded."""

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cluster.settings import SettingsError
from data_prep.columns import Labels
from data_prep.listing import Listing, SourceError

_SLACK = 1e-5
"""By which rounding may carry a weight above 1."""


def scaled(weights: NDArray[np.float64], scale: float, complain: Callable[[int, str], NoReturn]) -> NDArray[np.float64]:
    """Weights times `scale` (weight_scale), each within 0 and 1, [K].

    Args:
        complain: raises SourceError for a label (0..K - 1) and what is wrong with it.
    """
    values = weights * scale
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1 + _SLACK)))
    if len(wrong):
        first = int(wrong[0])
        what = f"has weight {weights[first]:g}: a number not below 0 and not above 1 is needed"
        if values[first] > 1:
            what += f"; {_advice(weights)}"
        complain(first, what)
    return np.minimum(values, 1)


def _advice(weights: NDArray[np.float64]) -> str:
    largest = float(weights[np.isfinite(weights)].max(initial=0))
    if largest <= 100:
        return f"weight_scale=0.01 takes weights for per cent (the largest is {largest:g})"
    return f"weight_scale={1 / largest:.3g} brings the largest, {largest:g}, to 1"


def with_scaled_weights(listing: Listing, scale: float) -> Listing:
    """A listing with its weights times `scale`: of tars and corpora, whose labels have no other setting.

    Raises:
        SourceError: a weight is not within 0 and 1.
        SettingsError: there are no weights.
    """
    labels = listing.labels
    if not isinstance(labels, Labels):
        if scale != 1:
            raise SettingsError(f"weight_scale is not read: {listing.place} has one label an image, without weights")
        return listing

    def complain(label: int, what: str) -> NoReturn:
        image = int(np.searchsorted(labels.pointers, label, "right")) - 1
        name = listing.names[image].decode("utf-8", "backslashreplace")
        raise SourceError(f"{listing.place}: label {listing.classes[labels.rows['class'][label]]!r} of {name!r} {what}")

    rows = labels.rows.copy()
    rows["weight"] = scaled(labels.rows["weight"].astype(np.float64), scale, complain)
    return replace(listing, labels=Labels(rows, labels.pointers))
