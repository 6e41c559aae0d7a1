"""Samples that turn out bad while they are read: damaged since they were written, or not to be decoded.

A bad one is replaced by another sample of its corpus, with that one's label. Which one depends on the run's seed and
on the samples alone (data_prep/order.py), so that it is the same on any rank, under any number of ranks and after
a restart, as long as the same samples are bad.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.storage import StorageError
from data_prep.checked_rows import AlteredIndexError
from data_prep.corpus_format import CorpusError, ShardError
from data_prep.mixture import Mixture
from data_prep.order import ATTEMPTS_IN_SHARD
from data_prep.shard_cache import FetchError

NAMED = 20
"""Bad samples that are described; of more, only the number is kept."""
ALWAYS_ALLOWED = 10
"""Bad samples that never stop a run, however few were read."""
_ATTEMPTS = 25 * ATTEMPTS_IN_SHARD


class BadSamples:
    """Reads a mixture and remembers what was found bad.

    Attributes:
        count: how often a bad sample was due in the batches that were handed over.
        described: the first of them, for messages.
    """

    def __init__(self, corpus: Mixture) -> None:
        self.count = 0
        self.described: list[str] = []
        self._corpus = corpus
        self._samples: dict[int, str] = {}
        self._shards: dict[int, str] = {}

    def read(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8] | None]:
        """The encoded images of samples (int64 [B]); None for each that is bad."""
        wanted = ids.tolist()
        images: list[NDArray[np.uint8] | None] = [None] * len(wanted)
        good = [place for place, sample in enumerate(wanted) if not self._is_bad(sample)]
        try:
            for place, image in zip(good, self._corpus.read(ids[good]), strict=True):
                images[place] = image
        except (FetchError, AlteredIndexError):
            raise
        except (StorageError, OSError):  # one of them: look at each
            for place in good:
                images[place] = self._read_one(wanted[place])
        return images

    def mark(self, sample: int, reason: str) -> None:
        """Remember that a sample is bad."""
        self._samples[sample] = reason

    def reason(self, sample: int) -> str:
        """Why a sample is bad."""
        return self._samples.get(sample) or self._shards[self._shard_of(sample)]

    def substitute(self, sample: int, seed: int) -> tuple[int, NDArray[np.uint8]]:
        """(sample, image) to show in place of a bad sample.

        Raises:
            CorpusError: nothing of many that were tried can be read.
        """
        attempt = 0
        while attempt < _ATTEMPTS:
            chosen = self._corpus.substitute(sample, seed, attempt)
            if self._shard_of(chosen) in self._shards:
                attempt += ATTEMPTS_IN_SHARD - attempt % ATTEMPTS_IN_SHARD  # all of them would be of this shard
                continue
            image = self._read_one(chosen)
            if image is not None:
                return chosen, image
            attempt += 1
        raise CorpusError(
            f"{self._corpus.describe(sample)} cannot be read, and neither can any of {_ATTEMPTS} others that were "
            f"tried in its place: {self.reason(sample)}"
        )

    def readable(self, sample: int, seed: int) -> tuple[int, NDArray[np.uint8]]:
        """A sample with its image, or what stands in for it if it is bad."""
        image = self._read_one(sample)
        return self.substitute(sample, seed) if image is None else (sample, image)

    def handed_over(self, samples: Sequence[int]) -> None:
        """Count bad samples that were replaced or left out in a batch."""
        self.count += len(samples)
        for sample in samples:
            described = f"{self._corpus.describe(sample)}: {self.reason(sample)}" if self._undescribed else ""
            if described and described not in self.described:
                self.described.append(described)

    @property
    def _undescribed(self) -> bool:
        return len(self.described) < NAMED

    def _shard_of(self, sample: int) -> int:
        return int(self._corpus.shards_of([sample])[0])

    def _is_bad(self, sample: int) -> bool:
        return sample in self._samples or (bool(self._shards) and self._shard_of(sample) in self._shards)

    def _read_one(self, sample: int) -> NDArray[np.uint8] | None:
        if self._is_bad(sample):
            return None
        try:
            return self._corpus.read([sample])[0]
        except (FetchError, AlteredIndexError):
            raise  # the store is away, the disk full, or no sample to be trusted: no reason to show others from now on
        except ShardError as error:
            self._shards[self._shard_of(sample)] = str(error)
        except (StorageError, OSError) as error:
            self._samples[sample] = str(error)
        return None


def too_many(bad: int, read: int, share: float) -> bool:
    """Whether a run must stop: more of the samples read are bad than ALWAYS_ALLOWED and than that share of them."""
    return bad > max(ALWAYS_ALLOWED, share * read)


class TooManyBadSamples(CorpusError):  # noqa: N818 - it says what was found
    """More samples are bad than a run accepts; the message names the first of them."""

    def __init__(self, bad: int, read: int, share: float, described: Sequence[str]) -> None:
        names = "\n  ".join(dict.fromkeys(described[:NAMED]))
        super().__init__(
            f"{bad:,} of {read:,} samples could not be read or decoded, more than max_bad_share = {share:g} allows. "
            "Look at the corpus with data_prep/verify.py, or raise it (data.max_bad_share in training). Some of "
            f"them:\n  {names}"
        )
