"""When rings run, their notifications and where they leave off."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import answering, crash, fault, handling
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import (
    BackendSession,
    FrontendRequest,
    Outgoing,
    Reply,
    VirtioFeature,
    VringState,
)
from vhostuser.protocol.ring import Ring as Agreed
from vhostuser.protocol.state import State
from vhostuser.ring import Ring

F = FrontendRequest


@fault("ring.state.started-disabled", "ring.state.enable-disable", "features.bit-30-enables-nothing")
def never_disabled() -> None:
    Agreed.runs = property(lambda ring: ring.started)  # type: ignore[assignment,method-assign]


@fault("ring.state.stopped-enabled")
def starts_when_enabled() -> None:
    Agreed.runs = property(lambda ring: ring.enabled)  # type: ignore[assignment,method-assign]


@fault("features.bit-30-enables-nothing", "ring.state.started-disabled")
def features_enable() -> None:
    right = State._change

    def change(state: State, code: Any, payload: Any) -> None:
        right(state, code, payload)
        if code is F.SET_FEATURES:
            for ring in state.rings:
                ring.enabled = True

    State._change = change  # type: ignore[method-assign]


@fault("features.bit-30-disables-nothing", "features.again-while-running")
def features_disable() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        same = request.payload.value == connection._session.features
        await right(connection, request)
        async with connection._life.halted():
            for ring in connection._session.rings if same else ():
                ring.enabled = False

    handling(F.SET_FEATURES, change)


@fault("features.log-all-while-running", "log.stops")
def halts_when_logging_ends() -> None:
    right = State._change

    def change(state: State, code: Any, payload: Any) -> None:
        logged = state.features & VirtioFeature.LOG_ALL.mask
        right(state, code, payload)
        if code is F.SET_FEATURES and logged and not payload.value & VirtioFeature.LOG_ALL.mask:
            for ring in state.rings:
                ring.enabled = False

    State._change = change  # type: ignore[method-assign]


@fault("kick.before-enable", "ring.state.kick-then-enable")
def loses_early_kicks() -> None:
    right = Lifecycle.kicked

    def kicked(life: Lifecycle, ring: Ring) -> None:
        if life._session.rings[ring.index].enabled:
            right(life, ring)

    Lifecycle.kicked = kicked  # type: ignore[method-assign]


@fault("base.given")
def base_of_nothing_is_0() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        ring = connection.rings[request.payload.index]
        return await right(connection, request) if ring.running else Reply(VringState(ring.index, 0))

    handling(F.GET_VRING_BASE, change)


@fault("base.index")
def base_of_another_ring() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_VRING_BASE:
            return answer
        return Outgoing(answer.data[:12] + bytes([answer.data[12] ^ 1]) + answer.data[13:])

    answering(change)


@fault("base.untouched", "base.before-negotiation")
def dies_of_an_unknown_ring() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].size:
            crash()
        return await right(connection, request)

    handling(F.GET_VRING_BASE, change)


@fault("kick.replaced")
def keeps_the_first_kick() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].running:
            await right(connection, request)

    handling(F.SET_VRING_KICK, change)


@fault("call.replaced", "call.none")
def keeps_the_first_call() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].running:
            await right(connection, request)

    handling(F.SET_VRING_CALL, change)


@fault("call.at-start")
def calls_for_nothing_but_requests() -> None:
    Ring.call = lambda ring: None  # type: ignore[method-assign]
