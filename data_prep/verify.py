"""Check a corpus from end to end: `python data_prep/verify.py CORPUS`."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


import numpy as np
from numpy.typing import NDArray

from cluster import storage
from cluster.command import Progress, absolute_path, log, run_command
from cluster.settings import Settings, parse_command
from data_prep.corpus import INDEX, Corpus, CorpusError, image_check
from data_prep.tar_headers import Member, TarError, iterate_members

DESCRIPTION = """
Check a corpus from end to end: the manifest against its own hash, index and labels against their checksums, every
shard against its checksum, every image and label in it against the index, and the counts of the manifest. Names each
shard and sample that is wrong, and exits with an error if there is one.

example:
  python data_prep/verify.py /data/in21k
"""

_MOST_SHOWN = 20


class VerifySettings(Settings):
    """Settings of verification."""

    corpus: str
    """Folder of the corpus."""


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
            f"{corpus.path}: {problems} problems found. To write a damaged shard again, remove its .record.json and "
            f"run the same shard command"
        )
    log.info(
        "%s is whole: %s samples in %d shards, %s bytes, corpus hash %s",
        corpus.path, f"{corpus.num_samples:,}", len(corpus.shard_sizes), f"{corpus.manifest['num_bytes']:,}",
        corpus.corpus_hash,
    )  # fmt: skip


def verify(corpus: Corpus) -> Iterator[str]:
    """What is wrong with a corpus that opens: one line a problem; nothing if it is whole."""
    yield from _check_counts(corpus)
    progress = Progress(corpus.num_samples, "samples", "verifying")
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
    path = corpus.path / facts["name"]
    if storage.hash_file(path) != facts["xxh3_128"]:
        yield f"{path}: its checksum is not the manifest's"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            members = list(iterate_members(descriptor, 0, facts["bytes"], str(path)))
        except TarError as error:
            yield str(error)
            return
        yield from _check_samples(corpus, shard, first_id, descriptor, members)
    finally:
        os.close(descriptor)
    try:
        if facts["samples"]:
            corpus.origin(first_id)
    except CorpusError as error:
        yield str(error)
    lines = [f"v1.2 {len(members) // 2}\n"]
    for image, label in zip(members[::2], members[1::2], strict=False):
        entries = []
        for member in (image, label):
            name = member.name.decode("ascii", "backslashreplace")
            entries.append(f"{name.partition('.')[2]} {member.offset} {member.size} {name}")
        lines.append(" ".join(entries) + "\n")
    index_path = path.with_suffix(".idx")
    if not index_path.is_file() or index_path.read_bytes() != "".join(lines).encode():
        yield f"{index_path} is missing or is not the index of its tar"


def _check_samples(corpus: Corpus, shard: int, first_id: int, descriptor: int, members: list[Member]) -> Iterator[str]:
    facts = corpus.manifest["shards"][shard]
    path = corpus.path / facts["name"]
    if len(members) != 2 * facts["samples"]:
        yield f"{path} has {len(members)} members for {facts['samples']} samples"
        return
    ids = np.arange(first_id, first_id + facts["samples"])
    rows, classes, weights = corpus.labels_of(ids)
    pointers = np.searchsorted(rows, np.arange(len(ids) + 1))
    index = corpus.index[ids]
    for place in range(len(ids)):
        row, image, label = index[place], members[2 * place], members[2 * place + 1]
        key = image.name.partition(b".")[0]
        where = f"{path}: sample {ids[place]} (member {image.name.decode('ascii', 'backslashreplace')!r})"
        if (int(row["shard"]), int(row["offset"]), int(row["length"])) != (shard, image.offset, image.size):
            yield f"{where} does not lie where {INDEX} says"
        elif image_check(os.pread(descriptor, image.size, image.offset)) != int(row["check"]):
            yield f"{where}: the image is not what was written"
        expected = slice(pointers[place], pointers[place + 1])
        content = os.pread(descriptor, label.size, label.offset)
        suffix = b".json" if corpus.label_kind == "multi" else b".cls"
        if label.name != key + suffix or not _label_is(corpus, content, classes[expected], weights[expected]):
            yield f"{where}: the label beside it is not that of {INDEX}"


def _label_is(corpus: Corpus, content: bytes, classes: NDArray[np.int64], weights: NDArray[np.float32]) -> bool:
    if corpus.label_kind == "single":
        return content == b"%d" % classes[0]
    try:
        parsed = json.loads(content)
        same_classes = parsed["labels"] == classes.tolist()
        return bool(same_classes and np.array_equal(np.array(parsed["weights"], np.float32), weights))
    except (ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    run_command(main)
