"""YAML as people write it in recipes and on command lines, read into what JSON can hold, within bounds.

A recipe may come from anybody. PyYAML follows any nesting by recursion, tries patterns on numbers of any length in
quadratic time, and unfolds aliases of aliases without end: here each of them has a limit that no recipe comes near.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

MOST_CHARACTERS = 1 << 18
"""Of a text."""
_DEEPEST = 16
"""Lists and mappings in each other."""
_MOST_VALUES = 4_000
"""Values of a text, with those behind its aliases counted each time."""
_LONGEST_NUMBER = 100
"""Characters; what is longer is text."""
_MARKS = re.compile(r"[-,;|:&*!%@>?\s]+")
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "merge", "value")}
"""What a value may be said to be; PyYAML's constructors of others expect what its own patterns have found."""


class YamlTextError(ValueError):
    """Text that cannot be read; the message says what is wrong, and where."""


class _Loader(yaml.SafeLoader):
    """1e-3 is a number (YAML 1.1 wants 1.0e-3), 2026-01-01 is text and not a date, and a key may not stand twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._values += 1
        if self._values > _MOST_VALUES:
            raise YamlTextError(f"more than {_MOST_VALUES:,} values (line {self.line + 1})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise YamlTextError(f"a key must be text (line {line})")
            if key_node.value in seen:
                raise YamlTextError(f"key {_short(key_node.value)} stands twice (line {line})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and isinstance(value, str) and len(value) > _LONGEST_NUMBER:
            value = "text"  # the patterns of numbers take quadratic time
        return super().resolve(kind, value, implicit)

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise YamlTextError(f"more than {_DEEPEST} lists or mappings in each other (line {self.line + 1})")
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) >= _DEEPEST:
            raise YamlTextError(f"more than {_DEEPEST} lists or mappings in each other (line {self.line + 1})")
        return bool(super().add_indent(column))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """The value that a text of YAML says: null, true, numbers, text, lists, and mappings with text as keys.

    Raises:
        YamlTextError: it is not YAML, is beyond the limits, or says what JSON cannot hold.
    """
    return _read(text, lambda node: None)


def read_word(text: str) -> Any:
    """The value of a word of a command line: as `read_yaml`, but text is all of it.

    In a file comments and anchors are YAML's (`/x #2`, `&a b`); a word has neither, and marks alone (`,`, `|`, a space)
    are themselves.
    """
    whole = text.strip()
    if whole.startswith("#") and len(text) <= MOST_CHARACTERS:
        return whole
    if text and len(text) <= _LONGEST_NUMBER and _MARKS.fullmatch(text):
        return whole or text

    def cut(node: Node) -> str | None:
        if not isinstance(node, ScalarNode) or node.style is not None:
            return None
        is_text = node.tag == "tag:yaml.org,2002:str" and not whole.startswith("!")
        return whole if is_text or node.end_mark.index - node.start_mark.index < len(whole) else None

    return _read(text, cut)


def _read(text: str, instead: Callable[[Node], str | None]) -> Any:
    """What a text says, or what is to be taken instead by its node."""
    if len(text) > MOST_CHARACTERS:
        raise YamlTextError(f"{len(text):,} characters are more than {MOST_CHARACTERS:,}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if (found := instead(node)) is not None:
                return found
            _count(node, {})
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YamlTextError(_in_one_line(error)) from error
    except YamlTextError:
        raise
    except (ValueError, OverflowError, TypeError, LookupError, RecursionError) as error:  # of PyYAML's constructors
        raise YamlTextError(f"a value in it is none that can be read ({type(error).__name__}: {error})") from error
    return _plain(value)


def _in_one_line(error: yaml.YAMLError) -> str:
    """What PyYAML says, without the picture of the place that it draws."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return ", ".join(text for text in (error.context, error.problem) if text) + where


def _count(node: Node, known: dict[int, int]) -> int:
    """Values behind a node, those behind an alias counted at each use.

    Raises:
        YamlTextError: they are too many, or a node is inside itself.
    """
    if isinstance(node, ScalarNode):
        _check_scalar(node)
    if not isinstance(node, CollectionNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise YamlTextError(f"an alias stands inside what it names (line {node.start_mark.line + 1})")
        return known[id(node)]
    known[id(node)] = 0  # under way
    pairs = isinstance(node, MappingNode)
    children = [child for entry in node.value for child in entry] if pairs else node.value
    total = 1
    for child in children:
        total += _count(child, known)
        if total > _MOST_VALUES:
            raise YamlTextError(f"more than {_MOST_VALUES:,} values (line {node.start_mark.line + 1})")
    known[id(node)] = total
    return total


def _check_scalar(node: ScalarNode) -> None:
    """Refuse what is said (`!!int`) to be of a type that its text is not, or that is none of ours."""
    line = node.start_mark.line + 1
    if node.tag not in _SCALARS:
        raise YamlTextError(f"a value of type {_short(node.tag.removeprefix(_TAG))} cannot be used here (line {line})")
    if node.tag != f"{_TAG}str" and len(node.value) > _LONGEST_NUMBER:  # !!int of 1:1:1:... takes quadratic time
        raise YamlTextError(f"{_short(node.value)} is no {node.tag.removeprefix(_TAG)} (line {line})")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise YamlTextError(f"key {_short(str(key))} must be text: write it in quotes")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise YamlTextError(f"{value} is no number that could be used")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise YamlTextError("a number of more than 18 digits cannot be used: as text, write it in quotes")
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, (int, float)):
        return value
    raise YamlTextError(f"a value of type {type(value).__name__} cannot be used here")


def _text(value: str) -> str:
    """Text, with the halves of a character that JSON's escapes (`\\ud83d\\ude00`) give joined."""
    try:
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise YamlTextError(f"{ascii(value)[:60]} has half a character") from None
    if "\0" in whole:
        raise YamlTextError(f"{_short(value)} has a zero character")
    return whole


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
