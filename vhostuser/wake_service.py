"""The back-end's end of the wake channel: a side socket on which a front-end says whom to wake.

What belongs here: serving that socket on the control loop. What does not: the messages (``protocol.wake``), translation
and the userfaultfd (``postcopy``), making socket files (``tools.endpoint``).

A wake is an ioctl that neither touches guest memory nor waits, so it is issued where the message is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from functools import partial

from vhostuser import measures
from vhostuser.metrics import Sample
from vhostuser.protocol import WAKE_MAX_SIZE, RemoteProtocolError, Wake, WakeAck, WakeHello, WakeServer

log = logging.getLogger("vhostuser")

# After an accept that failed, in seconds.
_RETRY = 0.1


class WakeService:
    """Serves the wake channel to one front-end after another; the others wait. Control thread only.

    ``wake`` fulfils a message; it must not block.
    """

    def __init__(self, wake: Callable[[Wake], WakeAck]) -> None:
        self._wake = wake
        self._serving = False
        self._messages = 0
        self._issued = 0

    async def listen(self, listener: socket.socket) -> None:
        """Accepts front-ends on a bound and listening SOCK_SEQPACKET socket, which stays the caller's, for ever."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.error("wake channel: no front-end could be accepted: %s", error.strerror)
                await asyncio.sleep(_RETRY)
                continue
            await self.serve(sock)

    async def serve(self, sock: socket.socket) -> None:
        """Serves the front-end at the other end of a connected socket until it has gone; closes the socket."""
        log.info("wake channel: a front-end is here")
        self._serving = True
        peer = _Peer(sock, self._fulfil)
        try:
            await peer.gone.wait()
        finally:
            self._serving = False
            peer.close()
            log.info("wake channel: the front-end has gone")

    def _fulfil(self, wake: Wake) -> WakeAck:
        ack = self._wake(wake)
        self._messages += 1
        self._issued += ack.issued
        return ack

    def measure(self) -> Iterator[Sample]:
        """Samples of what was done."""
        yield measures.WAKE_PEERS.sample(int(self._serving))
        yield measures.WAKES.sample(self._messages)
        yield measures.WOKEN.sample(self._issued)


class _Peer:
    """A front-end on the channel; owns its socket.

    A datagram is answered in the turn of the loop that brings it, without a task: that is a thread's time asleep. One
    datagram a turn, so that a flood leaves everybody else their turns.
    """

    def __init__(self, sock: socket.socket, wake: Callable[[Wake], WakeAck]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._wake = wake
        self._session = WakeServer()
        self._loop = asyncio.get_running_loop()
        self.gone = asyncio.Event()
        self._loop.add_reader(sock, self._read)

    def close(self) -> None:
        """Closes the socket; the watching stops first, or the loop would spin on a number that is used again."""
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()

    def _read(self) -> None:
        try:
            # Without room for ancillary data: the kernel closes descriptors that come along.
            datagram = self._sock.recv(WAKE_MAX_SIZE + 1)
            # An empty datagram looks like the end, and no honest front-end sends one.
            if datagram:
                self._send(self._answer(datagram))
                return
        except BlockingIOError:
            return
        except RemoteProtocolError as error:
            log.error("%s; the front-end is cut off", error.reason)
            with contextlib.suppress(OSError):
                self._sock.send(error.answer, socket.MSG_NOSIGNAL)
        except ConnectionError:
            pass
        except OSError as error:
            log.error("wake channel: the front-end is cut off: %s", error.strerror)
        self._end()

    def _answer(self, datagram: bytes) -> bytes:
        message = self._session.receive(datagram)
        return message.pack() if isinstance(message, WakeHello) else self._wake(message).pack()

    def _send(self, data: bytes) -> None:
        """When there is no room, nothing more is read until there is: whoever reads no answers is not served."""
        try:
            self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._loop.remove_reader(self._sock)
            self._loop.add_writer(self._sock, partial(self._room, data))

    def _room(self, data: bytes) -> None:
        self._loop.remove_writer(self._sock)
        self._loop.add_reader(self._sock, self._read)
        try:
            self._send(data)
        except OSError:
            self._end()

    def _end(self) -> None:
        self._loop.remove_reader(self._sock)
        self.gone.set()
