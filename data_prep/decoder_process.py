"""Decodes images in a process of its own, where workers die of one: it is found, and left out like any damaged image.

A decoder that crashes takes its process along, and with it the shard that it works on. Two processes for every image
would cost as much as the decoding, so this is for the shards on which processes have ended before.
"""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from data_prep.image_check import UnusableImage, check_image
from data_prep.image_pixels import open_upright

_LENGTH = 8
"""Bytes of the number before each image."""
_TRIES = 2
"""Of an image: its process may have been killed for something else."""
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
"""What a decoder dies of; other signals come from outside, such as from a kernel without memory."""


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
            assert self._process.stdout is not None
            if not self._process.stdout.read(1):
                ended = self._process
                self.close()
                raise OSError(f"the process that decodes images did not start (exit status {ended.returncode})")
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
        UnusableImage: a decoder crashes on it.
        OSError: the process ends of something else; worth another try.
    """
    if _guard is None:
        return
    end = 0
    for _ in range(_TRIES):
        ended = _guard.survives(image)
        if ended is None:
            return
        end = ended
    if -end in _CRASHES:
        raise UnusableImage(f"a decoder crashes on it ({signal.Signals(-end).name})")
    how = signal.Signals(-end).name if -end in {*signal.Signals} else f"exit status {end}"
    raise OSError(f"the process that decodes images ended ({how}) on one of {len(image):,} bytes: is memory enough?")


def serve() -> None:
    """The process: decodes what comes, as sharding, conversion and the search for duplicates do."""
    from data_prep.perceptual_hash import describe_images  # which imports this module

    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer

    def say_done() -> None:
        outgoing.write(b".")
        outgoing.flush()

    say_done()  # that it runs
    while len(head := incoming.read(_LENGTH)) == _LENGTH:
        image = incoming.read(int.from_bytes(head, "little"))
        with suppress(Exception), warnings.catch_warnings():  # Pillow raises whatever its parsing runs into
            warnings.simplefilter("ignore")
            check_image(image)  # what it refuses nothing else decodes
            describe_images([image])
            open_upright(image)
        say_done()
