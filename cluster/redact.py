"""Text that may be shown and written down: without credentials, without what a terminal would obey."""

import itertools
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

_SECRET_WORDS = {
    "accesskey", "accesskeyid", "accesstoken", "apikey", "authorization", "authtoken", "awsaccesskeyid", "bearer",
    "credential", "credentials", "googleaccessid", "hmac", "jwt", "passcode", "passphrase", "passwd", "password", "pw",
    "pwd", "refreshtoken", "secret", "secretkey", "signature", "token",
}  # fmt: skip
"""Words that mean a credential wherever they stand in a name: `api-token`, `client_secret`, `accessToken`."""
_SECRET_ENDS = ("accesskey", "apikey", "passwd", "password", "secret", "token")
"""Of words that were run together: `sessiontoken`, `dbpassword`."""
_SECRET_IN_QUERIES = {
    "auth", "expires", "jsessionid", "key", "pass", "policy", "sas", "session", "sessionid", "sid", "sig",
}  # fmt: skip
"""Words that mean one in an address's parameters only."""
_SIGNING = re.compile("x-(amz|goog)-.*|key-pair-id", re.IGNORECASE)
_KEYS = frozenset(("access", "account", "api", "private", "session", "shared", "subscription"))
"""Words that make a credential of the word `key` behind them."""

_PATHS = frozenset(("s3", "s3a", "s3n", "gs", "file", "sqlite", "models", "runs", "hdfs", "dbfs", "hf"))
"""Schemes whose addresses are paths: a `#` is part of a name there."""
_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]+://(?:[^\s/?#]*@)?[^\s'\"<>`]*")
"""An address within a text; a user and password may hold quotes."""
_PARAMETER = re.compile(r"(?P<mark>[?&;#])(?P<name>[\w.%\[\]-]+)=(?P<value>[^\s&;#'\"<>)\]},]*)")
_IN_QUOTES = r"(?P<quote>\\*['\"])(?s:.{0,2000}?)(?<!\\)(?P=quote)"
"""A value in quotes, which have backslashes where a text in quotes stands in another one."""
_ASSIGNED = re.compile(
    rf"(?P<name>(?<![\w.%/-])[\w.%-]+)(?P<sign>\s?=\s?|:\s?)(?P<value>{_IN_QUOTES}|\\*['\"]?[^\s&;,'\"<>)\]}}]+)"
)
_QUOTED = re.compile(rf"(?P<name>(?P<mark>\\*['\"])[\w.%-]+(?P=mark))(?P<sign>\s*:\s*)(?P<value>{_IN_QUOTES})")
_OPTION = re.compile(rf"(?P<name>(?<!\S)--[\w.-]+)(?P<sign>\s+)(?P<value>{_IN_QUOTES}|[^\s'\"-]\S*)")
_COOKIE = re.compile(r"\b((?:set-)?cookie\\*['\"]?:\s*\\*['\"]?)[^\r\n'\"\\]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic|token|digest)\s+)?[^\s'\"]+", re.IGNORECASE
)
_BEARER = re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_BARE_USER = re.compile(r"(?<![\w/.@:%+-])([\w.%+-]+:)[^\s/@:'\"]+(?=@[\w.-])")
"""`user:password@host` outside of an address."""
_DAMAGED_ADDRESS = re.compile(
    r"(?P<start>(?<![A-Za-z0-9+.-])https?:[/\\]{1,2}|(?<![^\s'\"=(\[,])//)[^\s/\\?#'\"]*@", re.IGNORECASE
)
"""The beginning of an address without its scheme or with other slashes, as what takes paths apart leaves it."""
_DEEPEST = 4
"""Addresses within the parameters of addresses that are looked at; what has more is left out."""
HIDDEN = "***"

_WORDS_OF_PROSE = {"bearer", "credential", "credentials", "secret", "signature", "token"}
"""Words that a colon follows in sentences too."""

_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Control characters, line ends, marks that turn the direction of writing, halves of characters."""


def printable(text: str, keep: str = "") -> str:
    """A text with escapes (`\\x1b`, `\\n`, `\\u202e`) for what a terminal or log would obey instead of showing it.

    Args:
        keep: characters that stay as they are: a line end, in a message of several lines.
    """
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def without_credentials(text: str) -> str:
    """An address, or a text with addresses in it, without credentials.

    Of addresses the user and password, parameters that are credentials or signatures (by their name, in any case and
    percent-encoded too), and what follows a `#` are left out; elsewhere `password=VALUE`, `"token": "VALUE"` and
    authorization headers lose their values. What holds none comes back as it is.
    """
    return _clean(text, 0)


def _clean(text: str, depth: int) -> str:
    """As `without_credentials`, for what stands `depth` parameters deep in an address."""
    text = _ADDRESS.sub(lambda found: _clean_address(found[0], depth), text)
    text = _DAMAGED_ADDRESS.sub(r"\g<start>", text)
    text = _PARAMETER.sub(
        lambda found: f"{found['mark']}{found['name']}={HIDDEN}" if _is_secret(found["name"], query=True) else found[0],
        text,
    )
    for pattern in (_HEADER, _BEARER, _COOKIE):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    for pattern in (_ASSIGNED, _QUOTED, _OPTION):
        text = _hide_values(pattern, text)
    return _BARE_USER.sub(rf"\1{HIDDEN}", text)


def cleaned(value: Any) -> Any:
    """JSON values with every text in them `without_credentials`."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {key: cleaned(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(inner) for inner in value]
    return value


def _hide_values(pattern: "re.Pattern[str]", text: str) -> str:
    """A text without the values that a pattern finds beside names of credentials, also within another's value."""
    kept, start, at = [], 0, 0
    while found := pattern.search(text, at):
        name = found["name"].strip("'\"\\-")
        prose = found["sign"].startswith(":") and name.lower() in _WORDS_OF_PROSE
        if prose or not _is_secret(name, query=False):
            at = found.end("sign")
            continue
        mark = found["quote"] or ""
        kept.append(f"{text[start : found.end('sign')]}{mark}{HIDDEN}{mark}")
        start = at = found.end()
    return "".join([*kept, text[start:]])


def _is_secret(name: str, query: bool) -> bool:
    """Whether a parameter of this name is a credential or part of a signature."""
    name = unquote(name)
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    parts = [part for part in re.split(r"[^a-z0-9]+", words.lower()) if part]
    joined = "".join(parts)
    if _SIGNING.fullmatch(name) or joined in _SECRET_WORDS or not _SECRET_WORDS.isdisjoint(parts):
        return True
    if any(part.endswith(_SECRET_ENDS) for part in parts):
        return True
    if any(one in _KEYS and other == "key" for one, other in itertools.pairwise(parts)):
        return True
    return query and (joined in _SECRET_IN_QUERIES or not _SECRET_IN_QUERIES.isdisjoint(parts))


def address_without_credentials(address: str) -> str:
    """An address as `without_credentials` has it; what is a path of this machine comes back as it is."""
    return _clean_address(address, 0)


def _clean_address(address: str, depth: int) -> str:
    start, far, rest = address.partition("://")
    if not far:
        return address
    is_path = start.lower() in _PATHS
    ends = re.search("[/?#]", rest)
    host, rest = (rest[: ends.start()], rest[ends.start() :]) if ends else (rest, "")
    if "@" in host:
        host = host.rpartition("@")[2]
    elif not is_path and not host.startswith("[") and re.search(r":[^0-9\])},.;:]", host):
        # No port: the beginning of a user and password with a slash, a question mark or a hash in it.
        host, rest = (rest.rpartition("@")[2], "") if "@" in rest else (HIDDEN, "")
        host, slash, rest = host.partition("/")
        rest = slash + rest
    rest, hash_sign, fragment = rest.partition("#")
    path, question, query = rest.partition("?")
    path = re.sub(r";([^;=/]+)=[^;/]*", lambda found: "" if _is_secret(found[1], query=True) else found[0], path)
    question, query = _clean_query(question, query, depth)
    if is_path:
        hash_sign, fragment = _clean_query(hash_sign, fragment, depth)
    else:
        hash_sign, fragment = "", ""
    return f"{start}://{host}{path}{question}{query}{hash_sign}{fragment}"


def _clean_query(mark: str, query: str, depth: int) -> tuple[str, str]:
    """A query with its mark, as they are where nothing in it is a credential."""
    parts = re.split("([&;])", query)
    pairs = list(zip(parts[::2], ["", *parts[1::2]], strict=True))
    kept = [(_clean_value(part, depth), sign) for part, sign in pairs if part and not _secret_pair(part)]
    if [part for part, _ in kept] == parts[::2]:
        return mark, query
    text = "".join(part if place == 0 else (sign or "&") + part for place, (part, sign) in enumerate(kept))
    return (mark if kept else ""), text


def _secret_pair(part: str) -> bool:
    name, equals, _ = part.partition("=")
    return bool(equals) and _is_secret(name, query=True)


def _clean_value(part: str, depth: int) -> str:
    """A parameter without the credentials in its value: of an address, as image proxies take them, or encoded ones."""
    name, equals, value = part.partition("=")
    inner = unquote(value)
    while "://" not in inner and depth < _DEEPEST and (more := unquote(inner)) != inner:
        inner, depth = more, depth + 1
    if inner == value and "://" not in inner:
        return part
    if depth == _DEEPEST:
        return f"{name}{equals}{HIDDEN}"
    if (clean := _clean(inner, depth + 1)) == inner:
        return part
    return f"{name}{equals}{quote(clean, safe='')}"
