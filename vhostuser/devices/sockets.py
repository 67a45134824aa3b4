"""Ends of a network device that are sockets.

What belongs here: connecting, accepting, and doing so again. What does not: frames (``native/end_stream.c``); socket
files and who may reach them, which are the caller's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from typing import ClassVar

from vhostuser._native import ffi, lib
from vhostuser.devices.ends import End, EndError, made

log = logging.getLogger("vhostuser")


class Stream(End):
    """One connection of a Unix stream socket, over which each frame goes behind its length (4 bytes, big endian).

    That is what QEMU's ``-netdev stream`` and passt speak. The connection is made again whenever the other side has
    gone; until then what the guest sends is refused. Offloads cannot be told over it, so none are offered.
    """

    kind = "stream"
    linked = False
    PAUSES: ClassVar = (0.1, 5.0)
    """Seconds between two attempts: the first pause, which doubles, and the longest one. After a connection that lasted
    longer than that the first pause comes again."""

    def __init__(self, path: str, pairs: int = 1) -> None:
        """Connects to ``path`` once it is attended. Raises EndError."""
        if pairs != 1:
            raise EndError(f"stream {path}: one connection is one queue pair, not {pairs}")
        self.pairs = 1
        self._path = path
        self._listener: socket.socket | None = None
        self._failure = 0
        error = ffi.new("int *")
        self.native = ffi.gc(made(lib.vu_end_stream(error), error, str(self)), lib.vu_end_free)

    def listen(self, listener: socket.socket) -> None:
        """Connects no more, but takes one connection after the other from a listening socket, ours from here."""
        listener.setblocking(False)
        self._listener = listener

    async def attend(self, linked: Callable[[bool], None]) -> None:
        pause, longest = self.PAUSES
        while True:
            began = time.monotonic()
            sock = await self._accept(self._listener) if self._listener else self._connect()
            if sock is not None:
                await self._use(sock.detach(), linked)
            if time.monotonic() - began > longest:
                pause = self.PAUSES[0]
            await asyncio.sleep(pause)  # in which the receiver may read what the other side said last
            pause = min(2 * pause, longest)

    async def _accept(self, listener: socket.socket) -> socket.socket:
        return (await asyncio.get_running_loop().sock_accept(listener))[0]

    def _connect(self) -> socket.socket | None:
        """Not by the loop, which takes a full backlog for a connection that is being made."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        code = sock.connect_ex(self._path)
        if code not in (0, self._failure):
            log.info("%s: %s; trying again and again", self, os.strerror(code))
        self._failure = code
        if not code:
            return sock
        sock.close()
        return None

    async def _use(self, fd: int, linked: Callable[[bool], None]) -> None:
        if lib.vu_stream_attach(self.native, fd) < 0:
            log.warning("%s: not used: %s", self, os.strerror(ffi.errno))
            return
        linked(True)
        await _hung_up(fd)
        linked(False)
        length = lib.vu_stream_refused(self.native)
        if length >= 0:
            bounds = f"{lib.VU_FRAME_LEAST} to {lib.VU_FRAME_MOST}"
            log.warning("%s: closed for a frame of %d bytes, %s are possible", self, length, bounds)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def __str__(self) -> str:
        return f"stream {self._path}"


class Datagram(End):
    """Datagrams of a Unix socket, one frame each: QEMU's ``-netdev dgram``. Who is at the other side is asked with each
    frame, so that it may go and come again. No offloads, as with ``Stream``."""

    kind = "dgram"

    def __init__(self, sock: socket.socket, peer: str, pairs: int = 1) -> None:
        """``sock`` is bound, and ours from here; ``peer`` is the path of the other side's. Raises EndError."""
        if pairs != 1:
            raise EndError(f"dgram {peer}: one socket is one queue pair, not {pairs}")
        self.pairs = 1
        self._peer = peer
        sock.setblocking(False)
        gauge = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sockets = (sock, gauge)
        error = ffi.new("int *")
        native = lib.vu_end_datagram(sock.fileno(), gauge.fileno(), os.fsencode(peer), error)
        self.native = ffi.gc(made(native, error, str(self)), lib.vu_end_free)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    def __str__(self) -> str:
        return f"dgram {self._peer}"


async def _hung_up(fd: int) -> None:
    """Waits until one of both sides has ended the connection, whatever is still to be read from it."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    with select.epoll() as watch:
        watch.register(fd, select.EPOLLRDHUP)
        loop.add_reader(watch.fileno(), over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(watch.fileno())
