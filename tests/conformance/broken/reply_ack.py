"""Who is answered, when, and with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from tests.conformance.broken.registry import F, answering, crash, fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import FRONTEND, BackendSession, Header, Outgoing, Payload, Row, exchange, payloads
from vhostuser.protocol.exchange import Server


@fault("reply-ack.own-reply-flags")
def keeps_need_reply() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or not (request.need_reply and request.code is F.GET_FEATURES):
            return answer
        return Outgoing(answer.data[:4] + bytes([answer.data[4] | 8]) + answer.data[5:], answer.fds)

    answering(change)


@fault("reply-ack.unasked")
def acknowledges_unasked() -> None:
    def change(session: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if session.protocol_features & 8 and request.code is F.SET_OWNER:
            return Outgoing(Header(F.SET_OWNER, 5, 8).pack() + bytes(8))
        return answer

    answering(change)


@fault("reply-ack.unnegotiated", "reply-ack.switched-off")
def acknowledges_without_the_feature() -> None:
    Server._acks = lambda server, need_reply: need_reply  # type: ignore[method-assign]


@fault("reply-ack.vring-base-once")
def answers_twice() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is not None and request.need_reply and request.code is F.GET_VRING_BASE:
            return Outgoing(answer.data * 2)
        return answer

    answering(change)


@fault("reply-ack.ack")
def acknowledges_in_four_bytes() -> None:
    """An owner that comes behind the features."""

    def change(session: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.SET_OWNER or not session.features:
            return answer
        return Outgoing(Header(request.code, 5, 4).pack() + bytes(4))

    answering(change)


@fault("reply-ack.once")
def acknowledges_its_answers() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_PROTOCOL_FEATURES or not request.need_reply:
            return answer
        return Outgoing(answer.data + Header(request.code, 5, 8).pack() + bytes(8))

    answering(change)


@fault("reply-ack.refusal-keeps-connection")
def leaves_after_a_refusal() -> None:
    right = Connection._answer

    async def answer(connection: Connection, request: Any) -> None:
        await right(connection, request)
        if request.refusal is not None:
            raise ConnectionAbortedError

    Connection._answer = answer  # type: ignore[method-assign]


# ---- rings that do not exist, numbers that cannot be


def _read(change: Callable[[Row, Any], Any]) -> None:
    """Has payloads changed as they are read, by the row of their message."""
    right = exchange._unpack

    def unpack(row: Row, kinds: Any, frame: Any) -> Payload:
        return cast(Payload, change(row, right(row, kinds, frame)))

    exchange._unpack = unpack


_NO_QUEUE = ("num", "base", "enable", "kick", "call", "err", "addr", "wide")


@fault(*(f"reply-ack.no-queue-{name}" for name in _NO_QUEUE), "reply-ack.reserved-index-bits")
def cuts_indexes_down() -> None:
    split = payloads._split_index
    payloads._split_index = lambda word: split(word & 0x1FF)

    def change(row: Row, payload: Any) -> Any:
        fits = row.code is F.GET_VRING_BASE or getattr(payload, "index", 0) < 2
        return payload if fits else replace(payload, index=payload.index & 1)

    _read(change)


@fault("reply-ack.no-queue-get-base")
def dies_of_the_base_of_no_ring() -> None:
    def change(row: Row, payload: Any) -> Any:
        if row.code is F.GET_VRING_BASE and payload.index > 1:
            crash()
        return payload

    _read(change)


@fault("reply-ack.size-4g")
def reads_half_of_a_size() -> None:
    def change(row: Row, payload: Any) -> Any:
        return replace(payload, num=payload.num & 0xFFFF) if row.code is F.SET_VRING_NUM else payload

    _read(change)


def _without_rule(code: F, name: str) -> None:
    row = FRONTEND[code]
    FRONTEND[code] = replace(row, rules=tuple(rule for rule in row.rules if rule.__name__ != name))  # type: ignore


@fault("reply-ack.size-0", "reply-ack.size-3", "reply-ack.size-64k", "reply-ack.size-4g")
def takes_any_size() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        connection.rings[request.payload.index].size = request.payload.num

    _without_rule(F.SET_VRING_NUM, "queue_size")
    handling(F.SET_VRING_NUM, change)


@fault("reply-ack.enable-2")
def enables_by_any_number() -> None:
    _without_rule(F.SET_VRING_ENABLE, "zero_or_one")
