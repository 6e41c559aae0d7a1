"""Files that say what images show: many labels for each image, and what people call the classes."""

import csv
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.columns import Labels, Strings
from data_prep.sources import Listing, SourceError

_THREADS = 16


def read_words(path: Path, classes: list[str]) -> list[str]:
    """What people call each class, from a file of lines `CLASS<tab>NAMES` (ImageNet's words.txt).

    A class that the file does not have is called by its own name.

    Raises:
        SourceError: unreadable, a line of another form, or none of the classes is in it.
    """
    words: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"words = {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        name, tab, description = line.partition("\t")
        if line.strip() and not (tab and description.strip()):
            raise SourceError(f"words = {path}, line {number}: {line[:60]!r} is not `CLASS<tab>NAMES`")
        words[name.strip()] = description.strip()
    if not any(name in words for name in classes):
        raise SourceError(f"words = {path} has none of the {len(classes)} classes, for example not {classes[0]!r}")
    return [words.get(name, name) for name in classes]


def list_labelled(root: Path, labels_file: Path) -> Listing:
    """List the images that a labels file names, with their many labels; paths in it are relative to `root`.

    The file is JSON lines, `{"path": "a/b.jpg", "labels": ["cat", "sofa"], "weights": [1.0, 0.4]}` for each image
    (weights may be left out: 1), or CSV with a header `path,label` or `path,label,weight` and one row a label.
    Images that are named but are not there are left out, with the reason.

    Raises:
        SourceError: the file is missing or wrong (with the line), or none of its images is there.
    """
    if not root.is_dir():
        what = "is not a folder: many labels are for folders of images" if root.exists() else "does not exist"
        raise SourceError(f"source {root} {what}")
    read = {".jsonl": _read_json_lines, ".csv": _read_csv}.get(labels_file.suffix)
    if read is None:
        raise SourceError(f"labels = {labels_file} must be a .jsonl or a .csv file")
    by_path: dict[str, dict[str, float]] = {}
    try:
        for line, path, label, weight in read(labels_file):
            _add(by_path, path, label, weight, f"labels = {labels_file}, line {line}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"labels = {labels_file} cannot be read: {error}") from error
    if not by_path:
        raise SourceError(f"labels = {labels_file} names no image")

    paths = sorted(by_path, key=os.fsencode)
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda path: _size(root / path), paths, chunksize=256))
    there = [path for path, size in zip(paths, sizes, strict=True) if size is not None]
    missing = [path for path, size in zip(paths, sizes, strict=True) if size is None]
    if not there:
        raise SourceError(
            f"none of the {len(paths)} images named in {labels_file} is in {root}, for example not {paths[0]!r}: "
            f"paths in it are relative to the source"
        )
    classes = sorted({label for labels in by_path.values() for label in labels})
    if not classes:
        raise SourceError(f"labels = {labels_file} gives no image a label")
    numbers = {name: number for number, name in enumerate(classes)}
    return Listing(
        "image folder with a labels file",
        root,
        classes,
        Strings.of([os.fsencode(path) for path in there]),
        np.array([size for size in sizes if size is not None], np.uint64),
        None,
        Labels.of([sorted((numbers[name], weight) for name, weight in by_path[path].items()) for path in there]),
        tuple((path, "named in the labels file, but there is no such file") for path in missing),
    )


def _add(by_path: dict[str, dict[str, float]], path: str, label: str | None, weight: float, where: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise SourceError(f"{where}: path {path!r} must be relative to the source and stay inside it")
    labels = by_path.setdefault(str(PurePosixPath(path)), {})
    if label is None:
        return
    if label in labels:
        raise SourceError(f"{where}: label {label!r} of {path!r} stands twice")
    if not label or not (math.isfinite(weight) and weight >= 0):
        raise SourceError(f"{where}: label {label!r} with weight {weight}: a name and a number not below 0 are needed")
    labels[label] = weight


def _read_json_lines(path: Path) -> Iterator[tuple[int, str, str | None, float]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"labels = {path}, line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise SourceError(f"{where}: not JSON ({error})") from error
            if not isinstance(entry, dict) or not {"path", "labels"} <= set(entry) <= {"path", "labels", "weights"}:
                raise SourceError(f"{where}: must be an object with path, labels and perhaps weights")
            labels = entry["labels"]
            weights = entry.get("weights", [1.0] * len(labels) if isinstance(labels, list) else None)
            if not (
                isinstance(entry["path"], str)
                and isinstance(labels, list)
                and isinstance(weights, list)
                and len(labels) == len(weights)
                and all(isinstance(label, str) for label in labels)
                and all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights)
            ):
                raise SourceError(f"{where}: path must be text, labels a list of texts, weights as many numbers")
            yield number, entry["path"], None, 0.0  # an image may have no label at all
            for label, weight in zip(labels, weights, strict=True):
                yield number, entry["path"], label, float(weight)


def _read_csv(path: Path) -> Iterator[tuple[int, str, str | None, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header not in (["path", "label"], ["path", "label", "weight"]):
            raise SourceError(f"labels = {path}: the first line must be `path,label` or `path,label,weight`")
        for row in rows:
            if not row:
                continue
            where = f"labels = {path}, line {rows.line_num}"
            if len(row) != len(header):
                raise SourceError(f"{where}: has {len(row)} fields where the header has {len(header)}")
            try:
                weight = float(row[2]) if len(row) == 3 else 1.0
            except ValueError:
                raise SourceError(f"{where}: weight {row[2]!r} is not a number") from None
            yield rows.line_num, row[0], row[1], weight


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
