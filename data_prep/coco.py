"""COCO's JSON as a table: each image with the categories of its annotations; iNaturalist and many tools write it too.

The format: https://cocodataset.org/#format-data. Classes are the categories in the order of their ids, all of them.
"""

import re
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cluster.storage import StorageError, parse_json
from data_prep.listing import SourceError
from data_prep.table_format import TableFile, TableRows
from data_prep.text_tables import text_errors

PATH, LABEL = "file_name", "category_id"
_PARTS = ("images", "annotations", "categories")


class CocoTable(NamedTuple):
    """Images with labels that are numbers of classes."""

    rows: TableRows
    classes: list[str]


def read_coco(file: TableFile) -> CocoTable | None:
    """The images of a file of COCO's, with the categories of their annotations, each once; None where it is none.

    Raises:
        SourceError: it is one of captions or of panoptic segments, or damaged.
    """
    if file.suffix != ".json":
        return None
    with text_errors(file), file.lines() as lines:
        text = lines.read()
    if not all(re.search(rf'"{part}"\s*:', text) for part in _PARTS[:2]):
        return None
    try:
        value = parse_json(text, str(file))
    except StorageError as error:
        raise SourceError(f"table {file} cannot be read: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(value.get(part), list) for part in _PARTS[:2]):
        return None
    for part in _PARTS:
        for number, entry in enumerate(value.get(part) or (), 1):
            if not isinstance(entry, dict):
                raise SourceError(f"{file}: {part}, entry {number}, is no object")
    if not isinstance(value.get("categories"), list) or not value["categories"]:
        raise SourceError(
            f"{file} is COCO's JSON without categories (of captions, say): no class can be told from it; the one of "
            f"instances (instances_*.json) has them"
        )
    numbers, classes = _classes(value["categories"], file)
    labels = _labels(value["annotations"], numbers, file)
    return CocoTable(_rows(value["images"], labels, file), classes)


def _classes(categories: list[dict[str, Any]], file: TableFile) -> tuple[dict[Hashable, int], list[str]]:
    """The number of each category by its id, and the names in the order of the numbers."""
    known: dict[Any, str] = {}
    for category in categories:
        name, identity = category.get("name"), category.get("id")
        if not isinstance(name, str) or not name.strip() or not _is_id(identity) or identity in known:
            raise SourceError(f"{file}: the category {str(category)[:80]} has no name, or no id of its own")
        known[identity] = name.strip()
    if len({type(identity) for identity in known}) > 1:
        raise SourceError(f"{file}: the ids of its categories are numbers and texts, mixed")
    order = sorted(known)
    above = {category["id"]: str(category.get("supercategory", "")) for category in categories}
    times = Counter(known.values())
    names = [known[i] if times[known[i]] == 1 else f"{above[i]}/{known[i]}" for i in order]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SourceError(f"{file}: two categories have the name {twice[0]!r}")
    return {identity: number for number, identity in enumerate(order)}, names


def _labels(
    annotations: list[dict[str, Any]], numbers: Mapping[Hashable, int], file: TableFile
) -> dict[Any, dict[int, None]]:
    """The classes of each image by its id."""
    found: dict[Any, dict[int, None]] = {}
    for annotation in annotations:
        if LABEL not in annotation:
            panoptic = "segments_info" in annotation
            what = "panoptic segments" if panoptic else "captions" if "caption" in annotation else "another kind"
            raise SourceError(
                f"{file} is COCO's JSON of {what}, whose annotations have no category_id: give the one of instances "
                f"(instances_*.json)"
            )
        image, category = annotation.get("image_id"), annotation[LABEL]
        if not _is_id(image) or not _is_id(category) or category not in numbers:
            raise SourceError(f"{file}: the annotation {str(annotation)[:80]} is of no image, or of no category of it")
        found.setdefault(image, {})[numbers[category]] = None
    return found


def _rows(images: list[dict[str, Any]], labels: dict[Any, dict[int, None]], file: TableFile) -> TableRows:
    paths: list[str] = []
    each: list[list[int]] = []
    seen: set[Any] = set()
    for number, image in enumerate(images, 1):
        identity = image.get("id")
        name = image.get(PATH) or str(image.get("coco_url", "")).rpartition("/")[2]  # LVIS has addresses alone
        if not _is_id(identity) or identity in seen or not isinstance(name, str) or not name:
            raise SourceError(f"{file}: images, entry {number}, has no {PATH}, or no id of its own")
        seen.add(identity)
        paths.append(name)
        each.append(sorted(labels.get(identity, ())))
    strange = next((identity for identity in labels if identity not in seen), None)
    if strange is not None:
        raise SourceError(f"{file}: an annotation is of image {strange!r}, which it does not have")
    texts = [str(label) for row in each for label in row]
    return TableRows(
        pa.array(paths, pa.string()), np.array([len(row) for row in each], np.int64), pa.array(texts, pa.string()),
        np.ones(len(texts)), np.arange(1, len(paths) + 1), are_cells=False,
    )  # fmt: skip


def _is_id(value: object) -> bool:
    return type(value) in (int, str)
