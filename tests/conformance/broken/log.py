"""Messages about the dirty log."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import answering, fault, handling
from vhostuser import lifecycle
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import (
    BackendSession,
    FrontendRequest,
    Outgoing,
)
from vhostuser.ring import Ring

F = FrontendRequest


@fault("message.acknowledged.set-log-fd", "log.log-fd")
def says_nothing_to_log_fd() -> None:
    answering(lambda _, request, answer: None if request.code is F.SET_LOG_FD else answer)


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
