"""The lists of what a corpus does not have, quarantine.jsonl and removed.jsonl: JSON lines, read in one place."""

from collections.abc import Iterable, Iterator

from cluster.records import Count, R, Record, check_record
from cluster.storage import StorageError, parse_json
from data_prep.corpus_format import CorpusError


class LeftOut(Record):
    """An image that was left out."""

    origin: str
    reason: str


class RemovedImage(LeftOut):
    """A duplicate, or an image that could not be compared; see `Removed.lines`."""

    row: Count
    corpus: str | None = None
    mirrored: bool = False


def read_lines(kind: type[R], lines: Iterable[bytes], where: str) -> Iterator[R]:
    """The records of JSON lines.

    Args:
        where: what holds them, for messages.

    Raises:
        CorpusError: a line is none; names it.
    """
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line, f"{where}, line {number},")
        except StorageError as error:
            raise CorpusError(str(error)) from error
        yield check_record(kind, value, f"{where}, line {number}", CorpusError)
