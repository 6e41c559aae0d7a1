"""The images that a table names: what their paths may be, which files they are, and where those lie."""

import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cluster.command import Progress, log
from cluster.folders import Folder, LocalFolder
from cluster.paths import shown, why_not_inside
from cluster.redact import address_without_credentials
from cluster.storage import NOT_THERE, unreadable
from data_prep.columns import Strings
from data_prep.listing import SourceError, is_junk
from data_prep.remote_images import FetchPolicy, RemoteImages, check_fetching
from data_prep.source_reader import FileImages, Images
from data_prep.source_tree import is_image_name
from data_prep.splits import suggested

_THREADS = 16
_CHUNK = 4096
_TRIED = 20
"""Images that are looked for where they might be."""
_FOLDERS = 16


@dataclass(frozen=True)
class Fetching:
    """How images of other machines are had."""

    assumed_bytes: int = 100_000
    """Of an image that must be fetched to know."""
    policy: FetchPolicy = field(default_factory=FetchPolicy)
    allowed: bool = False
    """Whether http(s) addresses are asked for their images."""


def as_files(paths: list[str], image_of_row: NDArray[np.int64], root: Folder) -> tuple[list[str], NDArray[np.int64]]:
    """Paths as the files are called: written in one way (a/x for ./a/x and a//x), and with their endings.

    Returns:
        The different ones, sorted, and which of them each row names.

    Raises:
        SourceError: an image that is named without its ending could be several files.
    """
    normal = _with_endings([path if "://" in path else str(PurePosixPath(path)) for path in paths], root)
    normal = _in_sub_folders(normal, root)
    if normal == paths:
        return paths, image_of_row
    unique = sorted(set(normal), key=str.encode)
    numbers = {path: number for number, path in enumerate(unique)}
    return unique, np.array([numbers[path] for path in normal], np.int64)[image_of_row]


def check_paths(
    paths: Sequence[str],
    image_of_row: NDArray[np.int64],
    lines: NDArray[np.int64],
    where: str,
    *,
    inside_only: bool = False,
) -> None:
    """Refuse paths that can be none, or lead out of the folder that they are relative to.

    Args:
        image_of_row: which of the paths each row names.
        lines: where each row stands.
        inside_only: whether absolute ones are refused, too.

    Raises:
        SourceError: one is; names its line.
    """
    for number, path in enumerate(paths):
        if not PurePosixPath(path).parts:
            problem: str | None = "is empty"
        elif "://" in path or (path.startswith("/") and not inside_only):
            problem = "has a zero character" if "\0" in path else None
        else:
            problem = why_not_inside(path)
        if problem is not None:
            line = lines[np.flatnonzero(image_of_row == number)[0]]
            raise SourceError(
                f"{where}, line {line}: path {shown(path)} {problem}: it must be an address, "
                f"{'' if inside_only else 'an absolute path, '}or relative to the source and inside it"
            )


def _with_endings(paths: list[str], root: Folder) -> list[str]:
    """Paths with the endings of the files that they name without (ids: 000001 is 000001.jpg)."""
    bare = [path for path in paths if not is_image_name(path) and "://" not in path and not path.startswith("/")]
    if not bare:
        return paths
    sizes = dict(zip(bare, _sizes(root, bare).tolist(), strict=True))
    missing = [path for path in bare if sizes[path] < 0]
    there: dict[str, list[str]] = {}
    for name in _names_in({str(PurePosixPath(path).parent) for path in missing}, root):
        if is_image_name(name):
            there.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, str] = {}
    for path in missing:
        names = there.get(path, [])
        if len(names) > 1:
            raise SourceError(
                f"image {shown(path)} of the table could be {shown(names[0])} or {shown(names[1])} in {root}: the "
                f"table must name it with its ending"
            )
        if names:
            found[path] = names[0]
    if found:
        path, name = next(iter(found.items()))
        log.info("%s images are named without their endings: %s is %s", f"{len(found):,}", shown(path), shown(name))
    return [found.get(path, path) for path in paths]


def _in_sub_folders(paths: list[str], root: Folder) -> list[str]:
    """Where no path is that of a file: the files of these names, or stems, in sub-folders (ids in images_part_1, _2).

    Raises:
        SourceError: an image could be several files.
    """
    if any("://" in path or path.startswith("/") for path in paths) or (_sizes(root, paths[:_TRIED]) >= 0).any():
        return paths
    below = [name for name in root.folders()[:_FOLDERS] if not is_junk(os.fsencode(name))]
    there: dict[str, list[str]] = {}
    for name in _names_in(set(below), root):
        if is_image_name(name):
            base = name.rpartition("/")[2]
            for key in {base, base.rpartition(".")[0]}:
                there.setdefault(key, []).append(name)
    if not all(path in there for path in paths[:_TRIED]):
        return paths
    twice = next((there[path] for path in paths if len(there.get(path, [])) > 1), None)
    if twice is not None:
        folders = " or ".join(f"{root}/{name.rpartition('/')[0]}" for name in twice[:2])
        raise SourceError(
            f"an image of the table could be {shown(twice[0])} or {shown(twice[1])} in {root}: give the folder of the "
            f"images as the source ({folders}), with labels=TABLE"
        )
    found = {path: there[path][0] for path in paths if path in there}
    example = next(iter(found))
    log.info("the images of the table lie in sub-folders of %s: %s is %s", root, shown(example), shown(found[example]))
    return [found.get(path, path) for path in paths]


def _names_in(folders: set[str], root: Folder) -> Iterator[str]:
    """The files directly in some folders of a folder; their paths."""
    if root.local is None:
        yield from (name for name in root.tree() if str(PurePosixPath(name).parent) in folders)
        return
    for folder in sorted(folders):
        if folder == ".":
            yield from root.names()
        else:
            yield from (f"{folder}/{name}" for name in root.child(folder).names())


def why_none(paths: Sequence[str], root: Folder, where: str) -> str:
    """Why none of a table's images is there, with the folder that has them where that is found."""
    said = f"none of the {len(paths)} images named in {where} is in {root.url}, for example not {paths[0]!r}"
    table = where.removeprefix("table ")
    for place in _likely(root):
        first = PurePosixPath(paths[0])
        if first.is_absolute() or "://" in paths[0]:
            break
        names = set(map(str, _names_in({str(first.parent)}, place)))
        if any(path in names or _bare(names, path) for path in paths[:_TRIED]):
            return f"{said}, but {place} has it. Give:\n  {suggested(place.url, f'labels={shlex.quote(table)}')}"
    return (
        f"{said}: relative paths are relative to the folder given as the source (with labels=TABLE), or to the "
        f"table's own"
    )


def _bare(names: set[str], path: str) -> bool:
    return any(name.rpartition(".")[0] == path for name in names if is_image_name(name))


def _likely(root: Folder) -> Iterator[Folder]:
    """Folders that may have the images that one does not: those in it, those a level deeper, and the one above."""
    below = [root.child(name) for name in root.folders()[:_FOLDERS] if not name.startswith(".")]
    yield from below
    for folder in below:
        yield from (folder.child(name) for name in folder.folders()[:_FOLDERS])
    if root.local is not None and root.local.parent != root.local:
        yield LocalFolder(root.local.parent)


def locate(
    paths: list[str], root: Folder, options: Fetching
) -> tuple[list[str], NDArray[np.uint64], Images, NDArray[np.bool_]]:
    """Find the images of paths.

    Returns:
        Names as they are written down, sizes in bytes, where the images are, and which are missing.

    Raises:
        SourceError: some would have to be fetched, and nobody asked for that.
    """
    far = np.array(["://" in path for path in paths], np.bool_)
    absolute = np.array([path.startswith("/") for path in paths], np.bool_)
    if not far.any() and not absolute.any():
        sizes = _sizes(root, paths)
        images: Images = FileImages(root, Strings.of([os.fsencode(path) for path in paths]))
        return paths, np.maximum(sizes, 0).astype(np.uint64), images, sizes < 0
    if absolute.all():
        inner = [path.lstrip("/") for path in paths]
        sizes = _sizes(LocalFolder(Path("/")), inner)
        images = FileImages(LocalFolder(Path("/")), Strings.of([os.fsencode(path) for path in inner]))
        return paths, np.maximum(sizes, 0).astype(np.uint64), images, sizes < 0
    check_fetching([path for path, is_far in zip(paths, far, strict=True) if is_far], options.allowed)
    addresses = [
        path if is_far or is_absolute else f"{root.url}/{path}"
        for path, is_far, is_absolute in zip(paths, far, absolute, strict=True)
    ]
    images = RemoteImages.at(addresses, options.policy)
    assumed = np.full(len(paths), options.assumed_bytes, np.uint64)
    log.info(
        "%s of %s images are fetched where the table says; shards are cut as if each had %s bytes (image_kb)",
        f"{int(far.sum()):,}", f"{len(paths):,}", f"{options.assumed_bytes:,}",
    )  # fmt: skip
    names = [address_without_credentials(path) for path in paths]
    if indistinct := len(paths) - len(set(names)):
        log.warning(
            "%s addresses differ from others only in what is not written down (a key, a token, what follows a #): "
            "nothing in the corpus will tell their images apart",
            f"{indistinct:,}",
        )
    return names, assumed, images, np.zeros(len(paths), np.bool_)


def _sizes(root: Folder, paths: Sequence[str]) -> NDArray[np.int64]:
    """Bytes of files in a folder, -1 for those that are not there."""
    local = root.local
    if local is None:
        known = root.tree()
        return np.array([known.get(path, -1) for path in paths], np.int64)
    progress = Progress(len(paths), "images", "listing")

    def sizes_of(chunk: Sequence[str]) -> list[int]:
        found = []
        for path in chunk:
            try:
                found.append(Path(local, path).stat().st_size)
            except OSError as error:
                if error.errno not in NOT_THERE:
                    raise unreadable(Path(local, path), error) from error
                found.append(-1)
        return found

    sizes: list[int] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
        for part in pool.map(sizes_of, chunks):
            sizes.extend(part)
            progress.update(len(part))
    return np.array(sizes, np.int64)
