"""Started and enabled: what becomes of a ring with each event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conformance.broken.registry import fault, handling
from tests.conformance.plain import Disk, override
from vhostuser.connection import HANDLERS, Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import FrontendRequest, RequestRefused, VirtioFeature
from vhostuser.protocol.ring import RING, RingEvent
from vhostuser.protocol.ring import Ring as Agreed
from vhostuser.protocol.state import State
from vhostuser.ring import POLLED, Ring

F = FrontendRequest
STATE = "ring.state."


def changing(change: Callable[[State, Any, Any, Callable[[], None]], None]) -> None:
    """Has what a request changes changed in another way: by the state, the request, and what is right."""
    right = State._change

    def changed(state: State, code: Any, payload: Any) -> None:
        change(state, code, payload, lambda: right(state, code, payload))

    State._change = changed  # type: ignore[method-assign]


def _event(event: RingEvent, *, started: bool | None, enabled: bool | None) -> None:
    RING[event] = (started, enabled)  # type: ignore[index]


# ---- runs when it should not


@fault("ring.state.started-disabled", "ring.state.enable-disable", "features.bit-30-enables-nothing")
def never_disabled() -> None:
    Agreed.runs = property(lambda ring: ring.started)  # type: ignore[assignment,method-assign]


def _polls() -> None:
    """Looks at its rings all the time, whatever their kicks say."""
    right = Disk.rest
    override(Disk, rest=lambda disk, queue, kick, stop: right(disk, queue, -1, stop))


@fault("ring.state.stopped-enabled")
def starts_when_enabled() -> None:
    _polls()
    Agreed.runs = property(lambda ring: ring.enabled)  # type: ignore[assignment,method-assign]


@fault("ring.state.stopped-enabled")
def runs_as_soon_as_it_is_set_up() -> None:
    _polls()
    Agreed.runs = True  # type: ignore[assignment,method-assign]


def _begins_running() -> None:
    _polls()
    Agreed.__init__.__defaults__ = (True, True)  # type: ignore[misc]


@fault("ring.state.initial", "ring.state.stopped-enabled")
def begins_running() -> None:
    _begins_running()


@fault("ring.state.initial", "ring.state.stopped-disabled")
def begins_running_and_disables_nothing() -> None:
    _begins_running()

    def change(state: State, code: Any, payload: Any, right: Callable[[], None]) -> None:
        if code is not F.SET_VRING_ENABLE or payload.num:
            right()

    changing(change)


@fault(STATE + "disable-before-start", STATE + "disabled-stays-disabled", STATE + "disable-while-stopped")
def enables_whatever_the_number_says() -> None:
    _event(RingEvent.DISABLE, started=None, enabled=True)


@fault(STATE + "started-disabled", STATE + "stop-keeps-disabled", STATE + "disable-before-start")
def enabled_by_a_kick() -> None:
    _event(RingEvent.KICK, started=True, enabled=True)


@fault(STATE + "disable-before-start", STATE + "disable-while-stopped")
def disables_only_what_was_started() -> None:
    def change(state: State, code: Any, payload: Any, right: Callable[[], None]) -> None:
        if not (code is F.SET_VRING_ENABLE and not payload.num and not state.rings[payload.index].started):
            right()

    changing(change)


@fault(STATE + "stop-of-running", STATE + "stop-of-disabled", STATE + "stop-then-enable", "base.silent-after-stop")
def goes_on_after_the_stop_until_it_is_set_up_anew() -> None:
    stopped: set[Ring] = set()
    drop, right = Ring.drop_kick, Lifecycle._wanted

    def keep(ring: Ring) -> None:
        drop(ring)
        ring.kick = POLLED
        stopped.add(ring)

    async def stop(connection: Connection, request: Any, answer: Any) -> Any:
        Ring.drop_kick = keep  # type: ignore[method-assign]
        try:
            return await answer(connection, request)
        finally:
            Ring.drop_kick = drop  # type: ignore[method-assign]

    async def set_up(connection: Connection, request: Any, answer: Any) -> Any:
        ring = connection.rings[request.payload.index]
        if ring in stopped:
            stopped.discard(ring)
            async with connection._life.halted(ring):
                ring.drop_kick()
        return await answer(connection, request)

    handling(F.GET_VRING_BASE, stop)
    handling(F.SET_VRING_NUM, set_up)
    handling(F.SET_VRING_BASE, set_up)
    Lifecycle._wanted = lambda life, ring: (ring in stopped and ring.configured) or right(life, ring)  # type: ignore[method-assign]


# ---- does not run when it should


@fault("features.bit-30-enables-nothing", "ring.state.started-disabled")
def features_enable() -> None:
    def change(state: State, code: Any, _: Any, right: Callable[[], None]) -> None:
        right()
        if code is F.SET_FEATURES:
            state._every_ring(RingEvent.ENABLE)

    changing(change)


@fault("features.bit-30-disables-nothing", "features.again-while-running")
def features_disable() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        same = request.payload.value == connection._session.features
        await right(connection, request)
        async with connection._life.halted():
            if same:
                connection._session._state._every_ring(RingEvent.DISABLE)

    handling(F.SET_FEATURES, change)


@fault("features.log-all-while-running", "log.stops")
def halts_when_logging_ends() -> None:
    def change(state: State, code: Any, payload: Any, right: Callable[[], None]) -> None:
        logged = state.features & VirtioFeature.LOG_ALL.mask
        right()
        if code is F.SET_FEATURES and logged and not payload.value & VirtioFeature.LOG_ALL.mask:
            state._every_ring(RingEvent.DISABLE)

    changing(change)


@fault(STATE + "enable-disable-enable", STATE + "twice-disabled")
def stopped_by_a_disable() -> None:
    _event(RingEvent.DISABLE, started=False, enabled=False)


@fault(STATE + "stop-keeps-enabled", STATE + "stop-before-kick", STATE + "twice-stopped")
def disabled_by_a_stop() -> None:
    _event(RingEvent.STOP, started=False, enabled=False)


@fault(STATE + "stop-keeps-disabled")
def enabled_by_a_stop() -> None:
    _event(RingEvent.STOP, started=False, enabled=True)


@fault("setup.ecnbak", STATE + "enable-while-stopped", STATE + "stop-keeps-enabled")
def disabled_by_a_kick_descriptor() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection._session.rings[request.payload.index].enabled = False
        return await right(connection, request)

    handling(F.SET_VRING_KICK, change)


@fault(STATE + "twice-enabled")
def registers_its_kick_with_each_enable() -> None:
    """Which fails the second time, as with EPOLL_CTL_ADD, and is taken for the end."""
    registered: set[Ring] = set()

    async def enable(connection: Connection, request: Any) -> None:
        ring = connection.rings[request.payload.index]
        if not request.payload.num:
            registered.discard(ring)
        elif ring in registered:
            raise ConnectionAbortedError
        elif ring.kick is not None:
            registered.add(ring)

    async def kick(connection: Connection, request: Any, right: Any) -> Any:
        registered.discard(connection.rings[request.payload.index])
        return await right(connection, request)

    HANDLERS[F.SET_VRING_ENABLE] = enable  # the session alone has to know, otherwise
    handling(F.SET_VRING_KICK, kick)


@fault(STATE + "twice-disabled")
def wants_an_enable_for_each_disable() -> None:
    depth: dict[Agreed, int] = {}
    Agreed.__hash__ = object.__hash__  # type: ignore[method-assign]

    def change(state: State, code: Any, payload: Any, right: Callable[[], None]) -> None:
        right()
        if code is F.SET_VRING_ENABLE and state.rings[payload.index].started:
            ring = state.rings[payload.index]
            depth[ring] = max(0, depth.get(ring, 0) + (-1 if payload.num else 1))
            ring.enabled = not depth[ring]

    changing(change)


@fault(STATE + "twice-stopped", "base.twice")
def refuses_to_stop_what_has_stopped() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if connection.rings[request.payload.index].kick is None:
            raise RequestRefused("it does not run")
        return await right(connection, request)

    handling(F.GET_VRING_BASE, change)
