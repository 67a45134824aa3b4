"""The front-end's end of the wake channel: names guest ranges, the back-end wakes its own threads that wait in them.

What belongs here: sending WAKEs and waiting for their acknowledgement, on a loop or on a thread. What does not: the
messages (``protocol.wake``), who is to be woken when (``faultserver``).

A channel is to one back-end; where several share the memory there is one to each.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from vhostuser.channel import readable
from vhostuser.protocol import WAKE_MAX_SIZE, RemoteProtocolError, Wake, WakeClient, WakeHello

PATIENCE = 5.0
"""Seconds until a back-end that does not answer counts as lost, unless the caller says otherwise."""


class WakeChannel:
    """For tasks of one loop, who take turns. Owns its socket.

    After an exception of ``wake`` other than LocalProtocolError nobody knows whether its wakes were issued: close the
    channel and wake by UFFDIO_WAKE on the back-end's userfaultfd, which works all the same.
    """

    def __init__(self, sock: socket.socket, *, patience: float = PATIENCE) -> None:
        """Takes over ``sock``, a connected SOCK_SEQPACKET socket. ``hello`` comes first.

        patience: how long an answer may take, in seconds.
        """
        sock.setblocking(False)
        self._conversation = _Conversation(sock)
        self._patience = patience
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(cls, path: str, *, patience: float = PATIENCE) -> Self:
        """Connects to the ``--wake-socket`` of a back-end. Raises OSError, and as ``wake``."""
        channel = cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), patience=patience)
        try:
            await asyncio.get_running_loop().sock_connect(channel._conversation.sock, path)
            await channel.hello()
        except BaseException:
            channel.close()
            raise
        return channel

    async def hello(self) -> None:
        """Begins; once. Raises as ``wake``."""
        async with self._turn:
            await self._exchange(WakeHello())

    async def wake(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Whoever waits in these (guest address, length) looks again; returns how many bytes of them were mapped.

        That is the sum of the lengths when all of it is mapped, and 0 outside of postcopy. Any alignment, any number of
        ranges: 255 fit into a message, and messages are sent one after the other. Returns when the back-end has issued
        the wakes. Raises TimeoutError, RemoteProtocolError when the back-end has gone or breaks the protocol, and
        LocalProtocolError for a range beyond 64 bits, when nothing was sent.
        """
        issued = 0
        async with self._turn:
            for wake in self._conversation.session.request(ranges):
                issued += await self._exchange(wake)
        return issued

    async def _exchange(self, message: WakeHello | Wake) -> int:
        with _naming(message):
            async with asyncio.timeout(self._patience):
                self._conversation.send(message)
                while True:
                    await readable(self._conversation.sock)
                    issued = self._conversation.answer(message)
                    if issued is not None:
                        return issued

    def close(self) -> None:
        """Hangs up; not while a task waits for an answer. Again: nothing."""
        self._conversation.sock.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BlockingWakeChannel:
    """For threads that place pages: any number of them, who take turns. Otherwise as ``WakeChannel``."""

    def __init__(self, sock: socket.socket, *, patience: float = PATIENCE) -> None:
        """Takes over ``sock``, a connected SOCK_SEQPACKET socket. ``hello`` comes first.

        patience: how long an answer may take, in seconds.
        """
        sock.settimeout(patience)
        self._conversation = _Conversation(sock)
        self._turn = threading.Lock()

    @classmethod
    def connect(cls, path: str, *, patience: float = PATIENCE) -> Self:
        """Connects to the ``--wake-socket`` of a back-end. Raises OSError, and as ``wake``."""
        channel = cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), patience=patience)
        try:
            channel._conversation.sock.connect(path)
            channel.hello()
        except BaseException:
            channel.close()
            raise
        return channel

    def fileno(self) -> int:
        """The socket, which stays ours: for C code that sends and receives on it while nobody calls ``wake``."""
        return self._conversation.sock.fileno()

    @property
    def ranges(self) -> int:
        """How many the back-end takes in a message, 0 before ``hello``; for C code, ``wake`` sees to it itself."""
        return self._conversation.session.ranges

    def hello(self) -> None:
        """Begins; once. Raises as ``wake``."""
        with self._turn:
            self._exchange(WakeHello())

    def wake(self, ranges: Iterable[tuple[int, int]]) -> int:
        """As ``WakeChannel.wake``, blocking."""
        with self._turn:
            return sum(self._exchange(wake) for wake in self._conversation.session.request(ranges))

    def _exchange(self, message: WakeHello | Wake) -> int:
        with _naming(message):
            self._conversation.send(message)
            while (issued := self._conversation.answer(message)) is None:
                pass
            return issued

    def close(self) -> None:
        """Hangs up; not while a thread waits for an answer. Again: nothing."""
        self._conversation.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Conversation:
    """What both forms do with their socket; owns it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.session = WakeClient()

    def send(self, message: WakeHello | Wake) -> None:
        with contextlib.suppress(ConnectionError):  # its last words may be there to be read
            self.sock.send(message.pack(), socket.MSG_NOSIGNAL)

    def answer(self, message: WakeHello | Wake) -> int | None:
        """The bytes issued; None if this answers an earlier message, whose caller was cancelled."""
        ack = self.session.receive(self._datagram())
        if ack is None:
            return 0
        return ack.issued if isinstance(message, Wake) and ack.id == message.id else None

    def _datagram(self) -> bytes:
        try:
            datagram = self.sock.recv(WAKE_MAX_SIZE + 1)
        except ConnectionResetError:  # it closed before it read all, and may have said why
            datagram = self.sock.recv(WAKE_MAX_SIZE + 1)
        if not datagram:
            raise RemoteProtocolError(None, "wake channel: the back-end closed it")
        return datagram


@contextlib.contextmanager
def _naming(message: WakeHello | Wake) -> Iterator[None]:
    """Tells what was waited for in vain."""
    try:
        yield
    except (TimeoutError, BlockingIOError):
        doubt = "HELLO: does another front-end have the channel?" if isinstance(message, WakeHello) else "WAKE"
        raise TimeoutError(f"wake channel: the back-end does not answer {doubt}") from None
