"""The buffer for requests in flight: messages and what is in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.conformance.broken.registry import fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import (
    FrontendRequest,
)
from vhostuser.virtqueue import InflightRegion

F = FrontendRequest


@fault("inflight.kept", "inflight.kept-under-load", "inflight.out-of-order")
def tracks_nothing() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        await right(connection, request)
        connection._life.inflight = None

    handling(F.SET_INFLIGHT_FD, change)


def _created(change: Callable[[int, int], tuple[int, int]]) -> None:
    right = InflightRegion.create
    InflightRegion.create = staticmethod(lambda queues, size: change(*right(queues, size)))  # type: ignore


@fault("inflight.fresh")
def buffers_of_ones() -> None:
    def change(fd: int, size: int) -> tuple[int, int]:
        os.pwrite(fd, b"\1", size - 1)
        return fd, size

    _created(change)


@fault("inflight.size")
def small_buffers() -> None:
    _created(lambda fd, size: (fd, 64))


@fault("inflight.in-file")
def buffers_without_a_file() -> None:
    def change(fd: int, size: int) -> tuple[int, int]:
        os.truncate(fd, 0)
        return fd, size

    _created(change)


@fault("inflight.again")
def one_buffer_for_all() -> None:
    made: list[tuple[int, int]] = []

    def change(fd: int, size: int) -> tuple[int, int]:
        made.append((fd, size))
        return os.dup(made[0][0]), size

    _created(change)
