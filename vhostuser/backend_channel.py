"""The back-end's own requests to the front-end, on the socket that SET_BACKEND_REQ_FD brought.

What belongs here: sending in order without making anybody wait, and reading answers. What does not: what is said,
and when a suspended device must be silent (``connection``).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections import deque

from vhostuser.channel import Channel, Fds
from vhostuser.protocol import BackendRequest, Client, Payload, ProtocolError

log = logging.getLogger("vhostuser")


class BackendChannel:
    """Owns ``fd``, a connected Unix stream socket. Control thread only.

    Requests are sent by a task of its own: a front-end that waits in GET_VRING_BASE does not read this socket, and
    the back-end must go on answering it all the same. No acknowledgement is asked for, so no answer is ever waited for.
    """

    def __init__(self, fd: int, session: Client, name: str) -> None:
        """``name`` is the front-end's, for the log. Raises OSError if ``fd`` is no Unix stream socket, or cannot be
        watched; the caller then still owns it.
        """
        sock = socket.socket(fileno=fd)
        try:
            if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
                raise OSError(errno.EPROTOTYPE, "a Unix stream socket was expected")
            self._channel = Channel(sock)
        except OSError:
            sock.detach()
            raise
        self._session = session
        self._name = name
        self._waiting: deque[tuple[BackendRequest, Payload | None]] = deque()
        self._more = asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._write()), asyncio.ensure_future(self._read())]

    @property
    def waiting(self) -> int:
        """How many requests wait for the front-end to read."""
        return len(self._waiting)

    def send(self, code: BackendRequest, payload: Payload | None = None) -> None:
        """Sends a request without waiting for anything; one that waits already is not sent twice."""
        if (code, payload) not in self._waiting:
            self._waiting.append((code, payload))
            self._more.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                while self._waiting:
                    outgoing = self._session.request(*self._waiting.popleft())
                    await self._channel.send(outgoing.data, outgoing.fds)
        except (OSError, ProtocolError) as error:
            log.warning("%s: the back-end channel is closed: %s", self._name, error)
            self._channel.end()

    async def _read(self) -> None:
        """Nothing is expected here: whatever comes ends the channel, descriptors included."""
        fds = Fds()
        try:
            _, fds = await self._channel.receive(self._session.wanted)
        except (OSError, ProtocolError) as error:
            log.warning("%s: the back-end channel is closed: %s", self._name, error)
        finally:
            fds.close()
        self._channel.end()

    def close(self) -> None:
        """Stops sending; what was not sent is dropped."""
        for task in self._tasks:
            task.cancel()
        self._channel.close()
