"""Decodes images in a process of its own, where workers die of one: it is found, and left out like any damaged image.

A decoder that crashes takes its process along, and with it the shard that it works on. Two processes for every image
would cost as much as the decoding, so this is for the shards on which processes have ended before.
"""

import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from PIL import Image

from data_prep.image_check import UnusableImage, check_image

_LENGTH = 8
"""Bytes of the number before each image."""
_TRIES = 2
"""Of an image: its process may have been killed for something else."""


class _DecoderProcess:
    """A process that decodes what it is sent, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def survives(self, image: bytes | memoryview) -> int | None:
        """None if the process decodes an image, whatever it thinks of it; how it ended (returncode) if it ends."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from data_prep.decoder_process import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(len(image).to_bytes(_LENGTH, "little"))
            process.stdin.write(image)
            process.stdin.flush()
            if process.stdout.read(1):
                return None
        self.close()
        return process.returncode

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(BrokenPipeError), process:  # which waits for its end
            pass


_guard: _DecoderProcess | None = None


@contextmanager
def guarded() -> Iterator[None]:
    """Inside the block `refuse_deadly` looks at each image. For one thread."""
    global _guard
    _guard = _DecoderProcess()
    try:
        yield
    finally:
        _guard.close()
        _guard = None


def refuse_deadly(image: bytes | memoryview) -> None:
    """Try an image in another process, inside `guarded`; elsewhere nothing is done.

    Raises:
        UnusableImage: the process ends on it.
    """
    if _guard is None:
        return
    ends = [_guard.survives(image)]
    while ends[-1] is not None and len(ends) < _TRIES:
        ends.append(_guard.survives(image))
    if ends[-1] is not None:
        end = ends[-1]
        how = signal.Signals(-end).name if -end in {*signal.Signals} else f"exit status {end}"
        raise UnusableImage(f"a decoder crashes on it ({how})")


def serve() -> None:
    """The process: decodes what comes, as sharding, conversion and the search for duplicates do."""
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    while len(head := incoming.read(_LENGTH)) == _LENGTH:
        image = incoming.read(int.from_bytes(head, "little"))
        with suppress(UnusableImage):
            check_image(image)
        with suppress(Exception), warnings.catch_warnings():  # Pillow raises whatever its parsing runs into
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(image)).convert("RGB")
        outgoing.write(b".")
        outgoing.flush()
