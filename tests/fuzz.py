"""Files of strangers, thrown at everything that reads files: `python -m tests.fuzz [reader=NAME] [cases=500] [seed=0]`.

Each case changes something that a reader's files have, makes their checksums anew, and reads them as the commands do.
What is refused must be refused by an error of ours, with at most 5 s and 1 GB. A case that fails is named by its seed:
`reader=NAME seed=SEED cases=1` runs it again.
"""

import contextlib
import dataclasses
import faulthandler
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from cluster.settings import SettingsError
from cluster.storage import StorageError
from data_prep.image_check import UnusableImage
from data_prep.listing import SourceError
from models.classifier import ClassifierError
from models.weights import WeightsError
from pipeline.packages import PackageError
from pipeline.parts import DamagedCheckpointError
from tests.fuzz_readers import READERS, Reader

REFUSALS = (
    SettingsError,
    StorageError,
    SourceError,
    UnusableImage,
    WeightsError,
    PackageError,
    ClassifierError,
    DamagedCheckpointError,
)
"""Our own errors, which say what is wrong with a file."""
LONGEST_S, MOST_BYTES = 5.0, 10**9


class HangError(BaseException):
    """A case took longer than it may."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that did not end as it should."""

    seed: int
    what: str
    trace: str

    def __str__(self) -> str:
        return f"seed={self.seed}: {self.what}\n{self.trace}"


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # that of the test itself


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without our log and the warnings of others, and with what is changed put back."""
    log, environment = logging.getLogger("vitforge"), dict(os.environ)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)


def peak() -> int:
    """Most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(reader: Reader, cases: int, seed: int = 0, patience: float = LONGEST_S) -> tuple[list[Failure], int]:
    """(what failed, how many cases were refused) of some cases of a reader."""
    failures, refused = [], 0
    with _quiet(), tempfile.TemporaryDirectory(prefix="vitforge-fuzz-") as scratch:
        base = Path(scratch, "base")
        base.mkdir()
        made = reader.make(base)
        for number in range(seed, seed + cases):
            place = Path(scratch, "case")
            place.mkdir()
            began, memory = time.monotonic(), peak()
            what, trace = "", ""
            try:
                with _limited(4 * patience):
                    reader.case(random.Random(number), made, place)
            except REFUSALS as error:
                refused += 1
                try:
                    str(error).encode()
                except UnicodeEncodeError:
                    what = f"a message that cannot be shown: {error!r}"
            except (Exception, HangError) as error:
                what, trace = f"{type(error).__name__}: {str(error)[:300]}", traceback.format_exc(limit=-6)[-3000:]
            took, taken = time.monotonic() - began, peak() - memory
            if not what and took > patience:
                what = f"took {took:.1f} s"
            if taken > MOST_BYTES:
                what += f" took {taken / 1e6:.0f} MB"
            if what:
                failures.append(Failure(number, what, trace))
            shutil.rmtree(place, ignore_errors=True)
    return failures, refused


def main() -> None:
    """The command."""
    faulthandler.enable()
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    cases, seed = int(words.pop("cases", 500)), int(words.pop("seed", 0))
    chosen = [READERS[words.pop("reader")]] if "reader" in words else list(READERS.values())
    if words:
        raise SystemExit(__doc__)
    failed = False
    for reader in chosen:
        began = time.monotonic()
        failures, refused = run(reader, cases, seed)
        kinds = {failure.what.split(":")[0] for failure in failures}
        print(
            f"{reader.name}: {cases} cases, {refused} refused, {len(failures)} failed {sorted(kinds) or ''}, "
            f"{time.monotonic() - began:.0f} s, at most {peak() / 1e6:.0f} MB",
            flush=True,
        )
        for failure in failures[:10]:
            print(f"  {reader.name} {failure}")
        failed |= bool(failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
