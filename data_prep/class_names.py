"""Files that say what classes there are, in which order, and what people call them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.command import log
from cluster.storage import StorageError, parse_json
from data_prep.columns import Labels
from data_prep.listing import Listing, SourceError

_NUMBER = re.compile("0|[1-9][0-9]{0,8}")
_LARGEST = 1_000_000
"""Class number in a table."""


def read_words(path: Path, classes: Sequence[str]) -> list[str]:
    """What people call each class, from lines `CLASS<tab>NAMES` (ImageNet's words.txt) or a JSON class index.

    A class that the file does not have is called by its own name.

    Raises:
        SourceError: unreadable, a line of another form, or none of the classes is in it.
    """
    if path.suffix == ".json":
        words = {name: description for name, description in _read_class_index(path, "words") if description}
    else:
        words = dict(_pairs(path, "words", "CLASS<tab>NAMES"))
    if not any(name in words for name in classes):
        raise SourceError(f"words = {path} has none of the {len(classes)} classes, for example not {classes[0]!r}")
    return [words.get(name, name) for name in classes]


def read_classes(path: Path) -> tuple[list[str], list[str] | None]:
    """Names and descriptions (None if it has none) of classes, in the order of their numbers.

    The file has lines `NAME` or `NAME<tab>DESCRIPTION`, or is a JSON class index: a list of names, or an object
    {"0": ["n01440764", "tench"], ...} or {"0": "tench", ...}.

    Raises:
        SourceError: unreadable, empty, a name is missing or stands twice.
    """
    if path.suffix == ".json":
        entries = _read_class_index(path, "classes")
    else:
        entries = []
        for number, line in enumerate(_lines(path, "classes"), 1):
            name, _, description = (part.strip() for part in line.partition("\t"))
            if not name:
                raise SourceError(f"classes = {path}, line {number}: there is no name")
            entries.append((name, description))
    if not entries:
        raise SourceError(f"classes = {path} is empty")
    seen: set[str] = set()
    for number, (name, _) in enumerate(entries, 1):
        if name in seen:
            what = "entry" if path.suffix == ".json" else "line"
            raise SourceError(f"classes = {path}, {what} {number}: class {name!r} stands twice")
        seen.add(name)
    described = any(description for _, description in entries)
    return [name for name, _ in entries], [d or name for name, d in entries] if described else None


def _read_class_index(path: Path, key: str) -> list[tuple[str, str]]:
    """(name, description or "") in the order of the numbers that are the keys, or of the file."""
    try:
        value = parse_json(path.read_bytes(), path.name)
    except (OSError, StorageError) as error:
        raise SourceError(f"{key} = {path} cannot be read: {error}") from error
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return [(name, "") for name in value]
    if not isinstance(value, dict) or not value:
        raise SourceError(f"{key} = {path} is no class index: a list of names, or an object of numbers and names")
    if all(name.isdigit() for name in value):
        numbers = sorted(map(int, value))
        if numbers != list(range(len(numbers))):
            raise SourceError(f"{key} = {path}: its numbers are not 0 to {len(numbers) - 1}, each once")
        return [_class_of(value[str(number)], path, key) for number in numbers]
    return [(name, str(description)) for name, description in value.items()]


def _class_of(entry: Any, path: Path, key: str) -> tuple[str, str]:
    if isinstance(entry, str):
        return entry, ""
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    raise SourceError(f"{key} = {path}: {entry!r} is neither a name nor [NAME, DESCRIPTION]")


def relabel(listing: Listing, path: Path) -> Listing:
    """Give classes other names, from lines `OLD<tab>NEW`; several may become one, the others stay as they are.

    Raises:
        SourceError: unreadable, a line of another form, or none of the classes is in it.
    """
    new_names = dict(_pairs(path, "relabel", "OLD<tab>NEW"))
    if not any(name in new_names for name in listing.classes):
        raise SourceError(
            f"relabel = {path} has none of the {len(listing.classes)} classes, for example not {listing.classes[0]!r}"
        )
    renamed = [new_names.get(name, name) for name in listing.classes]
    classes = sorted(set(renamed))
    numbers = {name: number for number, name in enumerate(classes)}
    descriptions = None
    if listing.class_descriptions is not None:
        known = dict(zip(listing.classes, listing.class_descriptions, strict=True))
        descriptions = [known.get(name, name) for name in classes]
    mapping = np.array([numbers[name] for name in renamed], np.int64)
    log.info("%d classes are %d after relabel = %s", len(listing.classes), len(classes), path)
    return replace(
        listing, classes=classes, class_descriptions=descriptions, labels=_mapped(listing.labels, mapping)
    )  # fmt: skip


def numbers_as_names(labels: Sequence[str]) -> list[str] | None:
    """Names "0" ... "max" of classes where all labels of a source are class numbers; None where they are names.

    Numbers with leading zeros are names, and so are those beyond any list of classes: identifiers.
    """
    if not all(_NUMBER.fullmatch(label) for label in labels):
        return None
    largest = max(map(int, labels), default=-1)
    return [str(number) for number in range(largest + 1)] if largest <= _LARGEST else None


def put_in_order(listing: Listing, classes: Sequence[str], descriptions: Sequence[str] | None, key: str) -> Listing:
    """Number the classes as a list does; images of classes that it does not have are left out.

    Raises:
        SourceError: no image is of a class in the list.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    mapping = np.array([numbers.get(name, -1) for name in listing.classes], np.int64)
    dropped = [name for name in listing.classes if name not in numbers]
    labels = _mapped(listing.labels, mapping)
    if isinstance(labels, Labels):
        assert isinstance(listing.labels, Labels)
        had_none = np.diff(listing.labels.pointers) == 0  # such an image stays
        rows = np.flatnonzero((np.diff(labels.pointers) > 0) | had_none)
    else:
        rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise SourceError(
            f"{key}: no image of {listing.place} is of one of its {len(classes)} classes; the source has "
            f"{', '.join(listing.classes[:3])}, the list {', '.join(classes[:3])}"
        )
    if dropped:
        log.warning(
            "left out: %s images of %d classes that %s does not have, for example %s",
            f"{len(listing) - len(rows):,}", len(dropped), key, dropped[0],
        )  # fmt: skip
    kept = replace(
        listing, classes=list(classes), labels=labels, class_descriptions=list(descriptions) if descriptions else None
    )
    return kept if len(rows) == len(listing) else kept.take(rows)


def _mapped(labels: NDArray[np.int32] | Labels, mapping: NDArray[np.int64]) -> NDArray[np.int32] | Labels:
    """Labels with other numbers; -1 takes a label away. Two labels of an image that become one keep the larger weight.

    Args:
        labels: int32 [N] or Labels.
        mapping: the new number of each old one, int64 [classes].
    """
    if not isinstance(labels, Labels):
        return mapping[labels].astype(np.int32)
    images = np.repeat(np.arange(len(labels.pointers) - 1), np.diff(labels.pointers))
    classes, weights = mapping[labels.rows["class"]], labels.rows["weight"]
    order = np.lexsort((-weights, classes, images))
    order = order[classes[order] >= 0]
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(images[order]) != 0) | (np.diff(classes[order]) != 0)
    order = order[first]
    rows = np.empty(len(order), labels.rows.dtype)
    rows["class"], rows["weight"] = classes[order], weights[order]
    counts = np.bincount(images[order], minlength=len(labels.pointers) - 1)
    return Labels(rows, np.concatenate([[0], np.cumsum(counts)]))


def after(known: Sequence[str], found: Sequence[str]) -> list[str]:
    """Classes with those that are new at the end, sorted."""
    return [*known, *sorted(set(found) - set(known))]


def _pairs(path: Path, key: str, form: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(_lines(path, key), 1):
        name, tab, value = line.partition("\t")
        if line.strip() and not (tab and value.strip()):
            raise SourceError(f"{key} = {path}, line {number}: {line[:60]!r} is not `{form}`")
        if line.strip():
            pairs.append((name.strip(), value.strip()))
    return pairs


def _lines(path: Path, key: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{key} = {path} cannot be read: {error}") from error
