"""What decoding a gzip tar gave, kept in the cache folder for the next time the same command is given."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from cluster.command import log
from data_prep.columns import Strings
from data_prep.corpus_cache import cache_folder
from data_prep.gzip_points import GzipPoints
from data_prep.image_folders import ClassListing, warn_of_others
from data_prep.source_reader import Stream

_CACHE_VERSION = 3


@dataclass(frozen=True)
class TarPart:
    """One tar: a class, or the whole where there are no class tars."""

    class_name: bytes
    listed: ClassListing
    stream: Stream


def _cache_path(key: str) -> Path:
    name = hashlib.sha256(f"{_CACHE_VERSION} {key}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder("gzip") / f"{name}.npz"


def keep_parts(key: str, parts: Sequence[TarPart]) -> None:
    """Keep what decoding gave, under a key that says which file it was and in which state."""
    streams: list[Stream] = []
    numbers = []
    for part in parts:
        if not streams or part.stream is not streams[-1]:
            known = next((k for k, stream in enumerate(streams) if stream is part.stream), None)
            if known is not None:
                numbers.append(known)
                continue
            streams.append(part.stream)
        numbers.append(len(streams) - 1)
    names = Strings.join([part.listed.names for part in parts])
    classes = Strings.of([part.class_name for part in parts])
    arrays: dict[str, Any] = {
        "names": names.content, "name_pointers": names.pointers,
        "classes": classes.content, "class_pointers": classes.pointers,
        "counts": np.array([len(part.listed.sizes) for part in parts]),
        "sizes": np.concatenate([part.listed.sizes for part in parts]),
        "offsets": np.concatenate([part.listed.offsets for part in parts]),
        "numbers": np.array(numbers),
        "starts": np.array([stream.start if stream.points else -1 for stream in streams], np.int64),
        "others": np.frombuffer(json.dumps([[n.hex() for n in p.listed.others] for p in parts]).encode(), np.uint8),
    }  # fmt: skip
    points = [stream.points for stream in streams if stream.points is not None]
    windows = Strings.join([each.windows for each in points])
    arrays |= {
        "point_counts": np.array([len(each.decoded) for each in points]),
        "decoded": np.concatenate([each.decoded for each in points]),
        "encoded": np.concatenate([each.encoded for each in points]),
        "bits": np.concatenate([each.bits for each in points]),
        "windows": windows.content, "window_pointers": windows.pointers,
    }  # fmt: skip
    path = _cache_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(path, buffer.getbuffer())
    log.info("what decoding gave is kept in %s for when the command is given again", path)


def kept_parts(key: str, name: str) -> list[TarPart] | None:
    """What was kept under a key, or None; `name` is that of the tar."""
    path = _cache_path(key)
    if not path.is_file():
        return None
    try:
        parts = _parts_in(path, name)
    except Exception as error:  # numpy's and zipfile's readers raise whatever their parsing runs into
        log.warning("what decoding %s gave before is damaged in %s (%s): decoding it again", name, path, error)
        return None
    warn_of_others([part.listed for part in parts])
    log.info("what decoding %s gave is known from before (%s)", name, path)
    return parts


def _parts_in(path: Path, name: str) -> list[TarPart]:
    with np.load(path, allow_pickle=False) as arrays:
        a = {key: arrays[key] for key in arrays.files}
    point_ends = np.concatenate([[0], np.cumsum(a["point_counts"])]).astype(int)
    windows = Strings(a["windows"], a["window_pointers"])
    streams: list[Stream] = []
    used = 0
    for start in a["starts"].tolist():
        if start < 0:
            streams.append(Stream(name))
            continue
        span = np.arange(point_ends[used], point_ends[used + 1])
        used += 1
        points = GzipPoints(a["decoded"][span], a["encoded"][span], a["bits"][span], windows.take(span))
        streams.append(Stream(name, start, points))
    names, classes = Strings(a["names"], a["name_pointers"]), Strings(a["classes"], a["class_pointers"])
    others = json.loads(a["others"].tobytes())
    ends = np.concatenate([[0], np.cumsum(a["counts"])]).astype(int)
    parts = []
    for number in range(len(classes)):
        span = np.arange(ends[number], ends[number + 1])
        listed = ClassListing(
            names.take(span), a["sizes"][span], a["offsets"][span], [bytes.fromhex(text) for text in others[number]]
        )
        parts.append(TarPart(classes[number], listed, streams[int(a["numbers"][number])]))
    return parts
