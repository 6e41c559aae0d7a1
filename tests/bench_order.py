"""The order of samples at the size of the largest corpora: seeking, memory, and how fast a run resumes.

  python -m tests.bench_order

300 million samples and 1,024 simulated ranks by index alone; then the first batch of real images from a corpus of
14.2 million index rows (which share a few images), from the beginning and from the middle, each in a process of its
own. Needs half a GB of disk for a while.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.checked_rows import CheckedRows, hash_blocks
from data_prep.corpus import Corpus
from data_prep.corpus_format import INDEX, MANIFEST, SAMPLE_DTYPE, manifest_hash
from data_prep.mixture import Schedule
from data_prep.order import SampleOrder
from tests.corpora import image_folder, make_corpus
from tests.running import REPOSITORY

SAMPLES, RANKS, GLOBAL_BATCH, SHARD, WINDOW = 300_000_000, 1024, 4096, 5_000, 64
RESUMED = 14_200_000
ROUNDS = 7


def write_index(path: Path, samples: int, pattern: NDArray[np.void]) -> None:
    """An index of rows that repeat a few, in shards of SHARD samples."""
    rows = np.resize(pattern, SHARD * 200)
    with path.open("wb") as file:
        for start in range(0, samples, len(rows)):
            rows["shard"] = (start + np.arange(len(rows))) // SHARD
            file.write(rows[: samples - start].tobytes())


def memory() -> str:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(lines[key].split()[0]) / 1e3 for key in ("RssAnon", "RssFile"))
    return (
        f"{own:,.0f} MB of its own, {mapped:,.0f} MB of mapped files (which the system takes back when it needs them)"
    )


def timed(run: Callable[..., object], repeats: int = 400) -> str:
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        run()
        times.append(1e3 * (time.thread_time() - began))
    return f"{statistics.median(times):.3f} ms (99 %: {np.percentile(times, 99):.3f} ms, first: {times[0]:.3f} ms)"


def seeking(folder: Path) -> None:
    path = folder / INDEX
    with path.open("wb") as file:
        file.truncate(SAMPLES * SAMPLE_DTYPE.itemsize)  # a hole: as long as the real one, without its bytes
    print(f"{SAMPLES:,} samples, global batch {GLOBAL_BATCH:,}, {RANKS:,} ranks; at the start {memory()}")
    began = time.process_time()
    _, checks = hash_blocks(path, SAMPLE_DTYPE.itemsize)
    print(f"looking at it: {time.process_time() - began:.1f} CPU-s; {checks.nbytes / 1e6:.1f} MB of checksums")
    index = CheckedRows(path, SAMPLE_DTYPE, checks=checks, where=str(path))
    sizes = [SHARD] * (SAMPLES // SHARD)
    random = np.random.default_rng(0)
    schedule = Schedule([70, 25, 5])
    share = GLOBAL_BATCH // RANKS

    def some_slice() -> NDArray[np.int64]:
        step, rank = int(random.integers(3 * SAMPLES // GLOBAL_BATCH)), int(random.integers(RANKS))
        return np.arange(share) + step * GLOBAL_BATCH + rank * share

    for name, window in (("shuffled as a whole", 0), (f"in windows of {WINDOW} shards", WINDOW)):
        order = SampleOrder(SAMPLES, 0, sizes, window)
        print(f"a rank's slice of any step, {name}: {timed(lambda order=order: order.ids(some_slice()))}")
        # Of a mixture of three parts, the turns of one stand for those of all.
        print(f"  of a mixture: {timed(lambda order=order: order.ids(schedule.locate(some_slice())[1]))}")
        print(f"  with its rows of the index: {timed(lambda order=order: index[order.ids(some_slice())[1]])}")
        began = time.thread_time()
        for rank in range(RANKS):
            order.ids(np.arange(share) + 31_415 * GLOBAL_BATCH + rank * share)
        print(f"  one step of all ranks: {1e3 * (time.thread_time() - began) / RANKS:.3f} ms a rank")
    print(f"in the end {memory()}; the index has {path.stat().st_size / 1e9:.1f} GB\n")
    path.unlink()


def large_corpus(folder: Path) -> Path:
    """A corpus of RESUMED samples in shards that are one file under many names."""
    small = make_corpus(image_folder(folder / "images", classes=2, images=20), folder / "small", shard_mb=10)
    (facts,) = small.manifest["shards"]
    place = folder / "large"
    place.mkdir()
    write_index(place / INDEX, RESUMED, small.index[:])
    shards = []
    for number in range(RESUMED // SHARD):
        name = f"shard-{number:06d}.tar"
        os.link(small.path / facts["name"], place / name)
        shards.append({**facts, "name": name, "samples": SHARD})
    size = (place / INDEX).stat().st_size
    manifest: dict[str, Any] = {**small.manifest, "num_samples": RESUMED, "shards": shards}
    manifest["files"] = {INDEX: {**small.manifest["files"][INDEX], "bytes": size}}
    manifest["corpus_hash"] = manifest_hash(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))
    return place


def first_batch(place: str, start: int, window: int) -> None:
    """From opening the corpus to the first batch; prints [seconds, CPU-seconds]."""
    from pipeline.data_config import DataSettings
    from pipeline.loader import TrainLoader
    from pipeline.workers import Worker

    third = (0.5, 0.5, 0.5)
    settings = DataSettings(corpus=place, image_size=32, shuffle_window=window, mean=third, std=third, decode_threads=1)
    list(TrainLoader(Corpus.open(place, "sizes"), settings, 1, Worker(), 64, 64, 0, 1, "cpu"))  # DALI's own start
    wall, cpu = time.perf_counter(), time.process_time()
    loader = TrainLoader(Corpus.open(place, "sizes"), settings, 0, Worker(), 64, 64, start, start + 100, "cpu")
    next(iter(loader))
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
    os._exit(0)  # the batches that the thread works on are not waited for


def resuming(folder: Path) -> None:
    place = large_corpus(folder)
    middle = RESUMED * 3 // 2 // 64  # of the second epoch
    for window in (0, WINDOW):
        times: dict[int, list[list[float]]] = {0: [], middle: []}
        for number in range(ROUNDS + 1):
            for start in times:
                words = [sys.executable, "-m", "tests.bench_order", str(place), str(start), str(window)]
                done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
                if number:
                    times[start].append(json.loads(done.stdout.splitlines()[-1]))
        wall, cpu = ({start: statistics.median(t[k] for t in times[start]) for start in times} for k in (0, 1))
        print(
            f"first batch of 64 of {RESUMED:,} samples, {f'windows of {window}' if window else 'shuffled as a whole'}: "
            f"from step 0 {wall[0]:.3f} s ({cpu[0]:.3f} CPU-s), from step {middle:,} {wall[middle]:.3f} s "
            f"({cpu[middle]:.3f} CPU-s): {wall[middle] / wall[0]:.2f} x in wall time, {cpu[middle] / cpu[0]:.2f} x in "
            "CPU time"
        )


def main() -> None:
    if len(sys.argv) == 4:
        first_batch(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    with tempfile.TemporaryDirectory(prefix="vitforge-order-") as scratch:
        seeking(Path(scratch))
        resuming(Path(scratch))


if __name__ == "__main__":
    main()
