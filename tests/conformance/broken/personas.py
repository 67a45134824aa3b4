"""What one front-end's habits meet and another's do not."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from tests.conformance.broken.registry import fault, handling
from vhostuser import virtqueue
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import FrontendRequest, RequestRefused

F = FrontendRequest


@fault("personas.qemu-7", "personas.qemu-10")
def one_inflight_buffer_for_each_connection() -> None:
    """QEMU asks anew when the kernel takes over from the firmware."""
    asked: WeakSet[Connection] = WeakSet()

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if connection in asked:
            raise RequestRefused("there is one already")
        asked.add(connection)
        return await right(connection, request)

    handling(F.GET_INFLIGHT_FD, change)


@fault("personas.qemu-10")
def rings_no_larger_than_the_inflight_buffer() -> None:
    """What QEMU 10 announces and what its guest takes are two sizes."""
    virtqueue.INFLIGHT_ROOM = 1
    Lifecycle._inflight_of = lambda life, ring: life.inflight  # type: ignore[method-assign]


@fault("personas.dpdk")
def memory_must_begin_at_zero() -> None:
    """virtio_user's guest addresses are its own: there is nothing at 0."""

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if all(region.guest for region in request.payload.regions):
            raise RequestRefused("no memory at 0")
        return await right(connection, request)

    handling(F.SET_MEM_TABLE, change)


@fault("personas.crosvm", "personas.cloud-hypervisor")
def no_flags_in_config_requests() -> None:
    """Both send 1 for what is 0 in the text."""

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if request.payload.flags:
            raise RequestRefused("no such flag")
        return await right(connection, request)

    handling(F.GET_CONFIG, change)


@fault("personas.libblkio")
def regions_leave_without_a_descriptor() -> None:
    """libblkio sends one with REM_MEM_REG too; it may, and it has to be closed."""

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if request.fds:
            raise RequestRefused("a descriptor?")
        return await right(connection, request)

    handling(F.REM_MEM_REG, change)
