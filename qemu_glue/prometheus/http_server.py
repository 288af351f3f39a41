"""A small HTTP server for one page, on a thread of its own, which no client can hold up.

Each connection is answered once and closed.  A client has a few seconds for all of it and a few KiB for its request;
where there are too many clients, the one that has been there longest gives way.  So one that sends nothing costs a
descriptor for some seconds, and the next scrape finds a place.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Final, NamedTuple, Self

from pvclock import ConfigError
from qemu_glue.prometheus.address import Address

__all__ = ["HttpServer", "Page"]

CLIENT_LIMIT_S: Final = 5.0
CLIENTS_MAX: Final = 64
REQUEST_BYTES_MAX: Final = 16 << 10
TURNS_TO_END: Final = 3
END_OF_REQUEST: Final = b"\r\n\r\n"
PATH: Final = "/metrics"
LOG: Final = logging.getLogger(__name__)


class Page(NamedTuple):
    """What is served.  kind: its Content-Type."""

    kind: str
    content: bytes


class HttpServer:
    """Serves what `make_page` makes of a request's Accept header, from now on until close().

    ConfigError if it cannot be served at `address`.
    """

    def __init__(self, address: Address, make_page: Callable[[str], Page]) -> None:
        self._make_page = make_page
        self._has_failed = False
        self._clients: dict[asyncio.Task[None], None] = {}
        self._listener = _listening(address)
        self.address = Address(address.host, self._listener.getsockname()[1])
        """With the port that was free, if any was asked for."""
        self._loop = asyncio.new_event_loop()
        self._is_over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="pvclock-metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.address}{PATH}"

    def close(self) -> None:
        """Serve no more; again, nothing."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._is_over.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # In its thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._take, sock=self._listener, limit=REQUEST_BYTES_MAX)
        await self._is_over.wait()
        self._loop.remove_reader(self._listener)
        for _ in range(TURNS_TO_END):  # one that was let in just now has no task so far
            await asyncio.sleep(0)
            clients = asyncio.all_tasks() - {asyncio.current_task()}
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        server.close()  # not before: a client that it has let in and not yet attached would stay open

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = self._loop.create_task(self._answer_in_time(reader, writer))
        client.add_done_callback(lambda _: self._let_go(client, writer))  # even if it is cancelled before it begins
        self._clients[client] = None
        if len(self._clients) > CLIENTS_MAX:
            oldest = next(iter(self._clients))
            del self._clients[oldest]  # at once, for several may come in one turn of the loop
            oldest.cancel()

    def _let_go(self, client: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self._clients.pop(client, None)
        writer.transport.abort()

    async def _answer_in_time(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):  # it is gone, or has had its time
            async with asyncio.timeout(CLIENT_LIMIT_S):
                await self._answer(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(END_OF_REQUEST)
        except asyncio.LimitOverrunError:
            writer.write(_response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        else:
            writer.write(self._response_to(request.decode("latin-1")))
        writer.close()
        await writer.wait_closed()

    def _response_to(self, request: str) -> bytes:
        first, *lines = request.split("\r\n")
        method, _, target = first.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        if method not in {"GET", "HEAD"}:
            return _response(HTTPStatus.METHOD_NOT_ALLOWED)
        if path == "/":
            return _response(HTTPStatus.OK, Page("text/html", f'<a href="{PATH}">pvclock metrics</a>\n'.encode()))
        if path != PATH:
            return _response(HTTPStatus.NOT_FOUND)
        headers = (line.partition(":") for line in lines)
        accepted = ",".join(value.strip() for name, _, value in headers if name.strip().lower() == "accept")
        try:
            page = self._make_page(accepted)
        except Exception as error:  # noqa: BLE001  # whatever it is, the next scrape is answered
            self._tell_once(error)
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR)
        return _response(HTTPStatus.OK, page, is_head=method == "HEAD")

    def _tell_once(self, error: Exception) -> None:
        """That there is no page, and why: a line for the first time, since scrapes come for ever."""
        if not self._has_failed:
            LOG.error("pvclock: %s is answered with status 500, and no more is said of it: %r", self.url, error)
        self._has_failed = True


def _response(status: HTTPStatus, page: Page | None = None, *, is_head: bool = False) -> bytes:
    shown = page or Page("text/plain", f"{status.value} {status.phrase}\n".encode())
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {shown.kind}\r\n"
        f"Content-Length: {len(shown.content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if is_head else shown.content)


def _listening(address: Address) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        is_ipv6 = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server((str(place[0]), address.port), family=family, dualstack_ipv6=is_ipv6)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"metrics cannot be served at {address}: {_why(error)}") from None


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "the port is in use; give another, or 0 for any that is free"
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        return "this host does not have that address"
    return str(getattr(error, "strerror", None) or error)
