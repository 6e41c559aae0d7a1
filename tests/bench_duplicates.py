"""What the search for duplicates costs, from measured rates, and that it finds what was planted.

    python -m tests.bench_duplicates [IMAGES]

Describing is timed on photographs of ImageNet's size. The search runs as sharding runs it, on IMAGES (5,000,000 if not
given) synthetic descriptors with an evaluation set of 50,000: exact, near and mirrored copies are planted at known
places, and every one must be found and nothing else. Bits are as uneven as makes the keys as crowded as those of
tiny-imagenet (1.5 times as many candidates as even bits). The part of the time that grows with the square of the number
is told apart by a run with a quarter of the images, for what it costs at 14 million.

How the limits were chosen (2026-11): 500 ImageNet and 1,000 tiny-imagenet photographs against copies of them; share of
the copies whose hashes differ by at most so many bits, on ImageNet / tiny-imagenet:

    copy                              4              6              8              10
    JPEG quality 30          1.000 / 0.992  1.000 / 0.999  1.000 / 0.999  1.000 / 0.999
    half, double size, 64x64 0.998 / 1.000  1.000 / 1.000  1.000 / 1.000  1.000 / 1.000
    0.7 size and quality 40  1.000 / 0.989  1.000 / 0.996  1.000 / 0.998  1.000 / 0.999
    gray                     1.000 / 1.000  1.000 / 1.000  1.000 / 1.000  1.000 / 1.000
    brightness x 1.2         0.946 / 0.950  0.984 / 0.986  0.998 / 0.996  1.000 / 0.999
    contrast x 1.3           0.992 / 0.982  1.000 / 0.998  1.000 / 1.000  1.000 / 1.000
    2 % cut off              0.906 / 0.759  0.988 / 0.952  0.998 / 0.991  0.998 / 0.999
    5 % cut off              0.338 / 0.295  0.650 / 0.606  0.852 / 0.854  0.950 / 0.952
    5 % cut off at a corner  0.020 / 0.024  0.088 / 0.120  0.268 / 0.301  0.538 / 0.549
    mirrored                 1.000 / 1.000  1.000 / 1.000  1.000 / 1.000  1.000 / 1.000

Of the copies within 10 bits the shapes correlate by 0.70 and more in 99 of 100, also of those with 5 % cut off. Among
50,000 images of tiny-imagenet (1.25e9 pairs, and as many mirrored ones) 58 pairs are within 8 bits; looked at, all that
correlate by 0.68 and more are copies, of the others none is. Against its 5,000 validation images (5e8 pairs) one
of the pairs above 0.7 was not: about one false pair in 3e9, so some hundreds of images when 50,000 are excluded from
14 million, and at most one in 200 when 14 million are compared with each other (with 4 bits next to none).
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_prep.duplicates import decide
from data_prep.perceptual_hash import _ODD, DESCRIPTOR, MIRROR, describe_images
from tests.bench_writing import make_images

AT = 14_000_000
DISTANCE = 8
EVALUATION = 50_000
UNEVEN = 0.57
"""Share of ones in every bit."""


def describe_rate() -> float:
    """CPU-seconds an image takes to be described."""
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), 300)
        images = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))]
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        for start in range(0, len(images), 64):
            describe_images(images[start : start + 64])
        best = min(best, (time.process_time() - started) / len(images))
    size = np.mean([len(image) for image in images])
    print(f"describing: {best * 1e3:.2f} CPU-ms an image of {size / 1e3:.0f} kB, {1 / best:,.0f} images/s of one core")
    return best


def fill(descriptors: np.ndarray, rng: np.random.Generator) -> None:
    """Unrelated images."""
    for start in range(0, len(descriptors), 100_000):
        piece = descriptors[start : start + 100_000]
        piece["content"] = rng.integers(0, 2**64, (len(piece), 2), np.uint64)
        bits = rng.random((len(piece), 64), np.float32) < UNEVEN
        piece["hash"] = np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0]
        piece["pictured"] = True
        piece["shape"] = np.clip(rng.standard_normal((len(piece), 255), np.float32) * 8, -127, 127)


def plant(target: np.ndarray, original: np.ndarray, rng: np.random.Generator) -> None:
    """Make images copies of others: a third each exact, near, and near and mirrored."""
    target[:] = original
    near = np.arange(len(target)) % 3 > 0
    mirrored = np.arange(len(target)) % 3 == 2
    target["content"][near] ^= np.uint64(1)
    for bits in rng.integers(0, 64, (DISTANCE, len(target)), np.uint64):
        flip = np.uint64(1) << bits
        target["hash"] ^= np.where(near & (rng.random(len(target)) < 0.5), flip, np.uint64(0))
    target["hash"] ^= np.where(mirrored, MIRROR, np.uint64(0))
    shapes = target["shape"]
    shapes[mirrored] *= np.where(_ODD, -1, 1).astype(np.int8)
    target["shape"] = shapes


def search(count: int, folder: Path) -> float:
    """CPU-seconds of the search among so many images and against an evaluation set; checks what it finds."""
    rng = np.random.default_rng(count)
    source = np.memmap(folder / "descriptors", DESCRIPTOR, "w+", shape=(count,))
    evaluation = np.zeros(EVALUATION, DESCRIPTOR)
    fill(source, rng)
    fill(evaluation, rng)
    chosen = rng.permutation(count)[:60_000]
    pairs = np.sort(chosen[:50_000].reshape(2, -1), axis=0)
    copies = np.zeros(pairs.shape[1], DESCRIPTOR)
    plant(copies, source[pairs[0]], rng)
    source[pairs[1]] = copies
    copies = np.zeros(10_000, DESCRIPTOR)
    plant(copies, evaluation[:10_000], rng)
    source[chosen[50_000:]] = copies
    source.flush()

    started, wall = time.process_time(), time.perf_counter()
    decisions = decide(source, [evaluation], dedup=True, distance=DISTANCE)
    used, wall = time.process_time() - started, time.perf_counter() - wall
    expected = np.zeros(count, bool)
    expected[pairs[1]] = expected[chosen[50_000:]] = True
    found = decisions["reason"] > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"search: {count:,} images with each other and with {EVALUATION:,} excluded, mirrored too: {used / 60:.1f} "
        f"CPU-minutes, {wall / 60:.1f} minutes, at most {peak:.1f} GB in memory ({source.nbytes / 1e9:.1f} GB of it "
        f"descriptors, mapped from a file); of {expected.sum():,} planted copies {np.sum(found & expected):,} were "
        f"found, and {np.sum(found & ~expected):,} other images"
    )
    assert (found == expected).all()
    assert (decisions["of"][pairs[1]] == pairs[0]).all()
    return used


def main() -> None:
    """The command."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    rate = describe_rate()
    with tempfile.TemporaryDirectory() as folder:
        quarter, whole = (search(number, Path(folder)) for number in (count // 4, count))
    # a N + b N^2: looking up, and comparing what lies there
    square = (whole / count - quarter / (count // 4)) / (count - count // 4)
    straight = whole / count - square * count
    estimate = straight * AT + square * AT**2
    print(
        f"at {AT:,} images: describing {AT * rate / 3600:.1f} CPU-hours, search {estimate / 60:.0f} CPU-minutes, about "
        f"{AT * 55 / 1e9:.1f} GB in memory and {AT * DESCRIPTOR.itemsize / 1e9:.1f} GB of scratch on a disk"
    )


if __name__ == "__main__":
    main()
