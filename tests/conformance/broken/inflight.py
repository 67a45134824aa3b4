"""The buffer for requests in flight: messages and what is in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import F, crash, fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import Reply, RequestRefused
from vhostuser.virtqueue import InflightRegion


@fault("inflight.kept", "inflight.kept-under-load", "inflight.out-of-order")
def tracks_nothing() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        await right(connection, request)
        connection._life.inflight = None

    handling(F.SET_INFLIGHT_FD, change)


def _created(change: Callable[[int, int], tuple[int, int]]) -> None:
    right = InflightRegion.create
    InflightRegion.create = staticmethod(lambda queues, size, **more: change(*right(queues, size, **more)))  # type: ignore


@fault("inflight.fresh")
def buffers_of_ones() -> None:
    def change(fd: int, size: int) -> tuple[int, int]:
        os.pwrite(fd, b"\1", size - 1)
        return fd, size

    _created(change)


def _describes(change: Callable[[int], int]) -> None:
    """Has the size of buffers told wrongly; taken back they are as large as their files."""

    async def mapped(connection: Connection, request: Any, right: Any) -> None:
        size = os.fstat(request.fds[0]).st_size
        await right(connection, replace(request, payload=replace(request.payload, mmap_size=size)))

    _created(lambda fd, size: (fd, change(size)))
    handling(F.SET_INFLIGHT_FD, mapped)


@fault("inflight.size")
def small_buffers() -> None:
    _describes(lambda _: 64)


@fault("inflight.in-file")
def buffers_beyond_their_file() -> None:
    _describes(lambda size: size + 4096)


@fault("inflight.again")
def one_buffer_for_all() -> None:
    made: list[tuple[int, int]] = []

    def change(fd: int, size: int) -> tuple[int, int]:
        made.append((fd, size))
        return os.dup(made[0][0]), size

    _created(change)


def _after_memory(code: F) -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.memory.regions:
            raise RequestRefused("no memory yet")
        return await right(connection, request)

    handling(code, change)


@fault("inflight.get")
def has_no_buffer_before_memory() -> None:
    _after_memory(F.GET_INFLIGHT_FD)


@fault("inflight.set")
def takes_no_buffer_before_memory() -> None:
    _after_memory(F.SET_INFLIGHT_FD)


@fault("inflight.numbers")
def rounds_the_size_of_queues_up() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Reply:
        fd, size = InflightRegion.create(request.payload.num_queues, 1024)
        return Reply(replace(request.payload, mmap_size=size, queue_size=1024), fds=(fd,))

    handling(F.GET_INFLIGHT_FD, change)


@fault("inflight.two-queues")
def makes_room_for_one_queue() -> None:
    right = InflightRegion.create

    def created(queues: int, size: int, **more: bool) -> tuple[int, int]:
        fd, length = right(queues, size, **more)
        return fd, length if queues == 1 else 16 + 16 * size

    InflightRegion.create = staticmethod(created)  # type: ignore[method-assign]


@fault("inflight.set-too-small", "inflight.set-beyond-file", "inflight.set-wraps", "inflight.set-many-queues")
def takes_any_buffer() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        with contextlib.suppress(RequestRefused):
            await right(connection, request)

    handling(F.SET_INFLIGHT_FD, change)


@fault("inflight.get-many-queues")
def dies_of_many_queues() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if request.payload.num_queues > len(connection.rings):
            crash()
        return await right(connection, request)

    handling(F.GET_INFLIGHT_FD, change)
