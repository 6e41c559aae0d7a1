"""What is said of the labels of every source before it becomes a corpus: counts, and what a person would find odd."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.command import counted, log
from data_prep.columns import Labels
from data_prep.corpus import Corpus
from data_prep.label_cells import why_delimited
from data_prep.label_numbers import number_of
from data_prep.listing import Listing, looks_like_image
from data_prep.split_names import split_of_folder

_PARTS = frozenset({"images", "imgs", "jpegimages", "annotations", "labels", "masks", "data", "dataset", "__macosx"})
_NOTHING = frozenset(
    {"none", "null", "nan", "na", "n/a", "unknown", "unlabeled", "unlabelled", "undefined", "missing", "?", "-", "nil"}
)
_SHOWN = 3
_PIECE = 1 << 20
_LONGEST_NAME = 100
_IMBALANCE = 1000
"""Times as many images of one class as of another that are worth a warning."""
_FEW_EACH = 2
"""Images for each class, on average, up to which classes look like names of images."""


def report_labels(listing: Listing) -> None:
    """Say how many classes a listing has, which are first and last, the smallest and the largest, and what is odd."""
    if isinstance(listing.labels, Labels):
        per_image = np.diff(listing.labels.pointers)
        counts = np.bincount(listing.labels.rows["class"], minlength=len(listing.classes))
    else:
        per_image = None
        counts = np.bincount(listing.labels, minlength=len(listing.classes))
    report_classes(listing.place, listing.classes, counts, len(listing), per_image)


def report_corpus(corpus: Corpus, place: str) -> None:
    """As `report_labels`, of a corpus.

    Args:
        place: the source.
    """
    per_image = None
    if corpus.label_kind == "multi":
        per_image = np.zeros(len(corpus), np.int64)
        for start in range(0, len(corpus), _PIECE):
            ids = np.arange(start, min(start + _PIECE, len(corpus)))
            per_image[ids] = np.bincount(corpus.labels_of(ids)[0], minlength=len(ids))
    report_classes(place, corpus.classes, np.array(corpus.class_counts), len(corpus), per_image)


def report_classes(
    place: str, classes: Sequence[str], counts: NDArray[np.int64], images: int, per_image: NDArray[np.int64] | None
) -> None:
    """Say what classes there are, and warn of what is odd about them.

    Args:
        place: the source.
        classes: names in the order of their numbers.
        counts: images of each class.
        images: of all of them.
        per_image: labels of each image where there may be many, or None.
    """
    if not classes or not images:
        return
    least, most = int(counts.argmin()), int(counts.argmax())
    kind = "one label an image"
    if per_image is not None:
        kind = f"{per_image.min()} to {per_image.max()} labels an image, {per_image.mean():.2g} on average"
    if counts[least] == counts[most]:
        spread = f"{counted(int(counts[most]), 'image')} of each"
    else:
        spread = (
            f"fewest images: {counts[least]:,} of {_name(classes[least])!r}, "
            f"most: {counts[most]:,} of {_name(classes[most])!r}"
        )
    log.info(
        "labels of %s: %s for %s, %s; first %r (0), last %r (%d); %s",
        place, counted(len(classes), "class", "classes"), counted(images, "image"), kind,
        _name(classes[0]), _name(classes[-1]), len(classes) - 1, spread,
    )  # fmt: skip
    for oddity in _oddities(classes, counts, images, per_image):
        log.warning("odd labels in %s: %s", place, oddity)


def _oddities(
    classes: Sequence[str], counts: NDArray[np.int64], images: int, per_image: NDArray[np.int64] | None
) -> Iterator[str]:
    used = [name for name, count in zip(classes, counts.tolist(), strict=True) if count]
    if len(used) == 1:
        yield f"all images are of one class, {_name(used[0])!r}: a model has nothing to tell apart"
    elif len(used) > 10 and images <= _FEW_EACH * len(used) and per_image is None:
        yield (
            f"{len(used):,} classes for {images:,} images: nearly every image is a class of its own, as where names, "
            f"captions or combinations of labels are taken for classes"
        )
    yield from _odd_names(used)
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if empty:
        yield f"{counted(len(empty), 'class has', 'classes have')} no image: {_some(empty)}"
    present = counts[counts > 0]
    if present.max() >= _IMBALANCE * present.min():
        yield f"the largest class has {present.max() / present.min():,.0f} times the images of the smallest"
    if per_image is not None and (without := int((per_image == 0).sum())):
        yield f"{counted(without, 'image has', 'images have')} no label and so no class"
    yield from _alike(used)


def _odd_names(names: Sequence[str]) -> Iterator[str]:
    for test, what in _NAME_TESTS:
        found = [name for name in names if test(name)]
        if found:
            yield f"{counted(len(found), 'class is', 'classes are')} called {what}: {_some(found)}"
    several = why_delimited(names, "")
    if several is not None:
        yield f"classes look like combinations of labels, one class for each, for example {several[0]!r}"
    numbers = [name for name in names if number_of(name) is not None]
    fractions = [name for name in numbers if not re.fullmatch(r"[0-9]+", name)]
    if fractions:
        yield (
            f"{counted(len(fractions), 'class name looks', 'class names look')} like a number that is not whole, as "
            f"where what is measured is taken for classes: {_some(fractions)}"
        )
    if numbers and len(numbers) < len(names):
        others = [name for name in names if number_of(name) is None]
        yield f"some class names are numbers ({_some(numbers)}), and some are not ({_some(others)})"


def _groups(classes: Sequence[str]) -> list[list[str]]:
    """Names that a person would take for one: that differ in case, white space, zeros or the form of letters."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        text = unicodedata.normalize("NFKC", name).casefold()
        words = re.sub(r"[\s_-]+", " ", text).strip()
        number = number_of(words)
        groups[words if number is None else f"{number.normalize():f}"].append(name)
    return [group for group in groups.values() if len(group) > 1]


def alike(new: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of a new and a known class that a person would take for one."""
    theirs = set(known)
    found = []
    for group in _groups([*known, *new]):
        old = next((name for name in group if name in theirs), None)
        found += [(name, old) for name in group if old is not None and name not in theirs]
    return found


def _alike(classes: Sequence[str]) -> Iterator[str]:
    groups = _groups(classes)
    if groups:
        shown = "; ".join(" and ".join(map(repr, group[:_SHOWN])) for group in groups[:_SHOWN])
        yield (
            f"{counted(len(groups), 'group')} of classes differ only in case, spaces, zeros or the form of "
            f"letters: {shown} (relabel= makes them one)"
        )


def _names_a_part(name: str) -> bool:
    return name.strip().lower() in _PARTS


_NAME_TESTS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda name: split_of_folder(name) is not None, "like a split of a data set, and not like what is in its images"),
    (_names_a_part, "like a part of a data set, and not like what is in its images"),
    (lambda name: name.strip().lower() in _NOTHING, "like what stands for no label (no_label= takes it as that)"),
    (lambda name: "." in name and looks_like_image(name.encode("utf-8", "replace")), "like a file of an image"),
    (lambda name: name != name.strip() or not name.isprintable(), "with white space at an end or what cannot be seen"),
    (lambda name: len(name) > _LONGEST_NAME, "by a whole sentence"),
)


def _name(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(_name(name)) for name in names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown
