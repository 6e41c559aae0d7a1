"""Finds the files that say what is in the images of a folder: tables and COCO's JSON beside it, or what is not read."""

import csv
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster.folders import Folder
from data_prep.listing import SourceError
from data_prep.source_tree import FolderTree, SourceTree, is_image_name
from data_prep.split_names import split_of_file
from data_prep.table_files import ColumnNames, columns_of
from data_prep.table_format import TableFile, table_suffix

STANDARD = ("_classes.csv", "metadata.csv", "metadata.jsonl", "metadata.parquet", "_annotations.coco.json")
"""Beside the images, they say by their names what they are: of Roboflow's and of Hugging Face's image folders."""
_LINES = ".txt"
"""Ending of files of lines IMAGE CLASS, for truth=."""
_KAGGLE_SOLUTION = re.compile(r"LOC_\w+_solution\.csv$")
"""Of ImageNet at Kaggle: classes with boxes, for truth=, too."""
_ORDER = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", _LINES)
_NO_LABELS = re.compile(
    r"(?i)(captions_|panoptic_|person_keypoints_|stuff_|image_info_|readme|licen[cs]e|requirements|sample_?submission|classes\.txt|words|notes|changelog|package)|"
    r"(_info|dataset_infos?|dataset_dict|state|config|classes|class_names|.*_stats)\.json$|.*(_index|\.idx)\.json$"
)
_SEPARATED = re.compile(r"\A[^\n]*[;\t|]")
_HEAD = 1 << 20
_HEAD_OF_JSON = 1 << 26
"""Bytes: COCO's lists of categories, licences and boxes may stand in front of the images' names."""
_IMAGES = 50
_SIBLINGS = 8


@dataclass(frozen=True)
class LabelFile:
    """A file that says what is in images."""

    path: str
    """In the source."""
    names_folder: bool
    """Whether it names the images with the folder that they lie in."""
    settings: tuple[str, ...] = ()
    """That are needed to read it."""

    @property
    def key(self) -> str:
        """The setting that names it."""
        return "truth" if self.path.endswith(_LINES) or _KAGGLE_SOLUTION.search(self.path) else "labels"


def find_label_files(tree: SourceTree, folder: str, *, certain_only: bool = False) -> list[LabelFile]:
    """Files with labels for the images of a folder of the source, the likeliest first.

    Args:
        certain_only: without those that could be it, but name none of the images that were looked for.
    """
    images = tree.images(folder)[:_IMAGES]
    certain: list[LabelFile] = []
    possible: list[LabelFile] = []
    for place in _places(tree, folder):
        for name in tree.files(place):
            path = f"{place}/{name}" if place else name
            if (table_suffix(name) is None and not name.endswith(_LINES)) or _NO_LABELS.match(name):
                continue
            head = _text(tree, path)
            if head is None or name.endswith((".parquet", ".gz")):
                if not name.endswith(_LINES):
                    possible.append(LabelFile(path, False))
            elif _says_labels(head, images, as_lines=name.endswith(_LINES)):
                with_folder = any(f"{PurePosixPath(folder).name}/{image}" in head for image in images)
                in_folder = place == folder and place != ""
                settings = _columns(tree, path, head, images)
                if settings is None:
                    continue
                certain.append(LabelFile(path, with_folder and not in_folder, settings))
            elif not name.endswith(_LINES):
                possible.append(LabelFile(path, False))
    certain = _of_split(certain, folder)
    split = split_of_file(folder)

    def rank(file: LabelFile) -> tuple[bool, int, str]:
        of_split = split_of_file(file.path)
        return split is not None and of_split != split, _ORDER.index(table_suffix(file.path) or _LINES), file.path

    return sorted(certain, key=rank) or ([] if certain_only else sorted(possible, key=rank))


def _of_split(files: list[LabelFile], folder: str) -> list[LabelFile]:
    """Those of the split that a folder is of, where its name and theirs say it: names of images come back in others."""
    split = split_of_file(PurePosixPath(folder).name)
    return [file for file in files if split_of_file(file.path) == split] or files if split else files


def foreign_labels(tree: SourceTree, folder: str) -> str | None:
    """What is said of labels that are not read: boxes in XML or text files, masks; None where there are none."""
    stems = {PurePosixPath(name).stem for name in tree.images(folder)[:_IMAGES]}
    files = {place: tree.files(place) for place in _places(tree, folder, with_images=True)}
    instead = (
        "which is not read: export it as COCO (labels=instances.json), as class folders, or as a table of image and "
        "label"
    )
    for place, names in files.items():
        where = place or "the source"
        if any(name.endswith(".xml") for name in names):
            return f"{where} has XML beside them (Pascal VOC's or CVAT's), {instead}"
        if any(name.endswith(".txt") and PurePosixPath(name).stem in stems for name in names):
            return f"{where} has a text file for each (YOLO's boxes, or captions), {instead}"
    for place, names in files.items():
        if place not in ("", folder) and stems & {PurePosixPath(name).stem for name in names if is_image_name(name)}:
            return (
                f"{place} has images of the same names (masks, or another size of them): what is in the images is "
                f"said by a table, with labels=TABLE and the one folder as the source"
            )
    return None


def _places(tree: SourceTree, folder: str, with_images: bool = False) -> list[str]:
    """Where such files may lie: the source, the folder of the images, and folders beside it and below those."""
    siblings = [name for name in tree.folders() if with_images or not tree.images(name)]
    siblings = [name for name in siblings if name != folder and not folder.startswith(f"{name}/")][:_SIBLINGS]
    below = [f"{name}/{each}" for name in siblings for each in tree.folders(name)[:3]]
    above = [str(path) for path in PurePosixPath(folder).parents if str(path) != "."]
    return list(dict.fromkeys(["", folder, *above, *siblings, *below]))


def _text(tree: SourceTree, path: str) -> str | None:
    local = isinstance(tree, FolderTree) and tree.folder.local is not None
    head = tree.head(path, _HEAD_OF_JSON if local and path.endswith(".json") else _HEAD)
    return None if head is None else head.decode("utf-8-sig", "replace")


def _says_labels(text: str, images: list[str], *, as_lines: bool) -> bool:
    """Whether a text has the names of images, at least of two; `as_lines` with something behind them on their lines."""
    behind = r"(\.\w+)?[ ,;\t]+\S" if as_lines else r"(?![\w-])"
    named = (
        re.search(rf"(?<![\w-]){re.escape(PurePosixPath(image).stem)}{behind}", text) is not None for image in images
    )
    return sum(named) >= min(2, len(images)) > 0


def _columns(tree: SourceTree, path: str, head: str, images: list[str]) -> tuple[str, ...] | None:
    """Settings that name the columns of a CSV file, where they have no usual names; None where it has but one."""
    if path.endswith(".csv") and len(next(csv.reader(head.splitlines()[:1]), [])) == 1 and not _SEPARATED.search(head):
        return None
    if not path.endswith(".csv") or not isinstance(tree, FolderTree) or why_no_table(tree.folder, path) is None:
        return ()
    rows = list(csv.reader(head.splitlines()[:20]))
    stems = {PurePosixPath(name).stem for name in images}
    found = next(
        (at for row in rows[1:] for at, value in enumerate(row) if PurePosixPath(value.strip()).stem in stems), None
    )
    if found is None or found >= len(rows[0]):
        return ("path_column=COLUMN", "label_column=COLUMN")
    others = [name for at, name in enumerate(rows[0]) if at != found]
    label = shlex.quote(others[0]) if len(others) == 1 else "COLUMN"
    return (f"path_column={shlex.quote(rows[0][found])}", f"label_column={label}")


def why_no_table(folder: Folder, name: str) -> str | None:
    """Why a file cannot be read as a table of images and labels without naming its columns; None if it can."""
    try:
        columns_of([TableFile(folder, name)], ColumnNames())
    except SourceError as error:
        return str(error)
    return None


def standard_label_file(names: list[str]) -> str | None:
    """The file beside images that says by its name that it has their labels, or None."""
    return next((name for name in STANDARD if name in names), None)
