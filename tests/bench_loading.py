"""Loading against webdataset + PIL in a DataLoader and against DALI's own reader, as ratios within one run.

    python -m tests.bench_loading [CORPUS]

All read the same shards and make batches of random crops at 224 pixels, mirrored half of the time and normalised.
Without a corpus it shards JPEGs of scikit-learn's sample photographs in a temporary folder. The DataLoader has as many
workers as DALI has threads, and none besides. They run in turn, several times, after a round that does not count.
"""

import io
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.corpus import Corpus
from pipeline.data_config import DataSettings
from pipeline.loader import TrainLoader
from pipeline.workers import Worker
from tests.benching import print_ratio, print_times, rounds_in_turn
from tests.corpora import make_corpus

ROUNDS = 5
BATCH = 64
BATCHES = 8
"""Batches a round."""
SIDE = 224
IMAGES = 500
EXTENSIONS = "jpg;jpeg;png;webp"
MEAN = STD = (0.5, 0.5, 0.5)


def make_photographs(folder: Path, count: int = IMAGES) -> None:
    """Parts of real photographs at their own resolution, about ImageNet's usual size: 500x400, 83 kB."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        x, y = int(rng.integers(0, 140)), int(rng.integers(0, 27))
        target = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        target.parent.mkdir(exist_ok=True)
        pictures[number % len(pictures)].crop((x, y, x + 500, y + 400)).save(target, "JPEG", quality=95)


def our_batches(corpus: Corpus, settings: DataSettings) -> Iterator[torch.Tensor]:
    """Vitforge's loader: one rank, without end."""
    for batch in TrainLoader(corpus, settings, 0, Worker(), BATCH, BATCH, 0, 10**6, "cpu"):
        assert len(batch.classes) == BATCH
        yield batch.images


def dali_batches(shards: list[Path], settings: DataSettings) -> Iterator[torch.Tensor]:
    """The same graph behind DALI's own reader, with its own random crops."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=settings.decode_threads, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        encoded, label = fn.readers.webdataset(  # type: ignore[misc]  # its stub knows one output at most
            paths=[str(shard) for shard in shards],
            index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
            ext=[EXTENSIONS, "cls"],
            random_shuffle=True,
            initial_fill=IMAGES,
        )
        images = fn.decoders.image_random_crop(
            encoded,
            random_area=list(settings.augment.crop_area),
            random_aspect_ratio=list(settings.augment.crop_aspect),
            output_type=types.RGB,
        )
        images = fn.resize(images, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            mirror=fn.random.coin_flip(),
        )
        return images, label

    pipeline = graph()
    pipeline.build()
    while True:
        images, labels = pipeline.run()
        assert len(labels) == BATCH
        yield torch.from_dlpack(images.as_tensor())


def webdataset_batches(shards: list[Path], settings: DataSettings, workers: int) -> Iterator[torch.Tensor]:
    """webdataset and Pillow in torch's DataLoader."""
    import webdataset

    def prepare(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        encoded = next(sample[kind] for kind in EXTENSIONS.split(";") if kind in sample)
        return pillow_crop(encoded, settings), int(sample["cls"])

    dataset = webdataset.WebDataset([str(shard) for shard in shards], resampled=True, shardshuffle=False)
    samples = dataset.shuffle(IMAGES).map(prepare)
    for images, labels in torch.utils.data.DataLoader(samples, batch_size=BATCH, num_workers=workers):
        assert len(labels) == BATCH
        yield images


def pillow_crop(encoded: bytes, settings: DataSettings) -> torch.Tensor:
    """What torchvision's RandomResizedCrop, flip, ToTensor and Normalize do: float32 [3, SIDE, SIDE]."""
    from PIL import Image

    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    box = random_box(*image.size, settings)
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


def random_box(width: int, height: int, settings: DataSettings) -> tuple[int, int, int, int]:
    """The crop of torchvision's RandomResizedCrop: left, top, right, bottom."""
    low, high = (math.log(ratio) for ratio in settings.augment.crop_aspect)
    for _ in range(10):
        area = width * height * random.uniform(*settings.augment.crop_area)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def taking(batches: Iterator[torch.Tensor]) -> Callable[[], None]:
    """What takes the batches of a round."""

    def run() -> None:
        for _ in range(BATCHES):
            images = next(batches)
            assert images.shape == (BATCH, 3, SIDE, SIDE)

    return run


def bench(corpus: Corpus) -> None:
    """Run all loaders on a corpus and print a table and the ratios."""
    threads = min(len(os.sched_getaffinity(0)), 8)
    settings = DataSettings(
        corpus=str(corpus.path), image_size=SIDE, mean=MEAN, std=STD, decode="cpu", decode_threads=threads
    )
    shards = [corpus.path / shard["name"] for shard in corpus.manifest["shards"]]
    pixels = corpus.index["width"].astype(np.int64) * corpus.index["height"]
    print(
        f"{corpus.num_samples:,} images in {len(shards)} shards, {corpus.index['length'].mean() / 1e3:.0f} kB and "
        f"{pixels.mean() / 1e3:.0f}k pixels each; {threads} DALI threads or DataLoader workers, batches of {BATCH}\n"
    )

    loaders = {
        # first, as its workers are forked and the others start threads
        f"webdataset + PIL, {threads} workers": webdataset_batches(shards, settings, threads),
        "webdataset + PIL, 0 workers": webdataset_batches(shards, settings, 0),
        "vitforge": our_batches(corpus, settings),
        "DALI's own reader": dali_batches(shards, settings),
    }
    times = rounds_in_turn({name: taking(batches) for name, batches in loaders.items()}, ROUNDS)
    print_times(times, BATCH * BATCHES)
    for name in loaders:
        if name != "vitforge":
            print_ratio(times, "vitforge", name, "target 0.97x" if name.startswith("DALI") else "target 1.6x")


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        bench(Corpus.open(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        images.mkdir()
        make_photographs(images)
        bench(make_corpus(images, Path(scratch) / "corpus", shard_mb=8))


if __name__ == "__main__":
    main()
