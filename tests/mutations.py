"""Mutations of what files hold, each a function of a random generator: values of JSON, text, bytes, tars and tables."""

import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308, -1e308,
    float("nan"), float("inf"), "", "x", "x" * 100_000, "../../x", "/etc/passwd", "a\0b", "\ud800", "\u202e",
        "nan", "1e999",
    "{}", [], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"a": {"a": {}}}},
)  # fmt: skip
"""Values that no file of ours has in most of its places."""


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside another; of long lists only the first few."""
    keys: Any = (
        list(value) if isinstance(value, dict) else range(min(len(value), 12)) if isinstance(value, list) else ()
    )
    for key in keys:
        found.append((value, key))
        _places(value[key], found)
    return found


def mutate_json(chance: random.Random, value: Any, times: int | None = None) -> Any:
    """A copy of a JSON value with one to three things wrong in it."""
    box = [json.loads(json.dumps(value))]
    for _ in range(times or chance.choice((1, 1, 1, 2, 3))):
        container, key = chance.choice(_places(box, []))
        old = container[key]
        what = chance.randrange(8)
        if what == 0 and container is not box:
            del container[key]
        elif what == 1 and isinstance(old, (int, float)) and not isinstance(old, bool):
            container[key] = chance.choice(
                (old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old), old + 0.5)
            )
        elif what == 2 and isinstance(old, list):
            container[key] = chance.choice((old[:-1], old + old, old[::-1], old[1:], old * 50))
        elif what == 3 and isinstance(old, dict):
            container[key] = chance.choice((list(old), list(old.values()), {**old, "unknown": 1}, {}))
        elif what == 4 and isinstance(old, str):
            container[key] = chance.choice(
                (old * 2, old[:-1], old.upper(), f"../{old}", f"{old}\n", f"{old}\0", old + "é")
            )
        elif what == 5:
            container[key] = nested(chance.choice((5, 200)))
        else:
            container[key] = chance.choice(ODD)
    return box[0]


def mutate_text(chance: random.Random, content: bytes) -> bytes:
    """Text, JSON and the like, with something wrong that no mutation of its values would give."""
    at = chance.randrange(len(content) + 1)
    inserts = (
        b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\0", b"NaN", b"1" * 5000, b"-", b"\xed\xa0\x80",
        b"\\ud800", b"1e999",
        b"\xef\xbb\xbf", b"\r", b'"', b",", b"\n\n", b"'", b"\t", b"\xe2\x80\xa8",
    )  # fmt: skip
    insert = chance.choice(inserts)
    return chance.choice(
        (
            content[:at],
            content[:at] + insert + content[at:],
            insert + content,
            content[at:],
            content + content,
            b"",
            insert,
        )
    )


def mutate_bytes(chance: random.Random, content: bytes) -> bytes:
    """Bytes with bits turned, or pieces gone, doubled, zero, or numbers of some width in their place."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        at = chance.randrange(len(changed))
        size = chance.choice((1, 2, 4, 8, 64, 512))
        what = chance.randrange(8)
        if what <= 2:
            changed[at] ^= 1 << chance.randrange(8)
        elif what == 3:
            del changed[at:]
        elif what == 4:
            del changed[at : at + size]
        elif what == 5:
            changed[at:at] = changed[at : at + size]
        elif what == 6:
            changed[at : at + size] = bytes(len(changed[at : at + size]))
        else:
            number = chance.choice((0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            width, code = chance.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
            packed = struct.pack(chance.choice("<>") + code, number % (1 << 8 * width))
            changed[at : at + width] = packed
    return bytes(changed)


def mutate_tar(chance: random.Random, members: list[tuple[str, bytes]]) -> bytes:
    """A tar with hostile names, kinds, sizes and headers; the checksums of most headers are right."""
    buffer = io.BytesIO()
    kind = chance.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    strange = (
        "../x",
        "/etc/passwd",
        "a/../b.jpg",
        "",
        ".",
        "x" * 300,
        "x" * 5000,
        "\0",
        "a\nb.jpg",
        ".jpg",
        "a.",
        "é.jpg",
    )
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if chance.random() < 0.2:
                info.name = chance.choice(strange) + chance.choice(("", name))
            if chance.random() < 0.1:
                info.type = chance.choice(
                    (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, b"S", b"g", b"V")
                )
                info.linkname = chance.choice(strange)
            if kind == tarfile.PAX_FORMAT and chance.random() < 0.3:
                keys = ("size", "path", "GNU.sparse.major", "mtime", "hdrcharset", "linkpath")
                values = ("-1", "abc", "1e9", "9" * 5000, str(len(content) + 1), "../../x", "", "18446744073709551616")
                info.pax_headers = {chance.choice(keys): chance.choice(values)}
            try:
                tar.addfile(info, io.BytesIO(content))
            except (ValueError, OSError, UnicodeError):  # tarfile does not write everything
                continue
    changed = bytearray(buffer.getvalue())
    for start in range(0, len(changed) - 512, 512):
        if changed[start + 257 : start + 262] == b"ustar" and chance.random() < 0.15:
            field, width = chance.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (100, 8)))
            raw = (
                b"\xff" * 12,
                b"\x80" + b"\0" * 3 + b"\x7f" * 8,
                b"77777777777\0",
                b"-0000000001\0",
                b" " * 12,
                bytes(12),
                b"L",
                b"x",
                b"9z",
            )
            value = chance.choice(raw)[:width]
            changed[start + field : start + field + len(value)] = value
            changed[start + 148 : start + 156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % (sum(changed[start : start + 512]) & 0o777777)
    return mutate_bytes(chance, bytes(changed)) if chance.random() < 0.3 else bytes(changed)


def any_of(chance: random.Random, *ways: tuple[float, Callable[[], bytes]]) -> bytes:
    """What one of some ways makes, each as likely as its weight."""
    return chance.choices([way for _, way in ways], [weight for weight, _ in ways])[0]()
