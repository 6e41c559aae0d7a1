"""Downloads over http(s) from servers that nobody vouches for: bounded in bytes, memory and time.

`requests` bounds the time without a byte; a server that drips one now and then, in its headers or its body, is never
given up by it. So each connection is known here, and one that is too slow is shut down from another thread.
"""

import ipaddress
import mmap
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from data_prep.image_check import MAX_BYTES, TOO_MANY_BYTES, UnusableImage

MIN_RATE = 4096
"""Bytes a second that a server must send, after the first `timeout` seconds of an attempt."""
MAX_EXPANSION = 100
"""How many times its compressed size an answer may have: encoded images hardly compress, what does is a bomb."""
_PIECE = 16 << 10
_IN_MEMORY = 4 << 20
"""Bytes of an answer that are held in memory; what is larger goes on through a file that has no name."""
_FREE_EXPANSION = 1 << 20
"""Bytes up to which the expansion is not looked at."""
_HOLDING_IPV4 = tuple(
    (ipaddress.IPv6Network(network), shift)
    for network, shift in (("::/96", 0), ("::ffff:0:0/96", 0), ("64:ff9b::/96", 0), ("2002::/16", 80))
)
"""Networks of IPv6 whose addresses lead to one of IPv4, and by how many bits that is shifted in them: IPv4-compatible
and -mapped (RFC 4291), NAT64 (RFC 6052), 6to4 (RFC 3056). (Those of Teredo, 2001::/32, are not global to Python.)"""
_LOCAL_TRANSLATION = ipaddress.IPv6Network("64:ff9b:1::/48")
"""NAT64 of a network's own (RFC 8215), with IPv4 addresses anywhere in it; global to Python 3.11."""


class SlowServerError(Exception):
    """A server that sends less than it must."""


class PrivateAddressError(Exception):
    """A server whose address is not a public one."""


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        body: None where the status says that it is none.
        retry_after: the header of that name; may be empty.
    """

    status: int
    body: memoryview | None
    retry_after: str


class ImageDownloads:
    """Downloads for several threads; connections are kept.

    Args:
        timeout: seconds without a byte, and until `MIN_RATE` holds.
        threads: that use it at a time.
        public_only: refuse servers at private, loopback, link-local and reserved addresses, whatever name led there.
            Proxies, which would be connected to instead, are not used then.
    """

    def __init__(self, timeout: float, threads: int, public_only: bool) -> None:
        self._timeout = timeout
        self._attempts: set[_Attempt] = set()
        self._closed = threading.Event()
        self._session = requests.Session()
        self._session.trust_env = not public_only
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(self, pool_connections=64, pool_maxsize=threads))
        # A server that compresses what is an image already makes work, or trouble.
        self._session.headers.update({"User-Agent": "vitforge", "Accept-Encoding": "identity"})
        self._session.hooks["response"].append(_without_body_of_redirect)
        self.public_only = public_only
        self.current = threading.local()
        threading.Thread(target=self._watch, name="downloads", daemon=True).start()

    def get(self, address: str) -> Answer:
        """Download once.

        Raises:
            UnusableImage: the answer is longer than an image can be.
            SlowServerError: it comes too slowly.
            PrivateAddressError: the address, or one that it redirects to, is not public.
            ValueError: or requests' errors: the address is none, or the server does not answer as it should.
        """
        attempt = _Attempt(self._timeout)
        self.current.attempt = attempt
        self._attempts.add(attempt)
        try:
            with self._session.get(address, timeout=self._timeout, stream=True) as answer:
                body = self._body(answer, attempt) if answer.ok else None
            if attempt.ended:  # what was shut down may look as if it had come to its end
                raise requests.exceptions.ReadTimeout
            return Answer(answer.status_code, body, answer.headers.get("Retry-After", ""))
        except (requests.exceptions.RequestException, OSError, urllib3.exceptions.HTTPError):
            if attempt.refused:
                raise PrivateAddressError(attempt.refused) from None
            if attempt.ended:
                raise SlowServerError(f"less than {MIN_RATE} bytes a second") from None
            raise
        finally:
            self._attempts.discard(attempt)

    def close(self) -> None:
        """Close the connections."""
        self._closed.set()
        self._session.close()

    def _body(self, answer: Any, attempt: "_Attempt") -> memoryview:
        """The whole of an answer; one that is cut short raises, by its length."""
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as body:
            size = 0
            for part in answer.iter_content(_PIECE):
                size += len(part)
                attempt.received = size
                if size > MAX_BYTES:
                    raise UnusableImage(TOO_MANY_BYTES)
                if size > max(_FREE_EXPANSION, MAX_EXPANSION * answer.raw.tell()):
                    raise UnusableImage(f"compressed to less than 1/{MAX_EXPANSION}: no image")
                body.write(part)
            if size <= _IN_MEMORY:
                body.seek(0)
                return memoryview(body.read())
            body.flush()
            return memoryview(mmap.mmap(body.fileno(), size, access=mmap.ACCESS_READ))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 2)):
            for attempt in list(self._attempts):
                attempt.end_if_slow()


class _Attempt:
    """One download as its watcher knows it."""

    def __init__(self, timeout: float) -> None:
        self.received = 0
        self.ended = False
        self.refused = ""
        self._began, self._timeout = time.monotonic(), timeout
        self._socket: Any = None

    def uses(self, connected: Any) -> None:
        """This is the socket that it waits for."""
        self._socket = connected

    def end_if_slow(self) -> None:
        """Shut its connection down if too little has come."""
        # what was received shows up a piece later than it came
        expected = (time.monotonic() - self._began - self._timeout) * MIN_RATE - _PIECE
        if self._socket is not None and self.received < expected:
            self.ended = True
            with suppress(OSError):  # it is gone already
                # of the plain socket, also under TLS: its thread may be waiting inside the handshake
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Adapter(HTTPAdapter):
    """An adapter whose connections tell the downloads about their sockets."""

    def __init__(self, downloads: ImageDownloads, **options: Any) -> None:
        self._downloads = downloads
        super().__init__(**options)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the pools; called by requests."""
        super().init_poolmanager(*arguments, **options)
        downloads = self._downloads

        class Plain(_Watched, HTTPConnection):
            watcher = downloads

        class Secure(_Watched, HTTPSConnection):
            watcher = downloads

        class PlainPool(urllib3.HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(urllib3.HTTPSConnectionPool):
            ConnectionCls = Secure

        self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}


class _Watched:
    """What both kinds of connections have."""

    watcher: ImageDownloads
    sock: Any

    # The one place between connecting and the first byte that is sent (urllib3 2.8; private, and the same since 1.9).
    def _new_conn(self) -> Any:
        connected = super()._new_conn()  # type: ignore[misc]
        attempt = self.watcher.current.attempt
        attempt.uses(connected)
        if self.watcher.public_only:
            peer = ipaddress.ip_address(connected.getpeername()[0].partition("%")[0])
            if not is_public(peer):
                attempt.refused = f"its server has the address {peer}, which is not a public one (fetch_public_only)"
                connected.close()
                raise ConnectionRefusedError(attempt.refused)
        return connected

    def request(self, *arguments: Any, **options: Any) -> None:
        if self.sock is not None:  # a connection that was kept
            self.watcher.current.attempt.uses(self.sock)
        super().request(*arguments, **options)  # type: ignore[misc]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the public internet, and so is the one of IPv4 that it leads to, if it does."""
    if isinstance(address, ipaddress.IPv6Address):
        for network, shift in _HOLDING_IPV4:
            if address in network:
                return is_public(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
        if address.is_site_local or address in _LOCAL_TRANSLATION:
            return False
    return address.is_global and not address.is_multicast


def _without_body_of_redirect(answer: requests.Response, **options: Any) -> None:
    """requests 2.34 reads the body of an answer that redirects whole, unpacked and in memory: closed, there is none."""
    if answer.is_redirect:
        answer.close()
