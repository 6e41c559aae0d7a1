"""Corpora that are parts of another one and share its shards: `python data_prep/subset.py CORPUS DESTINATION ...`."""

import hashlib
import json
import posixpath
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cluster.command import Progress, absolute_path, log, run_command
from cluster.folders import Folder, folder_at
from cluster.settings import Settings, SettingsError, parse_command
from data_prep.card import CARD, write_card
from data_prep.columns import LABEL_DTYPE
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import HashedFile
from data_prep.corpus_format import (
    FORMAT_VERSION,
    INDEX,
    LABEL_FORM,
    LABEL_POINTERS,
    LABELS,
    MANIFEST,
    PLACES,
    SHARDS_AT,
    CorpusError,
    manifest_hash,
)
from data_prep.corpus_jobs import check_places, held, written
from data_prep.manifest import read_manifest
from data_prep.sample_table import TABLE
from data_prep.stratify import apportion, random_places

DESCRIPTION = """
Make corpora that are parts of another one. No image is copied: they share its shards, which must stay where they are
relative to them, and have an index of their own; every command here reads them like any other corpus. They have no
tars: webdataset, DALI's reader and others would read the shards whole, with images that are not in the part.
`python data_prep/copy_corpus.py PART COPY` makes a corpus with tars of its own. Which images are in which part depends
on the corpus, the seed and the sizes alone.

  CORPUS       the folder of a corpus, or of such a part of one
  DESTINATION  a new folder beside it, with one corpus for each part:
               with holdout=   DESTINATION/heldout and DESTINATION/train, the rest
               with subsets=   DESTINATION/10pct, DESTINATION/5000-images, ...; with holdout too, of its rest

By default every class keeps its share: it has its exact share of a part, rounded up or down. With holdout, classes with
a single image keep it for training.

examples:
  python data_prep/subset.py /data/corpora/in21k /data/corpora/in21k-parts holdout=0.01
  python data_prep/subset.py /data/corpora/in21k /data/corpora/in21k-scaling subsets=[0.1,0.3,1.0]
"""

_PIECE = 1 << 18
"""Samples whose rows are written at a time."""
_KIND = "subset"

Size = int | float
"""A share if it is at most 1, else a number of images."""


class SubsetSettings(Settings):
    """Settings of making parts of a corpus."""

    corpus: str
    """Folder of the corpus that parts are made of."""
    destination: str
    """Folder for the parts; made if it is not there."""
    holdout: Size | None = Field(None, gt=0)
    """How much is held out: a share (0.01) or a number of images (10000), at most half."""
    subsets: tuple[Size, ...] = ()
    """Sizes of random parts, shares or numbers of images, each inside the next larger one."""
    stratify: bool = True
    """Whether each class keeps its share (for many labels an image: the heaviest); else images are drawn freely."""
    seed: int = Field(0, ge=0)
    """Of the choice."""


@dataclass(frozen=True)
class Part:
    """One of the corpora that are made."""

    name: str
    samples: NDArray[np.int64]
    """Ids in the corpus that it is a part of, ascending."""
    choice: dict[str, Any]
    """What they depend on, beside that corpus."""


def main() -> None:
    """The command."""
    make_parts(
        parse_command(
            SubsetSettings, prog="data_prep/subset.py", description=DESCRIPTION, positionals=("corpus", "destination")
        )
    )


def make_parts(settings: SubsetSettings) -> dict[str, Corpus]:
    """Make parts of a corpus, or those that are not there yet; returns all of them by name, opened.

    Raises:
        SettingsError: sizes that cannot be had.
        CorpusError: the corpus is missing or damaged, or the destination holds something else.
        LeaseError: another job works in the destination.
    """
    base = Corpus.open(absolute_path(settings.corpus, "corpus"))
    destination = folder_at(absolute_path(settings.destination, "destination"), "destination")
    check_places(base.folder, destination)
    made = {}
    with held(destination):
        for part in choose(base, settings):
            folder = destination.child(part.name)
            made[part.name] = _made_before(folder, base, part.choice) or _write(folder, base, part)
            with written(folder, advice=""):
                write_card(made[part.name])
    first = next(iter(made.values()))
    log.info(
        "the parts share the tars in %s and have none of their own: for what reads tars (webdataset, timm, DALI's "
        "reader), `python data_prep/copy_corpus.py %s COPY` makes some", base.shards_folder, first,
    )  # fmt: skip
    return made


def choose(base: Corpus, settings: SubsetSettings) -> list[Part]:
    """Which samples are in which part: a function of the corpus and the settings.

    Raises:
        SettingsError: sizes that cannot be had.
    """
    if settings.holdout is None and not settings.subsets:
        raise SettingsError("nothing to make: give holdout= or subsets=")
    labels = np.asarray(base.index["label"], np.int64) + 1  # 0: without any label
    strata = labels if settings.stratify else np.zeros(base.num_samples, np.int64)
    sizes = np.bincount(strata)
    places = random_places(strata, settings.seed)
    held = np.zeros(len(sizes), np.int64)
    choice = {"seed": settings.seed, "stratify": settings.stratify, "holdout": settings.holdout}
    parts = []
    if settings.holdout is not None:
        held = _hold_out(base, settings, sizes)
        is_held = places < held[strata]
        parts.append(Part("heldout", np.flatnonzero(is_held), {**choice, "part": "heldout"}))
        parts.append(Part("train", np.flatnonzero(~is_held), {**choice, "part": "train"}))
    rest = int((sizes - held).sum())
    totals = [_total(size, rest, f"subsets = {list(settings.subsets)}") for size in settings.subsets]
    wrong = [pair for pair in pairwise(totals) if pair[0] >= pair[1]]
    if wrong:
        raise SettingsError(f"subsets = {list(settings.subsets)}: give sizes in ascending order (of {rest:,} images)")
    for number, counts in enumerate(apportion(sizes - held, totals, settings.seed)):
        size = settings.subsets[number]
        inside = (places >= held[strata]) & (places < (held + counts)[strata])
        name = f"{100 * size:g}pct" if size <= 1 else f"{size}-images"
        parts.append(Part(name, np.flatnonzero(inside), {**choice, "subsets": list(settings.subsets[: number + 1])}))
    return parts


def _hold_out(base: Corpus, settings: SubsetSettings, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of each stratum are held out."""
    assert settings.holdout is not None
    count = _total(settings.holdout, base.num_samples, f"holdout = {settings.holdout}")
    single = settings.stratify & (sizes == 1)
    divisible = np.where(single, 0, sizes)
    if 2 * count > divisible.sum():
        raise SettingsError(
            f"holdout = {settings.holdout} is {count:,} images: at most half of the {int(divisible.sum()):,} can be "
            f"held out" + (" that are not alone in their class" if single.any() else "")
        )
    if single.any():
        log.warning("%s classes have a single image: it stays in train", f"{int(single.sum()):,}")
    return apportion(divisible, [count], settings.seed)[0]


def _total(size: Size, whole: int, what: str) -> int:
    if size > 1 and size != int(size):
        raise SettingsError(f"{what}: {size} is neither a share (at most 1) nor a whole number of images")
    if size <= 0 or size > whole:
        raise SettingsError(f"{what}: {size} cannot be had of {whole:,} images")
    return max(1, round(size * whole)) if size <= 1 else int(size)


def _made_before(folder: Folder, base: Corpus, choice: Mapping[str, Any]) -> Corpus | None:
    found = [*folder.names(), *folder.folders()]
    if not found:
        return None
    if MANIFEST not in found:
        rows = {INDEX, LABELS, LABEL_POINTERS, PLACES}
        if rows >= set(found) - {CARD, TABLE} and rows & set(found):
            return None  # of a run that was killed
        raise CorpusError(f"destination {folder} is not empty (it has {sorted(found)[0]!r}): give another folder")
    if read_manifest(folder).get("plan_hash") != _plan_hash(base, choice):
        raise CorpusError(
            f"destination {folder} holds another corpus, or a part of another one or of another choice: give another "
            f"folder, or remove that one"
        )
    corpus = Corpus.open(folder)
    log.info("%s is there already: %s images", corpus, f"{corpus.num_samples:,}")
    return corpus


def _plan_hash(base: Corpus, choice: Mapping[str, Any]) -> str:
    content = [FORMAT_VERSION, base.corpus_hash, dict(choice)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _write(folder: Folder, base: Corpus, part: Part) -> Corpus:
    """Write a part's index and manifest."""
    with written(folder, advice=""):
        folder.write_json(MANIFEST, _manifest(folder, base, part))
    corpus = Corpus.open(folder)
    empty = sum(
        not count and bool(before) for count, before in zip(corpus.class_counts, base.class_counts, strict=True)
    )
    log.info(
        "%s: %s of %s images in %d of %d shards%s; corpus hash %s",
        corpus, f"{corpus.num_samples:,}", f"{base.num_samples:,}", len(corpus.shard_sizes), len(base.shard_sizes),
        f", none of {empty:,} classes" if empty else "", corpus.corpus_hash,
    )  # fmt: skip
    return corpus


def _manifest(folder: Folder, base: Corpus, part: Part) -> dict[str, Any]:
    shards_at = _relative(base.shards_folder, folder)
    folder.remove_unfinished()
    in_shards = np.bincount(base.index["shard"][part.samples], minlength=len(base.shard_sizes))
    used = np.flatnonzero(in_shards)
    new_number = np.cumsum(in_shards > 0) - 1
    many = base.label_kind == "multi"
    counts = np.zeros(len(base.classes), np.int64)
    files = {name: HashedFile(folder, name) for name in (INDEX, PLACES, *((LABELS, LABEL_POINTERS) if many else ()))}
    if many:
        files[LABEL_POINTERS].write(np.zeros(1, "<u8").tobytes())
    progress = Progress(len(part.samples), "images", f"writing {part.name}")
    labels_before, image_bytes = 0, 0
    for start in range(0, len(part.samples), _PIECE):
        ids = part.samples[start : start + _PIECE]
        rows = base.index[ids]
        rows["shard"] = new_number[rows["shard"]]
        files[INDEX].write(rows.tobytes())
        files[PLACES].write(base.places_of(ids).astype("<u4").tobytes())
        of_row, classes, weights = base.labels_of(ids)
        counts += np.bincount(classes, minlength=len(counts))
        image_bytes += int(rows["length"].sum(dtype=np.int64))
        if many:
            labels = np.empty(len(classes), LABEL_DTYPE)
            labels["class"], labels["weight"] = classes, weights
            ends = labels_before + np.cumsum(np.bincount(of_row, minlength=len(ids)))
            labels_before = int(ends[-1])
            files[LABELS].write(labels.tobytes())
            files[LABEL_POINTERS].write(ends.astype("<u8").tobytes())
        progress.update(len(ids))
    shards = [base.manifest["shards"][number] for number in used.tolist()]
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "label_kind": base.label_kind,
        "classes": base.classes,
        "class_descriptions": base.class_descriptions,
        "class_counts": counts.tolist(),
        "num_samples": len(part.samples),
        "num_bytes": image_bytes,
        "quarantined": 0,
        "shards": [
            {
                **shard,
                "samples": int(in_shards[number]),
                "samples_there": shard.get("samples_there", shard["samples"]),
            }
            for number, shard in zip(used.tolist(), shards, strict=True)
        ],
        "files": {name: file.close() for name, file in files.items()},
        "plan_hash": _plan_hash(base, part.choice),
        "settings": part.choice,
        "source": {"kind": _KIND, "corpus_hash": base.corpus_hash, "images": base.num_samples},
        "created_by": {"source": base.url},
        SHARDS_AT: shards_at,
    }
    if LABEL_FORM in base.manifest:
        manifest[LABEL_FORM] = base.manifest[LABEL_FORM]
    manifest["corpus_hash"] = manifest_hash(manifest)
    return manifest


def _relative(shards: Folder, folder: Folder) -> str:
    """Where shards are as seen from a folder.

    Raises:
        CorpusError: one is on an object store and the other is not, or they are in different buckets.
    """
    (scheme, _, there), (own_scheme, _, here) = shards.url.rpartition("://"), folder.url.rpartition("://")
    if scheme != own_scheme or (scheme and there.split("/")[0] != here.split("/")[0]):
        raise CorpusError(
            f"a part in {folder} cannot share the shards in {shards}: give a destination "
            + (f"in the same bucket, {scheme}://{there.split('/')[0]}" if scheme else "on the same file system")
        )
    return posixpath.relpath(there, here)


if __name__ == "__main__":
    run_command(main)
