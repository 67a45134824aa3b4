"""Requests of a front-end on one socket: sent whole and in order, each paired with its own answer, or given up in time.

What belongs here: who waits for which answer, cancellation, time limits, the raw hatch. What does not: what the
requests are (``calls``), what is legal (``protocol.session``).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from vhostuser.channel import Channel, Fds
from vhostuser.protocol import (
    Answer,
    FrontendRequest,
    FrontendSession,
    Outgoing,
    Payload,
    ProtocolFeature,
    RemoteProtocolError,
    RequestRefused,
    VhostUserError,
)
from vhostuser.raw import RawMessage, receive_message

Answered = tuple[Answer, Fds]


class ReplyTimeout(VhostUserError, TimeoutError):
    """The back-end did not answer, or did not even read, in time. The connection stays usable: a late answer is thrown
    away.

    code: the request, None for any message. seconds: how long it was waited for. peer: the socket's name.
    """

    def __init__(self, code: FrontendRequest | None, seconds: float, peer: str, *, sent: bool = True) -> None:
        self.code = code
        self.seconds = seconds
        self.peer = peer
        what = "no message" if code is None else f"no answer to {code.name}"
        if sent:
            super().__init__(f"{what} from {peer} after {seconds:g} s")
        else:
            super().__init__(f"{peer} has not read, so nothing could be sent for {seconds:g} s")


class _Waiter(NamedTuple):
    """Somebody who waits for an answer, or has stopped waiting: the answer then comes all the same."""

    code: FrontendRequest
    answered: asyncio.Future[Answered]


class Requests:
    """The front-end's end of one connection; owns the socket. All methods belong to the loop's thread.

    Several tasks may make requests: one is under way at a time, in the order of the calls. A request that is cancelled
    is sent whole if any of it was, and its answer is read and thrown away when it comes. After a RemoteProtocolError
    nothing more can be asked.

    queue_count: queues that may be addressed. timeout: seconds for each request and its answer, or None: for ever; it
    may be changed between requests. name: what errors call the peer; by default the socket's path.
    """

    def __init__(
        self, sock: socket.socket, queue_count: int = 256, *, timeout: float | None = 30.0, name: str = ""
    ) -> None:
        self.session = FrontendSession(queue_count)
        self.timeout = timeout
        self.name = name or _name(sock)
        self._channel = Channel(sock)
        self._turn = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._reader: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def lost(self) -> asyncio.Event:
        """Set when the back-end has closed the connection; what it sent before may still be unread."""
        return self._channel.lost

    def close(self) -> None:
        """Closes the connection; the back-end sees the end of the stream. Who waits gets RemoteProtocolError."""
        for task in self._tasks:
            task.cancel()
        self._channel.close()
        self._fail("the connection was closed on this side")

    # ---- requests

    async def request(
        self,
        code: FrontendRequest,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool | None = None,
    ) -> tuple[Payload | None, Fds]:
        """Sends a request and waits for its answer, if one comes: its payload and descriptors, which are then the
        caller's.

        fds: sent along, and still the caller's. need_reply: ask for an acknowledgement; None: wherever REPLY_ACK was
        negotiated and the message has no reply of its own (libvhost-user answers those with wrong flags when asked for
        both). Raises RequestRefused when the back-end says no, RemoteProtocolError when it breaks the protocol or
        closes, ReplyTimeout, LocalProtocolError when the request is not allowed now, ConnectionError when it cannot be
        sent.
        """
        async with self._turn:
            if self._failure:
                raise RemoteProtocolError(code, self._failure)
            if need_reply is None:
                need_reply = self.session.has(ProtocolFeature.REPLY_ACK) and not self.session.replies(code)
            outgoing = self.session.request(code, payload, fds, need_reply)
            waiter = self._expect(code) if self.session.outstanding > len(self._waiting) else None
            answered = await self._exchange(code, outgoing, waiter)
        if answered is None:
            return None, Fds()
        answer, came = answered
        if answer.refused:
            came.close()
            raise RequestRefused(f"{self.name} refused {code.name}")
        return answer.payload, came

    async def _exchange(self, code: FrontendRequest, outgoing: Outgoing, waiter: _Waiter | None) -> Answered | None:
        sent = False
        try:
            async with asyncio.timeout(self.timeout):
                await self._send(outgoing.data, outgoing.fds)
                sent = True
                return await waiter.answered if waiter is not None else None
        except BaseException as error:
            if waiter is not None:
                _abandon(waiter.answered)
            if not isinstance(error, TimeoutError):
                raise
            raise ReplyTimeout(code, self.timeout or 0.0, self.name, sent=sent) from None

    def _expect(self, code: FrontendRequest) -> _Waiter:
        waiter = _Waiter(code, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        if self._reader is None:
            self._reader = self._start(self._read())
        return waiter

    # ---- reading

    async def _read(self) -> None:
        """Runs while answers are to come, so that the raw hatch can read at other times."""
        try:
            while self._waiting:
                answer, came = await self._next_answer(self._waiting[0].code)
                waiter = self._waiting.popleft()
                if waiter.answered.done():
                    came.close()
                else:
                    waiter.answered.set_result((answer, came))
        except RemoteProtocolError as error:
            self._fail(error.reason, error)
        finally:
            self._reader = None

    async def _next_answer(self, code: FrontendRequest) -> Answered:
        first: Fds | None = None
        while True:
            data, came = await self._channel.receive(self.session.wanted)
            if not data:
                raise RemoteProtocolError(code, f"{self.name} closed the connection")
            first = came if first is None else first
            try:
                answer = self.session.receive(data, came)
            except BaseException:
                came.close()
                first.close()
                raise
            if answer is not None:
                return answer, first

    def _fail(self, reason: str, error: RemoteProtocolError | None = None) -> None:
        """Nothing can be asked any more: both ends no longer agree where a message begins, or one of them is gone."""
        self._failure = self._failure or reason
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.answered.done():
                waiter.answered.set_exception(error or RemoteProtocolError(waiter.code, reason))

    # ---- sending

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        # The caller may be cancelled, and close its descriptors, before they are on their way.
        held = Fds(os.dup(fd) for fd in fds)
        writing = self._start(self._write(data, tuple(held)))
        writing.add_done_callback(lambda _: held.close())
        await asyncio.shield(writing)

    async def _write(self, data: bytes, fds: tuple[int, ...]) -> None:
        async with self._writing:
            await self._channel.send(data, fds)

    def _start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller has seen it, or was cancelled

    # ---- the raw hatch

    async def send_raw(self, data: bytes | Sequence[bytes], fds: Sequence[int] = ()) -> None:
        """Sends any bytes, of several pieces each by a write of its own, and descriptors with the first of them.

        The session is not told. Header(request, flags, size).pack() makes a header of any content. Raises
        ConnectionError.
        """
        for number, piece in enumerate([data] if isinstance(data, bytes) else data):
            await self._send(piece, () if number else fds)

    async def receive_raw(self, count: int) -> tuple[bytes, Fds]:
        """Up to ``count`` bytes and what came with them, which is the caller's; no bytes at the end of the stream.

        Raises RuntimeError while an answer is to come, which these bytes would be.
        """
        self._check_idle()
        return await self._channel.receive(count)

    async def receive_message(self) -> RawMessage | None:
        """The next message, whatever it is; None at the end of the stream. Raises ReplyTimeout, else as receive_raw."""
        self._check_idle()
        try:
            async with asyncio.timeout(self.timeout):
                return await receive_message(self._channel)
        except TimeoutError:
            assert self.timeout is not None
            raise ReplyTimeout(None, self.timeout, self.name) from None

    def _check_idle(self) -> None:
        if self._waiting:
            raise RuntimeError(f"an answer to {self._waiting[0].code.name} is to come, which would be read here")


def _abandon(answered: asyncio.Future[Answered]) -> None:
    """Nobody waits any more. What came in this very moment is closed here, what comes later by who reads it."""
    if not answered.cancel() and not answered.cancelled() and answered.exception() is None:
        answered.result()[1].close()


def _name(sock: socket.socket) -> str:
    try:
        path = sock.getpeername() or sock.getsockname()
    except OSError:  # it has hung up; the first request will say so
        path = ""
    return str(path) if path else "the back-end"
