"""The back-end's own requests to the front-end, on the socket that SET_BACKEND_REQ_FD brought.

What belongs here: sending in order without making anybody wait, and reading answers. What does not: what is said,
and when a suspended device must be silent (``connection``).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket

from vhostuser.channel import Channel, Fds
from vhostuser.protocol import BackendRequest, Client, Payload, ProtocolError

log = logging.getLogger("vhostuser")


class BackendChannel:
    """Owns ``fd``, a connected Unix stream socket. Control thread only.

    Requests are sent by a task of its own: a front-end that waits in GET_VRING_BASE does not read this socket, and
    the back-end must go on answering it all the same. No acknowledgement is asked for, so no answer is ever waited for.
    """

    def __init__(self, fd: int, session: Client) -> None:
        """Raises OSError if ``fd`` is no Unix stream socket; the caller then still owns it."""
        sock = socket.socket(fileno=fd)
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            sock.detach()
            raise OSError(errno.EPROTOTYPE, "a Unix stream socket was expected")
        self._session = session
        self._channel = Channel(sock)
        self._queue: asyncio.Queue[tuple[BackendRequest, Payload | None]] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._serve())

    def send(self, code: BackendRequest, payload: Payload | None = None) -> None:
        """Sends a request without waiting for anything."""
        self._queue.put_nowait((code, payload))

    async def _serve(self) -> None:
        reading = asyncio.ensure_future(self._read())
        try:
            while True:
                outgoing = self._session.request(*await self._queue.get())
                await self._channel.send(outgoing.data, outgoing.fds)
        except (ConnectionError, ProtocolError) as error:
            log.warning("the back-end channel is closed: %s", error)
        finally:
            reading.cancel()
            self._channel.close()

    async def _read(self) -> None:
        """Nothing is expected here: whatever comes ends the channel, descriptors included."""
        fds = Fds()
        try:
            _, fds = await self._channel.receive(self._session.wanted)
        finally:
            fds.close()
            self._channel.end()

    def close(self) -> None:
        """Stops sending; what was not sent is dropped."""
        self._task.cancel()
