"""Takes out of a listing what is there twice and what is in evaluation sets, exact copies and near ones.

Kolesnikov et al. ("Big Transfer", 2019, appendix) and Dosovitskiy et al. (2020, section 4.1) remove from the
pre-training data what is nearly the same as an image of the evaluation sets. Here each image of the source is described
once (perceptual_hash.py), pairs with near hashes are searched for (duplicate_search.py), and a pair counts if the
shapes agree too.

An image is removed if it is a duplicate of an image of an excluded corpus, or (dedup) of one that comes earlier in the
sorted order of the source, or is in the corpus that is appended to. The earlier one may itself be removed, as a
duplicate of a still earlier one.
"""

import hashlib
import itertools
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cluster.command import Progress, absolute_path, log
from cluster.folders import Folder, LocalFolder
from cluster.storage import StorageError
from data_prep.corpus import Corpus
from data_prep.corpus_cache import cache_folder
from data_prep.corpus_jobs import DUPLICATES, check_destination, mark_working_folder
from data_prep.duplicate_search import HammingIndex, Pairs
from data_prep.hash_task import HashTask, ImagesToDescribe, PartOfCorpus, PartOfListing, describe_part
from data_prep.listing import Listing
from data_prep.manifest import read_plan
from data_prep.origin_lines import one_line
from data_prep.perceptual_hash import DESCRIPTOR, MIRROR, SIMILAR, UNSEEN, VERSION, similarity
from data_prep.removed import UNCOMPARED, Removed, removed_in_words
from data_prep.tasks import Work, run_tasks, session

DEFAULT_DISTANCE = 8
"""Bits. Re-encoded, resized, gray, brighter or darker copies differ by less; see tests/bench_duplicates.py."""
MAX_DISTANCE = 16
_PARTS = re.compile(r"part-\d{6,}\.bin")
_PART_BYTES, _PART_IMAGES = 256_000_000, 20_000
"""What one task describes: a minute's work or two."""
_THREADS = min(32, os.cpu_count() or 1)

_DECISION = np.dtype(
    [
        ("reason", "u1"),  # 0 kept, _EXACT, _NEAR or _UNSEEN
        ("distance", "u1"),
        ("mirrored", "?"),
        ("where", "<i2"),  # place of the excluded corpus, or -1 for the source itself
        ("of", "<i8"),  # sample or row there
        ("similarity", "<f4"),
    ]
)
_EXACT, _NEAR, _UNSEEN = 1, 2, 3


@dataclass(frozen=True)
class DuplicateSearch:
    """What is asked for."""

    exclude: tuple[str, ...]
    """Corpora whose images are taken out."""
    dedup: bool
    """Whether images are taken out that come earlier in the source."""
    distance: int
    """Bits by which hashes of near duplicates may differ."""
    onto: Corpus | None = None
    """What is appended to: its images count as earlier ones of the source."""

    @property
    def asked(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.exclude) or self.dedup


def remove_duplicates(listing: Listing, search: DuplicateSearch, folder: Folder, workers: int) -> Listing:
    """Take duplicates out of a listing.

    Images are described in Ray tasks. What they find is kept in the destination until the corpus is finished, so that
    nothing is described twice, whenever the work was interrupted.

    Args:
        listing: of the source, in sorted order.
        search: what is asked for; without any corpus and without dedup the listing stays as it is.
        folder: of the corpus that is being made.
        workers: tasks at a time; 0 for what the cluster has CPUs for.

    Returns:
        The listing without them, perhaps empty; what was removed is in its `removed`. Images that could not be had,
        and so not be compared, are in its `left_out`.

    Raises:
        CorpusError: an excluded corpus cannot be read.
        SourceError: the source cannot be read.
    """
    if not search.asked or not len(listing):
        return listing
    corpora = [Corpus.open(absolute_path(place, "exclude")) for place in search.exclude]
    if search.onto is not None:
        if corpora:
            _warn_of_uncompared(search.onto, corpora)
        corpora += [search.onto] if search.dedup else []
    settings = {
        "dedup": search.dedup,
        "distance": search.distance,
        "exclude": [corpus.corpus_hash for corpus in corpora],
        "hash_version": VERSION,
        "listing": _identity(listing),
    }
    places = {corpus.corpus_hash: corpus.url for corpus in corpora}
    check_destination(folder)
    lines = _decided_before(folder, settings)
    if lines is None:
        kept = folder.child(DUPLICATES)
        mark_working_folder(kept)
        work = Work(
            len(listing) + sum(corpus.num_samples for corpus in corpora),
            float(listing.sizes.sum(dtype=np.float64)) + sum(corpus.manifest["num_bytes"] for corpus in corpora),
        )
        with session(work, workers):  # one for all that is described
            excluded = [_descriptors_of_corpus(corpus, kept, workers) for corpus in corpora]
            descriptions = kept.child(_identity(listing, listing.place))
            with _descriptors_of_listing(listing, descriptions, workers) as described:
                decisions = decide(described, excluded, search.dedup, search.distance)
        lines = _as_lines(listing, decisions, corpora)
        kept.write_bytes(_file_of_decisions(settings), lines)
        descriptions.remove_tree(_PARTS)
    removed = Removed(settings, lines, places)
    log.info("%s", removed_in_words(removed.counts))
    keep = np.ones(len(listing), bool)
    keep[removed.rows] = False
    return replace(listing.take(np.flatnonzero(keep), removed.unseen), removed=removed)


def _warn_of_uncompared(onto: Corpus, corpora: Sequence[Corpus]) -> None:
    """Say which corpora an append excludes that what is there already was not compared with."""
    for version in range(1, onto.version + 1):
        known = read_plan(onto.folder, version).excluded
        if missing := [corpus.url for corpus in corpora if corpus.corpus_hash not in known]:
            log.warning(
                "only the new images are compared with %s: those of version %d of %s stay, whether they are in it or "
                "not. To compare them too, shard all into another folder", ", ".join(missing), version, onto,
            )  # fmt: skip


def _file_of_decisions(settings: dict[str, Any]) -> str:
    return f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]}.jsonl"


def _decided_before(folder: Folder, settings: dict[str, Any]) -> bytes | None:
    """What an earlier run found (Removed.lines): while the corpus is being made, or in one that is finished."""
    kept = folder.child(DUPLICATES)
    if kept.size(_file_of_decisions(settings)) is not None:
        return kept.read_bytes(_file_of_decisions(settings))
    names = folder.names()
    for name in names:
        lines = name.replace("plan", "removed", 1).replace(".json", ".jsonl")
        if name.startswith("plan") and lines in names:
            there = folder.read_json(name)
            asked = there.get("settings") if isinstance(there, dict) else None
            if isinstance(asked, dict) and asked.get("duplicates") == settings:
                return folder.read_bytes(lines)
    return None


# -------------------------------------------------------------------------------------------------- descriptors


def _identity(listing: Listing, place: str = "") -> str:
    """Of what is described, as far as a rerun can see that it is the same."""
    digest = xxhash.xxh3_128(f"{VERSION} {place}".encode())
    for column in (listing.names.content, listing.names.pointers, listing.sizes):
        digest.update(np.ascontiguousarray(column).view(np.uint8).data)
    return digest.hexdigest()


@contextmanager
def _descriptors_of_listing(listing: Listing, folder: Folder, workers: int) -> Iterator[NDArray[np.void]]:
    """Descriptors of all images, DESCRIPTOR [N], memory-mapped on this node for as long as they are needed."""
    ends = np.cumsum(listing.sizes, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(listing):
        start = bounds[-1]
        before = int(ends[start - 1]) if start else 0
        full = int(np.searchsorted(ends, before + _PART_BYTES, side="left")) + 1
        bounds.append(min(full, start + _PART_IMAGES, len(listing)))

    def part(first: int, end: int) -> ImagesToDescribe:
        rows = np.arange(first, end)
        return PartOfListing(listing.images.take(rows), listing.names.take(rows), listing.sizes[rows])

    size = int(ends[-1])
    _describe(bounds, part, folder, workers, label=f"{listing.place}: describing", size=size)
    with _scratch() as file:
        descriptors = np.memmap(file, DESCRIPTOR, "w+", shape=(len(listing),))
        for number, (first, end) in enumerate(itertools.pairwise(bounds)):
            descriptors[first:end] = np.frombuffer(folder.read_bytes(_part_name(number)), DESCRIPTOR)
        yield descriptors


def _descriptors_of_corpus(corpus: Corpus, work: Folder, workers: int) -> NDArray[np.void]:
    """Descriptors of an excluded corpus, DESCRIPTOR [N]; kept in this node's cache: the corpus may be somebody else's.

    (Versions of before kept them beside the corpus: those are read.)
    """
    name = f"perceptual-hashes-{VERSION}-{corpus.corpus_hash[:32]}.bin"
    cache = LocalFolder(cache_folder("perceptual-hashes"))
    for place in (cache, corpus.folder):
        if place.size(name) == corpus.num_samples * DESCRIPTOR.itemsize + 16:
            content = place.read_bytes(name)
            if xxhash.xxh3_128_digest(content[:-16]) == content[-16:]:
                return np.frombuffer(content[:-16], DESCRIPTOR)
    folder = work.child(corpus.corpus_hash[:32])
    mean = max(1, corpus.manifest["num_bytes"] // corpus.num_samples)
    step = max(1, min(_PART_IMAGES, _PART_BYTES // mean))
    bounds = [*range(0, corpus.num_samples, step), corpus.num_samples]
    size = corpus.manifest["num_bytes"]
    _describe(bounds, partial(PartOfCorpus, corpus), folder, workers, label=f"{corpus}: describing", size=size)
    content = b"".join(folder.read_bytes(_part_name(number)) for number in range(len(bounds) - 1))
    with suppress(OSError, StorageError):  # without a cache they are made anew the next time
        cache.write_bytes(name, content + xxhash.xxh3_128_digest(content))
    folder.remove_tree(_PARTS)
    return np.frombuffer(content, DESCRIPTOR)


def _part_name(number: int) -> str:
    return f"part-{number:06d}.bin"


def _describe(
    bounds: Sequence[int],
    part: Callable[[int, int], ImagesToDescribe],
    folder: Folder,
    workers: int,
    *,
    label: str,
    size: int,
) -> None:
    """Describe what is not described yet: part k is images bounds[k]..bounds[k + 1] - 1, of `size` bytes in all."""
    spans = {_part_name(number): span for number, span in enumerate(itertools.pairwise(bounds))}
    counts = {name: end - first for name, (first, end) in spans.items()}
    missing = [name for name, count in counts.items() if folder.size(name) != count * DESCRIPTOR.itemsize]

    def task(name: str) -> HashTask:
        return HashTask(folder, name, part(*spans[name]))

    tasks = {name: partial(task, name) for name in missing}
    progress = Progress(bounds[-1], "images", label)
    progress.skip(sum(count for name, count in counts.items() if name not in tasks))
    work = Work(sum(counts[name] for name in missing), size * len(missing) / max(len(spans), 1))
    run_tasks(describe_part, tasks, folder, workers, progress, lambda name: counts[name], work=work)


@contextmanager
def _scratch() -> Iterator[Any]:
    """A file of this node that is gone afterwards, whatever happens."""
    place = cache_folder("perceptual-hashes")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            yield file
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"the cache {place} cannot be written: {error}. Set VITFORGE_CACHE to a folder on a disk of this node with "
            f"room for {DESCRIPTOR.itemsize} bytes an image"
        ) from error


# ---------------------------------------------------------------------------------------------------- decisions


def decide(
    source: NDArray[np.void], excluded: Sequence[NDArray[np.void]], dedup: bool, distance: int
) -> NDArray[np.void]:
    """Which images of a source are duplicates, and of what.

    Args:
        source: DESCRIPTOR [N], in sorted order.
        excluded: descriptors of each corpus whose images must not be in it.
        dedup: whether images of the source must not be in it twice.
        distance: bits by which hashes may differ.

    Returns:
        _DECISION [N].
    """
    decisions = np.zeros(len(source), _DECISION)
    contents, hashes = source["content"].copy(), source["hash"].copy()
    unseen = (contents == UNSEEN).all(1)
    decisions["reason"][unseen], contents[unseen] = _UNSEEN, 0
    for where, descriptors in enumerate(excluded):
        _settle_exact(decisions, where, _find(contents, descriptors["content"]))
    if dedup:
        _settle_exact(decisions, -1, _earlier(contents))
    rows = np.flatnonzero((decisions["reason"] == 0) & source["pictured"])
    if not len(rows):
        return decisions
    index = HammingIndex(hashes[rows], distance)
    for where, descriptors in enumerate(excluded):
        _settle_near_excluded(decisions, index, rows, source, where, descriptors)
    if dedup:
        _settle_near_inside(decisions, index, rows, source, hashes[rows])
    return decisions


def _settle_exact(decisions: NDArray[np.void], where: int, of: NDArray[np.int64]) -> None:
    rows = np.flatnonzero((of >= 0) & (decisions["reason"] == 0))
    decisions["reason"][rows], decisions["where"][rows], decisions["of"][rows] = _EXACT, where, of[rows]


def _find(contents: NDArray[np.uint64], among: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each checksum ([N, 2]) the place of the first equal one among others ([M, 2]), or -1."""
    if not len(among):
        return np.full(len(contents), -1)
    order = np.lexsort((np.arange(len(among)), among[:, 1], among[:, 0]))
    places = np.minimum(np.searchsorted(among[order, 0], contents[:, 0]), len(among) - 1)
    found = order[places]
    # (two images of the 64 bits that are searched by but of different content come up once in 10^6 corpora)
    return np.where((among[found] == contents).all(1) & contents.any(1), found, -1)


def _earlier(contents: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each checksum ([N, 2]) the place of the first equal one if that comes earlier, or -1."""
    order = np.lexsort((np.arange(len(contents)), contents[:, 1], contents[:, 0]))
    in_order = contents[order]
    starts = np.r_[True, (in_order[1:] != in_order[:-1]).any(1)]
    first = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    result = np.full(len(contents), -1)
    result[order] = np.where(starts, -1, first)
    return np.where(contents.any(1), result, -1)


def _settle_near_excluded(
    decisions: NDArray[np.void],
    index: HammingIndex,
    rows: NDArray[np.int64],
    source: NDArray[np.void],
    where: int,
    descriptors: NDArray[np.void],
) -> None:
    asked = np.flatnonzero(descriptors["pictured"])
    hashes, shapes = descriptors["hash"][asked], descriptors["shape"]
    found: list[NDArray[np.void]] = []
    lock = threading.Lock()
    for mirrored in (False, True):

        def confirm(pairs: Pairs, mirrored: bool = mirrored) -> None:
            queries, places, distances = pairs
            matches = _confirmed(asked[queries], rows[places], distances, shapes, source["shape"], mirrored)
            with lock:
                found.append(matches)

        _search(index, hashes, mirrored, f"comparing with {len(asked):,} excluded images", confirm)
    _take_best(decisions, np.concatenate([np.zeros(0, _MATCH), *found]), where)


def _settle_near_inside(
    decisions: NDArray[np.void],
    index: HammingIndex,
    rows: NDArray[np.int64],
    source: NDArray[np.void],
    hashes: NDArray[np.uint64],
) -> None:
    excluded = decisions["reason"][rows] != 0
    still_open = ~excluded
    shapes = source["shape"]
    for mirrored in (False, True):

        def confirm(pairs: Pairs, mirrored: bool = mirrored) -> None:
            queries, places, distances = pairs
            earlier = (places < queries) & ~excluded[places] & still_open[queries]
            queries, places = queries[earlier], places[earlier]
            if len(queries):
                matches = _confirmed(rows[places], rows[queries], distances[earlier], shapes, shapes, mirrored)
                # queries of one call are asked by no other thread, so that what is written here is written once
                _take_best(decisions, matches, -1)
                still_open[queries] = decisions["reason"][rows[queries]] == 0

        _search(index, hashes, mirrored, f"comparing {len(rows):,} images with each other", confirm, still_open)


def _search(
    index: HammingIndex,
    hashes: NDArray[np.uint64],
    mirrored: bool,
    what: str,
    found: Callable[[Pairs], None],
    still_open: NDArray[np.bool_] | None = None,
) -> None:
    progress = Progress(index.lookups(len(hashes)), "lookups", f"{what}, mirrored:" if mirrored else f"{what}:")
    index.search(hashes ^ MIRROR if mirrored else hashes, found, still_open, _THREADS, progress.update)


_MATCH = np.dtype([("row", "<i8"), ("of", "<i8"), ("distance", "u1"), ("mirrored", "?"), ("similarity", "<f4")])


def _confirmed(
    of: NDArray[np.int64],
    rows: NDArray[np.int64],
    distances: NDArray[np.uint8],
    shapes: NDArray[np.int8],
    shapes_of_rows: NDArray[np.int8],
    mirrored: bool,
) -> NDArray[np.void]:
    """Those of pairs with near hashes whose shapes agree, _MATCH."""
    agreement = np.concatenate(
        [np.zeros(0, np.float32)]
        + [
            similarity(shapes[of[part]], shapes_of_rows[rows[part]], mirrored)
            for part in (slice(start, start + 4096) for start in range(0, len(of), 4096))
        ]
    )
    agree = np.flatnonzero(agreement >= SIMILAR)
    matches = np.zeros(len(agree), _MATCH)
    matches["row"], matches["of"], matches["distance"] = rows[agree], of[agree], distances[agree]
    matches["mirrored"], matches["similarity"] = mirrored, agreement[agree]
    return matches


def _take_best(decisions: NDArray[np.void], matches: NDArray[np.void], where: int) -> None:
    """For each image that is still kept, its nearest match, of equally near ones the first."""
    matches = matches[decisions["reason"][matches["row"]] == 0]
    matches = matches[np.lexsort((matches["of"], matches["mirrored"], matches["distance"], matches["row"]))]
    matches = matches[np.unique(matches["row"], return_index=True)[1]]
    settled = matches["row"]
    decisions["where"][settled], decisions["reason"][settled] = where, _NEAR
    for column in ("of", "distance", "mirrored", "similarity"):
        decisions[column][settled] = matches[column]


def _as_lines(listing: Listing, decisions: NDArray[np.void], corpora: Sequence[Corpus]) -> bytes:
    """See Removed.lines."""
    rows = np.flatnonzero(decisions["reason"])
    origins: dict[tuple[int, int], str] = {}
    found = rows[decisions["reason"][rows] != _UNSEEN]
    for where, of in sorted({(int(d["where"]), int(d["of"])) for d in decisions[found]}):  # a shard's origins at a time
        origins[where, of] = corpora[where].origin(of) if where >= 0 else one_line(listing.names[of])
    lines = []
    for row, decision in zip(rows.tolist(), decisions[rows], strict=True):
        where, of = int(decision["where"]), int(decision["of"])
        entry: dict[str, Any] = {"row": row, "origin": one_line(listing.names[row])}
        if decision["reason"] == _UNSEEN:
            entry["reason"] = UNCOMPARED
        else:
            entry["reason"] = "exact" if decision["reason"] == _EXACT else "near"
            entry["corpus"] = corpora[where].corpus_hash if where >= 0 else None
            entry["of"] = origins[where, of]
        if decision["reason"] == _NEAR:
            entry["distance"] = int(decision["distance"])
            entry["similarity"] = round(float(decision["similarity"]), 3)
            entry["mirrored"] = bool(decision["mirrored"])
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", "backslashreplace")
