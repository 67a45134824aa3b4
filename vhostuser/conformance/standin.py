"""The back-end that a front-end under test meets: right in everything, but for one thing that a case asks for.

What belongs here: one connection, what is answered, what is done wrong on purpose, and what came. What does not: rules
(``frontend_cases``), whose connection it is (``caller``).

It serves no requests of the rings: a front-end has to set a device up, notify it and stop it whether its requests
come back or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vhostuser.channel import Channel, Fds
from vhostuser.conformance.offer import Offer
from vhostuser.conformance.transcript import Given, Heard, Transcript
from vhostuser.protocol import (
    FRONTEND,
    REPLY,
    SHMEM_REGIONS,
    U64,
    VERSION,
    Config,
    FrontendRequest,
    Header,
    Inflight,
    Payload,
    ProtocolFeature,
    RemoteProtocolError,
    ShmemConfig,
    VringState,
)
from vhostuser.protocol.witness import LARGEST_BODY, Side, Wire, Witness
from vhostuser.raw import RawMessage, receive_message

F, P = FrontendRequest, ProtocolFeature

SHMEM_SIZE = 1 << 20
"""Bytes of the one shared memory region that the device has where SHMEM is offered: number 1."""

_INFLIGHT = 64 << 10


@dataclass(frozen=True)
class Answer:
    """What goes back for a request: the payload and one descriptor at most, which the sender closes."""

    payload: Payload
    fd: int = -1


class Twist:
    """One thing done wrong, once: at the first request of this code, on whichever connection. done: set then.

    watch: what the front-end does in the end matters, and not only what it does next.
    """

    def __init__(self, code: FrontendRequest, act: Act, *, watch: bool = False) -> None:
        self.code = code
        self.act = act
        self.watch = watch
        self.done = asyncio.Event()


Act = Callable[["StandIn", Heard, Answer | None], Awaitable[bool]]
"""Does something in place of the right answer, which it is given. True: send the right answer then."""


class StandIn:
    """The back-end's end of one connection. Owns the socket and what came with messages.

    news: set whenever something happened: a message, the end, a twist.
    """

    def __init__(self, sock: socket.socket, offer: Offer, name: str, twist: Twist | None, news: asyncio.Event) -> None:
        self.transcript = Transcript(name, offer.features, offer.protocol, offer.queues)
        self.closed = False
        """The connection has ended, at either end."""
        self.twisted_at: int | None = None
        """How many requests had come when the twist was done on this connection."""
        self.acted = asyncio.Event()
        self.asked = False
        """An answer was due when the twist was done."""
        self.gone = False
        """We have hung up."""
        self.backend_socket: socket.socket | None = None
        self._offer = offer
        self._twist = twist
        self._news = news
        self._channel = Channel(sock)
        self._witness = Witness()
        self._bases: dict[int, int] = {}
        self._status = 0
        self._protocol = 0
        self._held: list[Fds] = []
        self._serving = asyncio.ensure_future(self._serve())

    @property
    def heard(self) -> list[Heard]:
        """Every request up to now."""
        return self.transcript.heard

    @property
    def after(self) -> list[Heard]:
        """What came after the twist."""
        return [] if self.twisted_at is None else self.heard[self.twisted_at :]

    def close(self) -> None:
        """Closes the socket and everything that came. Again: nothing."""
        self._serving.cancel()
        self._channel.close()
        self.closed = True
        while self._held:
            self._held.pop().close()
        if self.backend_socket is not None:
            self.backend_socket.close()
        self._news.set()

    # ---- serving

    async def _serve(self) -> None:
        try:
            while not self.gone and (message := await receive_message(self._channel)) is not None:
                await self._take(message)
            self.transcript.ended = not self.gone
        except (ConnectionError, RemoteProtocolError):
            self.transcript.ended = True
        finally:
            self.closed = True
            self._news.set()

    async def _take(self, message: RawMessage) -> None:
        header, body, fds = message
        self._held.append(fds)
        given = tuple(map(describe, fds))
        told = self._witness.hear(Wire.MAIN, Side.FRONTEND, header.pack() + body[:LARGEST_BODY], tuple(fds))
        heard = Heard(told, given)
        self._keep(heard, fds)
        answer = self._answer(heard) if self._due(heard) else None
        try:
            data = b""
            if answer is not None:
                heard, data = self._settle(heard, answer)
            self.transcript.add(heard)
            if await self._twisted(heard, answer) and answer is not None:
                await self.send(data, answer.fd)
        finally:
            if answer is not None and answer.fd >= 0:
                os.close(answer.fd)
            self._news.set()

    async def _twisted(self, heard: Heard, answer: Answer | None) -> bool:
        """Is the right answer still to be sent?"""
        twist = self._twist
        if twist is None or twist.done.is_set() or heard.code != twist.code:
            return True
        twist.done.set()
        self.twisted_at, self.asked = len(self.heard), answer is not None
        self._news.set()
        try:
            return await twist.act(self, heard, answer)
        finally:
            self.acted.set()

    def _settle(self, heard: Heard, answer: Answer) -> tuple[Heard, bytes]:
        """The message with the right answer, and the bytes of that. It counts as given whatever becomes of it: what
        follows is understood as by a front-end that has not noticed."""
        fds = () if answer.fd < 0 else (answer.fd,)
        data = pack(heard.code, answer.payload.pack())
        self._witness.hear(Wire.MAIN, Side.BACKEND, data, fds)
        return replace(heard, answer=answer.payload, answered=tuple(map(describe, fds))), data

    async def send(self, data: bytes, *fds: int) -> None:
        """Sends any bytes; the descriptors stay the caller's. A front-end that has gone is no error."""
        with contextlib.suppress(ConnectionError):
            await self._channel.send(data, tuple(fd for fd in fds if fd >= 0))

    def hang_up(self) -> None:
        """Ends the connection as the death of a process would."""
        self.gone = self.closed = self.transcript.cut = True
        self._channel.end()
        self._channel.close()
        if self.backend_socket is not None:
            self.backend_socket.close()
        self._news.set()

    # ---- what is remembered and answered

    def _keep(self, heard: Heard, fds: Fds) -> None:
        payload = heard.payload
        if heard.code == F.SET_VRING_BASE and isinstance(payload, VringState):
            self._bases[payload.index] = payload.num
        elif heard.code == F.SET_PROTOCOL_FEATURES and isinstance(payload, U64):
            self._protocol = payload.value
        elif heard.code == F.SET_STATUS and isinstance(payload, U64):
            self._status = payload.value
        elif heard.code == F.SET_BACKEND_REQ_FD and fds and heard.given[0].kind == "socket":
            if self.backend_socket is not None:
                self.backend_socket.close()
            self.backend_socket = socket.socket(fileno=fds.take())

    def _due(self, heard: Heard) -> bool:
        """Is there an answer to come? Also for what no session would take, as long as it can be understood."""
        row = FRONTEND.get(heard.code)
        if heard.code == F.SET_LOG_BASE:
            return self.agreed(P.LOG_SHMFD) or heard.message.header.need_reply
        return bool(row and row.reply) or (heard.message.header.need_reply and self.agreed(P.REPLY_ACK))

    def agreed(self, feature: ProtocolFeature) -> bool:
        """Has the front-end taken this feature?"""
        return bool(self._protocol & feature.mask)

    def _answer(self, heard: Heard) -> Answer:
        """The right answer."""
        offer, payload = self._offer, heard.payload
        numbers = {
            F.GET_FEATURES: offer.features,
            F.GET_PROTOCOL_FEATURES: offer.protocol,
            F.GET_QUEUE_NUM: offer.queues,
            F.GET_MAX_MEM_SLOTS: offer.slots,
            F.GET_STATUS: self._status,
        }
        match heard.code, payload:
            case F.GET_VRING_BASE, VringState(index):
                return Answer(VringState(index, self._bases.get(index, 0)))
            case F.GET_CONFIG, Config(offset, size):
                return Answer(Config(offset, size, 0, offer.config[offset : offset + size].ljust(size, b"\0")))
            case F.GET_INFLIGHT_FD, Inflight(_, _, queues, entries):
                return Answer(Inflight(_INFLIGHT, 0, queues, entries), _buffer())
            case F.GET_SHMEM_CONFIG, _:
                return Answer(ShmemConfig(1, (0, SHMEM_SIZE, *[0] * (SHMEM_REGIONS - 2))))
        return Answer(U64(numbers.get(F(heard.code), 0) if heard.code in FRONTEND else 0))


def _buffer() -> int:
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
    os.truncate(fd, _INFLIGHT)
    return fd


def describe(fd: int) -> Given:
    """What a descriptor is; never raises, nor blocks."""
    try:
        link, stat = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)  # noqa: PTH115
    except OSError:
        return Given("unknown")
    identity = (stat.st_dev, stat.st_ino)
    if link.startswith("/"):
        return Given("memfd" if link.startswith("/memfd:") else "file", stat.st_size, identity)
    kind, _, rest = link.partition(":")
    if kind != "anon_inode":
        return Given(kind, -1, identity)
    # All of these have one inode.
    number = re.search(r"^eventfd-id:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    return Given(rest.strip("[]"), -1, (0, int(number[1])) if number else (0, 0))


def pack(code: int, body: bytes, flags: int = VERSION | REPLY, size: int | None = None) -> bytes:
    """A message of any content."""
    return Header(code, flags, len(body) if size is None else size).pack() + body
