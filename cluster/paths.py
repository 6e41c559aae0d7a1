"""Names that come from outside, checked before they become paths: the only place that decides what is one.

A manifest, an index, a tar, a table, a package, a checkpoint or the listing of an object store may be of anybody. What
it calls a file is a name, never a place: it decides no other folder, nor anything else about where we read or write.
"""

LONGEST_NAME = 255
"""Bytes that a component of a path may have (NAME_MAX of Linux's file systems)."""
_LONGEST_PATH = 4095
"""Bytes (PATH_MAX of Linux, less the final zero)."""


def why_no_component(name: object) -> str | None:
    """Why something is no name of a file or folder directly inside another one; None if it is one."""
    if not isinstance(name, str):
        return f"is no text but of type {type(name).__name__}"
    if name in ("", ".", ".."):
        return "names no file"
    if "/" in name or "\\" in name:
        return "is a path and no name"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "has control characters"
    return _why_not_encoded(name, LONGEST_NAME)


def why_not_inside(name: object) -> str | None:
    """Why something is no path of a file or folder inside a folder, its components joined by slashes; None if it is.

    Files of other people, in sources, may have any character but the slash and zero in their names.
    """
    if not isinstance(name, str):
        return f"is no text but of type {type(name).__name__}"
    if "\0" in name:
        return "has a zero character"
    if name.startswith("/"):
        return "is an absolute path"
    parts = name.split("/")
    if ".." in parts:
        return "leads out of the folder"
    return _why_not_encoded(name, _LONGEST_PATH)


def shown(name: object) -> str:
    """A name for messages, whatever it is: on one line, and not of any length."""
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_component(name: object, where: str, error: type[ValueError]) -> str:
    """`name`, if it is one of a file or folder directly inside another one.

    Args:
        where: what names it, for the message.
        error: what is raised.

    Raises:
        error: it is not, and why.
    """
    return _checked(name, why_no_component(name), where, error)


def check_inside(name: object, where: str, error: type[ValueError]) -> str:
    """`name`, if it is the path of a file or folder inside a folder. Args, errors: as `check_component`."""
    return _checked(name, why_not_inside(name), where, error)


def _checked(name: object, problem: str | None, where: str, error: type[ValueError]) -> str:
    if problem is not None:
        raise error(f"{where}: the name {shown(name)} {problem}")
    assert isinstance(name, str)
    return name


def _why_not_encoded(name: str, most: int) -> str | None:
    # a name of a file that is no UTF-8 has surrogates for its bytes (os.fsdecode)
    try:
        length = len(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return "is no text"
    return f"has {length} bytes, more than {most}" if length > most else None
