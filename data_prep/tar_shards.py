"""Writes a shard: a plain USTAR tar, with its index made on the way and not by reading it again."""

import os
from typing import BinaryIO

import xxhash

from data_prep.tar_headers import BLOCK, make_header, padding

_MAX_BUFFERS = 1020
"""Of one writev, below Linux's limit of 1024 (IOV_MAX)."""


class ShardWriter:
    """Appends samples to a tar: each an image `KEY.EXTENSION` and a label `KEY.cls` or `KEY.json`.

    Writes go out in long runs (writev), and the checksum is taken of the same buffers. An image that is added must
    stay as it is until `flush`.

    Args:
        file: an unbuffered binary file at position 0.
        label_extension: "cls" for a class number in ASCII, "json" for many labels.
    """

    def __init__(self, file: BinaryIO, label_extension: str) -> None:
        self._descriptor = file.fileno()
        self._label_extension = label_extension
        self._digest = xxhash.xxh3_128()
        self._pending: list[bytes | memoryview] = []
        self._index_lines: list[str] = []
        self.size = 0
        """Bytes of the tar so far."""

    def add(self, key: str, extension: str, image: bytes | memoryview, label: bytes) -> int:
        """Append one sample; returns the offset of the image's bytes in the tar."""
        image_name, label_name = f"{key}.{extension}", f"{key}.{self._label_extension}"
        offset = self.size + BLOCK
        label_offset = offset + len(image) + padding(len(image)) + BLOCK
        between = bytes(padding(len(image))) + make_header(label_name, len(label)) + label + bytes(padding(len(label)))
        self._append(make_header(image_name, len(image)))
        self._append(image)
        self._append(between)
        self._index_lines.append(
            f"{extension} {offset} {len(image)} {image_name} "
            f"{self._label_extension} {label_offset} {len(label)} {label_name}\n"
        )
        return offset

    def finish(self) -> None:
        """Write what is pending and the two zero blocks that end a tar."""
        self._append(bytes(2 * BLOCK))
        self.flush()

    @property
    def checksum(self) -> str:
        """xxh3_128 of the finished tar, in hexadecimal."""
        assert not self._pending, "finish() first"
        return self._digest.hexdigest()

    @property
    def dali_index(self) -> bytes:
        """The index of the tar for DALI's webdataset reader, format v1.2.

        After a line with the number of samples: for each sample `extension offset size name` of every member.
        """
        return "".join([f"v1.2 {len(self._index_lines)}\n", *self._index_lines]).encode("ascii")

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        for content in self._pending:
            self._digest.update(content)
        buffers = [content for content in self._pending if content]
        while buffers:
            written = os.writev(self._descriptor, buffers)
            done = 0
            while done < len(buffers) and written >= len(buffers[done]):
                written -= len(buffers[done])
                done += 1
            del buffers[:done]
            if written:  # a disk may take less than it was given
                buffers[0] = memoryview(buffers[0])[written:]
        self._pending = []

    def _append(self, content: bytes | memoryview) -> None:
        self._pending.append(content)
        self.size += len(content)
        if len(self._pending) >= _MAX_BUFFERS:
            self.flush()
