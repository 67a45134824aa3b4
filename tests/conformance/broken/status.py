"""The device status and resets."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import F, fault, handling, number
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.memory import GuestMemory
from vhostuser.protocol import BackendSession, DeviceStatus, RequestRefused
from vhostuser.protocol.ring import RING, RingEvent
from vhostuser.protocol.state import State
from vhostuser.ring import Ring
from vhostuser.ring_messages import RingMessages

# ---- the register


@fault("status.initial", "status.read-back-0", "status.of-one-connection", "reset.status")
def has_been_acknowledged_from_the_start() -> None:
    number(F.GET_STATUS, lambda session, status: status or DeviceStatus.ACKNOWLEDGE)


@fault("status.read-back")
def tells_what_was_said_first() -> None:
    said: dict[BackendSession, int] = {}
    number(F.GET_STATUS, lambda session, status: said.setdefault(session, status) if status else 0)


@fault("status.read-back-0", "status.needs-reset-kept")
def takes_0_for_no_status() -> None:
    right = State._set_status
    State._set_status = lambda state, value: right(state, value) if value else None  # type: ignore[method-assign]


@fault("status.of-one-connection", "status.initial")
def has_one_status_for_all() -> None:
    last = [DeviceStatus.DRIVER]
    made, told = State.__init__, State._set_status

    def init(state: State, *arguments: Any) -> None:
        made(state, *arguments)
        state.status = last[0]

    def set_status(state: State, value: int) -> None:
        told(state, value)
        last[0] = state.status

    State.__init__ = init  # type: ignore[method-assign,assignment]
    State._set_status = set_status  # type: ignore[method-assign]


@fault("status.features-refused")
def features_are_always_ok() -> None:
    State.features_refused = property(lambda state: False, lambda state, value: None)  # type: ignore[assignment]


# ---- rings


@fault("status.before-driver-ok")
def does_not_wait_for_the_driver() -> None:
    BackendSession.ready = property(lambda session: True)  # type: ignore[assignment,method-assign]


@fault("status.reset", "status.before-driver-ok")
def goes_on_whatever_the_status() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        return None

    handling(F.SET_STATUS, change)
    State._set_status = lambda state, value: setattr(state, "status", DeviceStatus(value))  # type: ignore[method-assign]
    State.ready = property(lambda state: True)  # type: ignore[assignment,method-assign]


@fault("status.driver-ok")
def forgets_kicks_before_driver_ok() -> None:
    right = Lifecycle.kicked

    def kicked(life: Lifecycle, ring: Ring) -> None:
        if life._session.ready:
            right(life, ring)

    Lifecycle.kicked = kicked  # type: ignore[method-assign]


@fault("status.served", "status.driver-ok", "status.reset-and-again")
def is_never_ready() -> None:
    State.ready = property(lambda state: not state.status)  # type: ignore[assignment,method-assign]


@fault("status.reset-and-again")
def cannot_be_reset() -> None:
    right = State._set_status
    reset: set[State] = set()

    def set_status(state: State, value: int) -> None:
        right(state, value)
        if not value:
            reset.add(state)

    State._set_status = set_status  # type: ignore[method-assign]
    State.ready = property(lambda state: state not in reset)  # type: ignore[assignment,method-assign]


# ---- a device that cannot go on


@fault("status.needs-reset")
def is_never_in_need() -> None:
    BackendSession.ask_for_reset = lambda session: None  # type: ignore[method-assign]


@fault("status.needs-reset-kept")
def takes_the_driver_s_word_for_its_own() -> None:
    right = State._set_status

    def set_status(state: State, value: int) -> None:
        right(state, value)
        state.needs_reset = False

    State._set_status = set_status  # type: ignore[method-assign]


@fault("status.needs-reset-announced")
def keeps_its_need_to_itself() -> None:
    def broke(messages: RingMessages, ring: Ring) -> None:
        ring.signal_err()
        messages._session.ask_for_reset()

    RingMessages.broke = broke  # type: ignore[method-assign]


# ---- RESET_DEVICE


@fault("reset.stops", "reset.disables", "reset.status")
def resets_nothing() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        return None

    right = State._change
    handling(F.RESET_DEVICE, change)
    State._change = lambda state, code, payload: (  # type: ignore[method-assign]
        None if code is F.RESET_DEVICE else right(state, code, payload)
    )


@fault("reset.disables")
def leaves_rings_enabled() -> None:
    RING[RingEvent.RESET] = (False, None)  # type: ignore[index]


@fault("reset.again")
def forgets_memory_with_a_reset() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        await right(connection, request)
        connection._regions.memory = GuestMemory()

    handling(F.RESET_DEVICE, change)


@fault("reset.before-anything")
def has_nothing_to_reset() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        if not connection.memory.regions:
            raise RequestRefused("there is nothing to reset")
        await right(connection, request)

    handling(F.RESET_DEVICE, change)


@fault("reset.answers")
def hangs_up_at_the_second_reset() -> None:
    seen: set[Connection] = set()

    async def change(connection: Connection, request: Any, right: Any) -> None:
        if connection in seen:
            connection._channel.end()
        seen.add(connection)
        await right(connection, request)

    handling(F.RESET_DEVICE, change)


@fault("reset.status")
def keeps_the_status() -> None:
    right = State._change

    def change(state: State, code: Any, payload: Any) -> None:
        before = state.status
        right(state, code, payload)
        if code is F.RESET_DEVICE:
            state.status = before

    State._change = change  # type: ignore[method-assign]
