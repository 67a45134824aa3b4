"""One end of a connection that follows a script: this message must come, then that is sent.

What belongs here: reading and writing messages as they are told, legal or not. What does not: any behaviour of its own;
no session, no state. ::

    peer = ScriptedPeer(sock)
    await peer.follow(
        Expect(F.GET_FEATURES), Answer(U64(1 << 30)),
        Expect(F.SET_FEATURES, U64(0)),
    )

It plays either role: the back-end expects and answers, the front-end sends and expects answers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from vhostuser.channel import Channel
from vhostuser.protocol import NEED_REPLY, REPLY, VERSION, Header, Payload
from vhostuser.raw import RawMessage, receive_message


@dataclass(frozen=True)
class Expect:
    """The next message must be this. payload: None: any. need_reply: None: asked for or not. fds: how many, None: any.

    reply: it must be an answer to the last message sent.
    """

    code: int
    payload: Payload | None = None
    need_reply: bool | None = None
    fds: int | None = None
    reply: bool = False


@dataclass(frozen=True)
class Send:
    """A message to send. size: what the header claims; None: the truth. flags: added to the version."""

    code: int
    payload: Payload | bytes = b""
    fds: Sequence[int] = ()
    flags: int = 0
    size: int | None = None

    def pack(self) -> bytes:
        """Its bytes."""
        body = self.payload if isinstance(self.payload, bytes) else self.payload.pack()
        return Header(self.code, VERSION | self.flags, len(body) if self.size is None else self.size).pack() + body


@dataclass(frozen=True)
class Answer:
    """An answer to the message that was expected last; its code is that one's."""

    payload: Payload | bytes = b""
    fds: Sequence[int] = ()
    flags: int = REPLY
    size: int | None = None


Step = Expect | Send | Answer


class ScriptFailed(AssertionError):
    """The other end did something else than the script says."""


class ScriptedPeer:
    """One end of a connection. Owns the socket and what came with messages: ``fds`` of the last is open until the next.

    timeout: seconds to wait for an expected message.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = 5.0) -> None:
        self.last: RawMessage | None = None
        """The message that came last."""
        self._channel = Channel(sock)
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def follow(self, *steps: Step) -> None:
        """Does the steps in order. Raises ScriptFailed, naming the step by its number."""
        for number, step in enumerate(steps):
            try:
                await self._step(step)
            except ScriptFailed as failed:
                raise ScriptFailed(f"step {number}, {step}: {failed}") from None

    async def _step(self, step: Step) -> None:
        match step:
            case Expect():
                _compare(step, await self.receive())
            case Send():
                await self.send(step)
            case Answer(payload, fds, flags, size):
                assert self.last is not None, "an Answer follows an Expect"
                await self.send(Send(self.last.header.request, payload, fds, flags, size))

    async def receive(self) -> RawMessage:
        """The next message, whatever it is. Raises ScriptFailed if none comes."""
        message = await self._next()
        if message is None:
            raise ScriptFailed("the connection was closed")
        return message

    async def closed(self) -> None:
        """Waits for the other end to close. Raises ScriptFailed if it says something instead, or does not close."""
        message = await self._next()
        if message is not None:
            raise ScriptFailed(f"{message.header} came where the end of the stream was expected")

    async def _next(self) -> RawMessage | None:
        self._drop()
        try:
            async with asyncio.timeout(self._timeout):
                self.last = await receive_message(self._channel)
        except TimeoutError:
            raise ScriptFailed(f"nothing came for {self._timeout:g} s") from None
        return self.last

    async def send(self, message: Send) -> None:
        """Sends a message."""
        await self._channel.send(message.pack(), tuple(message.fds))

    def close(self) -> None:
        """Closes the socket and the descriptors of the last message."""
        self._drop()
        self._channel.close()

    def _drop(self) -> None:
        if self.last is not None:
            self.last.fds.close()
        self.last = None


def asking(message: Send) -> Send:
    """The same message with need_reply."""
    return replace(message, flags=message.flags | NEED_REPLY)


def _compare(step: Expect, message: RawMessage) -> None:
    header, body, fds = message
    wrong = []
    if header.request != step.code:
        wrong.append(f"request {header.request}")
    if bool(header.flags & REPLY) != step.reply:
        wrong.append("a request" if step.reply else "an answer")
    if step.need_reply not in (None, header.need_reply):
        wrong.append(f"need_reply {header.need_reply}")
    if step.payload is not None and body != step.payload.pack():
        wrong.append(f"payload {body.hex(' ') or 'empty'}")
    if step.fds not in (None, len(fds)):
        wrong.append(f"{len(fds)} descriptors")
    if wrong:
        raise ScriptFailed("came: " + ", ".join(wrong))
