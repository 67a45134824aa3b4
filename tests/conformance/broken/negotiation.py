"""Features and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.everything import offer_everything
from tests.conformance.broken.registry import F, fault, handling, number
from vhostuser import connection
from vhostuser.connection import HANDLERS, Connection
from vhostuser.protocol import (
    FRONTEND,
    BackendSession,
    FrontendRequest,
    Outgoing,
    ProtocolFeature,
    RequestRefused,
    VirtioFeature,
)
from vhostuser.protocol.exchange import Server
from vhostuser.protocol.state import State

P = ProtocolFeature


@fault("features.stable")
def forgets_what_it_offered() -> None:
    number(F.GET_FEATURES, lambda session, value: value & ~(1 << 9) if session.features else value)


@fault("features.protocol-stable")
def forgets_what_protocol_it_offered() -> None:
    number(F.GET_PROTOCOL_FEATURES, lambda session, value: value & ~4096 if session.protocol_features else value)


@fault("features.protocol-known")
def offers_what_does_not_exist() -> None:
    """And lets it be taken."""
    right = connection.protocol_features
    connection.protocol_features = lambda **what: right(**what) | 1 << 40


@fault("features.version-1")
def legacy() -> None:
    number(F.GET_FEATURES, lambda _, value: value & ~VirtioFeature.VERSION_1.mask)


@fault("features.queue-num")
def no_queues() -> None:
    number(F.GET_QUEUE_NUM, lambda _, value: 0)


@fault("features.mem-slots", "features.mem-slots-eight")
def no_slots() -> None:
    number(F.GET_MAX_MEM_SLOTS, lambda _, value: 0)


@fault("features.unoffered", "features.protocol-unoffered")
def takes_any_feature() -> None:
    right = State.__init__

    def init(state: State, *arguments: Any) -> None:
        right(state, *arguments)
        state.features_offered = state.protocol_features_offered = ~0

    State.__init__ = init  # type: ignore[method-assign]


@fault("features.reset-owner", "features.reset-owner-memory")
def forgets_everything_at_reset_owner() -> None:
    right = State.apply

    def apply(state: State, code: Any, payload: Any) -> None:
        right(state, code, payload)
        if code is F.RESET_OWNER:
            state.protocol_features = 0

    State.apply = apply  # type: ignore[method-assign]


@fault("features.bit-30")
def knows_no_protocol_features() -> None:
    number(F.GET_FEATURES, lambda _, value: value & ~VirtioFeature.PROTOCOL_FEATURES.mask)


@fault("features.mq")
def offers_one_queue_pair() -> None:
    number(F.GET_PROTOCOL_FEATURES, lambda _, value: value & ~P.MQ.mask)


@fault("features.queue-num-unnegotiated")
def wants_mq_negotiated() -> None:
    row = FRONTEND[F.GET_QUEUE_NUM]
    FRONTEND[F.GET_QUEUE_NUM] = replace(row, gate=row.gate._replace(offered=False))  # type: ignore[index]


@fault("features.second-ring-without-mq")
def has_one_ring_without_mq() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if request.payload.index and not connection._session.has(P.MQ):
            raise RequestRefused("MQ was not negotiated")
        return await right(connection, request)

    handling(F.SET_VRING_NUM, change)


# ---- the order of things


@fault("features.protocol-set-first", "features.protocol-set-alone")
def offers_when_asked() -> None:
    asked = set()

    def change(session: BackendSession, value: int) -> int:
        asked.add(session)
        return value

    number(F.GET_PROTOCOL_FEATURES, change)
    right = BackendSession.finish

    def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
        outgoing = right(session, request, outcome)
        if request.code is F.SET_PROTOCOL_FEATURES and session not in asked:
            session._state.protocol_features = 0
        return outgoing

    BackendSession.finish = finish  # type: ignore[method-assign]


def _opening(change: Callable[[list[FrontendRequest], Any], bool]) -> None:
    """Closes the connection where ``change`` says no to the next request after those that came before it."""
    before: dict[Connection, list[FrontendRequest]] = {}
    right = Connection._outcome

    async def outcome(connection: Connection, request: Any) -> Any:
        earlier = before.setdefault(connection, [])
        if not change(earlier, request):
            raise ConnectionAbortedError
        earlier.append(request.code)
        return await right(connection, request)

    Connection._outcome = outcome  # type: ignore[method-assign]


@fault("features.owner-first")
def knows_no_owner_before_the_features() -> None:
    _opening(lambda earlier, request: bool(earlier) or request.code is not F.SET_OWNER)


@fault("features.no-owner")
def is_shy_of_strangers() -> None:
    """Answers each question once before there is an owner."""
    _opening(lambda earlier, request: F.SET_OWNER in earlier or request.code not in earlier)


@fault("features.repeated")
def takes_protocol_features_once() -> None:
    _opening(lambda earlier, request: request.code is not F.SET_PROTOCOL_FEATURES or request.code not in earlier)


@fault("features.none")
def wants_a_protocol_feature() -> None:
    _opening(lambda _, request: request.code is not F.SET_PROTOCOL_FEATURES or request.payload.value)


@fault("features.without-bit-30")
def wants_bit_30() -> None:
    _opening(lambda _, request: request.code is not F.SET_FEATURES or request.payload.value >> 30 & 1)


@fault("features.subset", "features.protocol-set-first")
def acknowledges_where_it_has_a_channel() -> None:
    Server._acks = lambda server, need_reply: (  # type: ignore[method-assign]
        need_reply and server._state.has(P.REPLY_ACK) and server._state.has(P.BACKEND_REQ)
    )


# ---- features of others


@fault("features.inband-incomplete")
def rings_in_band_without_a_channel() -> None:
    offer_everything()
    row = FRONTEND[F.SET_PROTOCOL_FEATURES]
    FRONTEND[F.SET_PROTOCOL_FEATURES] = replace(row, rules=row.rules[:1])  # type: ignore[index]


@fault("features.reset-device")
def forgets_its_memory_with_the_device() -> None:
    offer_everything()

    async def reset(connection: Connection, _: Any) -> None:
        connection._regions.close()

    HANDLERS[F.RESET_DEVICE] = reset
