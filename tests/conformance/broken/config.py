"""The configuration space."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import answering, fault, handling
from vhostuser.connection import Connection
from vhostuser.devices.blk import Blk
from vhostuser.protocol import (
    Config,
    FrontendRequest,
    Reply,
)

F = FrontendRequest


@fault("config.part", "config.byte")
def ignores_the_offset() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        asked = request.payload
        if asked.offset > 256:
            return await right(connection, request)
        data = connection._device.config().ljust(256, b"\0")[: asked.size]
        return Reply(Config(asked.offset, asked.size, asked.flags, data))

    handling(F.GET_CONFIG, change)


@fault("config.beyond-is-error")
def knows_no_end_of_the_space() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        asked = request.payload
        if asked.offset < 256:
            return await right(connection, request)
        return Reply(Config(asked.offset, asked.size, asked.flags, bytes(asked.size)))

    handling(F.GET_CONFIG, change)


@fault("config.error-keeps-connection")
def leaves_after_an_error() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if request.payload.offset > 256:
            raise ConnectionAbortedError
        return await right(connection, request)

    handling(F.GET_CONFIG, change)


@fault("config.read-only", "config.write-beyond")
def writes_anything() -> None:
    Blk.set_config = lambda *_, **__: None  # type: ignore[assignment,method-assign]


@fault("config.migration", "message.acknowledged.set-config")
def says_nothing_to_set_config() -> None:
    answering(lambda _, request, answer: None if request.code is F.SET_CONFIG else answer)
