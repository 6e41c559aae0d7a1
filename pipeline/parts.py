"""A checkpoint's parts: one file of numbers a rank, and a list of which elements of which parameter lie where.

    rank-00000.bin     float32, little endian: the rank's pieces of the weights and of every optimizer state
    rank-00000.json    {"bytes", "scalars", "pieces": [[NAME, START, COUNT, {STATE: [OFFSET, xxh3_128]}], ...]}

Every piece has its own checksum, so that a rank of another layout reads what it needs and no more, and still
knows that it is what was written.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from cluster.ahead import ahead
from cluster.command import Progress
from cluster.folders import Folder
from cluster.records import check_record
from cluster.storage import StorageError, json_bytes, parse_json, write_fully
from pipeline.checkpoint_records import Listing
from pipeline.elastic import Holdings, Piece

READERS = 8
"""Reads under way at a time: object stores answer slowly, but many at once."""
RUN_BYTES = 32 << 20
"""Neighbouring pieces are read together up to this."""
GAP_BYTES = 1 << 20
"""What is read for nothing at most, between two pieces that are read together."""


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not all there as they were written."""


def part_name(rank: int) -> str:
    """Name of a rank's part, without .bin or .json."""
    return f"rank-{rank:05d}"


def write_part(held: Holdings, pieces: list[Piece], folder: Path, rank: int) -> dict[str, int]:
    """Write a rank's part into a local folder.

    Args:
        pieces: those of `held` that this rank saves.

    Returns:
        The files and their bytes, in the order in which they are to be brought elsewhere.

    Raises:
        OSError: the disk is full, or fails.
    """
    rows: list[list[Any]] = []
    position = 0
    with (folder / f"{part_name(rank)}.bin").open("wb", buffering=0) as file:
        for number, states in enumerate(held.flats):
            mine = [piece for piece in pieces if piece.flat == number]
            if not mine:
                continue
            low = min(piece.offset for piece in mine)
            high = max(piece.offset + piece.count for piece in mine)
            places: list[dict[str, Any]] = [{} for _ in mine]
            for state, tensor in sorted(states.items()):
                assert tensor.dtype == torch.float32, (state, tensor.dtype)
                numbers: Any = tensor[low:high].cpu().numpy()
                content = memoryview(numbers).cast("B")
                for place, piece in zip(places, mine, strict=True):
                    begin = 4 * (piece.offset - low)
                    digest = xxhash.xxh3_128_hexdigest(content[begin : begin + 4 * piece.count])
                    place[state] = [position + begin, digest]
                write_fully(file, content)
                position += len(content)
            rows += [[piece.name, piece.start, piece.count, place] for place, piece in zip(places, mine, strict=True)]
    scalars = {name: float(value) for name, value in held.scalars[0].items()}
    assert all({name: float(value) for name, value in other.items()} == scalars for other in held.scalars)
    listing = json_bytes({"bytes": position, "scalars": scalars, "pieces": rows})
    (folder / f"{part_name(rank)}.json").write_bytes(listing)
    return {f"{part_name(rank)}.bin": position, f"{part_name(rank)}.json": len(listing)}


@dataclass
class _Stored:
    """A piece in a file."""

    file: str
    name: str
    start: int
    count: int
    places: Mapping[str, tuple[int, str]]


@dataclass
class _Read:
    """Bytes of a file that hold one state of one stored piece, and where they go."""

    file: str
    offset: int
    count: int
    digest: str
    what: str
    targets: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    """Destinations (one-dimensional) and the element of the piece that each begins with."""


class Parts:
    """The parts of a checkpoint, to read from.

    Args:
        folder: the checkpoint's.
        parts: for every rank its files' bytes by name and its list's xxh3_128, as the manifest says.

    Raises:
        DamagedCheckpointError: a list is not what was written.
        StorageError: the storage fails.
    """

    def __init__(self, folder: Folder, parts: list[dict[str, Any]]) -> None:
        self.folder = folder
        self._sizes = {name: size for part in parts for name, size in part["files"].items()}
        self.scalars: dict[str, float] = {}
        self._stored: dict[str, list[_Stored]] = {}
        with ThreadPoolExecutor(READERS) as pool:
            listings = list(pool.map(self._listing, range(len(parts)), [part["digest"] for part in parts]))
        for rank, listing in enumerate(listings):
            self.scalars = listing.scalars
            for name, start, count, places in listing.pieces:
                stored = _Stored(f"{part_name(rank)}.bin", name, start, count, places)
                self._stored.setdefault(name, []).append(stored)
        for pieces in self._stored.values():
            pieces.sort(key=lambda stored: stored.start)

    def _listing(self, rank: int, digest: str) -> Listing:
        name = f"{part_name(rank)}.json"
        content = self._bytes(name)
        if xxhash.xxh3_128_hexdigest(content) != digest:
            raise DamagedCheckpointError(f"checkpoint {self.folder} is damaged: {name} is not what was written")
        where = f"checkpoint {self.folder} is damaged: {name}"
        try:
            value = parse_json(content, name)
        except StorageError as error:
            raise DamagedCheckpointError(f"{where} is not JSON ({error})") from error
        listing = check_record(Listing, value, where, DamagedCheckpointError)
        numbers = f"{part_name(rank)}.bin"
        if listing.bytes != self._sizes[numbers]:
            raise DamagedCheckpointError(f"{where} is not the list of {numbers}")
        return listing

    def _bytes(self, name: str, *where: int) -> bytes:
        try:
            return self.folder.read_bytes(name, *where)
        except StorageError as error:
            if self.folder.size(name) == self._sizes[name]:
                raise  # it is there: the storage fails, which says nothing of what lies there
            raise DamagedCheckpointError(f"checkpoint {self.folder} is damaged: {error}") from error

    def states(self) -> set[str]:
        """Names of the states that were saved."""
        return {state for pieces in self._stored.values() for stored in pieces for state in stored.places}

    def count(self, name: str, state: str) -> int:
        """Elements of a state of a parameter that are there."""
        return sum(stored.count for stored in self._stored.get(name, []) if state in stored.places)

    def read(self, wanted: Iterable[tuple[str, str, int, torch.Tensor]], label: str) -> None:
        """Read elements and put them where they belong, each stored piece verified.

        Args:
            wanted: parameter, state, first element, and the one-dimensional tensor that they fill.
            label: what is being done, for the progress lines.

        Raises:
            DamagedCheckpointError: something is missing or is not what was written.
        """
        reads: dict[tuple[str, int], _Read] = {}
        for name, state, start, target in wanted:
            covered = 0
            for stored in self._stored.get(name, []):
                first, last = max(start, stored.start), min(start + len(target), stored.start + stored.count)
                if first >= last or state not in stored.places:
                    continue
                if first != start + covered:  # a gap, or elements that are there twice
                    break
                offset, digest = stored.places[state]
                key = (stored.file, offset)
                if key not in reads:
                    what = f"{state} of {name}, elements from {stored.start} on"
                    reads[key] = _Read(stored.file, offset, stored.count, digest, what)
                reads[key].targets.append((target[first - start : last - start], first - stored.start))
                covered += last - first
            if covered != len(target):
                raise DamagedCheckpointError(
                    f"checkpoint {self.folder} has {covered:,} of {len(target):,} elements of {state} of {name}"
                )
        self._run([reads[key] for key in sorted(reads)], label)

    def verify(self) -> None:
        """Read everything.

        Raises:
            DamagedCheckpointError: something is missing or is not what was written.
        """
        reads = [
            _Read(stored.file, offset, stored.count, digest, f"{state} of {stored.name}")
            for pieces in self._stored.values()
            for stored in pieces
            for state, (offset, digest) in stored.places.items()
        ]
        self._run(sorted(reads, key=lambda read: (read.file, read.offset)), "verifying the checkpoint,")

    def _run(self, reads: list[_Read], label: str) -> None:
        progress = Progress(sum(4 * read.count for read in reads) >> 20, "MB", label)
        done = shown = 0
        for group, content in ahead(self._fetch, _together(reads), READERS, 2 * READERS):
            for read in group:
                begin = read.offset - group[0].offset
                values = torch.frombuffer(content, dtype=torch.float32, count=read.count, offset=begin)
                for target, first in read.targets:
                    target.copy_(values[first : first + len(target)])
                done += 4 * read.count
            progress.update((done >> 20) - shown)
            shown = done >> 20

    def _fetch(self, group: list[_Read]) -> tuple[list[_Read], bytearray]:
        first, last = group[0], group[-1]
        content = self._bytes(first.file, first.offset, last.offset + 4 * last.count - first.offset)
        for read in group:
            begin = read.offset - first.offset
            if xxhash.xxh3_128_hexdigest(memoryview(content)[begin : begin + 4 * read.count]) != read.digest:
                raise DamagedCheckpointError(
                    f"checkpoint {self.folder} is damaged: {read.what} in {read.file} is not what was written"
                )
        return group, bytearray(content)


def _together(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Neighbours in a file, to be read at once."""
    group: list[_Read] = []
    for read in reads:
        if group:
            end = group[-1].offset + 4 * group[-1].count
            near = read.file == group[0].file and read.offset - end <= GAP_BYTES
            if not near or read.offset + 4 * read.count - group[0].offset > RUN_BYTES:
                yield group
                group = []
        group.append(read)
    if group:
        yield group
