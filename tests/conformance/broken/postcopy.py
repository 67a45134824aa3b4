"""Postcopy: more in tests/lab_postcopy/broken."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import answering, fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import (
    BackendSession,
    FrontendRequest,
    Header,
    Outgoing,
)

F = FrontendRequest


@fault("postcopy.advise")
def advises_with_a_payload() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.POSTCOPY_ADVISE:
            return answer
        return Outgoing(Header(F.POSTCOPY_ADVISE, 5, 8).pack() + bytes(8), answer.fds)

    answering(change)


@fault("postcopy.listen-mapped")
def listens_with_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection._regions.listen()

    handling(F.POSTCOPY_LISTEN, change)
