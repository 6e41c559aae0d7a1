"""Loading from S3 against loading from local disk, as a ratio within one run.

    python -m tests.bench_s3 [CORPUS]

Both read the same shards in the same order, with windows, decode, and make batches as training takes them. The server
is moto's, on loopback, in a process of its own; every answer of it is 30 ms late. The cache holds two windows, so that
every shard is fetched anew in every epoch. Without a corpus, one is made of scikit-learn's sample photographs.

The server takes CPU time from the loader on a machine with few cores: the ratio per CPU-second, which leaves it out,
is what counts there. A request costs the same for a shard of 4 MB as for 8 MB of a larger one: the shards have 16 MB,
the least at which what is measured is what a corpus of shards of hundreds of MB costs.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from data_prep.corpus import Corpus
from pipeline.data_config import DataSettings
from tests.bench_loading import BATCH, BATCHES, MEAN, ROUNDS, SIDE, STD, make_photographs, our_batches, taking
from tests.benching import print_ratio, print_times, rounds_in_turn
from tests.corpora import make_corpus
from tests.s3_server import S3Server, s3_server

LATENCY = 0.03
WINDOW = 3
"""Shards."""
IMAGES, SHARD_MB = 2000, 16


def bench(corpus: Corpus, server: S3Server) -> None:
    """Run both loaders on a corpus and print a table and the ratio."""
    os.environ.update(server.env, AWS_ENDPOINT_URL=server.direct)
    bucket = server.bucket()
    client = server.client()
    for name in corpus.folder.tree():
        client.upload_file(str(corpus.path / name), bucket.removeprefix("s3://"), name)
    cache_bytes = 2 * WINDOW * max(shard["bytes"] for shard in corpus.manifest["shards"])
    remote = Corpus.open(bucket, cache_bytes=cache_bytes)
    threads = min(len(os.sched_getaffinity(0)), 8)
    settings = DataSettings(
        corpus=corpus.url, image_size=SIDE, mean=MEAN, std=STD, decode="cpu", decode_threads=threads,
        shuffle_window=WINDOW,
    )  # fmt: skip
    print(
        f"{corpus.num_samples:,} images of {corpus.index['length'].mean() / 1e3:.0f} kB in {len(corpus.shard_sizes)} "
        f"shards, windows of {WINDOW}, a cache of {cache_bytes / 1e6:.0f} MB; answers {1e3 * LATENCY:.0f} ms late; "
        f"{threads} DALI threads, batches of {BATCH}\n"
    )
    loaders = {"local disk": our_batches(corpus, settings), "S3": our_batches(remote, settings)}
    times = rounds_in_turn({name: taking(batches) for name, batches in loaders.items()}, ROUNDS)
    print_times(times, BATCH * BATCHES)
    print_ratio(times, "S3", "local disk", "target 0.9x")


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, s3_server(LATENCY) as server:
        os.environ["VITFORGE_CACHE"] = str(Path(scratch) / "cache")
        if len(sys.argv) > 1:
            bench(Corpus.open(sys.argv[1]), server)
            return
        images = Path(scratch) / "images"
        images.mkdir()
        make_photographs(images, IMAGES)
        bench(make_corpus(images, Path(scratch) / "corpus", shard_mb=SHARD_MB), server)


if __name__ == "__main__":
    main()
