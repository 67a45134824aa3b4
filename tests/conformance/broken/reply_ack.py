"""Who is answered, when, and with what."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import answering, fault
from vhostuser.protocol import (
    BackendSession,
    FrontendRequest,
    Header,
    Outgoing,
)
from vhostuser.protocol.exchange import Server

F = FrontendRequest


@fault("reply-ack.own-reply-flags")
def keeps_need_reply() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or not (request.need_reply and request.row.reply):
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
