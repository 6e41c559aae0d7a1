"""What the splits of data sets are called: the one list of such names, and where in names of files they stand."""

import re
from collections.abc import Iterable

SPLITS = {
    "train": ("train", "training", "trn", "traindata", "trainset"),
    "validation": ("val", "valid", "validation", "dev", "eval", "evaluation", "valset", "validset", "minival"),
    "test": ("test", "testing", "tst", "testset", "heldout", "holdout", "testdev"),
}
"""Usual names of each split, in small letters; `trainval` and `unlabeled` are splits of their own."""
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names} | {
    "trainval": "trainval", "unlabeled": "unlabeled", "unlabelled": "unlabeled", "unsup": "unlabeled",
}  # fmt: skip
_IMAGES = {"images", "image", "imgs", "img", "jpegimages", "jpeg", "jpegs", "jpg", "png", "photos", "pictures", "data",
           "dataset", "files"}  # fmt: skip
"""What folders are called that hold images of all classes."""
_BESIDE = _IMAGES | {"set", "split", "raw", "resized", "full", "small", "large", "all", "original"}
"""What may stand beside the split in the name of a folder that holds nothing but it: train_images, test_set."""
_WORDS = re.compile(r"[A-Za-z]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def split_of_folder(name: str) -> str | None:
    """The split that a folder (or class) is by the whole of its name: train, Validation, train2017, test_images.

    Returns:
        A key of `SPLITS`, "trainval" or "unlabeled"; None for any other name, such as test_tube.
    """
    words = [word.lower() for word in _words(name)]
    splits = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF}
    return splits.pop() if len(splits) == 1 and all(word in _SPLIT_OF or word in _BESIDE for word in words) else None


def names_no_class(name: str) -> bool:
    """Whether a folder is called as those are that hold images of all classes: images, JPEGImages, raw-img, train."""
    words = [word.lower() for word in _words(name)]
    known = all(word in _BESIDE or word in _SPLIT_OF for word in words)
    return known and any(word in _IMAGES or word in _SPLIT_OF for word in words)


def split_of_file(name: str) -> str | None:
    """The split that a file is of by a word of its name, the first where there are several; None without any.

    `train-00000-of-00002.parquet`, `imagenet-val-000123.tar`, `CUB_test.csv`; folders in front are not looked at.
    """
    stem = name.rsplit("/", 1)[-1].partition(".")[0]
    return next((_SPLIT_OF[word.lower()] for word in _words(stem) if word.lower() in _SPLIT_OF), None)


def differ_in_split(names: Iterable[str]) -> list[str]:
    """The names that differ from others in the word of a split alone: bounding_box_train and bounding_box_test."""
    alike: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        split = split_of_file(name)
        if split is not None:
            rest = tuple(word.lower() for word in _words(name) if word.lower() not in _SPLIT_OF)
            alike.setdefault(rest, {})[name] = split
    return [name for splits in alike.values() if len(set(splits.values())) > 1 for name in splits]


def canonical_split(name: str) -> str:
    """What a user calls a split, as `split_of_file` gives it: val and dev are validation; others stay as they are."""
    return _SPLIT_OF.get(name.lower(), name.lower())


def are_splits(names: Iterable[str]) -> bool:
    """Whether these names of folders or classes are those of splits, all of them and of two at least."""
    splits = [split_of_folder(name) for name in names]
    return len(splits) > 1 and None not in splits


def _words(text: str) -> list[str]:
    return [word for part in _CAMEL.split(text) for word in _WORDS.findall(part)]
