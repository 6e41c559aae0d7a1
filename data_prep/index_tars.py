"""Which tars of others are indexed, and how their labels end."""

import glob
import os
from collections import Counter
from pathlib import Path

from cluster import storage
from cluster.command import log
from cluster.folders import Folder, LocalFolder, file_at
from data_prep.corpus_format import MANIFEST
from data_prep.index_task import Tar
from data_prep.listing import SourceError
from data_prep.recognition import is_file, is_pattern, matching_names, source_folder
from data_prep.splits import described_splits, one_split
from data_prep.tar_headers import TarError
from data_prep.tar_sample_source import label_extension, tars_in


def list_tars(place: str, split: str | None) -> tuple[Tar, ...]:
    """The tars of a folder, one tar, or those that match a pattern: sorted by their names, without empty ones.

    Raises:
        SourceError: there is none, they are of several splits and none was asked for, or one cannot be indexed.
    """
    if "://" in place:
        folder, names, pattern = _named_tars(place)
        sizes = folder.tree()
        found = [Tar(folder, name, sizes[name]) for name in names]
    else:
        source = storage.local_path(place, "source")
        pattern = None if source.exists() else source.name
        paths = _local_tars(source)
        folder = LocalFolder(paths[0].parent)
        in_order = sorted(paths, key=lambda path: os.fsencode(path.name))
        found = [Tar(LocalFolder(path.parent), path.name, path.stat().st_size) for path in in_order]
    names = one_split(
        [tar.name for tar in found], split=split, place=place, pattern=pattern, known=described_splits(folder),
        program="index",
    )  # fmt: skip
    chosen = [tar for tar in found if tar.name in set(names)]
    empty = [tar for tar in chosen if not tar.size]
    if len(empty) == len(chosen):
        raise SourceError(f"source {place}: {empty[0]} is empty" + (f", as all {len(empty)} are" if empty[1:] else ""))
    if empty:
        log.warning("left out: %d empty tars, for example %s", len(empty), empty[0])
    return tuple(tar for tar in chosen if tar.size)


def _named_tars(place: str) -> tuple[Folder, list[str], str | None]:
    """The folder on a store, the names of its tars that are meant, and the pattern that chose them or None."""
    if is_file(place):
        folder, name = file_at(place, "source")
        return folder, [name], None
    if is_pattern(place):
        folder, pattern = file_at(place, "source")
        return folder, [name for name in matching_names(folder, pattern, place) if name.endswith(".tar")], pattern
    folder = source_folder(place)
    if not (names := tars_in(folder)):
        raise SourceError(f"source {place}: there is no tar in {folder}")
    return folder, names, None


def _local_tars(source: Path) -> list[Path]:
    if source.is_dir():
        found = [path for path in source.iterdir() if path.suffix == ".tar" and not path.name.startswith(".")]
        if not found:
            packed = next((path.name for path in source.iterdir() if path.name.endswith((".tar.gz", ".tgz"))), None)
            hint = f"; it has compressed ones ({packed}): decompress them first (gunzip)" if packed else ""
            if (source / MANIFEST).is_file():
                hint = ": it is a part, which shares those of a corpus; `python data_prep/copy_corpus.py` makes some"
            raise SourceError(f"source {source} has no .tar file{hint}")
    elif source.is_file():
        found = [source]
    else:
        found = [Path(path) for path in glob.glob(str(source)) if Path(path).is_file()]  # noqa: PTH207 - absolute
        if not found:
            raise SourceError(f"source {source}: there is no such file or folder, and no file matches it as a pattern")
    wrong = next((path for path in found if path.suffix != ".tar"), None)
    if wrong is not None:
        raise SourceError(f"source {source}: {wrong.name} is no .tar file")
    twice = [name for name, count in Counter(path.name for path in found).items() if count > 1]
    if twice:
        raise SourceError(f"source {source} has two tars of the name {twice[0]}: rename one, the corpus is one folder")
    return found


def label_extension_of(tars: tuple[Tar, ...]) -> str:
    """ "cls" or "json", by the first sample of the tars that has one of them.

    Raises:
        SourceError: none has; where a tar is damaged, that one is named.
    """
    damaged: TarError | None = None
    for tar in tars:
        try:
            extension = label_extension(tar.folder, tar.name)
        except TarError as error:
            damaged = damaged or error
            continue
        if extension:
            return extension
    if damaged is not None:
        raise SourceError(str(damaged)) from damaged
    raise SourceError(f"{tars[0]} has no label: neither .cls nor .json members")
