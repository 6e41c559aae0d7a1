"""Adds images to a corpus: new shards under a new version of the manifest. The older versions stay as they are."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from cluster.command import log
from cluster.folders import Folder
from cluster.redact import address_without_credentials
from data_prep.class_names import after, put_in_order
from data_prep.columns import Labels
from data_prep.convert import Conversion
from data_prep.corpus import Corpus
from data_prep.corpus_format import (
    COPY_OF,
    PLAN,
    SHARDS_AT,
    CorpusError,
    file_of_version,
    manifest_of_version,
    needs_own_shards,
)
from data_prep.label_report import alike
from data_prep.left_out import RemovedImage, read_lines
from data_prep.listing import Listing, SourceError
from data_prep.manifest import newest_version, read_manifest, read_plan
from data_prep.origin_lines import line_of_before, one_line
from data_prep.remote_images import NOT_FETCHED, RemoteImages
from data_prep.removed import REMOVED, UNCOMPARED
from data_prep.shard_plan import Appended, Plan
from data_prep.shard_task import remove_shard
from data_prep.source_reader import DANGLING, UNREADABLE
from data_prep.table_labels import NO_LABEL
from data_prep.target_weights import check_corpus_weights

NewClasses = Literal["append", "refuse"]
_MAY_COME = ("named in the table", NOT_FETCHED, UNCOMPARED, UNREADABLE, DANGLING, NO_LABEL)
"""How the reasons begin for which an image was left out that was missing, or its label: they may be there now."""
_SHOWN = 5
_SHARD_NAME = re.compile(r"shard-(\d{6,})\.tar")


def what_is_new(listing: Listing, folder: Folder, conversion: Conversion) -> tuple[Listing, Corpus]:
    """The images of a listing that a corpus does not have yet, and the version of the corpus that they add to.

    An image is told by its origin: its path relative to the source.

    Raises:
        CorpusError: there is no corpus, or it is damaged in a way that appending does not repair.
        SourceError: labels of another kind.
    """
    before = _version_to_add_to(folder)
    if SHARDS_AT in before.manifest:
        raise CorpusError(f"{folder} is a subset that shares the shards of another corpus: append to that one")
    if COPY_OF in before.manifest or needs_own_shards(before.manifest):
        raise CorpusError(
            f"{folder} is the copy of a part of another corpus: append to that one, or make a corpus of this one that "
            f"can be added to (`python data_prep/shard.py {folder} DESTINATION`)"
        )
    many = isinstance(listing.labels, Labels)
    if many != (before.label_kind == "multi"):
        raise SourceError(
            f"{listing.place} has {'many labels' if many else 'one label'} an image, the corpus {folder} has "
            f"{'one' if many else 'many'}: that cannot be appended "
            f"(labels_per_image={'one' if many else 'many'} reads a table so, where it can be)"
        )
    if many:  # or the weights of old and new images would be of two scales
        check_corpus_weights(before)
    return _not_there_yet(listing, before, conversion), before


def plan_append(
    new: Listing,
    before: Corpus,
    folder: Folder,
    shard_bytes: int,
    seed: int,
    conversion: Conversion,
    new_classes: NewClasses,
) -> Plan:
    """Plan shards for new images, at least one, that go after those of a corpus in a folder.

    Raises:
        CorpusError: the folder has a damaged newest version of other images.
        SourceError: new classes that are refused.
    """
    classes = after(before.classes, [name for name in new.classes if name in _used(new)])
    found = classes[len(before.classes) :]
    if found and new_classes == "refuse":
        raise SourceError(
            f"{new.place} has {len(found)} classes that the corpus does not have ({', '.join(found[:5])}): give "
            f"new_classes=append to add them at the end, or relabel=FILE"
        )
    if found:
        log.info("%d new classes at the end of the list: %s", len(found), ", ".join(found[:5]))
        for new_name, known_name in alike(found, before.classes)[:_SHOWN]:
            log.warning(
                "the new class %r is nearly called like %r, which the corpus has: relabel=FILE with a line "
                "%s<tab>%s makes them one", new_name, known_name, new_name, known_name,
            )  # fmt: skip
    said = dict(zip(new.classes, new.class_descriptions or new.classes, strict=True))
    if before.class_descriptions is not None or new.class_descriptions is not None:
        known = dict(zip(before.classes, before.names, strict=True))
        descriptions = [known.get(name) or said.get(name, name) for name in classes]
    else:
        descriptions = None
    new = replace(put_in_order(new, classes, None, "the corpus"), class_descriptions=descriptions)
    planned = before.num_samples + before.manifest["quarantined"]
    appended = Appended(before.version + 1, before.corpus_hash, _first_shard(folder, before), planned)
    plan = Plan(new, descriptions, shard_bytes, seed, conversion, appended)
    _drop_other_plan(folder, plan)
    return plan


def _version_to_add_to(folder: Folder) -> Corpus:
    try:
        return Corpus.open(folder)
    except CorpusError as error:
        # shards of the newest version may be damaged: the same command makes it anew from the one before
        newest = newest_version(folder)
        if newest is None or newest == 1:
            raise
        log.warning("%s; making version %d again", str(error).split(". ")[0], newest)
        return Corpus.open(folder, version=newest - 1)


def _not_there_yet(listing: Listing, before: Corpus, conversion: Conversion) -> Listing:
    # Older versions wrote down some credentials that are left out now.
    there = np.fromiter((_digest(address_without_credentials(origin)) for origin in _origins(before)), "S16")
    here = np.fromiter((_digest(one_line(listing.names[row])) for row in range(len(listing))), "S16", len(listing))
    _take_lines_of_before(listing, here, there)
    is_new = ~np.isin(here, there)
    if isinstance(listing.images, RemoteImages):
        _refuse_indistinct(listing, before, here, there)
    if not isinstance(listing.images, RemoteImages) and not _were_converted(before, conversion):
        _refuse_other_images(listing, before, here, there[: before.num_samples])
    rows = np.flatnonzero(is_new)
    log.info(
        "%s of %s images are in %s already or were left out of it before, by their origins; %s are new",
        f"{len(listing) - len(rows):,}", f"{len(listing):,}", before, f"{len(rows):,}",
    )  # fmt: skip
    left_before = {entry["origin"] for entry in before.quarantined()}
    kept = replace(listing, left_out=tuple(item for item in listing.left_out if item[0] not in left_before))
    return kept.take(rows)


def _take_lines_of_before(listing: Listing, here: NDArray[np.bytes_], there: NDArray[np.bytes_]) -> None:
    """Replace digests of the listing by those of the lines that an older version wrote, where the corpus has them.

    Where it has such a line as often as names of the listing have it now, it is that of those.

    Args:
        here, there: digests of the origins of the listing, and of the corpus.
    """
    names = ((row, listing.names[row]) for row in range(len(listing)))
    changed = [
        (row, line_of_before(name)) for row, name in names if b"\\" in name and one_line(name) != line_of_before(name)
    ]
    if not changed:
        return
    rows, lines = np.array([row for row, _ in changed]), np.array([_digest(line) for _, line in changed], "S16")
    known, taken_now = (Counter(digests[np.isin(digests, lines)].tolist()) for digests in (there, here))
    before = Counter(lines.tolist())
    has = np.array([known[line] >= taken_now[line] + before[line] for line in lines.tolist()])
    taken = has & ~np.isin(here[rows], there)
    here[rows[taken]] = lines[taken]


def _refuse_indistinct(listing: Listing, before: Corpus, here: NDArray[np.bytes_], there: NDArray[np.bytes_]) -> None:
    """Refuse addresses that differ in credentials only, where the corpus has some of them: nothing tells which.

    Args:
        here, there: digests of the origins of the listing, and of the corpus.
    """
    origins, rows, counts = np.unique(here, return_index=True, return_counts=True)
    known, known_counts = np.unique(there, return_counts=True)
    has = dict(zip(known.tolist(), known_counts.tolist(), strict=True))
    found = zip(origins.tolist(), rows.tolist(), counts.tolist(), strict=True)
    mixed = [row for origin, row, count in found if 0 < has.get(origin, 0) < count]
    if mixed:
        raise SourceError(
            f"{listing.place} has addresses that differ only in what is not written down (a key, a token, what follows "
            f"a #), for example {one_line(listing.names[mixed[0]])!r}: it cannot be told which of them {before} "
            "has. Give a table of those that are new, under addresses that differ otherwise"
        )


def _were_converted(corpus: Corpus, conversion: Conversion) -> bool:
    """Whether images of a corpus, in any version, may have other bytes than their source."""
    if conversion.max_side or conversion.baseline:
        return True
    versions = [read_manifest(corpus.folder, manifest_of_version(version)) for version in range(1, corpus.version)]
    return any(manifest.get("converted") for manifest in (*versions, corpus.manifest))


def _refuse_other_images(listing: Listing, before: Corpus, here: NDArray[np.bytes_], there: NDArray[np.bytes_]) -> None:
    """Refuse images that have the origin of one in the corpus, and another size.

    Args:
        here: digests of the origins of the listing.
        there: of the corpus, in the order of its ids.
    """
    order = np.argsort(there, kind="stable")
    first, end = (np.searchsorted(there, here, side, sorter=order) for side in ("left", "right"))
    rows = np.flatnonzero(first < end)
    lengths = np.asarray(before.index["length"])
    other = rows[lengths[order[first[rows]]] != listing.sizes[rows]]
    # older versions wrote one line for some names that differ: one of the images is of this size
    alike = [row for row in other.tolist() if listing.sizes[row] in lengths[order[first[row] : end[row]]]]
    other = np.setdiff1d(other, alike)
    if len(other):
        raise SourceError(
            f"{len(other):,} of {len(rows):,} images that {before} has by their paths are of another size in "
            f"{listing.place}, for example {one_line(listing.names[int(other[0])])!r}: an image is told by its path "
            f"relative to the source, so these would be taken for images that are there already. If they are another "
            f"delivery, give the folder above both deliveries as the source, or rename the files, so that the paths "
            f"differ; images that were changed in place need a new corpus"
        )


def _origins(corpus: Corpus) -> Iterator[str]:
    """What the corpus has, and what was left out of it for good: damaged images, and duplicates."""
    yield from corpus.origins()
    for entry in corpus.quarantined():
        if not entry["reason"].startswith(_MAY_COME):
            yield entry["origin"]
    for version in range(1, corpus.version + 1):
        name = file_of_version(REMOVED, version)
        if corpus.folder.size(name) is not None:
            lines = corpus.folder.read_bytes(name).splitlines()
            entries = read_lines(RemovedImage, lines, f"{corpus.folder}/{name}")
            yield from (entry.origin for entry in entries if entry.reason != UNCOMPARED)


def _digest(origin: str) -> bytes:
    return xxhash.xxh3_128_digest(origin.encode("utf-8", "backslashreplace"))


def _used(listing: Listing) -> set[str]:
    labels = listing.labels.rows["class"] if isinstance(listing.labels, Labels) else listing.labels
    return {listing.classes[number] for number in np.unique(labels).tolist()}


def _first_shard(folder: Folder, before: Corpus) -> int:
    """One more than any shard that an older version planned or has: even one that came out empty keeps its number."""
    numbers = [0]
    for shard in before.manifest["shards"]:
        name = _SHARD_NAME.fullmatch(shard["name"])
        numbers.append(int(name[1]) + 1 if name else 0)
    for version in range(1, before.version + 1):
        plan = read_plan(folder, version)
        numbers.append(plan.appended.first_shard + plan.shards)
    return max(numbers)


def _drop_other_plan(folder: Folder, plan: Plan) -> None:
    """Remove the unfinished shards of an earlier attempt to append other images; no manifest knows them."""
    name = file_of_version(PLAN, plan.version)
    if folder.size(name) is None:
        return
    there = read_plan(folder, plan.version)
    if folder.read_json(name) == plan.describe():
        return
    newest = newest_version(folder)
    if newest is None or newest >= plan.version:
        raise CorpusError(
            f"version {newest} of {folder} is damaged, and was made from other images or with other settings than "
            f"these: give those again to repair it"
        )
    log.warning("%s: an unfinished append of other images, or with other settings, is removed", folder)
    first, count = there.appended.first_shard, there.shards
    found = filter(None, (_SHARD_NAME.fullmatch(f"{file.partition('.')[0]}.tar") for file in folder.names()))
    for tar in sorted({name[0] for name in found if first <= int(name[1]) < first + count}):
        remove_shard(folder, tar)
    folder.remove(name)
