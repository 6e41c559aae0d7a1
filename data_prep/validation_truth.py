"""The classes of ImageNet's validation images, which are distributed without: from the files that come with them.

The developers' kit numbers the classes in an order of its own (ILSVRC2012_ID, 1 to 1000, in meta.mat), which is not
that of the names; here they come out as the names (WordNet ids) in sorted order, as those of the training images do.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.columns import Strings
from data_prep.label_numbers import EMPTY, in_order, why_no_class
from data_prep.listing import Listing, SourceError
from data_prep.source_reader import Images

_WNID = re.compile(r"n\d{8}")


def with_truth(
    kind: str, place: str, names: Strings, sizes: NDArray[np.uint64], images: Images, truth: Path, synsets: Path | None
) -> Listing:
    """A listing of images without classes, with those of a truth file.

    Args:
        names: of the files, sorted; in this order the lines of a file of classes alone are theirs.
        truth: one line an image: a number (ILSVRC2012_ID), a class name, `IMAGE CLASS`, or LOC_val_solution.csv.
        synsets: for numbers, the order of the classes: meta.mat, or a text file of one class name a line. meta.mat
            beside the truth file is found.

    Raises:
        SourceError: there is no image, a file cannot be read, or it has not one class for each image.
    """
    if not len(names):
        raise SourceError(
            f"source {place} has no image directly in it, and truth= is for images without class folders: give the "
            f"folder that they lie in as the source, or with inside="
        )
    lines = [line.strip() for line in _text(truth, "truth").splitlines() if line.strip()]
    if not lines:
        raise SourceError(f"truth = {truth} is empty")
    if all(line.isdigit() for line in lines):
        order = _order(truth, synsets)
        numbers = np.array(lines, np.int64)
        if numbers.min() < 1 or numbers.max() > len(order):
            raise SourceError(f"truth = {truth}: its numbers are not within 1 to {len(order)}, the classes of synsets")
        found = [order[number - 1] for number in numbers.tolist()]
        classes = sorted(order)
        numbers_of = {name: number for number, name in enumerate(classes)}
        by_line = True
    else:
        if synsets is not None:
            raise SourceError(f"synsets = {synsets} is not read: truth = {truth} has names of classes, not numbers")
        words = [re.split(r"[,\s]+", line) for line in lines]
        by_line = all(len(line) == 1 for line in words)
        if by_line:
            found = [line[0] for line in words]
        else:
            by_name = {Path(line[0]).stem: line[1] for line in words if len(line) > 1 and line[0] != "ImageId"}
            stems = [Path(names[row].decode("utf-8", "replace")).stem for row in range(len(names))]
            missing = [stem for stem in stems if stem not in by_name]
            if missing:
                raise SourceError(f"truth = {truth} has no class for {len(missing)} images, for example {missing[0]!r}")
            found = [by_name[stem] for stem in stems]
        classes, numbers_of = _named_classes(found, truth)
    if by_line and len(found) != len(names):
        raise SourceError(
            f"truth = {truth} has {len(found):,} classes for {len(names):,} images in {place}: one line for each "
            f"image, in the order of their names, is needed"
        )
    labels = np.array([numbers_of[name] for name in found], np.int32)
    # as if the images lay in class folders: in the order of the classes, with the class in their names
    rows = np.lexsort((np.arange(len(names)), labels))
    in_folders = Strings.of([f"{found[row]}/".encode() + names[row] for row in rows.tolist()])
    return Listing(kind, place, classes, in_folders, sizes[rows], images.take(rows), labels[rows])


def _named_classes(found: Sequence[str], truth: Path) -> tuple[list[str], dict[str, int]]:
    """Classes in the order of their numbers, and the number of each label; labels that can be no class are refused."""
    labels = sorted(set(found))
    for label in labels:
        why = why_no_class(label)
        if why is not None:
            raise SourceError(
                f"truth = {truth}: label {label!r} {why}, and so no class. Images without a class are left out of a "
                f"table `path,label`, given as labels=TABLE no_label={label or EMPTY}"
            )
    classes, numbers = in_order(labels)
    return classes, dict(zip(labels, numbers.tolist(), strict=True))


def _order(truth: Path, synsets: Path | None) -> list[str]:
    """The classes in the order of ILSVRC2012_ID."""
    beside = truth.with_name("meta.mat")
    if synsets is None and not beside.is_file():
        raise SourceError(
            f"truth = {truth} has numbers (ILSVRC2012_ID), and what they mean is not known: give synsets=FILE, "
            f"meta.mat of the developers' kit (ILSVRC2012_devkit_t12.tar.gz) or a text file of the class names in "
            f"that order"
        )
    path = synsets or beside
    if path.suffix == ".mat":
        return _from_meta(path)
    order = []
    for number, line in enumerate(_text(path, "synsets").splitlines(), 1):
        name = _WNID.search(line)
        if line.strip() and name is None:
            raise SourceError(f"synsets = {path}, line {number}: {line[:60]!r} has no name like n01440764")
        if name is not None:
            order.append(name[0])
    if not order or len(set(order)) < len(order):
        raise SourceError(f"synsets = {path} {'names a class twice' if order else 'is empty'}")
    return order


def _from_meta(path: Path) -> list[str]:
    from scipy.io import loadmat

    try:
        table = loadmat(path, squeeze_me=True)["synsets"]
        by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise SourceError(f"synsets = {path} cannot be read as meta.mat of the developers' kit: {error}") from error
    if sorted(by_id) != list(range(1, len(by_id) + 1)):
        raise SourceError(f"synsets = {path}: the ids of its classes without children are not 1, 2, 3, ...")
    return [by_id[number] for number in sorted(by_id)]


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{key} = {path} cannot be read: {error}") from error
