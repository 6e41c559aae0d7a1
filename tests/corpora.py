"""Makes small corpora of real images for the tests, in this process and without Ray."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cluster.folders import LocalFolder
from data_prep.card import write_card
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import assemble
from data_prep.corpus_format import INDEX, PLAN, SAMPLE_DTYPE, image_check
from data_prep.shard_plan import Plan
from data_prep.shard_task import write_shard
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source


def encoded(seed: int, size: tuple[int, int] = (40, 30), image_format: str = "JPEG", **options) -> bytes:
    """A smooth random picture, encoded; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, image_format, **options)
    return buffer.getvalue()


def image_folder(root: Path, classes: int = 3, images: int = 10) -> Path:
    """Writes an image folder: classes c0, c1, ..., JPEGs of several sizes."""
    for number in range(classes):
        folder = root / f"c{number}"
        folder.mkdir(parents=True)
        for place in range(images):
            content = encoded(100 * number + place, (40 + place, 30))
            (folder / f"{place:03d}.JPEG").write_bytes(content)
    return root


def make_corpus(source: Path, folder: Path, shard_mb: float = 0.01, labels: Path | None = None) -> Corpus:
    """Shards a source in this process."""
    listing = list_source(SourceSettings(source=str(source), labels=None if labels is None else str(labels)))
    plan = Plan(listing, None, round(shard_mb * 1e6), seed=0)
    there = LocalFolder(folder)
    there.write_bytes(PLAN, b"{}")
    assemble(there, plan, [write_shard(plan.task(shard, there)) for shard in range(len(plan))])
    corpus = Corpus.open(there)
    write_card(corpus)
    return corpus


def overwrite(corpus: Corpus, sample: int, content: bytes, own_checksum: bool = False) -> None:
    """Puts other bytes at the beginning of a sample's image, and with `own_checksum` their checksum into the index."""
    index = np.memmap(corpus.path / INDEX, SAMPLE_DTYPE, "r+")  # which the corpus itself would find altered
    row = index[sample]
    tar = corpus.path / corpus.manifest["shards"][int(row["shard"])]["name"]
    with tar.open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(content[: int(row["length"])])
        file.flush()
        file.seek(int(row["offset"]))
        image = file.read(int(row["length"]))
    if own_checksum:
        index[sample]["check"] = image_check(image)
        index.flush()
