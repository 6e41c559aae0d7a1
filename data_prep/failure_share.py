"""Stops a job of which too much fails: a source that is broken is better found after minutes than at the end."""

from collections import Counter
from collections.abc import Iterable, Sequence
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
        left_out: name and reason of those that are not even tried.
        planned: how many are.

    Raises:
        SourceError: more are left out than may fail.
    """

    def __init__(self, most: float, left_out: Sequence[tuple[str, str]], planned: int) -> None:
        self._most = most
        self._left_out = Counter(reason for _, reason in left_out if not reason.startswith(BY_CHOICE))
        self._restart()
        self._check(self._seen + planned)

    def _restart(self) -> None:
        self._seen, self._reasons = self._left_out.total(), self._left_out.copy()

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
            self._check(self._seen)

    def check_all(self, records: Iterable[dict[str, Any]]) -> None:
        """Look at all shards of a plan, at the end.

        Raises:
            SourceError: more fail than may.
        """
        self._restart()
        for record in records:
            self.count(record)
        self._check(self._seen)

    def _check(self, seen: int) -> None:
        failed = self._reasons.total()
        if failed > self._most * seen:
            raise SourceError(
                f"{failed:,} of the first {seen:,} images cannot be used, more than max_failures = "
                f"{self._most:g} allows: {reasons_in_words(self._reasons)}. Is the source whole? "
                f"The finished shards stay; with a larger max_failures the same command goes on"
            )
