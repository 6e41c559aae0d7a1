"""Whether the sub-folders of a source are its classes: what strangers' folders hold instead, and the command for it.

Splits beside each other, the folder above the classes or above the data, all images in one folder beside a table of
labels, images beside masks, and img2dataset's numbered folders would all make a corpus, and none that anybody wants.
"""

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from cluster.command import log
from cluster.paths import shown
from data_prep.label_files import LabelFile, find_label_files, foreign_labels
from data_prep.listing import SourceError
from data_prep.source_tree import SourceTree
from data_prep.split_names import are_splits, differ_in_split, names_no_class, split_of_file, split_of_folder
from data_prep.splits import in_order, matching_folder, suggested

_LOOKED_AT = 16
"""Sub-folders up to which each is looked into; more of them are classes, as far as their names do not tell."""
_DEPTH = 5
_DIGITS = re.compile(r"\d+")
_HELD = (".tar", ".tar.gz", ".tgz", ".parquet", ".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class SourcePlace:
    """A source as a user gives it."""

    source: str
    is_tar: bool = False
    top: str = ""
    """In a tar the folder that all images lie in, which is left out of paths."""

    def command(self, path: str = "", *settings: str) -> str:
        """The command that takes a folder inside it."""
        if not self.is_tar:
            return suggested(f"{self.source.rstrip('/')}/{path}" if path else self.source, *settings)
        inside = "/".join(filter(None, [self.top, path]))
        return suggested(self.source, *([f"inside={shlex.quote(inside)}"] if path else []), *settings)

    def refusal(self, what: str, *commands: str, are_folders: bool = True) -> SourceError:
        """An error that says what was found and which commands would do.

        Args:
            are_folders: whether there are folders of images, that could be classes all the same.
        """
        kind = "tar" if self.is_tar else "folder"
        taken = f"\n(kind={kind} takes the sub-folders for classes all the same)" if are_folders else ""
        return SourceError(f"source {self.source}: {what}. Give:\n  " + "\n  ".join(commands) + taken)


def refuse_other_layouts(tree: SourceTree, place: SourcePlace) -> None:
    """Refuse a source whose sub-folders are no classes.

    Raises:
        SourceError: says what they are instead and which command would be right.
    """
    names = tree.folders()
    _refuse_splits(tree, place, names)
    _refuse_img2dataset(tree, place, names)
    looked_at = names if len(names) <= _LOOKED_AT else [name for name in names if names_no_class(name)]
    direct = [name for name in looked_at if tree.images(name)]
    deeper = [name for name in looked_at if name not in direct and _has_images(tree, name)]
    held = dict(filter(None, (_data_below(tree, name) for name in looked_at if name not in direct)))
    if len(names) > _LOOKED_AT:
        for name in direct:
            _refuse_one_folder(tree, place, name, held)
        _warn_of_levels(tree, place, names)
        return
    if not direct and not deeper:
        _refuse_data_below(tree, place, held)
        return
    for name in direct:
        if len(direct) + len(deeper) == 1 or (names_no_class(name) and split_of_folder(name) is None):
            _refuse_one_folder(tree, place, name, held)
    if len(direct) > 1 and not deeper:
        _refuse_parts(tree, place, direct)
    if not direct:
        _refuse_level_above(tree, place, deeper, held)


def refuse_loose_images(
    tree: SourceTree, place: SourcePlace, above: tuple[SourceTree, SourcePlace, str] | None
) -> None:
    """Refuse a folder without sub-folders for what lies in it, where that is known.

    Args:
        above: the folder that it lies in, and its name there; None where there is none.

    Raises:
        SourceError: images beside a table of labels, or compressed tars.
    """
    labels = find_label_files(tree, "") if tree.images() else []
    if labels:
        raise place.refusal(
            f"the images lie directly in it, in no sub-folders; {shown(labels[0].path)} beside them says what is in "
            f"them",
            *(_with_labels(place, each, "") for each in labels[:3]), are_folders=False,
        )  # fmt: skip
    if tree.images() and above is not None:
        labels = find_label_files(above[0], above[2], certain_only=True)
        if labels:
            raise above[1].refusal(
                f"the images lie directly in {shown(above[2])}, in no sub-folders; {shown(labels[0].path)} beside it "
                f"says what is in them",
                *(_with_labels(above[1], each, above[2]) for each in labels[:3]), are_folders=False,
            )  # fmt: skip
    boxes = foreign_labels(tree, "") if tree.images() else None
    if boxes:
        raise SourceError(f"source {place.source}: the images lie directly in it, in no sub-folders; {boxes}")
    packed = [name for name in tree.files() if name.endswith((".tar.gz", ".tgz"))]
    if packed and not tree.images():
        raise SourceError(
            f"source {place.source} has {len(packed)} compressed tars, for example {shown(packed[0])}: WebDataset "
            f"shards are read where they are not compressed and end in .tar, so decompress them first (gunzip); a "
            f"compressed tar of images in class folders is a source of its own, given by its name"
        )


def _refuse_splits(tree: SourceTree, place: SourcePlace, names: list[str]) -> None:
    exact = [name for name in names if split_of_folder(name) is not None]
    if len({split_of_folder(name) for name in exact}) < 2:
        # imagenet21k_train is a split, `train station` a class: a class has its images directly in its folder
        exact = [name for name in names if split_of_file(name) is not None]
        if len({split_of_file(name) for name in exact}) < 2 or any(tree.images(name) for name in exact[:_LOOKED_AT]):
            exact = differ_in_split(names)
        if not exact:
            return
    splits = in_order(split for name in exact if (split := split_of_file(name)))
    exact.sort(key=lambda name: splits.index(split_of_file(name) or ""))
    commands = [_split_command(tree, place, "", name) for name in exact[:3]]
    others = [name for name in names if name not in exact]
    rest = f", beside {', '.join(map(shown, others[:3]))}" if others else ""
    raise place.refusal(f"its folders {', '.join(map(shown, exact[:4]))} are splits and no classes{rest}", *commands)


def _split_command(tree: SourceTree, place: SourcePlace, path: str, name: str) -> str:
    """The command for one of the splits in a folder: its class folders, or its images with a table beside them."""
    inside = f"{path}/{name}" if path else name
    if tree.images(inside) and not tree.folders(inside):
        labels = find_label_files(tree, inside, certain_only=not place.is_tar)
        if labels and labels[0].path.rpartition("/")[0] != inside:
            return _with_labels(place, labels[0], inside)
    split = split_of_file(name)
    if split is not None and matching_folder(tree.folders(path), split) == name:
        return place.command(path, f"split={split}")
    return place.command(inside)


def _refuse_img2dataset(tree: SourceTree, place: SourcePlace, names: list[str]) -> None:
    """Its `files` layout: 00000/000000000.jpg, .json and .txt."""
    if not names or not all(name.isdigit() and len(name) >= 5 for name in names):
        return
    files = tree.files(names[0])
    beside = {PurePosixPath(name).stem for name in files if name.endswith((".json", ".txt"))}
    images = [name for name in tree.images(names[0]) if PurePosixPath(name).stem in beside]
    if not images:
        return
    tars = f"{place.source.rstrip('/')}-tars"
    packing = (
        f"mkdir -p {shlex.quote(tars)}; for part in {shlex.quote(place.source)}/[0-9]*/; do tar --sort=name -cf "
        f'{shlex.quote(tars)}/"$(basename "$part")".tar -C "$part" .; done'
    )
    raise place.refusal(
        f"{', '.join(names[:2])}, ... are parts and no classes, each image has a .json or .txt beside it (the files "
        f"layout of img2dataset): pack each part into a tar, which is read with the labels of its .json members",
        packing, suggested(tars),
    )  # fmt: skip


def _refuse_one_folder(
    tree: SourceTree, place: SourcePlace, name: str, held: dict[str, list[str]], *, always: bool = False
) -> None:
    """Refuse one folder of images that is no class: by its name, or by what lies beside it."""
    labels = find_label_files(tree, name)
    boxes = foreign_labels(tree, name)
    loose = tree.images()
    if not (labels or boxes or held or loose or always or names_no_class(name)):
        return
    where = f"the images lie in one folder, {shown(name)}, which would be their only class"
    if labels:
        commands = [_with_labels(place, labels[0], name), *(_with_labels(place, each, name) for each in labels[1:3])]
        raise place.refusal(f"{where}; {shown(labels[0].path)} beside it says what is in them", *commands[:3])
    if held:
        _refuse_data_below(tree, place, held)
    if boxes:
        raise SourceError(f"source {place.source}: {where}; {boxes}")
    what = f"; {len(loose)} others lie directly in the source" if loose else ""
    unpacked = f"tar -xf {shlex.quote(place.source)} -C FOLDER; " + suggested(f"FOLDER/{name}", "labels=TABLE")
    raise place.refusal(
        f"{where}{what}. An image folder has a sub-folder of images for each class; where a table says the classes, "
        f"name it",
        unpacked if place.is_tar else place.command(name, "labels=TABLE"),
    )  # fmt: skip


def _with_labels(place: SourcePlace, labels: LabelFile, name: str) -> str:
    if place.is_tar:
        return f"tar -xf {shlex.quote(place.source)} -C FOLDER; " + suggested(
            f"FOLDER/{name}", f"labels=FOLDER/{shlex.quote(labels.path)}"
        )
    given = f"{labels.key}={shlex.quote(place.source.rstrip('/') + '/' + labels.path)}"
    settings = () if labels.key == "truth" else labels.settings
    return place.command("" if labels.names_folder else name, given, *settings)


def _refuse_parts(tree: SourceTree, place: SourcePlace, parts: list[str]) -> None:
    """Refuse folders that are parts of one whose images a table beside them names: images_part_1, images_part_2."""
    numbers = {_DIGITS.sub("#", name) for name in parts}
    if len(numbers) > 1:
        return
    labels = find_label_files(tree, parts[0], certain_only=True)
    if not labels or not find_label_files(tree, parts[-1], certain_only=True):
        return
    given = f"labels={shlex.quote(place.source.rstrip('/') + '/' + labels[0].path)}"
    raise place.refusal(
        f"its folders {', '.join(map(shown, parts[:3]))} are parts and no classes; {shown(labels[0].path)} beside them "
        f"says what is in their images",
        place.command("", given, *labels[0].settings),
    )  # fmt: skip


def _warn_of_levels(tree: SourceTree, place: SourcePlace, names: list[str]) -> None:
    some = names[:: max(1, len(names) // 4)][:4]
    below = [each for name in some if not tree.images(name) for each in tree.folders(name)[:2]]
    if len({*below}) > len(some):
        log.warning(
            "%s: the images lie in folders of the %d class folders (%s/%s, ...): if those are the classes, this is a "
            "level above them",
            place.source, len(names), some[0], below[0],
        )  # fmt: skip


def _refuse_data_below(tree: SourceTree, place: SourcePlace, held: dict[str, list[str]]) -> None:
    if not held:
        return
    name, files = next(iter(held.items()))
    where = "; ".join(
        f"{shown(each)} has {len(found)} ({', '.join(map(shown, found[:2]))})" for each, found in held.items()
    )
    splits = {split_of_file(file) for file in files}
    above = name.rpartition("/")[0]
    commands = [place.command(each) for each in list(held)[:3]]
    splits_above = [split for each in tree.folders(above) if (split := split_of_file(each))] if above else []
    if len(set(splits_above)) > 1:  # default/train/0000.parquet, default/partial-train/0000.parquet
        named = in_order(splits_above)
        commands = [place.command(above, f"split={split}") for split in named[:3]]
    elif len(splits) > 1:
        commands = [place.command(name, f"split={split}") for split in in_order(filter(None, splits))[:3]]
    raise place.refusal(f"its tars or tables lie in sub-folders: {where}", *commands, are_folders=False)


def _refuse_level_above(tree: SourceTree, place: SourcePlace, deeper: list[str], held: dict[str, list[str]]) -> None:
    """Where no sub-folder has an image directly in it: the classes are a level below, or deeper."""
    paths = [_below_single(tree, name) for name in deeper]
    below = [set(tree.folders(path)) for path in paths]
    if len(deeper) > 1:
        _refuse_splits_in_classes(tree, place, deeper)
        shared = all(len(a & b) > 1 and 2 * len(a & b) >= min(len(a), len(b)) for a, b in pairwise(below))
        if not shared or (len(set().union(*below)) <= len(deeper) and not any(map(names_no_class, deeper))):
            _warn_of_levels(tree, place, deeper)
            return  # classes with folders of their own below: n01/left, n01/right
        names = ", ".join(map(shown, sorted(set.intersection(*below))[:3]))
        raise place.refusal(
            f"its {len(deeper)} folders ({', '.join(map(shown, deeper[:3]))}) have the same folders in them ({names}, "
            f"...), which are the classes",
            *(place.command(path) for path in paths[:3]),
        )
    path = _class_level(tree, deeper[0])
    folders = tree.folders(path)
    loose = [name for name in folders if tree.images(f"{path}/{name}")]
    if len(loose) == 1 and len(folders) == 1:  # images/default, img_align_celeba/img_align_celeba
        _refuse_one_folder(tree, place, f"{path}/{loose[0]}", {}, always=True)
    if loose and all(map(split_of_folder, loose)) and not any(tree.folders(f"{path}/{name}") for name in folders):
        boxes = foreign_labels(tree, f"{path}/{loose[0]}")
        if boxes and not find_label_files(tree, f"{path}/{loose[0]}", certain_only=True):
            raise SourceError(f"source {place.source}: the images lie in {shown(path)} by splits; {boxes}")
    commands = [place.command(path)]
    if are_splits(folders):
        order = in_order(split for name in folders if (split := split_of_folder(name)))
        folders.sort(key=lambda name: order.index(split_of_folder(name) or ""))
        commands = [_split_command(tree, place, path, name) for name in folders[:3]]
    found = ", ".join(map(shown, folders[:3]))
    raise place.refusal(
        f"all images lie below one folder, {shown(deeper[0])}, which would be their only class; the folders further "
        f"down ({found}) look like it",
        *commands,
    )


def _refuse_splits_in_classes(tree: SourceTree, place: SourcePlace, classes: list[str]) -> None:
    """Refuse class folders that hold splits: bottle/train, bottle/test, cable/train, ..."""
    below = tree.folders(classes[0])
    splits = [name for name in below if split_of_folder(name)]
    if len({split_of_folder(name) for name in splits}) < 2 or not set(splits) & set(tree.folders(classes[1])):
        return
    where = place.source if not place.is_tar else "FOLDER"
    unpacked = f"tar -xf {shlex.quote(place.source)} -C FOLDER; " if place.is_tar else ""
    wanted = f"{where.rstrip('/')}-{splits[-1]}"
    split = shlex.quote(splits[-1])
    linking = (
        f"{unpacked}mkdir -p {shlex.quote(wanted)}; for one in {shlex.quote(where)}/*/; do "
        f'ln -s "$one"{split} {shlex.quote(wanted)}/"$(basename "$one")"; done'
    )
    raise place.refusal(
        f"each of its folders holds splits ({shown(classes[0])} has {', '.join(map(shown, below[:3]))}), which would "
        f"be joined. Links make a folder of one split",
        linking, suggested(wanted),
    )  # fmt: skip


def _below_single(tree: SourceTree, path: str) -> str:
    """The folder below one that leads nowhere else: amazon/images for amazon."""
    while len(folders := tree.folders(path)) == 1 and not tree.images(f"{path}/{folders[0]}"):
        path = f"{path}/{folders[0]}"
    return path


def _class_level(tree: SourceTree, path: str) -> str:
    """The folder below whose sub-folders have the images, or are splits."""
    for _ in range(_DEPTH):
        folders = tree.folders(path)
        below = [name for name in folders if _has_images(tree, f"{path}/{name}")]
        if are_splits(folders) or len(below) != 1 or tree.images(f"{path}/{below[0]}"):
            break
        path = f"{path}/{below[0]}"
    return path


def _has_images(tree: SourceTree, path: str, depth: int = _DEPTH) -> bool:
    if tree.images(path):
        return True
    return depth > 0 and any(_has_images(tree, f"{path}/{name}", depth - 1) for name in tree.folders(path)[:3])


def _data_below(tree: SourceTree, name: str) -> tuple[str, list[str]] | None:
    """The first folder, a folder of the source or one below it, that has tars or tables, and their names."""
    path = name
    for _ in range(_DEPTH):
        files = _data_files(tree, path)
        if files:
            return path, files
        below = [f"{path}/{each}" for each in tree.folders(path)]
        path = next((each for each in below if _data_files(tree, each)), below[0] if below else "")
        if not path:
            break
    return None


def _data_files(tree: SourceTree, path: str) -> list[str]:
    return [name for name in tree.files(path) if name.endswith(_HELD)]
