"""The back-end's own requests to the front-end, on the socket that SET_BACKEND_REQ_FD brought.

What belongs here: sending in order without making anybody wait, reading answers, and what is told by it and when. What
does not: what the device does (``connection``).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import deque

from vhostuser.channel import Channel, Fds
from vhostuser.protocol import (
    BackendRequest,
    BackendSession,
    Client,
    Payload,
    ProtocolError,
    ProtocolFeature,
    RequestRefused,
)

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


class Announcements:
    """What one front-end is told of its own accord: that the configuration space has changed. Owns the channel.

    ``name`` is the front-end's, for the log. Control thread only.
    """

    def __init__(self, name: str, session: BackendSession) -> None:
        self._name = name
        self._session = session
        self._channel: BackendChannel | None = None
        self._config_changed = False

    @property
    def channel(self) -> BackendChannel | None:
        """What the front-end gave last."""
        return self._channel

    def take_channel(self, fds: Fds) -> None:
        """SET_BACKEND_REQ_FD: the first of them is the channel, instead of the one before. Raises RequestRefused."""
        fd = fds.take()
        try:
            channel = BackendChannel(fd, self._session.channel(), self._name)
        except OSError as error:
            os.close(fd)
            raise RequestRefused(f"the descriptor cannot be the back-end channel: {error.strerror}") from None
        self.close()
        self._channel = channel

    def config_changed(self) -> None:
        """CONFIG_CHANGE is due."""
        self._config_changed = True
        self.send_due()

    def send_due(self) -> None:
        """CONFIG_CHANGE, once for all changes: a suspended device must not send anything."""
        if not self._config_changed or self._channel is None or self._session.suspended:
            return
        self._config_changed = False
        if self._session.has(ProtocolFeature.CONFIG):
            self._channel.send(BackendRequest.CONFIG_CHANGE_MSG)

    def close(self) -> None:
        """Closes the channel, if there is one; what was not sent is dropped."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None
