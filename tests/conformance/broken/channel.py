"""The back-end's own channel."""

from __future__ import annotations

import os
from typing import Any

from tests.conformance.broken.registry import fault, handling
from vhostuser.backend_channel import BackendChannel
from vhostuser.connection import Connection
from vhostuser.protocol import (
    FrontendRequest,
    Header,
)

F = FrontendRequest


@fault("channel.replaced", "channel.ends-with-connection")
def keeps_channels_open() -> None:
    BackendChannel.close = lambda channel: None  # type: ignore[method-assign]


@fault("channel.suspended")
def speaks_while_suspended() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        os.write(request.fds[0], Header(2, 1, 0).pack())
        await right(connection, request)

    handling(F.SET_BACKEND_REQ_FD, change)
