"""Check a corpus from end to end: `python data_prep/verify.py CORPUS`."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds


import numpy as np
from numpy.typing import NDArray

from cluster import storage
from cluster.command import Progress, absolute_path, counted, log, run_command
from cluster.folders import at_hand
from cluster.settings import Settings, parse_command
from data_prep.card import check_card
from data_prep.corpus import Corpus
from data_prep.corpus_format import INDEX, PLACES, CorpusError, image_check, needs_own_shards
from data_prep.corpus_jobs import in_megabytes
from data_prep.sample_labels import LabelForm, forms_of
from data_prep.shard_task import shard_file
from data_prep.tar_headers import Member, TarError, iterate_members
from data_prep.webdataset_tars import UnusableSample, dali_index, dali_index_line, iterate_samples

DESCRIPTION = """
Check a corpus from end to end: the manifest against its own hash, index and labels against their checksums, every
shard and its list of origins against their checksums, every image and label in it against the index, and the counts of
the manifest; and what other tools read beside it (README.md, _info.json, samples.parquet), where Vitforge wrote that.
Names each shard and sample that is wrong, and exits with an error if there is one.

Shards on S3 are fetched into TMPDIR for it, one for each CPU at a time.

example:
  python data_prep/verify.py /data/in21k
"""

_MOST_SHOWN = 20


class VerifySettings(Settings):
    """Settings of verification."""

    corpus: str
    """Folder of the corpus; may be on S3 (s3://BUCKET/FOLDER)."""


def main() -> None:
    """The command."""
    settings = parse_command(
        VerifySettings, prog="data_prep/verify.py", description=DESCRIPTION, positionals=("corpus",)
    )
    corpus = Corpus.open(absolute_path(settings.corpus, "corpus"))
    problems = 0
    for problem in verify(corpus):
        problems += 1
        if problems <= _MOST_SHOWN:
            log.error("%s", problem)
    if problems:
        raise CorpusError(
            f"{corpus}: {counted(problems, 'problem')} found. To write a damaged shard again, remove its .tar and run "
            f"the command that made the corpus (shard, index or copy) again"
        )
    log.info(
        "%s is whole: %s in %s, %s of images, corpus hash %s",
        corpus, counted(corpus.num_samples, "sample"), counted(len(corpus.shard_sizes), "shard"),
        in_megabytes(corpus.manifest["num_bytes"]), corpus.corpus_hash,
    )  # fmt: skip
    if needs_own_shards(corpus.manifest):
        log.info(
            "its tars, in %s, have other images too: `python data_prep/copy_corpus.py %s COPY` makes some with its own",
            corpus.shards_folder, corpus,
        )  # fmt: skip


def verify(corpus: Corpus) -> Iterator[str]:
    """What is wrong with a corpus that opens: one line a problem; nothing if it is whole."""
    yield from _check_counts(corpus)
    yield from check_card(corpus)
    progress = Progress(corpus.num_samples, "samples", "verifying", at_once=os.cpu_count() or 1)
    first_ids = np.concatenate([[0], np.cumsum(corpus.shard_sizes)])
    shards = range(len(corpus.shard_sizes))
    # hashing releases the interpreter, so threads use all cores
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = pool.map(lambda shard: list(check_shard(corpus, shard, int(first_ids[shard]))), shards)
        for shard, problems in zip(shards, jobs, strict=True):
            yield from problems
            progress.update(corpus.shard_sizes[shard])


def _check_counts(corpus: Corpus) -> Iterator[str]:
    if len(corpus.index) != corpus.num_samples or sum(corpus.shard_sizes) != corpus.num_samples:
        yield (
            f"manifest.json counts {corpus.num_samples} samples, its shards {sum(corpus.shard_sizes)}, {INDEX} has "
            f"{len(corpus.index)}"
        )
    counts = np.zeros(len(corpus.classes), np.int64)
    for start in range(0, len(corpus.index), 1 << 20):
        _, classes, _ = corpus.labels_of(np.arange(start, min(start + (1 << 20), len(corpus.index))))
        if classes.size and not (classes.min() >= 0 and classes.max() < len(counts)):
            yield f"a label lies outside the {len(counts)} classes"
            return
        counts += np.bincount(classes, minlength=len(counts))
    if counts.tolist() != corpus.class_counts:
        yield "manifest.json counts other images of the classes than the labels give"


def check_shard(corpus: Corpus, shard: int, first_id: int) -> Iterator[str]:
    """What is wrong with one shard whose first sample has this id."""
    facts = corpus.manifest["shards"][shard]
    place = f"{corpus.shards_folder}/{facts['name']}"
    with at_hand(corpus.shards_folder, facts["name"]) as path:
        if storage.hash_file(path) != facts["xxh3_128"]:
            yield f"{place}: its checksum is not the manifest's"
        descriptor = os.open(path, os.O_RDONLY)
        try:
            members = iterate_members(descriptor, 0, facts["bytes"], place)
            forms = forms_of(corpus.manifest)
            samples = {pair[0].offset: pair for pair in _pairs(members, forms)}
            yield from _check_samples(corpus, shard, first_id, descriptor, samples, forms)
        except TarError as error:
            yield str(error)
            return
        finally:
            os.close(descriptor)
    try:
        if facts["samples"]:
            corpus.read_origins(shard)
    except CorpusError as error:
        yield str(error)
    if PLACES in corpus.manifest["files"]:  # a subset: DALI's index is that of the whole tar
        return
    offsets = corpus.index["offset"][first_id : first_id + facts["samples"]].tolist()
    lines = [dali_index_line(samples[offset]) for offset in offsets if offset in samples]
    index_name = shard_file(facts["name"], ".idx")
    size = corpus.folder.size(index_name)
    if size is None or corpus.folder.read_bytes(index_name) != dali_index(lines):
        yield f"{corpus}/{index_name} is missing or is not the index of its tar"


def _pairs(members: Iterable[Member], forms: Sequence[LabelForm]) -> Iterator[tuple[Member, Member]]:
    """Image and label of every sample of a tar that has both; tars of others may have more members."""
    for sample in iterate_samples(members):
        for form in forms:
            try:
                yield sample.image(), sample.label(form.extension)
            except UnusableSample:
                continue
            break


def _check_samples(
    corpus: Corpus,
    shard: int,
    first_id: int,
    descriptor: int,
    samples: Mapping[int, tuple[Member, Member]],
    forms: Sequence[LabelForm],
) -> Iterator[str]:
    """What is wrong with the samples of a shard; `samples` are image and label by the image's offset in the tar."""
    facts = corpus.manifest["shards"][shard]
    path = f"{corpus}/{facts['name']}"
    ids = np.arange(first_id, first_id + facts["samples"])
    rows, classes, weights = corpus.labels_of(ids)
    pointers = np.searchsorted(rows, np.arange(len(ids) + 1))
    index = corpus.index[ids]
    for place in range(len(ids)):
        row = index[place]
        found = samples.get(int(row["offset"]))
        if found is None or (int(row["shard"]), int(row["length"])) != (shard, found[0].size):
            yield f"{path}: sample {ids[place]} does not lie where {INDEX} says, or has no label beside it"
            continue
        image, label = found
        where = f"{path}: sample {ids[place]} (member {image.name.decode('utf-8', 'backslashreplace')!r})"
        if image_check(os.pread(descriptor, image.size, image.offset)) != int(row["check"]):
            yield f"{where}: the image is not what was written"
        expected = slice(pointers[place], pointers[place + 1])
        content = os.pread(descriptor, label.size, label.offset)
        there = (classes[expected], weights[expected])
        if not any(_label_is(form, len(corpus.classes), content, *there) for form in forms):
            yield f"{where}: the label beside it is not that of {INDEX}"


def _label_is(
    form: LabelForm, num_classes: int, content: bytes, classes: NDArray[np.int64], weights: NDArray[np.float32]
) -> bool:
    try:
        pairs = form.labels(content, num_classes)
    except UnusableSample:
        return False
    same_classes = [number for number, _ in pairs] == classes.tolist()
    return same_classes and np.array_equal(np.array([weight for _, weight in pairs], np.float32), weights)


if __name__ == "__main__":
    run_command(main)
