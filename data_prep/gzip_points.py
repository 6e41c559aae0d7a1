"""Random access to gzip files: one pass finds points from which decoding can start anew, reads begin at the nearest.

A point is a place of the compressed stream, down to the bit, with the 32 KiB of output before it that what follows
may refer to. rapidgzip finds them, on all cores, and leaves out of the 32 KiB what nothing refers to: in images,
which do not compress, nearly all of it.
"""

import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.ahead import ahead
from cluster.marked_folders import temporary_folder
from data_prep.columns import Strings
from data_prep.tar_headers import BLOCK, ReadAt, TarError

_MAGIC = bytes(8) + b"gzipindx"
_PIECE = 64 << 10
"""Compressed bytes that are read, and decoded bytes that are made, at a time."""
_SPACING = 512 << 10
"""Compressed bytes between points. Reading at random decodes half of that for each image; fewer make a larger index:
about 350 bytes a point for photographs."""
_FED = 1 << 20
_TRAILER = 8
"""Bytes of checksum and length that end a gzip member."""


class GzipError(ValueError):
    """A gzip file that is damaged or cut short."""


@dataclass(frozen=True)
class GzipPoints:
    """Points of one gzip file at which decoding can start, P of them, in order; the first is at its beginning."""

    decoded: NDArray[np.int64]
    """Offset of each point in the decoded stream, bytes [P]."""
    encoded: NDArray[np.int64]
    """Offset of the first whole byte of each point in the file [P]."""
    bits: NDArray[np.uint8]
    """How many (high) bits of the byte before that belong to it [P], 0..7."""
    windows: Strings
    """The 32 KiB of output before each point, zlib-compressed [P]; empty where nothing refers to it."""

    def around(self, offsets: NDArray[np.uint64]) -> "GzipPoints":
        """Those that reads at these offsets need: what is sent to a worker."""
        needed = np.unique(np.searchsorted(self.decoded, offsets.astype(np.int64), side="right") - 1)
        return GzipPoints(self.decoded[needed], self.encoded[needed], self.bits[needed], self.windows.take(needed))


def _bits(value: int, count: int) -> list[int]:
    return [value >> place & 1 for place in range(count)]


def _empty_blocks() -> tuple[list[int], list[int]]:
    """Two deflate blocks that decode to nothing, of 10 and of 97 bits (RFC 1951), the lowest bit first."""
    fixed = [0, *_bits(1, 2), *[0] * 7]  # not the last block, fixed codes, end of block
    # Dynamic codes: literals 0 and 256 (end of block) have one bit each, there is no distance. The 19 lengths of the
    # code for code lengths, in the order of the standard: 18 (a run of zeros) has one bit, 0 and 1 have two.
    lengths = {18: 1, 0: 2, 1: 2}
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    dynamic = [0, *_bits(2, 2), *_bits(0, 5), *_bits(0, 5), *_bits(15, 4)]
    dynamic += [bit for symbol in order for bit in _bits(lengths.get(symbol, 0), 3)]
    one, zero, run = [1, 1], [1, 0], [0]
    dynamic += one + run + _bits(138 - 11, 7) + run + _bits(117 - 11, 7) + one + zero
    return fixed, [*dynamic, 1]


def _prefixes() -> list[tuple[bytes, int]]:
    """For 0..7 bits to skip: whole bytes, and the low bits of the byte that follows, that a decoder reads as nothing.

    Python's zlib starts at whole bytes only. Blocks that decode to nothing bring it to any bit.
    """
    fixed, dynamic = _empty_blocks()
    prefixes = []
    for skip in range(8):
        bits = list(dynamic) if skip % 2 else []
        while len(bits) % 8 != skip:
            bits += fixed
        values = [sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
        prefixes.append((bytes(values[: len(bits) // 8]), values[-1] if skip else 0))
    return prefixes


_PREFIXES = _prefixes()


class GzipReader:
    """Reads pieces of the decoded stream of a gzip file; pieces asked for in ascending order share their decoding.

    Args:
        read_at: of the file.
        points: at which decoding may start; they must reach every offset that is read.
        where: what to call the file in messages.
    """

    def __init__(self, read_at: ReadAt, points: GzipPoints, where: str) -> None:
        self._read_at, self._points, self._where = read_at, points, where
        self._decoder: Any = None
        self._raw = True
        """Whether the decoder began at a point: it does not know of the member's trailer then."""
        self._source = 0
        """Offset in the file of what the decoder is given next."""
        self._position = 0
        """Offset in the decoded stream of what it gives next."""
        self._input = b""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill `view` from an offset of the decoded stream; returns the bytes that were there.

        Raises:
            GzipError: the stream is damaged.
        """
        point = int(np.searchsorted(self._points.decoded, offset, side="right")) - 1
        assert point >= 0, "no point reaches this offset"
        if self._decoder is None or not self._points.decoded[point] <= self._position <= offset:
            self._start(point)
        try:
            while self._position < offset:
                if not self._decode(min(_PIECE, offset - self._position)):
                    return 0
            done = 0
            while done < len(view) and (piece := self._decode(min(_PIECE, len(view) - done))):
                view[done : done + len(piece)] = piece
                done += len(piece)
            return done
        except zlib.error as error:
            self._decoder = None
            raise GzipError(f"{self._where} is damaged near decoded byte {self._position}: {error}") from error

    def _start(self, point: int) -> None:
        bits = int(self._points.bits[point])
        self._source = int(self._points.encoded[point])
        self._position = int(self._points.decoded[point])
        packed = self._points.windows[point]
        window = zlib.decompress(packed) if packed else b""
        self._decoder, self._raw = zlib.decompressobj(-zlib.MAX_WBITS, zdict=window), True
        self._input = b""
        if bits:
            before = self._read_at(1, self._source - 1)
            if not before:
                raise GzipError(f"{self._where} ends before byte {self._source}")
            whole, low = _PREFIXES[8 - bits]
            self._input = whole + bytes([low | before[0] & (0xFF << (8 - bits) & 0xFF)])

    def _decode(self, most: int) -> bytes:
        """The next bytes of the decoded stream; empty at its end."""
        while True:
            if self._decoder.eof and not self._next_member():
                return b""
            if not self._input:
                self._input = self._read_at(_PIECE, self._source)
                self._source += len(self._input)
            at_end = not self._input
            piece: bytes = self._decoder.decompress(self._input, most)
            self._input = self._decoder.unconsumed_tail
            self._position += len(piece)
            if piece or at_end:
                return piece

    def _next_member(self) -> bool:
        """Go on with the gzip member that follows, as `cat a.gz b.gz` gives; False where there is none."""
        left = self._decoder.unused_data
        self._source += (_TRAILER if self._raw else 0) - len(left)
        self._input = self._read_at(_PIECE, self._source)
        self._source += len(self._input)
        if not self._input.startswith(b"\x1f\x8b"):
            return False
        self._decoder, self._raw = zlib.decompressobj(16 + zlib.MAX_WBITS), False
        return True


@dataclass(frozen=True)
class Slice:
    """A gzip file that is a run of bytes of another file, or a file that has no path on this machine."""

    read_at: ReadAt
    """Of the other file."""
    start: int
    size: int
    readers: int = 1
    """Threads that read it at a time; more than one where `read_at` is for several and waits for a network."""


def find_points(source: Path | Slice, where: str, visit: Callable[[ReadAt], None], threads: int) -> GzipPoints:
    """Decode a gzip file once, for someone who reads it from front to back, and find its points on the way.

    A process of its own decodes: all of what rapidgzip holds is gone afterwards, and a crash of it is an error here.

    Args:
        source: the file.
        where: what to call it in messages.
        visit: is given the decoded stream; it may hop forward, not back.
        threads: that decode.

    Raises:
        GzipError: it is damaged or cut short.
        OSError: it cannot be read.
    """
    with temporary_folder("gzip") as folder:
        index = folder / "points"
        words = ["-d", "-c", "-f", "--verify", "-P", str(threads), "--chunk-size", str(_SPACING >> 10)]
        words += ["--index-format", "gztool", "--export-index", str(index)]
        words += [os.fspath(source)] if isinstance(source, Path) else []
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys, rapidgzip; sys.exit(rapidgzip.cli())", *words],
            stdin=subprocess.DEVNULL if isinstance(source, Path) else subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        unread: list[Exception] = []
        feeder = threading.Thread(target=_feed, args=(process, source, unread), daemon=True)
        complaints: list[bytes] = []
        listener = threading.Thread(target=lambda: complaints.extend(process.stderr or ()), daemon=True)
        try:
            listener.start()
            if isinstance(source, Slice):
                feeder.start()
            stream = _Forward(process)

            def refuse_failure() -> None:
                failed = process.wait() != 0
                if unread:
                    raise unread[0]
                if failed:
                    raise GzipError(f"{where} is damaged or cut short: {_last_line(complaints, listener)}")

            try:
                visit(stream.read_at)
            except TarError:
                if stream.at_end():  # perhaps the tar is cut short because decoding, or reading, failed
                    refuse_failure()
                raise
            end = stream.drain()
            refuse_failure()
            points = _parse(index.read_bytes())
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    keep = points.decoded < max(end, 1)
    return points if keep.all() else points.around(points.decoded[keep].astype(np.uint64))


def _feed(process: "subprocess.Popen[bytes]", source: Slice, unread: list[Exception]) -> None:
    """Write a gzip file to its decoder; why it cannot be read goes to `unread`."""
    assert process.stdin is not None
    end = source.start + source.size
    places = range(source.start, end, _FED)
    pieces = ahead(lambda at: _read(source, min(_FED, end - at), at), places, source.readers, source.readers + 1)
    with suppress(BrokenPipeError), process.stdin, closing(pieces):  # the process says itself what it does not like
        while True:
            try:
                piece = next(pieces, b"")
            except Exception as error:  # whatever it is: the reader of the stream raises it
                unread.append(error)
                return
            if not piece:
                return
            process.stdin.write(piece)


def _read(source: Slice, size: int, offset: int) -> bytes:
    """All that is there of some bytes of a file."""
    piece = source.read_at(size, offset)
    while len(piece) < size and (more := source.read_at(size - len(piece), offset + len(piece))):
        piece += more
    return piece


def _last_line(complaints: list[bytes], listener: threading.Thread) -> str:
    listener.join(5)
    return complaints[-1].decode("utf-8", "replace").strip() if complaints else "the decoder stopped without a word"


class _Forward:
    """What a process writes, read from front to back; a little of what was read can be read again."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        self._pipe = process.stdout
        self._start = 0
        self._buffer = b""

    def read_at(self, size: int, offset: int) -> bytes:
        assert offset >= self._start, "a stream goes forward only"
        while offset + size > self._start + len(self._buffer) and self._more(offset):
            pass
        at = offset - self._start
        return self._buffer[at : at + size]

    def at_end(self) -> bool:
        """Whether the process has written its last byte."""
        return not self._more(self._start)

    def drain(self) -> int:
        """Read what is left; returns the size of the whole."""
        while self._more(self._start + len(self._buffer)):
            pass
        return self._start + len(self._buffer)

    def _more(self, needed: int) -> bool:
        piece = self._pipe.read(_FED)
        # of what comes before `needed` only the last bytes are kept
        drop = max(0, min(needed - self._start, len(self._buffer)) - BLOCK)
        self._start += drop
        self._buffer = self._buffer[drop:] + piece
        return bool(piece)


def _parse(index: bytes) -> GzipPoints:
    """Points from an index in the format of gztool: big-endian (decoded, encoded, bits, window's bytes, window)."""
    assert index.startswith(_MAGIC), index[:16]
    (count,) = struct.unpack_from(">Q", index, len(_MAGIC))
    at = len(_MAGIC) + 16
    numbers, windows = [], []
    for _ in range(count):
        decoded, encoded, bits, size = struct.unpack_from(">QQII", index, at)
        at += 24 + size
        numbers.append((decoded, encoded, bits))
        windows.append(index[at - size : at])
    columns = np.array(numbers, np.int64).reshape(-1, 3)
    return GzipPoints(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.uint8), Strings.of(windows))
