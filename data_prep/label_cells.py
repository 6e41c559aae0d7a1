"""What stands in a cell of labels: one label, or several with a delimiter or in brackets, as other tools write them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.storage import StorageError, parse_json

_WORDS = {"space": " ", "tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "slash": "/"}
"""Delimiters that a command line has no simple way to write."""
AS_IS = "none"
LIST = "list"
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_ITEM = re.compile(
    r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|(None|[^\s,;'"\[\](){}]+))\s*([,;]|\s|$)\s*""", re.DOTALL
)
_PLURAL = re.compile(r"(tag|label|class|categorie|attribute|target|finding|genre|keyword|concept)(e?s)", re.IGNORECASE)
_SHOWN = 60
_LOOKED_AT = 200_000
"""Different cells; more of them are no classes, and the report says so."""


@dataclass(frozen=True)
class LabelCells:
    """How cells of labels are read.

    Attributes:
        delimiter: None where nobody has said, `AS_IS` where a cell is one label as it stands, `LIST` for lists in text
            (JSON, Python, NumPy), or what stands between labels.
    """

    delimiter: str | None = None

    @classmethod
    def of(cls, delimiter: str | None) -> "LabelCells":
        """From a setting: a delimiter, or the word for one."""
        return cls(None if delimiter is None else _WORDS.get(delimiter, delimiter))

    @property
    def splits(self) -> bool:
        """Whether a cell may hold several labels."""
        return self.delimiter not in (None, AS_IS)

    def split(self, cell: str) -> list[str]:
        """The labels of a cell, without white space around them; the whole cell where it is one label.

        Raises:
            ValueError: it is no list where lists are read.
        """
        if not self.splits:
            return [cell.strip()]
        if self.delimiter == LIST:
            return _items(cell.strip())
        parts = cell.split() if self.delimiter == " " else cell.split(self.delimiter)
        return [part.strip() for part in parts if part.strip()]


def _items(cell: str) -> list[str]:
    """The items of a flat list: ["a", 3], ['a'], (1, 2), {'a'}, [3 7 9]; a cell without brackets is one label."""
    if cell[:1] not in _BRACKETS:
        return [cell] if cell else []
    if not cell.endswith(_BRACKETS[cell[0]]) or len(cell) < 2:
        raise ValueError("its bracket does not close")
    try:
        value = parse_json(cell, "it")
    except StorageError:
        value = None
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return [str(item).lower() if isinstance(item, bool) else str(item).strip() for item in value]
    items, place, inner = [], 0, cell[1:-1].strip()
    if not any(quote in inner for quote in "'\""):
        return [part.strip() for part in (inner.split(",") if "," in inner else inner.split()) if part.strip()]
    while place < len(inner):
        found = _ITEM.match(inner, place)
        if found is None:
            raise ValueError("it is no list of texts and numbers")
        single, double, bare, _ = found.groups()
        quoted = single if single is not None else double
        items.append(bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL).strip())
        place = found.end()
    return items


def _is_list(cell: str) -> bool:
    """Whether a cell is a list in text, and not a name in brackets such as "(unknown)"."""
    if len(cell) < 2 or _BRACKETS.get(cell[0]) != cell[-1]:
        return False
    inner = cell[1:-1].strip()
    return not inner or any(mark in inner for mark in ",'\"") or all(_is_number(part) for part in inner.split())


def _is_number(text: str) -> bool:
    return text.lstrip("+-").replace(".", "", 1).isdigit()


def why_delimited(cells: Sequence[str], column: str) -> tuple[str, str] | None:
    """A cell that seems to hold several labels, and the setting that splits it; None where all seem to be one label.

    Names of several words or with a comma are common ("golden retriever", "tench, Tinca tinca"): parts at a space or a
    comma count where they are numbers, where they come back in other cells, and more so in a column called tags.

    Args:
        cells: different ones.
        column: its name.
    """
    cells = cells[:_LOOKED_AT]
    listed = next((cell for cell in cells if _is_list(cell.strip())), None)
    if listed is not None:
        return listed, LIST
    for delimiter in (";", "|"):
        found = next((cell for cell in cells if len(LabelCells(delimiter).split(cell)) > 1), None)
        if found is not None:
            return found, f"'{delimiter}'"
    for delimiter, said in ((",", "','"), ("\t", "tab"), (" ", "space")):
        found = _with_parts_in_common(cells, LabelCells(delimiter), bool(_PLURAL.fullmatch(column.split(" ")[-1])))
        if found is not None:
            return found, said
    return None


def _with_parts_in_common(cells: Sequence[str], split: LabelCells, is_plural: bool) -> str | None:
    """A cell of several parts where parts of one cell come back in others as labels do, and words of names do not."""
    parts = [split.split(cell) for cell in cells]
    several = [number for number, found in enumerate(parts) if len(found) > 1]
    if not several:
        return None
    example = cells[several[0]]
    if all(_is_number(part) for number in several for part in parts[number]):
        return example
    uses = Counter(part for found in parts for part in set(found))
    common = [number for number in several if any(uses[part] > 1 for part in parts[number])]
    sets = Counter(frozenset(found) for found in parts)
    if any(count > 1 for count in sets.values()):  # the same parts in another order
        return next(cells[number] for number in several if sets[frozenset(parts[number])] > 1)
    enough = 0.25 if split.delimiter != " " or is_plural else 2.0
    if len(common) >= enough * len(several):
        return cells[common[0]]
    # combinations of few parts: more cells than parts
    return example if len(common) == len(several) > 2 and len(uses) < len(cells) else None


def perhaps_delimited(cells: Sequence[str]) -> tuple[str, str] | None:
    """As `why_delimited`, by less: a label that is a whole cell and a word of others ("primary", "haze primary")."""
    cells = cells[:_LOOKED_AT]
    for delimiter, said in ((",", "','"), ("/", "slash"), ("+", "'+'"), ("&", "'&'"), (" ", "space")):
        whole = {cell.strip() for cell in cells}
        split = LabelCells(delimiter)
        for cell in cells:
            parts = split.split(cell)
            if len(parts) > 1 and any(part in whole for part in parts):
                return cell, said
    return None


def shown_cell(cell: str) -> str:
    """A cell for messages."""
    return repr(cell if len(cell) <= _SHOWN else f"{cell[: _SHOWN - 3]}...")
