"""One connected Unix socket on an event loop: exact reads with their descriptors, whole writes, loss.

What belongs here: bytes and descriptors, and who closes which. What does not: what the bytes mean (``protocol``),
and what is done about it (``connection``).

asyncio's streams and transports drop descriptors without a word, and uvloop has no ``sock_recvmsg``; so the socket
is non-blocking and is watched with ``add_reader``.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import select
import socket
from collections.abc import Iterable, Iterator

from vhostuser.protocol import RemoteProtocolError

# The kernel passes 253 descriptors in one message at most (SCM_MAX_FD). With room for all of them a peer that sends
# too many is refused by the message's own rule; MSG_CTRUNC is then left to mean that our descriptor table is full.
_MOST_FDS = 253
_INT = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(_MOST_FDS * _INT)
_CTRUNC = int(socket.MSG_CTRUNC)  # an enumeration's own "&" takes longer than the system call


class Fds:
    """The descriptors that came with one message; owns those that nobody has taken.

    Close it when the message has been dealt with: what was not taken is closed then.
    """

    __slots__ = ("_fds",)

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[int]:
        return iter(self._fds)

    def __contains__(self, fd: object) -> bool:
        return fd in self._fds

    def __getitem__(self, index: int) -> int:
        """Look at a descriptor without taking it."""
        return self._fds[index]

    def take(self) -> int:
        """The first descriptor; from now on the caller closes it."""
        return self._fds.pop(0)

    def extend(self, other: Fds) -> None:
        """Takes over everything that ``other`` still owns."""
        self._fds += other._fds
        other._fds = []

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


class Channel:
    """A connected ``AF_UNIX`` stream socket; owns it. All methods belong to the loop's thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # who waits in ``receive``
        self._watched = False
        self._lost = asyncio.Event()
        # While a request waits for a ring nobody reads the socket, and add_reader cannot ask for EPOLLRDHUP; an
        # epoll descriptor is itself readable when it has events, on asyncio and on uvloop.
        self._hangup = select.epoll()  # closes itself when what follows raises
        self._hangup.register(sock, select.EPOLLRDHUP)
        self._loop.add_reader(self._hangup.fileno(), self._on_hangup)

    def _on_hangup(self) -> None:
        self._loop.remove_reader(self._hangup.fileno())
        self._lost.set()

    @property
    def lost(self) -> asyncio.Event:
        """Set when the peer has gone; bytes that it sent before may still be unread."""
        return self._lost

    async def receive(self, wanted: int) -> tuple[bytes, Fds]:
        """The next 1 to ``wanted`` bytes and the descriptors that came with them; no bytes at the end of the stream.

        Never more than ``wanted``: the kernel glues bytes without descriptors to later ones that have some, and then
        nobody could tell whose they are.

        Raises RemoteProtocolError if descriptors were lost because our table of them is full.
        """
        while (got := self.at_hand(wanted)) is None:
            await self._readable()
        return got

    async def _readable(self) -> None:
        """Waits until there is something to read. The socket stays watched, or every message would cost two system
        calls for it; until something comes that nobody waits for, which would wake the loop again and again."""
        if not self._watched:
            self._loop.add_reader(self._sock, self._on_readable)
            self._watched = True
        self._reader = self._loop.create_future()
        await self._reader

    def _on_readable(self) -> None:
        if self._reader is None or self._reader.done():
            self._loop.remove_reader(self._sock)
            self._watched = False
        else:
            self._reader.set_result(None)

    def at_hand(self, wanted: int) -> tuple[bytes, Fds] | None:
        """What ``receive`` would return without waiting; None if it would wait."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(wanted, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b"", Fds()
        return data, _owned(ancillary, flags)

    async def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Sends all of ``data``, the descriptors with its first byte; the caller keeps and closes them.

        Raises ConnectionError when the peer has gone.
        """
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        rest = memoryview(data)
        while rest:
            try:
                sent = self._sock.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await writable(self._sock)
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # it was hung up on before it was ever accepted
                    raise
                raise ConnectionResetError(error.errno, error.strerror) from None
            else:
                rest, ancillary = rest[sent:], []

    async def room(self) -> None:
        """Waits until a small message can be sent at once, or nothing can be sent any more."""
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        if not poll.poll(0):
            await writable(self._sock)

    def offer(self, data: bytes) -> None:
        """Sends ``data`` if there is room for it at once: the last words to a peer that may not be listening."""
        with contextlib.suppress(OSError):
            self._sock.send(data, socket.MSG_NOSIGNAL)

    def finish(self) -> None:
        """Sends no more: the peer sees the end of the stream once it has read what was sent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def hung_up(self) -> None:
        """Waits until nothing can pass in either direction: the peer has closed, or both have finished."""
        with select.epoll() as poll:
            poll.register(self._sock, 0)  # a hang-up is reported unasked
            await readable(poll.fileno())

    def end(self) -> None:
        """Shuts the connection down: the reader sees the end of the stream, as does the peer."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket; the watching stops first, or the loop would spin on a number that is used again."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._hangup.fileno())
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._hangup.close()
        self.end()
        self._sock.close()


async def readable(source: int | socket.socket) -> None:
    """Waits until a descriptor or socket has something to read; stops watching it before it returns."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(source, ready.set)
    try:
        await ready.wait()
    finally:
        if isinstance(source, int) or source.fileno() >= 0:  # who closed the socket has ended the watching
            loop.remove_reader(source)


async def writable(source: int | socket.socket) -> None:
    """Waits until a descriptor or socket has room for more; stops watching it before it returns."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(source, ready.set)
    try:
        await ready.wait()
    finally:
        if isinstance(source, int) or source.fileno() >= 0:
            loop.remove_writer(source)


def _owned(ancillary: list[tuple[int, int, bytes]], flags: int) -> Fds:
    fds = Fds()
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % _INT])
            fds.extend(Fds(numbers))
    if flags & _CTRUNC:
        fds.close()
        raise RemoteProtocolError(None, "descriptors were lost on the way: raise the limit on open files (ulimit -n)")
    return fds
