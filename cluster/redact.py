"""Text that may be shown and written down: without credentials, without what a terminal would obey."""

import itertools
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

_SECRET_WORDS = {
    "accesskey", "accesskeyid", "accesstoken", "apikey", "authorization", "authtoken", "awsaccesskeyid", "bearer",
    "credential", "credentials", "googleaccessid", "hmac", "jwt", "passphrase", "passwd", "password", "pwd",
    "refreshtoken", "secret", "secretkey", "signature", "token",
}  # fmt: skip
"""Words that mean a credential wherever they stand in a name: `api-token`, `client_secret`, `accessToken`."""
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
_ASSIGNED = re.compile(
    r"(?P<name>(?<![\w.%/-])[\w.%-]+)(?P<sign>\s?=\s?|:\s?)(?P<value>\"[^\"]*\"|'[^']*'|[^\s&;,'\"<>)\]}]+)"
)
_QUOTED = re.compile(r"(?P<name>(['\"])[\w.%-]+\2)(?P<sign>\s*:\s*)(?P<value>\"[^\"]*\"|'[^']*')")
_HEADER = re.compile(
    r"(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic|token|digest)\s+)?[^\s'\"]+", re.IGNORECASE
)
_BEARER = re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_BARE_USER = re.compile(r"(?<![\w/.@:%+-])([\w.%+-]+:)[^\s/@:'\"]+(?=@[\w.-])")
"""`user:password@host` outside of an address."""
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
    text = _ADDRESS.sub(lambda found: address_without_credentials(found[0]), text)
    text = _PARAMETER.sub(
        lambda found: f"{found['mark']}{found['name']}={HIDDEN}" if _is_secret(found["name"], query=True) else found[0],
        text,
    )
    text = _BEARER.sub(rf"\1{HIDDEN}", _HEADER.sub(rf"\1{HIDDEN}", text))
    for pattern in (_ASSIGNED, _QUOTED):
        text = pattern.sub(_hide_value, text)
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


def _hide_value(found: "re.Match[str]") -> str:
    name = found["name"].strip("'\"")
    if not _is_secret(name, query=False) or (found["sign"].startswith(":") and name.lower() in _WORDS_OF_PROSE):
        return found[0]
    mark = found["value"][0] if found["value"][:1] in ("'", '"') else ""
    return f"{found['name']}{found['sign']}{mark}{HIDDEN}{mark}"


def _is_secret(name: str, query: bool) -> bool:
    """Whether a parameter of this name is a credential or part of a signature."""
    name = unquote(name)
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    parts = [part for part in re.split(r"[^a-z0-9]+", words.lower()) if part]
    joined = "".join(parts)
    if _SIGNING.fullmatch(name) or joined in _SECRET_WORDS or not _SECRET_WORDS.isdisjoint(parts):
        return True
    if any(one in _KEYS and other == "key" for one, other in itertools.pairwise(parts)):
        return True
    return query and (joined in _SECRET_IN_QUERIES or not _SECRET_IN_QUERIES.isdisjoint(parts))


def address_without_credentials(address: str) -> str:
    """An address as `without_credentials` has it; what is a path of this machine comes back as it is."""
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
    question, query = _clean_query(question, query)
    if is_path:
        hash_sign, fragment = _clean_query(hash_sign, fragment)
    else:
        hash_sign, fragment = "", ""
    return f"{start}://{host}{path}{question}{query}{hash_sign}{fragment}"


def _clean_query(mark: str, query: str) -> tuple[str, str]:
    """A query with its mark, as they are where nothing in it is a credential."""
    parts = re.split("([&;])", query)
    pairs = list(zip(parts[::2], ["", *parts[1::2]], strict=True))
    kept = [(_clean_value(part), sign) for part, sign in pairs if part and not _secret_pair(part)]
    if [part for part, _ in kept] == parts[::2]:
        return mark, query
    text = "".join(part if place == 0 else (sign or "&") + part for place, (part, sign) in enumerate(kept))
    return (mark if kept else ""), text


def _secret_pair(part: str) -> bool:
    name, equals, _ = part.partition("=")
    return bool(equals) and _is_secret(name, query=True)


def _clean_value(part: str) -> str:
    """A parameter whose value is an address, as image proxies take them, without the credentials of that."""
    name, equals, value = part.partition("=")
    inner = unquote(value)
    if "://" not in inner or (clean := without_credentials(inner)) == inner:
        return part
    return f"{name}{equals}{quote(clean, safe='')}"
