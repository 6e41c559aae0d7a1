"""Labels of tables, whether these name their images or hold them: what they mean, and what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from cluster.command import log
from cluster.settings import SettingsError
from data_prep.columns import LABEL_DTYPE, Labels
from data_prep.convert import BY_CHOICE
from data_prep.label_cells import AS_IS, LabelCells, perhaps_delimited, shown_cell, why_delimited
from data_prep.label_numbers import EMPTY, class_number, in_order, same_label, why_no_class
from data_prep.label_weights import scaled
from data_prep.listing import SourceError

LabelKind = Literal["auto", "one", "many"]
NO_LABEL = f"{BY_CHOICE}no label"
"""How the reason of an image begins that a table gives no label."""


@dataclass(frozen=True)
class LabelOptions:
    """What a user may say about labels."""

    labels_per_image: LabelKind = "auto"
    cells: LabelCells = field(default_factory=LabelCells)
    no_label: tuple[str, ...] = ()
    """Labels that are none; EMPTY for cells in which nothing stands."""
    weight_scale: float = 1.0


class RawLabels(NamedTuple):
    """What a table says, K labels of N images."""

    image: NDArray[np.int64]
    """Of each label, 0..N - 1 [K]."""
    text: NDArray[np.int64]
    """Which of `texts` each label is [K]."""
    weights: NDArray[np.float64]
    """[K]."""
    texts: Sequence[str]
    """The different labels."""
    are_cells: bool
    """Whether each is a cell of a column, and not an item of a list."""
    are_weighted: bool
    """Whether a column of weights was read."""


class TableLabels(NamedTuple):
    """What they mean."""

    classes: list[str]
    labels: NDArray[np.int32] | Labels
    """Of all N images; -1 where one label is read and an image has none."""
    without: NDArray[np.int64]
    """Images without a label that are to be left out."""


class Place(NamedTuple):
    """How messages name what is wrong."""

    table: str
    column: str
    """Of labels."""
    line: Callable[[int], str]
    """The table and the line of a label (0..K - 1)."""
    image: Callable[[int], str]
    """Name of an image (0..N - 1)."""


def read_labels(
    raw: RawLabels, count: int, names: Sequence[str] | None, options: LabelOptions, place: Place
) -> TableLabels:
    """The classes of a table, and those of each of its N images.

    Args:
        count: N.
        names: of the classes where the labels are their numbers, or None.

    Raises:
        SourceError: a label is none, stands twice beside an image, or has a weight that is none; a column seems to hold
            several labels in a cell; an image has not one label where it must.
    """
    if raw.are_cells:
        _say_unread(raw.texts, options.no_label, place)
    raw, rows = _without_no_labels(raw, options.no_label)

    def complain(label: int, what: str) -> NoReturn:
        image = place.image(int(raw.image[label]))
        raise SourceError(f"{place.line(int(rows[label]))}: label {raw.texts[raw.text[label]]!r} of {image!r} {what}")

    if not len(raw.text):
        raise SourceError(f"{place.table} gives no image a label")
    _refuse_no_classes(raw, complain)
    cells = options.cells
    is_whole = (
        raw.are_cells if cells.delimiter is None else cells.splits and len(np.unique(raw.image)) == len(raw.image)
    )
    if is_whole and names is None:  # a delimiter that stands in no cell is not the right one
        refuse_delimited(raw.texts, place.column, f"{place.table}: column {place.column!r}")
    classes, number_of_text = _classes(raw.texts, names, place.table)
    numbers = number_of_text[raw.text]
    if options.weight_scale != 1 and not raw.are_weighted:
        raise SettingsError(
            f"weight_scale is not read: {place.table} has no weights (weight_column= names their column)"
        )
    weights = scaled(
        raw.weights, options.weight_scale, lambda label, what: complain(label, f"{what}; weight_column=none reads none")
    )
    order = np.lexsort((numbers, raw.image))  # stable
    same = np.flatnonzero((np.diff(raw.image[order]) == 0) & (np.diff(numbers[order]) == 0))
    if len(same):
        complain(int(order[same[0] + 1]), "stands twice")
    counts = np.bincount(raw.image, minlength=count)
    if _many(counts, raw.are_weighted, options, place):
        table = np.empty(len(numbers), LABEL_DTYPE)
        table["class"], table["weight"] = numbers[order], weights[order]
        labels = Labels(table, np.concatenate([[0], np.cumsum(counts)]))
        return TableLabels(classes, labels, np.zeros(0, np.int64))
    column = np.full(count, -1, np.int32)
    column[raw.image] = numbers
    return TableLabels(classes, column, np.flatnonzero(counts == 0))


def _say_unread(texts: Sequence[str], no_label: Sequence[str], place: Place) -> None:
    unread = [value for value in no_label if not any(same_label(text, value) for text in texts)]
    if unread:
        log.warning("no_label: no label of %s is %s", place.table, " or ".join(map(repr, unread)))


def _without_no_labels(raw: RawLabels, no_label: Sequence[str]) -> tuple[RawLabels, NDArray[np.int64]]:
    """Without the labels that are said to be none, and which of the labels are left."""
    none = np.array([any(same_label(text, value) for value in no_label) for text in raw.texts], np.bool_)
    rows = np.flatnonzero(~none[raw.text]) if len(raw.text) else np.zeros(0, np.int64)
    used, text = np.unique(raw.text[rows], return_inverse=True)
    left = raw._replace(
        image=raw.image[rows], text=text, weights=raw.weights[rows], texts=[raw.texts[number] for number in used]
    )
    return left, rows


def _refuse_no_classes(raw: RawLabels, complain: Callable[[int, str], NoReturn]) -> None:
    for number, text in enumerate(raw.texts):
        why = why_no_class(text)
        if why is not None:
            complain(
                int(np.flatnonzero(raw.text == number)[0]),
                f"{why}, and so no class: no_label={text or EMPTY} takes it as no label",
            )


def refuse_delimited(texts: Sequence[str], column: str, where: str) -> None:
    """Refuse labels that seem to be several in a cell, and say it where they might.

    Args:
        texts: the different ones.
        column: its name, or that of what holds them.
        where: what holds them, in words.

    Raises:
        SourceError: they seem to be.
    """
    asked = f"label_delimiter={AS_IS} takes each cell as one label as it stands"
    found = why_delimited(texts, column)
    if found is not None:
        cell, delimiter = found
        raise SourceError(
            f"{where} seems to hold several labels in a cell, such as {shown_cell(cell)}: label_delimiter={delimiter} "
            f"splits them, {asked}"
        )
    found = perhaps_delimited(texts)
    if found is not None:
        cell, delimiter = found
        log.warning(
            "%s: each cell is taken as one label, though a part of %s is a label, too: if cells hold several labels, "
            "label_delimiter=%s splits them (%s, without this warning)",
            where, shown_cell(cell), delimiter, asked,
        )  # fmt: skip


def _classes(texts: Sequence[str], names: Sequence[str] | None, table: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes, and which one each label is; `names` where the table has them."""
    if names is None:
        return in_order(texts)
    numbers = [class_number(text) for text in texts]
    if all(number is not None and number < len(names) for number in numbers):
        return list(names), np.array(numbers, np.int64)
    places = {name: place for place, name in enumerate(names)}
    if any(text not in places for text in texts):
        strange = [
            text for text, number in zip(texts, numbers, strict=True)
            if text not in places and (number is None or number >= len(names))
        ] or list(texts)  # fmt: skip
        raise SourceError(
            f"{table}: its labels are not numbers of the {len(names)} classes it names, for example not {strange[0]!r}"
        )
    return list(names), np.array([places[text] for text in texts], np.int64)


def _many(counts: NDArray[np.int64], are_weighted: bool, options: LabelOptions, place: Place) -> bool:
    """Whether images have many labels each."""
    asked = options.labels_per_image
    most, without = int(counts.max()), np.flatnonzero(counts == 0)
    if asked == "many":
        return True
    if asked == "one" and most > 1:
        first = int(np.flatnonzero(counts > 1)[0])
        raise SourceError(f"labels_per_image = one: {place.table} gives {place.image(first)!r} {counts[first]} labels")
    many = asked == "auto" and (are_weighted or most > 1)
    if not many and len(without) and not options.no_label:
        raise SourceError(
            f"{place.table} gives {place.image(int(without[0]))!r} no label ({len(without):,} of {len(counts):,}), "
            f"and the others one: no_label={EMPTY} leaves such images out, labels_per_image=many keeps them as "
            f"images of no class"
        )
    if asked == "auto":
        log.info(
            "%s: %s (labels_per_image=auto)", place.table,
            f"many labels an image ({'with weights' if are_weighted else f'up to {most}'})" if many
            else "one label an image, and no weights: one class each",
        )  # fmt: skip
    return many
