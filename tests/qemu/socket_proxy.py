"""A process that passes one client's bytes to another UNIX socket and back.

Run as `python -m tests.qemu.socket_proxy TARGET PATH`; listens at PATH when it has said so, and ends with its client.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress

__all__: list[str] = []


def serve(target: str, path: str) -> None:
    """Listen, and pass one client's bytes on until there are no more."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as server:
        listening.bind(path)
        listening.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        client, _ = listening.accept()
        with client:
            server.connect(target)
            there = threading.Thread(target=pass_on, args=(client, server))
            there.start()
            pass_on(server, client)
            there.join()


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes on until there are no more."""
    while got := one.recv(1 << 16):
        other.sendall(got)
    with suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    serve(*sys.argv[1:])
