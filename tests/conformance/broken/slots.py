"""Messages about memory: tables and slots."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import (
    FrontendRequest,
    RequestRefused,
)

F = FrontendRequest


@fault("slots.removed-unknown", "slots.removed-other-user", "slots.removed-offset")
def removes_what_is_not_there() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        try:
            await right(connection, request)
        except RequestRefused:
            return

    handling(F.REM_MEM_REG, change)


@fault("slots.too-many")
def takes_any_number_of_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection._mem_slots = 100000
        return await right(connection, request)

    handling(F.ADD_MEM_REG, change)


@fault("slots.many", "slots.too-many")
def takes_eight_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if len(connection.memory.regions) >= 8:
            raise RequestRefused("eight are enough")
        return await right(connection, request)

    handling(F.ADD_MEM_REG, change)


@fault("slots.added-used", "slots.removed")
def acknowledges_regions_without_adding_them() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        listening = connection._listening
        return await right(connection, request) if listening or not connection.memory.regions else None

    handling(F.ADD_MEM_REG, change)
