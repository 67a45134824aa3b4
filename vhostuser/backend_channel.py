"""The back-end's own requests to the front-end, on the socket that SET_BACKEND_REQ_FD brought.

What belongs here: sending in order without making anybody wait, pairing answers, what ends the channel. What does not:
when something may be sent, and how long its sender waits (``announcements``).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhostuser.channel import Channel, Fds
from vhostuser.protocol import (
    Answer,
    BackendRequest,
    Client,
    Empty,
    LocalProtocolError,
    Payload,
    ProtocolError,
    ProtocolFeature,
    RequestRefused,
)

log = logging.getLogger("vhostuser")

MOST_WAITING = 256
"""Requests that wait for the front-end to read, or to answer; further ones are refused."""

ANSWER_WITHIN = 10.0
"""Seconds after which a front-end that owes an answer has lost the channel."""

Answered = tuple[Payload, Fds]
"""An answer that says yes, and its descriptors, which are the receiver's to close."""


@dataclass(eq=False)
class _Request:
    """Waits to be sent. fds: ours, until then. answered: cancelled where nobody wants an answer."""

    code: BackendRequest
    payload: Payload | None
    fds: Fds
    answered: asyncio.Future[Answered]


class BackendChannel:
    """Owns ``fd``, a connected Unix stream socket. Control thread only.

    Requests are sent by a task of its own: a front-end that waits in GET_VRING_BASE does not read this socket, and the
    back-end must go on answering it all the same. A front-end that answers wrongly, or not in ``ANSWER_WITHIN``, has
    lost this channel, with one line in the log, and nothing else. While it ``waits`` for us that time does not pass:
    it may answer nothing before it has its own answer.
    """

    def __init__(
        self, fd: int, session: Client, has: Callable[[ProtocolFeature], bool], name: str, waits: Callable[[], bool]
    ) -> None:
        """``has``: was it negotiated? ``name`` is the front-end's, for the log. Raises OSError if ``fd`` is no Unix
        stream socket, or cannot be watched; the caller then still owns it.
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
        self._has = has
        self._name = name
        self._front_end_waits = waits
        self._failure = ""
        self._waiting: deque[_Request] = deque()
        self._sent: deque[asyncio.Future[Answered]] = deque()
        self._more = asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._write()), asyncio.ensure_future(self._read())]

    @property
    def waiting(self) -> int:
        """How many requests wait for the front-end to read."""
        return len(self._waiting)

    # ---- asking

    def send(self, code: BackendRequest, payload: Payload | None = None) -> bool:
        """Sends a request without waiting for anything; one that waits already is not sent twice.

        False where it cannot be sent, because the channel is closed or the front-end has long not read.
        """
        if any((each.code, each.payload) == (code, payload) and each.answered.done() for each in self._waiting):
            return True
        if self._obstacle():
            return False
        self._queue(code, payload, Fds()).cancel()
        return True

    def request(
        self, code: BackendRequest, payload: Payload | None = None, fds: Sequence[int] = ()
    ) -> asyncio.Future[Answered]:
        """Sends a request with its descriptors, which stay the caller's; the answer, when it comes.

        An answer is asked for where the message has one of its own or REPLY_ACK was negotiated; otherwise the future is
        done, with an empty payload, when the request is sent. It fails with RequestRefused where the front-end says no,
        and where it cannot be asked (any more). Who cancels it waits no longer; what comes then is closed.
        """
        if obstacle := self._obstacle():
            raise RequestRefused(f"{code.name}: {obstacle}")
        answered = self._queue(code, payload, _copies(code, fds))
        self._time(code, answered)
        return answered

    def _obstacle(self) -> str:
        if not self._failure and len(self._waiting) + len(self._sent) >= MOST_WAITING:
            return f"{MOST_WAITING} requests wait for the front-end already"
        return self._failure

    def _queue(self, code: BackendRequest, payload: Payload | None, fds: Fds) -> asyncio.Future[Answered]:
        answered: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(code, payload, fds, answered))
        self._more.set()
        return answered

    def _time(self, code: BackendRequest, answered: asyncio.Future[Answered]) -> None:
        timer = asyncio.get_running_loop().call_later(ANSWER_WITHIN, self._overdue, code, answered)
        answered.add_done_callback(lambda _: timer.cancel())

    def _overdue(self, code: BackendRequest, answered: asyncio.Future[Answered]) -> None:
        if self._front_end_waits():
            self._time(code, answered)
        else:
            self._fail(f"the front-end has not answered {code.name} for {ANSWER_WITHIN:g} s")

    def drop_waiting(self, reason: str) -> None:
        """What was not sent yet is not sent any more."""
        while self._waiting:
            request = self._waiting.popleft()
            request.fds.close()
            _refuse(request.answered, f"{request.code.name}: {reason}")

    # ---- sending

    async def _write(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                while self._waiting:
                    # Nothing is taken from the queue before it can go: a device that is suspended takes it back.
                    await self._channel.room()
                    if self._waiting:
                        await self._send(self._waiting.popleft())
        except OSError as error:
            self._fail(error.strerror or str(error))

    async def _send(self, request: _Request) -> None:
        code, answered = request.code, request.answered
        unasked = answered.done()
        need_reply = not unasked and not self._session.replies(code) and self._has(ProtocolFeature.REPLY_ACK)
        try:
            outgoing = self._session.request(code, request.payload, tuple(request.fds), need_reply)
            if need_reply or self._session.replies(code):
                self._sent.append(answered)
                await self._channel.send(outgoing.data, outgoing.fds)
            else:
                await self._channel.send(outgoing.data, outgoing.fds)
                _succeed(answered, Empty(), Fds())
        except LocalProtocolError as error:
            # Our own device's mistake, or features that were negotiated anew: no reason to lose the channel.
            _refuse(answered, str(error))
            if unasked:
                log.warning("%s: not sent on the back-end channel: %s", self._name, error)
        except BaseException:
            _refuse(answered, f"{code.name}: {self._failure or 'it could not be sent'}")
            raise
        finally:
            request.fds.close()

    # ---- reading

    async def _read(self) -> None:
        try:
            while (answer := await self._next_answer()) is not None:
                _settle(self._sent.popleft(), *answer)
            self._session.eof()
            self._fail("")
        except (OSError, ProtocolError) as error:
            self._fail(str(error))

    async def _next_answer(self) -> tuple[Answer, Fds] | None:
        """The next answer, with its descriptors; None at the end of the stream. Anything else ends the channel."""
        first: Fds | None = None
        try:
            while True:
                data, came = await self._channel.receive(self._session.wanted)
                if not data:
                    return None
                # The first piece's are the answer's; the session rejects any that come later.
                first = came if first is None else first
                try:
                    answer = self._session.receive(data, came)
                except BaseException:
                    came.close()
                    raise
                if answer is not None:
                    return answer, first
        except BaseException:
            if first is not None:
                first.close()
            raise

    # ---- the end

    def _fail(self, reason: str) -> None:
        """Nothing can be asked any more; without a reason the front-end has closed its end in good order."""
        if self._failure:
            return
        self._failure = f"the back-end channel is closed: {reason or 'by the front-end'}"
        log.log(logging.WARNING if reason else logging.INFO, "%s: %s", self._name, self._failure)
        self._channel.end()
        self.drop_waiting(self._failure)
        while self._sent:
            _refuse(self._sent.popleft(), self._failure)

    def close(self) -> None:
        """Closes the socket; what was not sent or not answered is refused."""
        for task in self._tasks:
            task.cancel()
        self._failure = self._failure or "the back-end channel is closed"
        self.drop_waiting(self._failure)
        while self._sent:
            _refuse(self._sent.popleft(), self._failure)
        self._channel.close()


def _copies(code: BackendRequest, fds: Sequence[int]) -> Fds:
    """Descriptors of our own: the caller may close its before they are on their way. Raises RequestRefused."""
    own = Fds()
    try:
        for fd in fds:
            own.extend(Fds([os.dup(fd)]))
    except OSError as error:
        own.close()
        raise RequestRefused(f"{code.name}: its descriptor cannot be sent: {error.strerror}") from None
    return own


def _refuse(answered: asyncio.Future[Answered], reason: str) -> None:
    if not answered.done():
        answered.set_exception(RequestRefused(reason))
        answered.exception()  # whether anybody looks at it or not


def _succeed(answered: asyncio.Future[Answered], payload: Payload, fds: Fds) -> None:
    if answered.done():  # nobody waits any more
        fds.close()
    else:
        answered.set_result((payload, fds))


def _settle(answered: asyncio.Future[Answered], answer: Answer, fds: Fds) -> None:
    if answer.refused:
        fds.close()
        _refuse(answered, f"the front-end refused {answer.code.name}")
    else:
        _succeed(answered, answer.payload, fds)
