"""The back-end's own channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from tests.conformance.broken.registry import F, fault, handling
from vhostuser.backend_channel import BackendChannel
from vhostuser.connection import Connection
from vhostuser.protocol import Header, RequestRefused


@fault("channel.replaced", "channel.ends-with-connection")
def keeps_channels_open() -> None:
    BackendChannel.close = lambda channel: None  # type: ignore[method-assign]


@fault("channel.suspended")
def speaks_while_suspended() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        os.write(request.fds[0], Header(2, 1, 0).pack())
        await right(connection, request)

    handling(F.SET_BACKEND_REQ_FD, change)


@fault("channel.accepted")
def has_no_use_for_a_channel() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        raise RequestRefused("there is nothing to say")

    handling(F.SET_BACKEND_REQ_FD, change)


@fault("channel.works-beside")
def stops_for_a_channel() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        await right(connection, request)
        async with connection._life.halted():
            for ring in connection._session.rings:
                ring.enabled = False

    handling(F.SET_BACKEND_REQ_FD, change)


@fault("channel.closed")
def ends_with_its_channel() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        await right(connection, request)
        lost = asyncio.ensure_future(connection._announcements.channel._channel.lost.wait())  # type: ignore[union-attr]
        lost.add_done_callback(lambda _: connection._channel.end())

    handling(F.SET_BACKEND_REQ_FD, change)


@fault("channel.no-socket")
def takes_anything_for_a_channel() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        with contextlib.suppress(RequestRefused):
            await right(connection, request)

    handling(F.SET_BACKEND_REQ_FD, change)


@fault("channel.full")
def waits_to_be_heard() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if connection._announcements.channel is not None:
            sock = connection._announcements.channel._channel._sock
            sock.setblocking(True)
            sock.send(Header(2, 1, 0).pack())
            sock.setblocking(False)
        return await right(connection, request)

    handling(F.GET_VRING_BASE, change)
