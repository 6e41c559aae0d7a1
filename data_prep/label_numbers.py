"""Labels that are numbers: which texts are, in which order they stand, and which of them can be no class.

Numbers stay numbers however they are written: 2, 2.0 and 2e0 are one class, which stands before 10.
"""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

EMPTY = "empty"
"""What no_label= calls a cell in which nothing stands."""
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?")
_PADDED = re.compile(r"[+-]?0[0-9]+")
_LONGEST = 60
"""Characters of a number; Decimal would read any."""
_LARGEST = 1_000_000
"""Class number in a table: a list of so many classes and more would fill memory."""


def number_of(text: str) -> Decimal | None:
    """The number that a text is, or None; "007" is one, "1,000", "nan" and "inf" are none."""
    return Decimal(text) if len(text) <= _LONGEST and _NUMBER.fullmatch(text) else None


def why_no_class(text: str) -> str | None:
    """Why a label can be no class, or None: it is empty, a negative number, or NaN, as people write "no label"."""
    if not text:
        return "has no name"
    if text.lower().lstrip("+-") == "nan":
        return "is not a number"
    number = number_of(text)
    return "is negative" if number is not None and number < 0 else None


def same_label(text: str, other: str) -> bool:
    """Whether a label is one that no_label= gives: equal, or equal as a number ("-1" and "-1.0"), or both NaN."""
    if text == ("" if other == EMPTY else other):
        return True
    number = number_of(text)
    if number is not None:
        return number == number_of(other)
    return text.lower() == other.lower() == "nan"


def sorted_names(names: Iterable[str]) -> list[str]:
    """Different names of classes: by their values where all are numbers, else by their bytes."""
    different = sorted(set(names))
    values = [number_of(name) for name in different]
    numbers = [value for value in values if value is not None]
    return [n for _, n in sorted(zip(numbers, different, strict=True))] if len(numbers) == len(values) else different


def in_order(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of classes in the order of their numbers, and which class each of some different labels is, int64 [labels].

    Names are sorted by their bytes. Where all labels are numbers, they are sorted by value; whole numbers up to a
    million are the numbers of their classes themselves (so that 0 to the largest are classes), larger ones are
    identifiers: names. Numbers with leading zeros ("007") are names, too, and stay as they are written.
    """
    numbers = [number_of(label) for label in labels]
    values = [number for number in numbers if number is not None]
    if labels and len(values) == len(labels) and not any(map(_PADDED.fullmatch, labels)):
        return _by_value(values)
    names = sorted_names(labels)
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[label] for label in labels], np.int64)


def _by_value(values: Sequence[Decimal]) -> tuple[list[str], NDArray[np.int64]]:
    different = sorted(set(values))
    whole = all(value == value.to_integral_value() for value in different)
    if whole and different[0] >= 0 and different[-1] <= _LARGEST:
        return [str(number) for number in range(int(different[-1]) + 1)], np.array([int(v) for v in values], np.int64)
    names = [f"{value.to_integral_value() if whole else value.normalize():f}" for value in different]
    places = {value: place for place, value in enumerate(different)}
    return names, np.array([places[value] for value in values], np.int64)


def class_number(text: str) -> int | None:
    """The class number that a text is (3, 3.0, 003), or None."""
    value = number_of(text)
    if value is None or value < 0 or value > _LARGEST or value != value.to_integral_value():
        return None
    return int(value)
