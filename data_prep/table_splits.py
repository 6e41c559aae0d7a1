"""Tables that name the split of each image in a column: one split makes a corpus, not all of them in silence."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cluster.command import log
from cluster.paths import shown
from data_prep.listing import SourceError
from data_prep.split_names import canonical_split, split_of_file
from data_prep.splits import ALL, in_order, suggested
from data_prep.table_files import column_names, column_values
from data_prep.table_format import Columns, TableFile

_COLUMN = re.compile(r"(data_?(set|split)|split|splits|set|subset|partition|phase|usage|train_test(_split)?)(_?name)?")
_SPACES = re.compile(r"[\s-]+")


def of_split(
    files: Sequence[TableFile], columns: Columns, split: str | None, place: str, settings: Sequence[str] = ()
) -> Columns:
    """The columns of a table, with the one that names splits, and which split of it is read.

    Args:
        split: what was asked for, or None; "all" reads all of them.
        place: of the source as it was given, for messages.
        settings: that were given, for the commands in messages.

    Raises:
        SourceError: the table names several splits and none was asked for, or not the one that was.
    """
    used = set(columns.names)
    name = next((n for n in column_names(files[0]) if n not in used and _COLUMN.fullmatch(_plain(n))), None)
    counts: Counter[str] = Counter()
    if name is not None and split != ALL:
        for file in files:
            counts.update(column_values(file, name))
    splits = in_order(found for value in counts if (found := split_of_file(value)))
    if name is None or (len(splits) < 2 and split is None) or not counts:
        return columns
    in_words = ", ".join(f"{shown(value)} ({count:,})" for value, count in counts.most_common(6))
    if split is None:
        commands = [suggested(place, *settings, f"split={each}") for each in [*splits[:3], ALL]]
        raise SourceError(
            f"table {files[0]} has images of several splits, in column {name!r}: {in_words}. They are not joined "
            f"unless you say so. Give one of:\n  " + "\n  ".join(commands)
        )
    values = tuple(value for value in counts if value == split or split_of_file(value) == canonical_split(split))
    if not values:
        raise SourceError(f"split = {split}: column {name!r} of table {files[0]} has {in_words}")
    log.info("%s: rows whose %s is %s", place, name, " or ".join(values))
    return replace(columns, split=name, splits=values)


def _plain(name: str) -> str:
    return _SPACES.sub("_", name.strip().lower())
