"""What a front-end sends byte by byte, and what is answered to it: headers, pieces, descriptors."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable
from typing import Any

from tests.conformance.broken.registry import answering, crash, fault
from vhostuser.channel import Channel, Fds
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


@fault("framing.descriptor-of-unknown", "message.extra-descriptor")
def leaks_what_it_did_not_ask_for() -> None:
    _leaks(lambda fds: len(fds) == 1 and stat.S_ISFIFO(os.fstat(fds[0]).st_mode))
