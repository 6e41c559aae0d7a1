"""Shard writing against webdataset's ShardWriter and `cp -r` of the same files, as ratios within one run.

    python -m tests.bench_writing [FOLDER_OF_JPEGS]

Without a folder it makes JPEGs of scikit-learn's sample photographs at several sizes in a temporary folder. Writers
are compared with the images in memory (what a ShardWriter is given), and as a whole stage that reads every file and
writes it to the same disk (what `cp -r` does). They run in turn, several times, and the least time of each counts, as
the machine may have other things to do; the free memory is used once before. Validation (the full decode of every
image) is what sharding adds to that; it is timed apart.
"""

import io
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import psutil

from cluster import storage
from cluster.folders import LocalFolder
from data_prep.corpus_format import image_check
from data_prep.image_check import check_image
from data_prep.shard_plan import Plan
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.tar_shards import ShardWriter

ROUNDS = 5
SHARD_BYTES = 64_000_000


def make_images(folder: Path, count: int = 1200) -> None:
    """Real photographs, cropped at different places and sizes so that no two are equal: about 110 kB each."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        picture = pictures[number % len(pictures)]
        x, y = int(rng.integers(0, 240)), int(rng.integers(0, 120))
        crop = picture.crop((x, y, x + 400, y + 300)).resize(((400, 300), (500, 375), (640, 480))[number % 3])
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=95)
        target = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(buffer.getvalue())


def write_shards(plan: Plan, target: Path) -> None:
    """What a sharding task does, without the decoding: tars, index rows, .idx and checksums, synced and renamed."""
    target.mkdir()
    for shard in range(len(plan)):
        task = plan.task(shard, LocalFolder(target))
        with task.folder.building(task.name) as file:
            writer = ShardWriter(file, "cls")
            rows: list[tuple[int, int, int]] = []
            for images in task.images.groups(task.names, task.sizes):
                there = [image for image in images if isinstance(image, memoryview)]
                rows += add_all(writer, there, task.first_position + len(rows))
                writer.flush()
            writer.finish()
        storage.write_bytes((target / task.name).with_suffix(".idx"), writer.dali_index)
        assert len(rows) == len(task.sizes)


def add_all(writer: ShardWriter, images: Iterable[bytes | memoryview], first: int) -> list[tuple[int, int, int]]:
    """Write images and gather their index rows."""
    rows = []
    for number, image in enumerate(images, first):
        offset = writer.add(f"{number:09d}", "jpg", image, b"7")
        rows.append((offset, len(image), image_check(image)))
    return rows


def write_from_memory(images: Sequence[bytes], target: Path) -> None:
    """One shard of images that were read before."""
    target.mkdir()
    with (target / "shard.tar").open("wb", buffering=0) as file:
        writer = ShardWriter(file, "cls")
        for start in range(0, len(images), 16):
            add_all(writer, images[start : start + 16], start)
            writer.flush()
        writer.finish()
    (target / "shard.idx").write_bytes(writer.dali_index)


def write_by_webdataset(images: Iterable[bytes], target: Path) -> None:
    """The same images through webdataset's ShardWriter, without any index."""
    import webdataset

    target.mkdir()
    pattern = str(target / "shard-%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=10**9, verbose=0) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"{number:09d}", "jpg": image, "cls": 7})


def copy_folder(source: Path, target: Path) -> None:
    """`cp -r`."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)


def touch_memory() -> None:
    """Use the free memory once. A virtual machine gets it from its host when a page is first touched.

    What that costs is the CPU time of whoever is the first, here the page cache under one writer or another: a fresh
    machine was seen to write at half the rate of one that had been up for ten minutes.
    """
    length = psutil.virtual_memory().available * 3 // 4
    mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process and its children)."""
    os.sync()

    def cpu() -> float:
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    before, started = cpu(), time.perf_counter()
    run()
    return time.perf_counter() - started, cpu() - before


def bench(source: Path, scratch: Path) -> None:
    """Run all writers on an image folder and print a table and the ratios."""
    listing = list_source(SourceSettings(source=str(source)))
    megabytes = float(listing.sizes.sum()) / 1e6
    plan = Plan(listing, None, SHARD_BYTES, seed=0)
    paths = [source / os.fsdecode(listing.names[number]) for number in range(len(listing))]
    images = [path.read_bytes() for path in paths]  # also brings every file into the page cache
    print(f"{len(listing):,} images, {megabytes:,.0f} MB, {megabytes * 1e3 / len(listing):.0f} kB each\n")

    counter = iter(range(10**6))

    def fresh() -> Path:
        return scratch / f"out-{next(counter)}"

    def validate() -> None:
        for image in images:
            check_image(image)

    runs: dict[str, Callable[[], None]] = {
        "from memory: vitforge": lambda: write_from_memory(images, fresh()),
        "from memory: ShardWriter": lambda: write_by_webdataset(images, fresh()),
        "from files: vitforge": lambda: write_shards(plan, fresh()),
        "from files: ShardWriter": lambda: write_by_webdataset((path.read_bytes() for path in paths), fresh()),
        "from files: cp -r": lambda: copy_folder(source, fresh()),
        "validation": validate,
    }
    wall = dict.fromkeys(runs, float("inf"))
    cpu = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            # once unmeasured: the page cache that another writer left costs the next one up to twice its own time
            for _ in range(2):
                wall_once, cpu_once = measure(run)
                for path in scratch.iterdir():
                    shutil.rmtree(path)
            wall[name], cpu[name] = min(wall[name], wall_once), min(cpu[name], cpu_once)

    print(f"{'':26} {'MB/s':>8} {'MB per CPU-second':>18} {'CPU-ms/image':>13}")
    for name in runs:
        per_image = 1e3 * cpu[name] / len(listing)
        print(f"{name:26} {megabytes / wall[name]:8,.0f} {megabytes / cpu[name]:18,.0f} {per_image:13.3f}")
    print()
    for ours, theirs, target in (
        ("from memory: vitforge", "from memory: ShardWriter", "target 3x"),
        ("from files: vitforge", "from files: ShardWriter", "reading and the kernel's part included"),
        ("from files: vitforge", "from files: cp -r", "target 0.6x; ours with checksums, and synced to disk"),
    ):
        print(
            f"{ours} / {theirs.split(': ')[1]}: {cpu[theirs] / cpu[ours]:.2f}x per CPU-second, "
            f"{wall[theirs] / wall[ours]:.2f}x in wall time ({target})"
        )


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            source = Path(sys.argv[1])
        else:
            source = Path(scratch) / "images"
            source.mkdir()
            make_images(source)
        outputs = Path(scratch) / "outputs"
        outputs.mkdir()
        touch_memory()
        bench(source, outputs)


if __name__ == "__main__":
    main()
