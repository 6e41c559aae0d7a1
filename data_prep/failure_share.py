"""Stops a job of which too much fails: a source that is broken is better found after minutes than at the end."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data_prep.convert import BY_CHOICE
from data_prep.corpus_jobs import reasons_in_words
from data_prep.listing import SourceError

_SEEN_AT_LEAST = 1000
"""Images before a share of them says anything; at the end any number does."""


class FailureShare:
    """Counts the images that cannot be used.

    Args:
        most: the share of all images that may fail.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._seen = 0
        self._reasons: Counter[str] = Counter()

    def count(self, record: dict[str, Any]) -> None:
        """Count a finished shard.

        Raises:
            SourceError: more fail than may.
        """
        self._seen += record["samples"] + len(record["quarantined"])
        self._reasons.update(
            entry["reason"] for entry in record["quarantined"] if not entry["reason"].startswith(BY_CHOICE)
        )
        if self._seen >= _SEEN_AT_LEAST:
            self._check()

    def check_all(self, records: Iterable[dict[str, Any]]) -> None:
        """Look at all shards of a plan, at the end.

        Raises:
            SourceError: more fail than may.
        """
        self._seen, self._reasons = 0, Counter()
        for record in records:
            self.count(record)
        self._check()

    def _check(self) -> None:
        failed = self._reasons.total()
        if failed > self._most * self._seen:
            raise SourceError(
                f"{failed:,} of the first {self._seen:,} images cannot be used, more than max_failures = "
                f"{self._most:g} allows: {reasons_in_words(self._reasons)}. Is the source whole? "
                f"The finished shards stay; with a larger max_failures the same command goes on"
            )
