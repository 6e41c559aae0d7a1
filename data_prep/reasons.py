"""Why an image is left out, said the same way whenever and wherever it is found.

The list of reasons is part of what a corpus is known by: the same source must give the same list on every run and
machine. Decoders' messages hold what differs from run to run; this is the one place where that is taken out.
"""

import re
import tempfile

_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>| ?\bat 0x[0-9a-fA-F]{6,}| ?\b0x[0-9a-fA-F]{8,}")
"""Of an object in memory as Python writes it (`<_io.BytesIO object at 0x7f...>`), or a pointer of a C library."""
_OF_PROCESS = re.compile(r"/proc/(?:self|\d+)(?:/task/\d+)?/fd/\d+|/dev/fd/\d+|\b(pid|tid|process|thread|fd)[ =:]+\d+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")
_LONGEST = 300
"""Characters; what a decoder quotes of a damaged file may be of any length."""


def repeatable(reason: str) -> str:
    """A reason without addresses, processes and temporary folders, on one line."""
    text = _CONTROL.sub(" ", reason)
    text = _ADDRESS.sub("", text)
    text = _OF_PROCESS.sub(lambda found: found[1] or "a file", text)
    folder = re.escape(tempfile.gettempdir().rstrip("/") + "/")
    text = re.sub(rf"{folder}[^\s'\"<>]+", "a temporary file", text)
    text = text.encode("utf-8", "backslashreplace").decode()  # of bytes that are no text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
