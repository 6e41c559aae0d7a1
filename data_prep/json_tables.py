"""Rows of a JSON file: a list of objects, or one of the forms in which pandas and others write a table."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.storage import StorageError, parse_json
from data_prep.listing import SourceError, looks_like_image

FORMS = (
    '[{"path": "a.jpg", "label": "cat"}, ...], {"path": ["a.jpg", ...], "label": ["cat", ...]}, '
    '{"a.jpg": "cat", ...}, what pandas\' to_json writes, or one object a line'
)
PATH, LABEL = "path", "label"
"""Columns of what has no names for them."""


def json_rows(lines: io.TextIOBase, where: str) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON file and their numbers, from 1 on: objects of columns.

    Raises:
        SourceError: it is not JSON, or no table.
    """
    text = lines.read()
    try:
        rows = _rows(parse_json(text, where))
    except StorageError as error:
        each = [line for line in text.splitlines() if line.strip()]
        try:
            rows = [parse_json(line, "a line") for line in each] if len(each) > 1 else None
        except StorageError:
            rows = None
        if rows is None:
            raise SourceError(f"table {where} cannot be read: {error}") from error
    if rows is None:
        raise SourceError(f"table {where} is JSON, but no table that is known: {FORMS}")
    yield from enumerate(rows, 1)


def _rows(value: Any) -> list[Any] | None:
    """The rows of a value; None where it is no table."""
    if isinstance(value, list):
        return _of_list(value)
    if not isinstance(value, dict) or not value:
        return None
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):  # pandas, orient="split"
        names = [str(name) for name in value["columns"]]
        return [dict(zip(names, row, strict=False)) if isinstance(row, list) else row for row in value["data"]]
    tables = [
        entry for entry in value.values() if isinstance(entry, list) and entry and isinstance(entry[0], (dict, list))
    ]
    if len(tables) == 1 and not _are_columns(value):  # orient="table", {"data": [...]}, {"labels": [["a.jpg", 6], ...]}
        return _of_list(tables[0])
    if tables and not _are_columns(value):
        return None
    if all(looks_like_image(key.encode("utf-8", "replace")) and "." in key for key in value):
        return [
            {PATH: path, LABEL: label} if not isinstance(label, dict) else {PATH: path, **label}
            for path, label in value.items()
        ]
    if _are_columns(value):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    inner = list(value.values())
    if all(isinstance(entry, dict) and entry for entry in inner):
        return _of_objects(value)
    return None


def _of_list(rows: list[Any]) -> list[Any] | None:
    if all(isinstance(row, dict) for row in rows):
        return rows
    if all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in rows):
        return [{PATH: path, LABEL: label} for path, label in rows]
    return None


def _are_columns(value: Mapping[str, Any]) -> bool:
    """Whether an object is one list for each column, all of one length."""
    lists = list(value.values())
    return len(lists) > 1 and all(isinstance(entry, list) and len(entry) == len(lists[0]) for entry in lists)


def _of_objects(value: Mapping[str, Mapping[str, Any]]) -> list[Any] | None:
    """pandas' orient="columns", {"path": {"0": "a.jpg", ...}, ...}, or "index", {"0": {"path": "a.jpg", ...}, ...}."""
    first = next(iter(value.values()))
    if all(isinstance(entry, (dict, list)) for entry in first.values()):
        return None
    rows = list(first)
    numbered = _are_numbers(rows) and not _are_numbers(list(value))
    if numbered and all(list(column) == rows for column in value.values()):
        return [{name: column[row] for name, column in value.items()} for row in rows]
    return list(value.values())


def _are_numbers(keys: Sequence[str]) -> bool:
    return all(key.isdigit() for key in keys)
