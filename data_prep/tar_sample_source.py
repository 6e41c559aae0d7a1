"""Listing WebDataset tars and corpora of ours, to shard their images anew: other order, size, classes or labels."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cluster.command import Progress, log
from cluster.folders import Folder
from data_prep.columns import LABEL_DTYPE, Labels, Strings
from data_prep.corpus import Corpus
from data_prep.corpus_format import MANIFEST
from data_prep.corpus_jobs import reasons_in_words
from data_prep.listing import Listing, SourceError
from data_prep.origin_lines import name_of_line
from data_prep.sample_labels import LabelForm, NoClass, described, described_member, read_labels, told_by
from data_prep.source_reader import Stream, StreamImages, reader_of
from data_prep.table_labels import LabelKind, refuse_delimited
from data_prep.tar_headers import TarError, iterate_members
from data_prep.webdataset_tars import IMAGE_EXTENSIONS, UnusableSample, iterate_samples

_THREADS = 8
_TELLING = 16
"""Tars that are looked at to tell what all of them are, and samples."""
_SAMPLES = 100


def is_corpus(folder: Folder) -> bool:
    """Whether a folder is a corpus of ours."""
    return folder.size(MANIFEST) is not None


def tars_in(folder: Folder) -> list[str]:
    """Names of the tars directly in a folder, sorted by their bytes."""
    return sorted((n for n in folder.names() if n.endswith(".tar") and not n.startswith(".")), key=os.fsencode)


def telling_tar(folder: Folder, tars: Sequence[str]) -> str | None:
    """How the labels of WebDataset shards end, "cls" or "json", by the first tar that tells.

    Tars that are empty, damaged or cut before their first samples are passed over, and named in the log.

    Returns:
        "" where samples have images beside other members and no label; None where the tars hold no samples.
    """
    unusable: list[str] = []
    seen: str | None = None
    for tar in tars[:_TELLING]:
        try:
            seen = label_extension(folder, tar, among=100)
        except (TarError, OSError) as error:
            unusable.append(f"{tar} is empty" if not folder.size(tar) else str(error))
            continue
        if seen is not None:
            break
    for problem in unusable:
        log.warning("%s: what the tars are is told by the others", problem)
    return seen


def list_corpus(place: str) -> Listing:
    """List the images of a corpus, by where they once came from.

    Raises:
        CorpusError: it is unfinished or damaged.
    """
    corpus = Corpus.open(place)
    count = corpus.num_samples
    origins = Strings.of([name_of_line(origin) for origin in corpus.origins()])
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


def list_samples(
    folder: Folder, tars: Sequence[str], place: str, form: LabelForm | None = None, kind: LabelKind = "auto"
) -> Listing:
    """List the samples of WebDataset tars of a folder: an image and, of the same key, a `.cls` or `.json` label.

    Samples without a label are left out, with the reason. Classes are named as the labels are, or by their numbers.

    Args:
        form: what is known of the labels beside which member they are in.
        kind: how many an image has.

    Raises:
        SourceError: a tar is damaged, or no sample has a label.
    """
    extension = telling_tar(folder, tars)
    if not extension:
        raise _no_samples(folder, tars)
    form = form_of_tars([(folder, tar) for tar in tars], replace(form or LabelForm(""), extension=extension), kind)
    if form.names is not None:
        form = replace(form, names=tuple(names_in_tars([(folder, tar) for tar in tars], form)))
    log.info("%s: %s", place, described(form))
    progress = Progress(len(tars), "tars", "listing")
    names: list[bytes] = []
    sizes: list[int] = []
    which: list[int] = []
    offsets: list[int] = []
    pairs: list[list[tuple[int, float]]] = []
    left_out: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, (tar, listed) in enumerate(
            zip(tars, pool.map(lambda tar: _list_tar(folder, tar, form), tars), strict=True)
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
    largest = max((label for labels in pairs for label, _ in labels), default=-1)
    if largest < 0:
        reasons = Counter(reason for _, reason in left_out)
        if names:
            reasons["its list of labels is empty"] += len(names)
        raise SourceError(f"no sample of source {place} has a label: {reasons_in_words(reasons) or 'there is none'}")
    listing = Listing(
        "WebDataset tars", place, list(form.names or map(str, range(largest + 1))), Strings.of(names),
        np.array(sizes, np.uint64),
        StreamImages(
            folder, tuple(map(Stream, tars)),
            np.array(which, np.int32), np.array(offsets, np.uint64),
        ),
        np.array([labels[0][0] for labels in pairs], np.int32) if not form.many else Labels.of(pairs), tuple(left_out),
    )  # fmt: skip
    if left_out:
        log.warning("left out: %d samples, for example %s: %s", len(left_out), *left_out[0])
    return listing.take(np.array(sorted(range(len(names)), key=names.__getitem__), np.int64))


def form_of_tars(tars: Sequence[tuple[Folder, str]], form: LabelForm, kind: LabelKind) -> LabelForm:
    """How labels stand in tars, by their first samples; `names` are empty where labels are names.

    Raises:
        SourceError: none of these has a label; with the reasons.
    """
    contents: list[bytes] = []
    for folder, tar in tars[:_TELLING]:
        with suppress(TarError, OSError):  # of a damaged tar, or an empty one: whoever reads all of them says it
            contents.extend(islice(_label_contents(folder, tar, form.extension), _SAMPLES - len(contents)))
        if len(contents) >= _SAMPLES:
            break
    told = told_by(form, kind, contents)
    if told is None and contents:
        reasons: Counter[str] = Counter()
        for content in contents:
            try:
                read_labels(content, form)
            except UnusableSample as reason:
                reasons[str(reason)] += 1
        raise SourceError(f"no sample of {tars[0][0]} has a label: {reasons_in_words(reasons)}")
    return told or form


def names_in_tars(tars: Sequence[tuple[Folder, str]], form: LabelForm) -> list[str]:
    """The names that labels in tars are, in the order of their numbers.

    Raises:
        SourceError: a tar is damaged, or labels seem to be several in one text.
    """
    progress = Progress(len(tars), "tars", "reading the names of classes")
    found: set[str] = set()

    def names_in(place: tuple[Folder, str]) -> set[str]:
        names: set[str] = set()
        try:
            for content in _label_contents(*place, form.extension):
                with suppress(UnusableSample):
                    names.update(text for text, _ in form.texts(content))
        except TarError as error:
            raise SourceError(str(error)) from error
        return names

    with ThreadPoolExecutor(_THREADS) as pool:
        for names in pool.map(names_in, tars):
            found |= names
            progress.update(1, f"{len(found):,} classes")
    if form.cells.delimiter is None:
        refuse_delimited(sorted(found), form.key or "", f"{tars[0][0]}: {described_member(form)}")
    return sorted(found)


def _label_contents(folder: Folder, tar: str, extension: str) -> Iterator[bytes]:
    """What stands in the labels of a tar's samples."""
    read_at, size = reader_of(folder, tar)
    for sample in iterate_samples(iterate_members(read_at, 0, size, f"{folder}/{tar}")):
        with suppress(UnusableSample):
            label = sample.label(extension)
            yield read_at(label.size, label.offset)


def _list_tar(folder: Folder, tar: str, form: LabelForm) -> list[tuple[bytes, int, int, list[tuple[int, float]], str]]:
    """(name, size, offset, labels, why it is left out or "") of each sample."""
    found: list[tuple[bytes, int, int, list[tuple[int, float]], str]] = []
    read_at, size = reader_of(folder, tar)
    if not size:
        log.warning("%s/%s is empty: there is nothing in it to read", folder, tar)
        return found
    try:
        for sample in iterate_samples(iterate_members(read_at, 0, size, f"{folder}/{tar}")):
            try:
                image, label = sample.image(), sample.label(form.extension)
                labels = form.labels(read_at(label.size, label.offset))
            except NoClass as reason:
                raise SourceError(f"{folder}/{tar}, {os.fsdecode(label.name)}: {reason}") from None
            except UnusableSample as reason:
                found.append((sample.members[0][1].name, 0, 0, [], str(reason)))
                continue
            found.append((image.name, image.size, image.offset, labels, ""))
    except TarError as error:
        raise SourceError(str(error)) from error
    return found


def _no_samples(folder: Folder, tars: Sequence[str]) -> SourceError:
    """Why tars are no WebDataset shards with labels: the first thing that is wrong with them."""
    for tar in tars[:_TELLING]:
        if not folder.size(tar):
            continue
        read_at, size = reader_of(folder, tar)
        try:
            sample = next(iterate_samples(iterate_members(read_at, 0, size, f"{folder}/{tar}")), None)
        except TarError as error:
            return SourceError(str(error))
        if sample is not None:
            return SourceError(
                f"{folder}/{tar}: no label beside its images, neither .cls nor .json: its samples are of "
                f"{', '.join('.' + extension for extension, _ in sample.members)}"
            )
    return SourceError(f"{folder}/{tars[0]} is empty" + (f", and so are {len(tars) - 1} more" if tars[1:] else ""))


def label_extension(folder: Folder, tar: str, among: int | None = None) -> str | None:
    """ "cls" or "json", by the first sample of a tar that has one of them.

    Returns:
        "" where none of `among` samples has, but an image has other members beside it; None where none has.

    Raises:
        TarError: it is damaged.
    """
    read_at, size = reader_of(folder, tar)
    beside = False
    for sample in islice(iterate_samples(iterate_members(read_at, 0, size, f"{folder}/{tar}")), among):
        extensions = {extension for extension, _ in sample.members}
        for extension in ("cls", "json"):
            if extension in extensions:
                return extension
        beside |= len(extensions) > 1 and bool(extensions & set(IMAGE_EXTENSIONS))
    return "" if beside else None
