"""Makes folders and tars as other tools and people lay them out, and lists them in this process."""

import io
import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.listing import Listing, SourceError
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from tests.corpora import encoded

IMAGE = encoded(0, (16, 12))


def write(root: Path, *names: str, content: bytes = IMAGE) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def packed(folder: Path, path: Path) -> Path:
    """The files of a folder as a tar."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return tar_of(path, {f"./{folder.name}/{file.relative_to(folder)}": file.read_bytes() for file in files})


def shards(folder: Path, *names: str, label: str = "cls", each: int = 2) -> Path:
    for number, name in enumerate(names):
        members: dict[str, bytes] = {}
        for sample in range(each):
            key = f"{number:03d}{sample}"
            value = {"cls": str(sample), "json": json.dumps({"label": sample, "caption": "x"}), "txt": "x"}[label]
            members |= {f"{key}.jpg": IMAGE, f"{key}.{label}": value.encode()}
        tar_of(folder / name, members)
    return folder


def listed(source: object, **settings: object) -> Listing:
    given = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return list_source(SourceSettings.model_validate({"source": str(source), **given}))


def names(listing: Listing) -> list[str]:
    return [listing.names[row].decode() for row in range(len(listing))]


def numbers(listing: Listing) -> list[int]:
    """The class of each image."""
    assert isinstance(listing.labels, np.ndarray)
    return listing.labels.tolist()


def commands(refused: pytest.ExceptionInfo[SourceError]) -> list[Listing]:
    """What the commands in a refusal give; each must work as it is printed."""
    lines = [line.split() for line in str(refused.value).splitlines() if line.startswith("  python data_prep/shard.py")]
    assert lines, str(refused.value)
    results = []
    for line in lines:
        source, destination, *settings = shlex.split(" ".join(line))[2:]
        assert destination == "DESTINATION"
        results.append(listed(source, **dict(word.split("=", 1) for word in settings)))
    return results
