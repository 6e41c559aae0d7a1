"""What files from outside must say: typed records, checked once where they are read.

JSON that somebody else may have written is a `Record` before anything uses it: of the right types, in its bounds, and
otherwise refused with the file's name and the place in it. Keys that a record does not have are left alone, as newer
versions may write more.
"""

from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import AfterValidator, Field

from cluster import paths


class Record(pydantic.BaseModel):
    """Base of all records."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )


R = TypeVar("R", bound=Record)


def _component(name: str) -> str:
    if (problem := paths.why_no_component(name)) is not None:
        raise ValueError(f"the name {paths.shown(name)} {problem}")
    return name


Component = Annotated[str, AfterValidator(_component)]
"""Name of a file or folder directly inside another one."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""How many of something, or bytes."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""xxh3_128 in hexadecimal."""

_SHOWN = 80


def check_record(kind: type[R], value: Any, where: str, error: type[ValueError]) -> R:
    """A value that was read as JSON, as a record.

    Args:
        where: what holds it, for the message.
        error: what is raised.

    Raises:
        error: it is of another form; the message says where in it, and what is wrong.
    """
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        place = ".".join(paths.shown(part)[1:-1] if isinstance(part, str) else str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("value_error", "missing") else f", not {_short(first['input'])}"
        raise error(f"{where}: {f'{place}: ' if place else ''}{message[:1].lower() + message[1:]}{given}") from None


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:  # Python writes no number of thousands of digits
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
