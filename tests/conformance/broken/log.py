"""Messages about the dirty log."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import F, answering, crash, fault, handling
from vhostuser import lifecycle
from vhostuser._native import lib
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.memory import DirtyLog
from vhostuser.protocol import BackendSession, Outgoing, RequestRefused, VirtioFeature
from vhostuser.protocol.state import State
from vhostuser.ring import Ring


@fault("message.acknowledged.set-log-fd", "log.log-fd")
def says_nothing_to_log_fd() -> None:
    answering(lambda _, request, answer: None if request.code is F.SET_LOG_FD else answer)


@fault("log.log-fd-signalled")
def tells_nobody_of_its_marks() -> None:
    DirtyLog.tell = lambda log, fd: None  # type: ignore[method-assign]


@fault("log.reply-bytes")
def answers_log_base_with_what_was_there() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.SET_LOG_BASE:
            return answer
        return Outgoing(answer.data[:12] + (256).to_bytes(8, "little"))

    answering(change)


@fault("log.replaced")
def keeps_the_first_log() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        return await right(connection, request) if connection._life.dirty_log is None else None

    handling(F.SET_LOG_BASE, change)


@fault("log.before", "log.stops")
def logs_always() -> None:
    right = Lifecycle._start

    def start(life: Lifecycle, ring: Ring, regions: Any) -> None:
        lifecycle.VirtioFeature = type("Always", (), {"LOG_ALL": type("Bit", (), {"mask": ~0})})  # type: ignore
        right(life, ring, regions)

    Lifecycle._start = start  # type: ignore[method-assign]


@fault("log.reply")
def answers_log_base_once_rings_have_it() -> None:
    silent = set()

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not any(ring.size for ring in connection.rings):
            silent.add(connection._session)
        return await right(connection, request)

    handling(F.SET_LOG_BASE, change)
    answering(lambda session, request, answer: None if session in silent and request.code is F.SET_LOG_BASE else answer)


@fault("log.reply-once")
def acknowledges_log_base_too() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.SET_LOG_BASE or not request.need_reply:
            return answer
        return Outgoing(answer.data * 2)

    answering(change)


@fault("log.again")
def logs_one_migration() -> None:
    logged = VirtioFeature.LOG_ALL.mask
    right = State._change
    over = set()

    def change(state: State, code: Any, payload: Any) -> None:
        if code is F.SET_FEATURES:
            if state.features & logged and not payload.value & logged:
                over.add(state)
            if state in over:
                payload = replace(payload, value=payload.value & ~logged)
        right(state, code, payload)

    State._change = change  # type: ignore[method-assign]


@fault("log.beyond-file", "log.unmappable")
def takes_any_log() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        with contextlib.suppress(RequestRefused):
            await right(connection, request)

    handling(F.SET_LOG_BASE, change)


@fault("log.too-small")
def marks_behind_the_log() -> None:
    right = Lifecycle._ring_ended

    def ended(life: Lifecycle, ring: Ring, broken: Any) -> None:
        if broken is not None and broken.code == lib.VU_E_RANGE and life.dirty_log is not None:
            crash()
        right(life, ring, broken)

    Lifecycle._ring_ended = ended  # type: ignore[method-assign]
