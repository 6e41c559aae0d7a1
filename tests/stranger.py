"""What a process of another user, which knows the address of the ranks' channel and all of our code, tries on it.

python stranger.py REPOSITORY HOST PORT: prints what it got, a JSON list. Run by root, it becomes another user first.
"""

import encodings.idna  # noqa: F401 needed for addresses, and out of reach for another user where Python is root's own
import json
import os
import socket
import sys

sys.path.insert(0, sys.argv[1])

from cluster.authenticated_channel import Client

NOBODY = 65_534


def main() -> None:
    """Ask with secrets that are not the ranks', say something else, say nothing."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    address = sys.argv[2], int(sys.argv[3])
    sign = {"beat": 1, "moves": 10**6, "phase": "start", "step": 1, "node": "there", "pid": 1}
    got: list[str] = []
    for secret in (b"", bytes(32)):
        try:
            got.append(str(Client(address, secret, 5).ask({"rank": 1, "sign": sign})))
        except OSError as error:
            got.append(type(error).__name__)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100_000, b""):
        with socket.create_connection(address, timeout=10) as connection:
            greeting = connection.recv(4096)
            try:
                connection.sendall(said)
                while some := connection.recv(4096):
                    greeting += some
            except ConnectionError:
                pass
            got.append(f"{len(greeting)} bytes")
    print(json.dumps(got))


if __name__ == "__main__":
    main()
