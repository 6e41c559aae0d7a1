"""Reads the images of a listing ahead of whoever writes them, into memory that is used again and again.

Fresh memory for every image costs more CPU time (page faults) than reading it does.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.columns import Strings
from data_prep.sources import SourceError

_GROUP_IMAGES, _GROUP_BYTES = 64, 1 << 20
"""What one thread reads at a time: enough to make a thread's turn worth it, little enough to stay in its cache."""
_AHEAD = 8
"""Threads, and groups of images, that reading is ahead."""


def read_groups(
    root: Path, names: Strings, sizes: NDArray[np.uint64], offsets: NDArray[np.uint64] | None
) -> Iterator[list[memoryview]]:
    """The encoded images of (a part of) a listing, in its order, a group at a time.

    The views of a group are released when the next one is asked for: copy, or write, what must stay.

    Args:
        root: the folder, or the tar.
        names: of the images below the root.
        sizes: bytes of each image.
        offsets: of each image in the tar; None for a folder.

    Raises:
        SourceError: an image is gone or has another size than when it was listed.
        OSError: the file system fails; worth another try.
    """
    descriptor = os.open(root, os.O_RDONLY) if offsets is not None else -1
    base = os.fsencode(root) + b"/"
    groups = _cut_into_groups(sizes)
    largest = max((int(sizes[group.start : group.stop].sum()) for group in groups), default=0)
    free = [bytearray(largest) for _ in range(min(_AHEAD, len(groups)) + 1)]

    def read_group(group: range, buffer: bytearray) -> tuple[bytearray, list[memoryview]]:
        views, at = [], 0
        whole = memoryview(buffer)
        for place in group:
            size = int(sizes[place])
            view = whole[at : at + size]
            if offsets is not None:
                count = _read_fully(descriptor, view, int(offsets[place]))
            else:
                count = _read_file(base + names[place], view)
            if count != size:
                raise SourceError(
                    f"{os.fsdecode(names[place])} in {root} changed while it was being sharded: it had {size} bytes "
                    f"when it was listed; run again when nothing writes there"
                )
            views.append(view)
            at += size
        return buffer, views

    pool = ThreadPoolExecutor(_AHEAD)
    running: list[Future[tuple[bytearray, list[memoryview]]]] = []
    waiting = iter(groups)
    try:
        while True:
            while len(running) < _AHEAD and (group := next(waiting, None)) is not None:
                running.append(pool.submit(read_group, group, free.pop()))
            if not running:
                return
            buffer, views = running.pop(0).result()
            yield views
            for view in views:
                view.release()
            free.append(buffer)
    finally:
        pool.shutdown(cancel_futures=True)
        if descriptor >= 0:
            os.close(descriptor)


def _cut_into_groups(sizes: NDArray[np.uint64]) -> list[range]:
    """Places 0..N in runs of few images and few bytes."""
    groups, start, total = [], 0, 0
    for place, size in enumerate(sizes.tolist()):
        total += size
        if place - start + 1 == _GROUP_IMAGES or total >= _GROUP_BYTES:
            groups.append(range(start, place + 1))
            start, total = place + 1, 0
    return [*groups, range(start, len(sizes))] if start < len(sizes) else groups


def _read_fully(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` from an offset of a file; returns the bytes that were there."""
    done = 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done


def _read_file(path: bytes, view: memoryview) -> int:
    """Fill `view` with a file; returns its size as far as that was seen: one more than `view` has if it is longer."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise SourceError(f"{os.fsdecode(path)} is gone: it was there when the source was listed") from None
    try:
        count = os.readv(descriptor, [view, bytearray(1)])
        if count < len(view):
            count += _read_fully(descriptor, view[count:], count)
        return count
    finally:
        os.close(descriptor)
