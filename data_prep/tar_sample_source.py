"""Listing WebDataset tars and corpora of ours, to shard their images anew: other order, size, classes or labels."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cluster.command import Progress, log
from cluster.folders import Folder
from data_prep.columns import LABEL_DTYPE, Labels, Strings
from data_prep.corpus import Corpus
from data_prep.corpus_format import MANIFEST
from data_prep.listing import Listing, SourceError
from data_prep.source_reader import Stream, StreamImages, reader_of
from data_prep.tar_headers import TarError, iterate_members
from data_prep.webdataset_tars import UnusableSample, iterate_samples, parse_label

_THREADS = 8


def is_corpus(folder: Folder) -> bool:
    """Whether a folder is a corpus of ours."""
    return folder.size(MANIFEST) is not None


def tars_in(folder: Folder) -> list[str]:
    """Names of the tars directly in a folder, sorted by their bytes."""
    return sorted((n for n in folder.names() if n.endswith(".tar") and not n.startswith(".")), key=os.fsencode)


def holds_samples(folder: Folder, tar: str) -> bool:
    """Whether a tar begins as a WebDataset shard does: an image with a label of the same key."""
    return _label_extension(folder, tar) is not None


def list_corpus(place: str) -> Listing:
    """List the images of a corpus, by where they once came from.

    Raises:
        CorpusError: it is unfinished or damaged.
    """
    corpus = Corpus.open(place)
    count = corpus.num_samples
    origins = Strings.of([origin.encode() for origin in corpus.origins()])
    streams = tuple(Stream(shard["name"]) for shard in corpus.manifest["shards"])
    index = corpus.index
    images = StreamImages(
        corpus.shards_folder, streams, index["shard"].astype(np.int32), index["offset"].astype(np.uint64)
    )
    labels: Labels | NDArray[np.int32] = index["label"].astype(np.int32)
    if corpus.label_kind == "multi":
        rows, classes, weights = corpus.labels_of(np.arange(count))
        table = np.empty(len(classes), LABEL_DTYPE)
        table["class"], table["weight"] = classes, weights
        labels = Labels(table, np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]))
    listing = Listing(
        "corpus", place, corpus.classes, origins, index["length"].astype(np.uint64), images, labels,
        class_descriptions=corpus.class_descriptions,
    )  # fmt: skip
    order = np.array(sorted(range(count), key=lambda row: origins[row]), np.int64)
    return listing.take(order)


def list_samples(folder: Folder, tars: Sequence[str], place: str) -> Listing:
    """List the samples of WebDataset tars of a folder: an image and, of the same key, a `.cls` or `.json` label.

    Samples without a label are left out, with the reason. Classes are named by their numbers.

    Raises:
        SourceError: a tar is damaged, or no sample has a label.
    """
    extension = _label_extension(folder, tars[0])
    if extension is None:
        raise SourceError(
            f"{folder}/{tars[0]} is no WebDataset tar: it has neither .cls nor .json members beside its images"
        )
    progress = Progress(len(tars), "tars", "listing")
    names: list[bytes] = []
    sizes: list[int] = []
    which: list[int] = []
    offsets: list[int] = []
    pairs: list[list[tuple[int, float]]] = []
    left_out: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, (tar, listed) in enumerate(
            zip(tars, pool.map(lambda tar: _list_tar(folder, tar, extension), tars), strict=True)
        ):
            for name, size, offset, labels, reason in listed:
                if reason:
                    left_out.append((f"{tar}/{os.fsdecode(name)}", reason))
                    continue
                names.append(os.fsencode(tar) + b"/" + name)
                sizes.append(size)
                which.append(number)
                offsets.append(offset)
                pairs.append(labels)
            progress.update(1, f"{len(names):,} images")
    if not names:
        raise SourceError(f"source {place}: no sample has a label; {len(left_out)} are without")
    largest = max((label for labels in pairs for label, _ in labels), default=-1)
    if largest < 0:
        raise SourceError(f"no sample of source {place} has a label")
    single = extension == "cls"
    listing = Listing(
        "WebDataset tars", place, [str(label) for label in range(largest + 1)], Strings.of(names),
        np.array(sizes, np.uint64),
        StreamImages(
            folder, tuple(map(Stream, tars)),
            np.array(which, np.int32), np.array(offsets, np.uint64),
        ),
        np.array([labels[0][0] for labels in pairs], np.int32) if single else Labels.of(pairs), tuple(left_out),
    )  # fmt: skip
    if left_out:
        log.warning("left out: %d samples, for example %s: %s", len(left_out), *left_out[0])
    return listing.take(np.array(sorted(range(len(names)), key=names.__getitem__), np.int64))


def _list_tar(folder: Folder, tar: str, extension: str) -> list[tuple[bytes, int, int, list[tuple[int, float]], str]]:
    """(name, size, offset, labels, why it is left out or "") of each sample."""
    found: list[tuple[bytes, int, int, list[tuple[int, float]], str]] = []
    read_at, size = reader_of(folder, tar)
    try:
        for sample in iterate_samples(iterate_members(read_at, 0, size, f"{folder}/{tar}")):
            try:
                image, label = sample.image(), sample.label(extension)
                labels = parse_label(read_at(label.size, label.offset), extension)
            except UnusableSample as reason:
                found.append((sample.members[0][1].name, 0, 0, [], str(reason)))
                continue
            found.append((image.name, image.size, image.offset, labels, ""))
    except TarError as error:
        raise SourceError(str(error)) from error
    return found


def _label_extension(folder: Folder, tar: str) -> str | None:
    """ "cls" or "json", by the first samples of a tar; None where it is no WebDataset tar."""
    try:
        return label_extension(folder, tar, among=100)
    except (TarError, OSError):
        return None


def label_extension(folder: Folder, tar: str, among: int | None = None) -> str | None:
    """ "cls" or "json", by the first sample of a tar that has one of them; None where none of `among` samples has.

    Raises:
        TarError: it is damaged.
    """
    read_at, size = reader_of(folder, tar)
    for sample in islice(iterate_samples(iterate_members(read_at, 0, size, f"{folder}/{tar}")), among):
        extensions = {extension for extension, _ in sample.members}
        for extension in ("cls", "json"):
            if extension in extensions:
                return extension
    return None
