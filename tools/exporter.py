"""Metrics over HTTP: ``GET /metrics`` as Prometheus text, ``GET /metrics.json``.

What belongs here: addresses, and as much of HTTP/1.1 as that takes. What does not: what is measured and how it is
written (``vhostuser.metrics``).

It lives on the control loop, so nothing here may cost much: few clients at once, a short request, a deadline, one
answer a connection. Whoever does not keep to that is hung up on, and the back-end does not notice.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from vhostuser.metrics import Sample, as_json, as_text

log = logging.getLogger("vhostuser")

_CLIENTS: Final = 4
_LONGEST_REQUEST: Final = 8192
# For the whole of a request and its answer, in seconds.
_PATIENCE: Final = 5.0
# After an accept that failed, in seconds.
_RETRY: Final = 0.1
_BACKLOG: Final = 8


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a path, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def local(self) -> bool:
        """Whether no other machine reaches it."""
        return bool(self.path) or ipaddress.ip_address(self.host).is_loopback

    def listen(self) -> socket.socket:
        """A socket that listens at host and port. Raises OSError."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)


def address(text: str) -> Address:
    """An argparse type: unix:PATH or HOST:PORT; no name is looked up."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        return Address(path=text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    host = {"localhost": "127.0.0.1"}.get(host, host.removeprefix("[").removesuffix("]"))
    try:
        ipaddress.ip_address(host)
        if not colon or not port.isdecimal() or int(port) > 0xFFFF:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither unix:PATH nor HOST:PORT with a number for the host, such as 127.0.0.1:9780"
        ) from None
    return Address(host=host, port=int(port))


class Exporter:
    """Answers with what ``measure`` gives at that moment. Control thread only."""

    def __init__(self, measure: Callable[[], Iterable[Sample]]) -> None:
        self._measure = measure

    async def listen(self, listener: socket.socket) -> None:
        """Serves clients on a bound and listening stream socket, which stays the caller's, for ever."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(_CLIENTS)
        async with asyncio.TaskGroup() as group:
            while True:
                await room.acquire()
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:
                    log.debug("metrics: no client could be accepted: %s", error.strerror)
                    room.release()
                    await asyncio.sleep(_RETRY)
                    continue
                group.create_task(self.serve(sock)).add_done_callback(lambda _: room.release())

    async def serve(self, sock: socket.socket) -> None:
        """Answers one request on a connected socket and closes it. Never raises for what the client does."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_PATIENCE):
                head = await _head(loop, sock)
                if head:
                    await loop.sock_sendall(sock, self.answer(head))
        except (OSError, TimeoutError):
            pass
        finally:
            sock.close()

    def answer(self, head: bytes) -> bytes:
        """The whole answer to the head of a request."""
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not head.endswith(b"\r\n\r\n") or not version.startswith(b"HTTP/1."):
            return _answer("400 Bad Request", "this is not HTTP/1.1\n")
        if method not in (b"GET", b"HEAD"):
            return _answer("405 Method Not Allowed", "GET or HEAD\n", "Allow: GET, HEAD")
        answer = self._resource(target.partition(b"?")[0])
        return answer if method == b"GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    def _resource(self, path: bytes) -> bytes:
        if path == b"/metrics":
            return _answer("200 OK", as_text(self._measure()), kind="text/plain; version=0.0.4; charset=utf-8")
        if path == b"/metrics.json":
            return _answer("200 OK", json.dumps(as_json(self._measure())) + "\n", kind="application/json")
        return _answer("404 Not Found", "there are /metrics and /metrics.json\n")


async def _head(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    """Up to the empty line behind the headers, or what there was of it; empty if nobody asks."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _LONGEST_REQUEST:
        piece = await loop.sock_recv(sock, _LONGEST_REQUEST - len(head))
        if not piece:
            break
        head += piece
    end = head.find(b"\r\n\r\n")
    return head if end < 0 else head[: end + 4]


def _answer(status: str, body: str, *headers: str, kind: str = "text/plain; charset=utf-8") -> bytes:
    content = body.encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + content
