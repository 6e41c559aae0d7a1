"""Questions and answers in JSON between processes that share a secret; nobody else is answered, or heard.

Both sides begin a connection with a random number. The key of the connection is an HMAC of the two under the secret,
and every message carries an HMAC under that key of its direction, its number and its content: it cannot be made,
changed, repeated or sent back by who does not know the secret. What is said is not encrypted.

A server answers all of its clients from one thread that never waits for any of them. Who has not proven within
seconds to know the secret is cut off, and only so many may try at a time.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.command import log

LARGEST = 65_536
"""Bytes of a message at most."""
_NONCE, _MAC = 32, 32
_HEADER = struct.Struct(">I")
_PROVE_S = 5.0
"""Seconds that a stranger has to prove to know the secret."""
_STRANGERS = 64
"""Connections of strangers at a time; the oldest goes when one more comes."""
_ASK, _ANSWER = b"ask", b"answer"


class ChannelError(OSError):
    """The other side does not answer in time, or as one that knows the secret."""


def new_secret() -> bytes:
    """A secret for a channel."""
    return secrets.token_bytes(32)


def _key(secret: bytes, of_server: bytes, of_client: bytes) -> bytes:
    return hmac.digest(secret, b"authenticated channel" + of_server + of_client, hashlib.sha256)


def _frame(key: bytes, direction: bytes, number: int, value: Any) -> bytes:
    content = json.dumps(value).encode()
    if len(content) > LARGEST:
        raise ValueError(f"a message of {len(content)} bytes is more than the {LARGEST} that a channel takes")
    return _HEADER.pack(len(content)) + _mac(key, direction, number, content) + content


def _mac(key: bytes, direction: bytes, number: int, content: bytes) -> bytes:
    return hmac.digest(key, b"%s %d " % (direction, number) + content, hashlib.sha256)


def _content_length(header: bytes) -> int:
    length: int = _HEADER.unpack(header)[0]
    if length > LARGEST:
        raise ChannelError(f"a message of {length} bytes was announced")
    return length


def _opened(key: bytes, direction: bytes, number: int, mac: bytes, content: bytes) -> Any:
    """The value in a message that is what it claims to be."""
    if not hmac.compare_digest(mac, _mac(key, direction, number, content)):
        raise ChannelError("a message is not from one that knows the secret")
    return json.loads(content)


@dataclass(eq=False)
class _Connection:
    """A client, as the server sees it."""

    socket: socket.socket
    nonce: bytes
    heard: float
    """When it came, or was last heard as one that knows the secret (monotonic)."""
    key: bytes = b""
    answered: int = 0
    received: bytearray = field(default_factory=bytearray)

    @property
    def proven(self) -> bool:
        return self.answered > 0

    def messages(self, secret: bytes) -> list[Any]:
        """What has been received whole.

        Raises:
            ChannelError: it is not from one that knows the secret.
        """
        if not self.key:
            if len(self.received) < _NONCE:
                return []
            self.key = _key(secret, self.nonce, bytes(self.received[:_NONCE]))
            del self.received[:_NONCE]
        found = []
        while len(self.received) >= _HEADER.size:
            length = _content_length(bytes(self.received[: _HEADER.size]))
            end = _HEADER.size + _MAC + length
            if len(self.received) < end:
                break
            message = bytes(self.received[_HEADER.size : end])
            found.append(_opened(self.key, _ASK, self.answered, message[:_MAC], message[_MAC:]))
            self.answered += 1
            del self.received[:end]
        return found


class Server:
    """Answers the questions of those who know the secret, until it is closed.

    Args:
        host: the address that it listens on, and on no other.
        secret: shared with the clients.
        answer: makes the answer to a question, in the server's thread: it must not wait. A question that it raises
            ValueError, TypeError or KeyError for ends the connection that it came by.
        clients: how many there are; a few connections of clients that have connected anew are held beside theirs.

    Attributes:
        address: host and port.
    """

    def __init__(self, host: str, secret: bytes, answer: Callable[[Any], Any], clients: int) -> None:
        self._secret, self._answer, self._most = secret, answer, 2 * clients + 8
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family, backlog=_STRANGERS + clients)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: set[_Connection] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="vitforge-channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._closed.set()
        self._thread.join(timeout=10)

    def _serve(self) -> None:
        looked = time.monotonic()
        while not self._closed.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                if key.data is None:
                    self._accept()
                elif key.data in self._connections:  # one before it may have cost this one its place
                    self._read(key.data)
            now = time.monotonic()
            if now - looked > 0.1:
                looked = now
                for connection in [one for one in self._connections if not one.proven and now - one.heard > _PROVE_S]:
                    self._drop(connection)
        for connection in list(self._connections):
            self._drop(connection)
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:  # no file descriptor is left, or who came is gone again
            log.debug("a connection was not accepted (%s)", error)
            self._closed.wait(0.05)
            return
        accepted.setblocking(False)
        connection = _Connection(accepted, secrets.token_bytes(_NONCE), time.monotonic())
        self._connections.add(connection)
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._send(connection, connection.nonce)
        for proven, most in ((False, _STRANGERS), (True, self._most)):
            some = [one for one in self._connections if one.proven is proven]
            if len(some) > most:
                self._drop(min(some, key=lambda one: one.heard))

    def _read(self, connection: _Connection) -> None:
        try:
            received = connection.socket.recv(LARGEST)
            if not received:
                self._drop(connection)
                return
            connection.received += received
            for question in connection.messages(self._secret):
                connection.heard = time.monotonic()
                answer = self._answer(question)
                self._send(connection, _frame(connection.key, _ANSWER, connection.answered - 1, answer))
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.debug("a connection was cut off (%s)", error)
            self._drop(connection)

    def _send(self, connection: _Connection, content: bytes) -> None:
        try:
            whole = connection.socket.send(content) == len(content)
        except OSError:
            whole = False
        if not whole:  # it does not read its answers: there is never more than one on the way
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.socket)
            connection.socket.close()


class Client:
    """Asks a `Server`. It connects when it is asked something, and anew after an error.

    Args:
        timeout_s: for an answer, together with the connection where there is none yet.
    """

    def __init__(self, address: tuple[str, int], secret: bytes, timeout_s: float) -> None:
        self.address, self._secret, self._timeout_s = address, secret, timeout_s
        self._socket: socket.socket | None = None
        self._key, self._asked = b"", 0

    def ask(self, question: Any) -> Any:
        """The answer to a question.

        Raises:
            OSError: there is none.
        """
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._socket is None:
                self._connect(deadline)
            self._give(_frame(self._key, _ASK, self._asked, question), deadline)
            length = _content_length(self._take(_HEADER.size, deadline))
            mac, content = self._take(_MAC, deadline), self._take(length, deadline)
            answer = _opened(self._key, _ANSWER, self._asked, mac, content)
            self._asked += 1
            return answer
        except BaseException:  # what comes next on this connection could be the answer to another question
            self.close()
            raise

    def close(self) -> None:
        """End the connection."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None

    def _connect(self, deadline: float) -> None:
        self._socket = socket.create_connection(self.address, timeout=self._left(deadline))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = secrets.token_bytes(_NONCE)
        self._key, self._asked = _key(self._secret, self._take(_NONCE, deadline), nonce), 0
        self._give(nonce, deadline)

    def _give(self, content: bytes, deadline: float) -> None:
        assert self._socket is not None
        self._socket.settimeout(self._left(deadline))
        self._socket.sendall(content)

    def _take(self, count: int, deadline: float) -> bytes:
        assert self._socket is not None
        received = b""
        while len(received) < count:
            self._socket.settimeout(self._left(deadline))
            some = self._socket.recv(count - len(received))
            if not some:
                raise ChannelError("the connection was closed")
            received += some
        return received

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ChannelError(f"no answer in {self._timeout_s:g} s")
        return left
