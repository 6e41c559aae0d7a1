"""What readers find in corpora that do not install small: timm's ReaderWds, Energon, webdataset.

Run with the Python of an environment of its own, into which goes what is to be tried (it needs nothing of ours):

    pip install timm webdataset megatron-energon
    python -m tests.other_readers CORPUS [CORPUS ...]

Each CORPUS is a folder on this machine with tars of its own: one of shard.py or index.py, or a copy of either or of a
part. Prints for each reader how many samples it finds and of how many of them class (or heaviest label) and size are
those of the table beside the tars; exits with 1 if any are not. Energon's preparation is made in a folder of links.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Sample = tuple[tuple[int, ...], tuple[int, int]]
"""Its class or classes, ascending, and (width, height)."""


def main() -> None:
    failures = 0
    for place in sys.argv[1:]:
        folder = Path(place).resolve()
        expected = table_of(folder)
        print(f"{folder}: {expected.total():,} samples")
        for name, read in READERS.items():
            try:
                found = Counter(read(folder))
            except ImportError as error:
                print(f"  {name:<24} not installed ({error})")
                continue
            right = (found & expected).total()
            failures += not right == found.total() == expected.total()
            print(f"  {name:<24} {found.total():>8,} samples, {right:>8,} as the table has them")
    sys.exit(1 if failures or len(sys.argv) < 2 else 0)


def table_of(folder: Path) -> Counter[Sample]:
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "samples.parquet")
    labels = (
        [[label] for label in rows["label"].to_pylist()] if "label" in rows.column_names else rows["labels"].to_pylist()
    )
    sizes = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    return Counter((tuple(sorted(each)), size) for each, size in zip(labels, sizes, strict=True))


def many_labels(folder: Path) -> bool:
    return bool(json.loads((folder / "manifest.json").read_text())["label_kind"] == "multi")


def by_webdataset(folder: Path) -> Iterator[Sample]:
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    label = "json" if many_labels(folder) else "cls"
    for image, content in (
        webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple(endings(folder), label)
    ):
        yield tuple(sorted(content["labels"])) if label == "json" else (int(content),), image.size


def by_timm(folder: Path) -> Iterator[Sample]:
    import timm.data

    extra = {"target_key": "labels"} if many_labels(folder) else {}
    reader = timm.data.create_dataset("wds/", str(folder), split="train", input_key=endings(folder), **extra)
    assert len(reader) == table_of(folder).total(), f"timm expects {len(reader)} samples"
    for image, label in reader:
        yield tuple(sorted(label)) if isinstance(label, list) else (int(label),), image.size


def by_energon(folder: Path) -> Iterator[Sample]:
    import torch
    from megatron import energon

    with tempfile.TemporaryDirectory() as scratch:
        links = Path(scratch) / folder.name
        links.mkdir()
        for path in folder.iterdir():
            (links / path.name).symlink_to(path)
        image = endings(folder).replace(";", ",")
        fields = {"image": image, "label": "json[labels]" if many_labels(folder) else "cls"}
        command = [
            str(Path(sys.executable).parent / "energon"), "prepare", str(links), "--non-interactive",
            "--split-ratio", "1,0,0", "--sample-type", "ImageClassificationSample", "--field-map", json.dumps(fields),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
        dataset = energon.get_val_dataset(
            str(links),
            split_part="train",
            batch_size=None,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        )
        for sample in energon.get_loader(dataset):
            label: Any = sample.label
            numbers = label.tolist() if isinstance(label, torch.Tensor) else label
            height, width = sample.image.shape[-2:]
            yield tuple(sorted(numbers)) if isinstance(numbers, list) else (int(numbers),), (width, height)


def endings(folder: Path) -> str:
    """Of the images, in the order in which the index of the first tars has them."""
    first = (path.read_text().splitlines()[1:] for path in sorted(folder.glob("*.idx")) if path.suffixes == [".idx"])
    return ";".join(dict.fromkeys(line.split()[0] for lines in first for line in lines))


READERS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "webdataset": by_webdataset,
    "timm's ReaderWds": by_timm,
    "megatron-energon": by_energon,
}


if __name__ == "__main__":
    main()
