"""Names of files, which may be any bytes, as lines of text: where the images of a corpus came from."""

import re

_LIKE_ESCAPED = re.compile(r"\\(?=[nr]|x[0-9a-f]{2})")
_ESCAPED = re.compile(rb"\\(n|r|x([0-9a-f]{2}))")
_BYTES = {b"n": b"\n", b"r": b"\r"}


def one_line(name: bytes) -> str:
    r"""A file's name as one line of text, whatever bytes it has; no two names have the same line.

    Ends of lines become `\n` and `\r`, what is no UTF-8 `\xHH`, and a backslash before such letters `\x5c`.
    """
    text = _LIKE_ESCAPED.sub(r"\\x5c", name.decode("utf-8", "surrogateescape"))
    return _escaped(text.encode("utf-8", "surrogateescape"))


def line_of_before(name: bytes) -> str:
    """The line that older versions wrote, in which a backslash stood as it is: some names had the same one."""
    return _escaped(name)


def name_of_line(line: str) -> bytes:
    """The name that `one_line` gives a line of."""
    return _ESCAPED.sub(lambda found: _BYTES.get(found[1]) or bytes.fromhex(found[2].decode()), line.encode())


def _escaped(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace").replace("\n", "\\n").replace("\r", "\\r")
