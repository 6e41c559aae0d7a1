"""A real S3 server for tests: moto's in a process of its own, and before it a proxy that makes the faults of networks.

`with s3_server() as server:` starts both; tests use the fixtures `s3_server` and `s3` of conftest.py.
"""

import asyncio
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

KINDS = ("slow_down", "reset", "lost_answer", "short", "stall", "denied")
"""slow_down: 503 SlowDown, nothing is done. reset: the connection is reset, nothing is done. lost_answer: the request
is done, then the connection is reset. short: an answer's body is cut in its middle. stall: there is no answer.
denied: 403 AccessDenied."""

PAGE = 20
"""Objects that one answer lists; S3 gives 1,000."""

ACCESS_KEY = "AKIATESTTESTTESTTEST"
SECRET_KEY = "hush-this-must-not-be-seen-anywhere"


@dataclass
class Faults:
    """What the proxy does to requests; change it at any time.

    Attributes:
        rates: for kinds of KINDS the share of requests that get it.
        only: regular expression; requests "METHOD /path" that do not match it are left alone.
        limit: how many faults there are at most.
        latency: seconds that every answer is late.
        seed: what chooses them.
    """

    rates: dict[str, float] = field(default_factory=dict)
    only: str = ""
    limit: float = float("inf")
    latency: float = 0.0
    requests: list[str] = field(default_factory=list)
    """What came in: "METHOD /path range"."""
    injected: Counter[str] = field(default_factory=Counter)
    """Faults so far, by kind."""
    seed: random.Random = field(default_factory=lambda: random.Random(0))

    def clear(self) -> None:
        """No faults any more, and nothing counted."""
        self.__init__()  # type: ignore[misc]

    def choose(self, request: str) -> str | None:
        """The fault of the next request, if it gets one."""
        if self.injected.total() >= self.limit or not re.search(self.only, request):
            return None
        drawn = self.seed.random()
        for kind, rate in self.rates.items():
            assert kind in KINDS, kind
            if drawn < rate:
                self.injected[kind] += 1
                return kind
            drawn -= rate
        return None


class Proxy:
    """HTTP/1.1 on loopback, in a thread of its own: passes requests on, or does what `faults` says."""

    def __init__(self, target: int) -> None:
        self.faults = Faults()
        self._target = target
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
            self.port = int(server.sockets[0].getsockname()[1])
            ready.set()
            self._loop.run_forever()
            server.close()
            for task in (tasks := asyncio.all_tasks(self._loop)):
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

        self._thread = threading.Thread(target=serve, daemon=True, name="fault proxy")
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False when the connection is done with."""
        head = await reader.readuntil(b"\r\n\r\n")
        if b"\r\nexpect: 100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect: 100-continue", b"", head)
        assert b"\r\ntransfer-encoding" not in head.lower(), head
        body = await reader.readexactly(_length(head) or 0)
        span = re.search(rb"(?i)\r\nrange: (\S+)", head)
        request = " ".join([*head.decode("latin1").split(" ", 2)[:2], span[1].decode() if span else ""]).strip()
        self.faults.requests.append(request)
        fault = self.faults.choose(request)
        await asyncio.sleep(self.faults.latency)
        if fault in ("slow_down", "denied"):
            status, code = {"slow_down": ("503 Slow Down", "SlowDown"), "denied": ("403 Forbidden", "AccessDenied")}[
                fault
            ]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test wants</Message></Error>"
            content = b"" if head.startswith(b"HEAD") else text.encode()
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + content)
            await writer.drain()
            return True
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "reset":
            _reset(writer)
            return False
        answer, content = await self._pass_on(head, body)
        if fault == "lost_answer":
            _reset(writer)
            return False
        writer.write(answer)
        if fault == "short" and content:
            writer.write(content[: len(content) // 2])
            await writer.drain()
            return False
        writer.write(content)
        await writer.drain()
        return True

    async def _pass_on(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target, limit=1 << 20)
        try:
            writer.write(re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = None if head.startswith(b"HEAD") else _length(answer)
            answer = re.sub(rb"(?i)\r\n(connection|transfer-encoding): [^\r]*", b"", answer)
            if head.startswith(b"HEAD"):
                return answer, b""
            if length is not None:
                return answer, await reader.readexactly(length)
            content = await reader.read()
            return answer[:-2] + b"Content-Length: %d\r\n\r\n" % len(content), content
        finally:
            writer.close()


def _length(head: bytes) -> int | None:
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return int(found[1]) if found else None


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass
class S3Server:
    """A running server and what makes it fail.

    Attributes:
        endpoint: of the proxy.
        faults: what the proxy does.
        direct: endpoint without the proxy.
    """

    endpoint: str
    faults: Faults
    direct: str
    buckets: int = 0

    @property
    def env(self) -> dict[str, str]:
        """The variables with which a process uses the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> str:
        """Makes a bucket; returns its URL."""
        self.buckets += 1
        name = f"bucket-{self.buckets}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> Any:
        """A boto3 client past the proxy, to look at what is there."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.direct,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )


@contextmanager
def s3_server(latency: float = 0.0) -> Iterator[S3Server]:
    """An S3 server on loopback for the length of a `with` block; it ends with this process, however that ends.

    Args:
        latency: seconds that every answer is late, also without the proxy.
    """
    variables: Mapping[str, str] = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    variables = {**variables, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.s3_server", str(latency)],
        cwd=REPOSITORY, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    port = int(process.stdout.readline())
    proxy = Proxy(port)
    try:
        yield S3Server(f"http://127.0.0.1:{proxy.port}", proxy.faults, f"http://127.0.0.1:{port}")
    finally:
        proxy.stop()
        process.stdin.close()
        process.wait(20)


def _main() -> None:
    """Serve until standard input ends, which it does when the process that started this one is gone."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    lock, latency = threading.Lock(), float(sys.argv[1])

    def one_at_a_time(environ: Any, start: Any) -> Any:
        time.sleep(latency)
        with lock:  # S3 does a conditional put in one step; moto looks and then writes
            return list(application(environ, start))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _main()
