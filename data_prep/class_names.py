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
from data_prep.label_numbers import class_number, sorted_names
from data_prep.listing import Listing, SourceError

_NUMBER = re.compile("0|[1-9][0-9]{0,8}")


def read_words(path: Path, classes: Sequence[str]) -> list[str]:
    """What people call each class, from lines `CLASS<tab>NAMES` (ImageNet's words.txt) or a JSON class index.

    A class that the file does not have is called by its own name.

    Raises:
        SourceError: unreadable, a line of another form, or none of the classes is in it.
    """
    if path.suffix == ".json":
        entries = _read_class_index(path, "words")
        numbers = numbers_of(classes, [name for name, _ in entries])
        if numbers is not None and max(numbers) < len(entries):
            return [entries[number][1] or entries[number][0] for number in numbers]
        words = {name: description for name, description in entries if description}
    else:
        words = dict(_pairs(path, "words", "CLASS<tab>NAMES"))
    if not any(name in words for name in classes):
        raise SourceError(f"words = {path} has none of the {len(classes)} classes, for example not {classes[0]!r}")
    return [words.get(name, name) for name in classes]


def read_classes(path: Path) -> tuple[list[str], list[str] | None]:
    """Names and descriptions (None if it has none) of classes, in the order of their numbers.

    The file has lines `NAME` or `NAME<tab>DESCRIPTION`, or is a JSON class index: a list of names, or an object
    {"0": ["n01440764", "tench"], ...} or {"0": "tench", ...}, where numbers that it leaves out are named by themselves.

    Raises:
        SourceError: unreadable, empty, a name is missing or stands twice.
    """
    if path.suffix == ".json":
        entries = _read_class_index(path, "classes")
    else:
        entries = []
        lines = list(_lines(path, "classes"))
        if path.suffix.lower() == ".csv" and any("," in line for line in lines[:1]):
            raise SourceError(
                f"classes = {path} is a table of several columns: give a text file of one class a line in the order of "
                f'their numbers, NAME or NAME<tab>DESCRIPTION, or JSON such as {{"0": "cat", "1": "dog"}}'
            )
        for number, line in enumerate(lines, 1):
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
    if all(map(_NUMBER.fullmatch, value)):
        known = {int(number): _class_of(entry, path, key) for number, entry in value.items()}
        if len(known) < len(value) or max(known) >= 10 * len(known) + 10:
            raise SourceError(f"{key} = {path}: its numbers are not those of classes, 0, 1, 2, ..., each once")
        # from 1 on, or with gaps: numbers without a name are called by themselves
        return [known.get(number, (str(number), "")) for number in range(max(known) + 1)]
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
    classes = sorted_names(renamed)
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


def by_value(listing: Listing) -> Listing:
    """Where all classes of a listing are called by numbers, these in the order of their values: 2 before 10."""
    classes = sorted_names(listing.classes)
    if classes == listing.classes or classes == sorted(classes):
        return listing
    log.info("the classes of %s are numbers: they are in the order of their values", listing.place)
    places = {name: place for place, name in enumerate(classes)}
    mapping = np.array([places[name] for name in listing.classes], np.int64)
    return replace(listing, classes=classes, labels=_mapped(listing.labels, mapping))


def numbers_of(classes: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The numbers that classes are called by, where these are to be looked up in a list of names; None for names."""
    numbers = [class_number(name) for name in classes]
    known = [number for number in numbers if number is not None]
    if not classes or len(known) < len(numbers) or len(set(known)) < len(known) or not set(names).isdisjoint(classes):
        return None
    return known


def named_by_number(
    listing: Listing, numbers: Sequence[int], classes: Sequence[str], descriptions: Sequence[str] | None, key: str
) -> Listing:
    """Give classes that are called by numbers the names that a list has in these places.

    Raises:
        SourceError: there are fewer names than numbers.
    """
    if max(numbers) >= len(classes):
        hint = ""
        if min(numbers) == 1 and max(numbers) == len(classes):
            hint = ': its lines are 0, 1, 2, ...; where they are 1, 2, 3, ..., give a JSON file {"1": "NAME", ...}'
        raise SourceError(
            f"{key}: {len(classes)} names for class numbers up to {max(numbers)} in {listing.place}{hint}"
        )
    images = np.bincount(_classes_in(listing), minlength=len(listing.classes))
    used = {number for number, count in zip(numbers, images.tolist(), strict=True) if count}
    # a number that the list has no name for, and the source no image of, is no class
    kept = [number for number, name in enumerate(classes) if number in used or name != str(number)]
    places = {number: place for place, number in enumerate(kept)}
    mapping = np.array([places.get(number, -1) for number in numbers], np.int64)
    return replace(
        listing,
        classes=[classes[number] for number in kept],
        class_descriptions=[descriptions[number] for number in kept] if descriptions else None,
        labels=_mapped(listing.labels, mapping),
    )


def _classes_in(listing: Listing) -> NDArray[np.int64]:
    labels = listing.labels
    return (labels.rows["class"] if isinstance(labels, Labels) else labels).astype(np.int64)


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
    """Classes with those that are new at the end, sorted: numbers by their values."""
    return [*known, *sorted_names(set(found) - set(known))]


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
