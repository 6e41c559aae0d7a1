"""Text files are UTF-8 on every system: nothing leaves their encoding to the locale, which on Windows is another."""

import ast
from collections.abc import Iterator

import pytest

from cluster.storage import StorageError, parse_json
from tests.running import REPOSITORY

ROOMS = ("models", "data_prep", "cluster", "pipeline")


def left_to_the_locale(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text without saying its encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {word.arg: word.value for word in node.keywords}
        if "encoding" in given:
            continue
        if name in ("read_text", "write_text"):
            missing = True
        elif name == "open":
            builtin = isinstance(node.func, ast.Name)
            mode = given.get("mode", next(iter(node.args[int(builtin) :]), None))
            value = mode.value if isinstance(mode, ast.Constant) else "r" if builtin and mode is None else "b"
            missing = isinstance(value, str) and set(value) <= set("rwax+t")
        else:
            text = given.get("text", given.get("universal_newlines"))
            missing = name in ("run", "Popen", "check_output") and isinstance(text, ast.Constant) and bool(text.value)
        if missing:
            yield node.lineno


def test_no_text_is_read_or_written_in_the_encoding_of_the_locale():
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for room in ROOMS
        for path in sorted((REPOSITORY / room).rglob("*.py"))
        for line in left_to_the_locale(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_the_search_finds_what_it_is_for():
    code = """
path.read_text()
path.write_text("a")
open(path)
open(path, "w")
path.open("a")
path.open(mode="rt")
run(command, text=True)
path.read_text(encoding="utf-8")
open(path, "rb")
path.open("wb")
corpus.open(name)
run(command)
"""
    assert list(left_to_the_locale(ast.parse(code))) == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "content",
    [rb'"\ud800"', rb'"\uDFFF\uD800"', b'"\xed\xa0\x80"', '"\ud800"'.encode("utf-16", "surrogatepass"), '"\udc80"'],
)
def test_half_a_character_in_json_is_refused_where_it_is_read(content: bytes | str) -> None:
    with pytest.raises(StorageError, match=r"it\.json is damaged"):
        parse_json(content, "it.json")
    assert parse_json(rb'["\ud83d\ude00", "\uD55C"]', "it.json") == ["\U0001f600", "\ud55c"]
