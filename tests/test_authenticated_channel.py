"""The channel of the ranks: who knows the secret is answered; strangers hear nothing, change nothing, stop nothing."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster import authenticated_channel
from cluster.authenticated_channel import LARGEST, Client, Server, new_secret

SECRET = new_secret()


@pytest.fixture
def asked() -> list[Any]:
    """What the server was asked."""
    return []


@pytest.fixture
def server(asked: list[Any]) -> Iterator[Server]:
    def answer(question: Any) -> Any:
        asked.append(question)
        return {"answer": question["ask"]}

    serving = Server("127.0.0.1", SECRET, answer, clients=2)
    yield serving
    serving.close()


def client(server: Server, secret: bytes = SECRET, timeout_s: float = 10) -> Client:
    return Client(server.address, secret, timeout_s)


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def everything_from(connection: socket.socket) -> bytes:
    """What comes on a connection until the other side ends it."""
    connection.settimeout(60)
    received = b""
    while True:
        try:
            some = connection.recv(4096)
        except ConnectionResetError:
            return received
        if not some:
            return received
        received += some


def test_each_question_gets_its_answer_also_after_the_server_has_ended_a_connection(server, asked):
    one, other = client(server), client(server)
    for number in range(20):
        assert one.ask({"ask": number}) == {"answer": number}
        assert other.ask({"ask": -number}) == {"answer": -number}
    with pytest.raises(OSError, match="closed"):
        one.ask({"nothing": 1})  # the server can make no answer to it
    assert one.ask({"ask": "again"}) == {"answer": "again"}
    assert len(asked) == 42


def test_it_listens_on_the_address_that_it_was_given_and_on_no_other(server):
    lines = open("/proc/net/tcp").read().splitlines() + open("/proc/net/tcp6").read().splitlines()  # noqa: SIM115, PTH123
    port = f":{server.address[1]:04X}"
    listening = [line.split()[1] for line in lines if f"{port} " in line and line.split()[3] == "0A"]
    assert listening == ["0100007F" + port]


def test_who_has_another_secret_is_neither_answered_nor_heard(server, asked):
    with pytest.raises(OSError, match="closed"):
        client(server, new_secret()).ask({"ask": "what"})
    assert asked == []


@pytest.mark.parametrize(
    "junk",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 31, b"\0" * 200, b"\xff" * 5000, b"x" * 32 + b"\0\0\0\0" + b"\0" * 40,
     b"x" * 32 + (LARGEST).to_bytes(4, "big") + b"y" * (LARGEST - 1)],
)  # fmt: skip
def test_a_stranger_hears_a_random_number_and_is_cut_off(server, asked, monkeypatch, junk):
    monkeypatch.setattr(authenticated_channel, "_PROVE_S", 0.3)
    with socket.create_connection(server.address) as stranger:
        stranger.sendall(junk)
        assert client(server).ask({"ask": 1}) == {"answer": 1}
        assert len(everything_from(stranger)) in (0, 32)
    assert asked == [{"ask": 1}]


def test_what_was_said_once_cannot_be_said_again(server, asked):
    """A stranger that has listened on the wire repeats what it heard, on its own connection and on the same one."""
    with socket.create_server(("127.0.0.1", 0)) as wire:
        through = Client(wire.getsockname()[:2], SECRET, 10)
        said: list[bytes] = []

        def carry() -> None:
            near, _ = wire.accept()
            with near, socket.create_connection(server.address) as far:
                near.sendall(far.recv(32))
                said.append(near.recv(32))
                time.sleep(0.2)
                said.append(near.recv(4096))
                far.sendall(said[0] + said[1])
                near.sendall(far.recv(4096))
                until(lambda: len(said) == 3)
                far.sendall(said[1])  # the same question as the next one
                said.append(everything_from(far))

        thread = threading.Thread(target=carry, daemon=True)
        thread.start()
        assert through.ask({"ask": "once"}) == {"answer": "once"}
        said.append(b"")
        thread.join(60)
    assert said[3] == b""
    with socket.create_connection(server.address) as stranger:
        stranger.recv(32)
        stranger.sendall(said[0] + said[1])
        assert everything_from(stranger) == b""
    assert asked == [{"ask": "once"}]


def test_a_stranger_in_the_servers_place_is_not_believed():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        fake = subprocess.Popen(
            [sys.executable, "-c",
             "import socket, sys\n"
             "listener = socket.socket(fileno=int(sys.argv[1]))\n"
             "one, _ = listener.accept()\n"
             "one.sendall(bytes(32) + bytes([0, 0, 0, 2]) + bytes(32) + b'{}')\n"
             "one.recv(1)\n"
             "listener.accept()[0].recv(1000)\n"
             "sys.stdin.read()\n", str(stranger.fileno())],
            pass_fds=[stranger.fileno()], stdin=subprocess.PIPE,
        )  # fmt: skip
        asking = Client(stranger.getsockname()[:2], SECRET, 2)
        with pytest.raises(OSError, match="not from one that knows the secret"):
            asking.ask({"ask": 1})
        with pytest.raises(OSError, match=r"timed out|no answer in 2 s"):  # one that says nothing
            asking.ask({"ask": 1})
        fake.communicate(b"")


def test_a_crowd_of_silent_strangers_keeps_nobody_out(server, asked):
    before = client(server)
    assert before.ask({"ask": 1}) == {"answer": 1}
    crowd = [socket.create_connection(server.address) for _ in range(150)]
    try:
        for number in range(3):
            assert before.ask({"ask": number}) == {"answer": number}
            assert client(server).ask({"ask": number}) == {"answer": number}
        still_open = 0
        for one in crowd:
            one.setblocking(False)
            try:
                still_open += one.recv(32) != b"" and one.recv(1) != b""
            except BlockingIOError:
                still_open += 1
            except ConnectionResetError:
                pass
        assert still_open <= authenticated_channel._STRANGERS
    finally:
        for one in crowd:
            one.close()
    assert len(asked) == 7
