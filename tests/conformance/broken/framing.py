"""What a front-end sends byte by byte, and what is answered to it: headers, pieces, descriptors."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from tests.conformance.broken.registry import answering, crash, fault
from vhostuser.channel import Channel, Fds
from vhostuser.connection import Connection
from vhostuser.protocol import (
    BackendSession,
    FrontendRequest,
    Header,
    Outgoing,
    RemoteProtocolError,
)
from vhostuser.protocol.codec import Reader
from vhostuser.protocol.exchange import Server

F = FrontendRequest


@fault("framing.reply-flags")
def flags_of_a_number() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_MAX_MEM_SLOTS:
            return answer
        return Outgoing(answer.data[:4] + b"\x0d" + answer.data[5:])

    answering(change)


@fault("framing.reply-size")
def number_of_four_bytes() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_MAX_MEM_SLOTS:
            return answer
        return Outgoing(Header(request.code, 5, 4).pack() + answer.data[12:16])

    answering(change)


@fault("framing.unknown", "framing.unknown-with-payload", "framing.id-0")
def acknowledges_the_unknown() -> None:
    right = Server._unusable

    def unusable(server: Server, header: Header, request: int, reason: str, *rest: Any, **more: Any) -> Any:
        error = right(server, header, request, reason, *rest, **more)
        if reason == "unknown request" and error.answer:
            error.answer = Header(header.request, 5, 8).pack() + bytes(8)
        return error

    Server._unusable = unusable  # type: ignore[method-assign]


@fault("framing.version-0", "framing.version-2", "framing.reply-flag-on-request")
def looks_at_no_flags() -> None:
    Header.check_request = lambda header: None  # type: ignore[method-assign]


@fault("framing.byte-by-byte")
def wants_whole_pieces() -> None:
    right = Channel.receive

    async def receive(channel: Channel, wanted: int) -> tuple[bytes, Fds]:
        data, fds = await right(channel, wanted)
        if 0 < len(data) < wanted:
            raise RemoteProtocolError(None, "a message in pieces")
        return data, fds

    Channel.receive = receive  # type: ignore[method-assign]


@fault("framing.payload-apart")
def wants_payloads_at_once() -> None:
    right = Channel.receive

    async def receive(channel: Channel, wanted: int) -> tuple[bytes, Fds]:
        data, fds = await right(channel, wanted)
        payload = len(data) == 12 and any(data[8:])
        if payload and not select.select([channel._sock], [], [], 0)[0]:
            raise RemoteProtocolError(None, "a payload that is not there yet")
        return data, fds

    Channel.receive = receive  # type: ignore[method-assign]


@fault("framing.end-in-header", "framing.end-in-payload")
def dies_of_half_a_message() -> None:
    right = Reader.eof

    def eof(reader: Reader) -> None:
        if reader.started:
            crash()
        right(reader)

    Reader.eof = eof  # type: ignore[method-assign]


def _leaks(when: Callable[[Fds], bool]) -> None:
    right = Fds.close
    Fds.close = lambda fds: None if when(fds) else right(fds)  # type: ignore[method-assign]


@fault("framing.descriptors-many", "framing.descriptors-253")
def leaks_many_descriptors() -> None:
    _leaks(lambda fds: len(fds) > 8)


@fault("framing.no-leak", "memory.descriptors-closed", "slots.leak")
def leaks_memory_files() -> None:
    _leaks(lambda fds: any(stat.S_ISREG(os.fstat(fd).st_mode) for fd in fds))


@fault("framing.descriptor-of-unknown", "message.extra-descriptor", "slots.removed-descriptor")
def leaks_what_it_did_not_ask_for() -> None:
    _leaks(lambda fds: len(fds) == 1 and stat.S_ISFIFO(os.fstat(fds[0]).st_mode))


# ---- flags and order


@fault("framing.reserved-flags")
def echoes_reserved_flags() -> None:
    came = {}
    right = Server._open

    def opened(server: Server, frame: Any) -> Any:
        came[server] = frame.header.flags & 0x10
        return right(server, frame)

    def check(header: Header) -> None:
        if header.flags & 7 != 1:
            header._wrong("no request of version 1")

    def change(session: BackendSession, _: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None:
            return None
        return Outgoing(answer.data[:4] + bytes([answer.data[4] | came[session]]) + answer.data[5:], answer.fds)

    Server._open, Header.check_request = opened, check  # type: ignore[assignment,method-assign]
    answering(change)


@fault("framing.glued", "reply-ack.in-order")
def acknowledges_behind_other_answers() -> None:
    """As from a thread of its own: not before the next answer has gone, unless none does for a while."""
    held: dict[Channel, bytes] = {}
    right = Channel.send

    async def send(channel: Channel, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if Header.unpack(data[:12]).request in (F.SET_VRING_NUM, F.SET_OWNER) and channel not in held:
            held[channel] = data
            asyncio.get_running_loop().call_later(0.3, lambda: channel.offer(held.pop(channel, b"")))
            return
        await right(channel, data + held.pop(channel, b""), fds)

    Channel.send = send  # type: ignore[method-assign]


def _counts(change: Callable[[Connection, int], Awaitable[None]]) -> None:
    """Does something with every GET_FEATURES, by how many have come one after the other."""
    counts: dict[Connection, int] = {}
    right = Connection._answer

    async def answer(connection: Connection, request: Any) -> None:
        counts[connection] = counts.get(connection, 0) + 1 if request.code is F.GET_FEATURES else 0
        await change(connection, counts[connection])
        await right(connection, request)

    Connection._answer = answer  # type: ignore[method-assign]


@fault("framing.pipelined")
def has_room_for_sixty_four_questions() -> None:
    async def change(connection: Connection, count: int) -> None:
        if count > 64:
            raise ConnectionAbortedError

    _counts(change)


@fault("framing.glued-descriptors")
def reads_ahead_without_descriptors() -> None:
    async def change(connection: Connection, count: int) -> None:
        if count == 3:
            connection._channel.at_hand = partial(_bare, connection._channel._sock)  # type: ignore[method-assign]

    _counts(change)


def _bare(sock: socket.socket, wanted: int) -> tuple[bytes, Fds] | None:
    try:
        return sock.recv(wanted), Fds()
    except BlockingIOError:
        return None


# ---- ends


@fault("framing.end-unread")
def dies_of_a_broken_pipe() -> None:
    right = Channel.send

    async def send(channel: Channel, data: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            await right(channel, data, fds)
        except ConnectionError:
            crash()

    Channel.send = send  # type: ignore[method-assign]


@fault("framing.end-at-once")
def dies_of_a_silent_visitor() -> None:
    right = Connection._next_request
    heard: set[Connection] = set()

    async def next_request(connection: Connection) -> Any:
        received = await right(connection)
        if received is None and connection not in heard:
            crash()
        heard.add(connection)
        return received

    Connection._next_request = next_request  # type: ignore[method-assign]


# ---- sizes and late descriptors


@fault("framing.size-huge")
def has_not_that_much_memory() -> None:
    right = Header.check_request

    def check(header: Header) -> None:
        if header.size > 1 << 30:
            crash()
        right(header)

    Header.check_request = check  # type: ignore[method-assign]


@fault("framing.descriptors-late")
def loses_late_descriptors() -> None:
    right = Reader._take_fds

    def take(reader: Reader, fds: Any) -> None:
        if reader.started and len(fds):
            fds._fds.clear()
        right(reader, fds)

    Reader._take_fds = take  # type: ignore[method-assign]
