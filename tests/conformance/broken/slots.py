"""Messages about memory: tables and slots."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from typing import Any

from tests.conformance.broken.registry import F, crash, fault, handling
from vhostuser._native import lib
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.memory import GuestMemory, Region
from vhostuser.protocol import MemoryTable, Payload, QueueBroken, RequestRefused, Row, exchange
from vhostuser.regions import Regions
from vhostuser.ring import Ring


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


# ---- tables and regions that must work


def _maps(refused: Callable[[Any, int], bool]) -> None:
    """Refuses regions by what is said of them and by their descriptor."""
    right = Region.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[Region], fd: int, described: Any, *rest: Any, **more: Any) -> Any:
        if refused(described, fd):
            raise RequestRefused("not such a region")
        return right(kind, fd, described, *rest, **more)

    Region.map = classmethod(mapped)  # type: ignore[assignment,method-assign]


@fault("memory.high", "memory.one-file", "memory.eight-regions")
def knows_guests_of_four_gigabytes() -> None:
    _maps(lambda described, _: described.guest >= 1 << 32)


@fault("memory.hugetlb")
def knows_no_huge_pages() -> None:
    _maps(lambda _, fd: os.fstat(fd).st_blksize > 4096)


@fault("memory.eight-regions")
def takes_four_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if len(request.payload.regions) > 4:
            raise RequestRefused("four are enough")
        return await right(connection, request)

    handling(F.SET_MEM_TABLE, change)


@fault("memory.set-twice", "slots.table-replaces")
def keeps_the_first_table() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        return None if connection.memory.regions else await right(connection, request)

    handling(F.SET_MEM_TABLE, change)


@fault("memory.after-rings")
def knows_no_ring_before_memory() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.memory.regions:
            raise RequestRefused("where would the ring be?")
        return await right(connection, request)

    handling(F.SET_VRING_BASE, change)


def _disables(code: F) -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        answer = await right(connection, request)
        for agreed, ring in zip(connection._session.rings, connection.rings, strict=True):
            agreed.enabled = agreed.enabled and not ring.configured
        return answer

    handling(code, change)


@fault("memory.under-load", "memory.grows-under-load")
def stops_for_a_table() -> None:
    _disables(F.SET_MEM_TABLE)


@fault("slots.under-load", "slots.added-unused")
def stops_for_a_region() -> None:
    _disables(F.ADD_MEM_REG)


@fault("slots.added")
def wants_a_table_before_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.memory.regions and not connection._listening:
            raise RequestRefused("no table yet")
        return await right(connection, request)

    handling(F.ADD_MEM_REG, change)


@fault("slots.table-replaces")
def adds_tables_to_regions() -> None:
    right = Regions.adopt
    added = set()

    async def add(connection: Connection, request: Any, handle: Any) -> Any:
        answer = await handle(connection, request)
        added.update(connection.memory.regions[-1:])
        return answer

    def adopt(regions: Regions, memory: GuestMemory, *rest: Any, **more: Any) -> None:
        kept = [region for region in regions.memory.regions if region in added and region not in memory.regions]
        with contextlib.suppress(RequestRefused):
            memory = GuestMemory([*memory.regions, *kept]) if len(memory.regions) == 1 else memory
        right(regions, memory, *rest, **more)

    handling(F.ADD_MEM_REG, add)
    Regions.adopt = adopt  # type: ignore[method-assign]


# ---- what must be refused


def _takes(code: F) -> None:
    """Has a refusal of this message taken for a yes."""

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        with contextlib.suppress(RequestRefused):
            return await right(connection, request)

    handling(code, change)


_UNMAPPABLE = ("empty-region", "guest-wraps", "user-wraps", "offset-wraps", "huge", "beyond-file", "eventfd")


@fault(*(f"memory.refused.{name}" for name in (*_UNMAPPABLE, "guest-overlap", "user-overlap")))
def takes_any_table() -> None:
    _takes(F.SET_MEM_TABLE)


@fault("memory.refusal-keeps-table")
def forgets_memory_for_a_refusal() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        try:
            return await right(connection, request)
        except RequestRefused:
            async with connection._life.halted():
                connection._regions.memory = GuestMemory()
            raise

    handling(F.SET_MEM_TABLE, change)


@fault("slots.added-twice", "slots.added-overlap", "slots.added-empty", "slots.added-beyond-file", "slots.too-many")
def takes_any_region() -> None:
    _takes(F.ADD_MEM_REG)


def _counts_no_descriptors() -> None:
    right = exchange._check_fds

    def check(row: Row, *rest: Any) -> None:
        if row.code is not F.SET_MEM_TABLE:
            right(row, *rest)

    async def change(connection: Connection, request: Any, handle: Any) -> Any:
        return await handle(connection, request) if len(request.fds) == len(request.payload.regions) else None

    exchange._check_fds = check
    handling(F.SET_MEM_TABLE, change)


@fault("memory.refused.too-few-descriptors", "memory.refused.too-many-descriptors")
def counts_no_descriptors() -> None:
    _counts_no_descriptors()


@fault("memory.refused.nine", "memory.lying-count")
def reads_what_regions_there_are() -> None:
    check, unpack = exchange._check_size, exchange._unpack

    def check_size(row: Row, *rest: Any) -> None:
        if row.code is not F.SET_MEM_TABLE:
            check(row, *rest)

    def read(row: Row, kinds: Any, frame: Any) -> Payload:
        if MemoryTable in kinds:
            count = min((len(frame.body) - 8) // 32, 8)
            frame = frame._replace(body=bytes([count, *bytes(7)]) + frame.body[8 : 8 + 32 * count])
        return unpack(row, kinds, frame)

    exchange._check_size, exchange._unpack = check_size, read
    _counts_no_descriptors()


# ---- memory that goes


@fault("memory.empty")
def dies_of_an_empty_table() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not request.payload.regions:
            crash()
        return await right(connection, request)

    handling(F.SET_MEM_TABLE, change)


@fault("memory.unmaps-ring", "slots.removed-ring")
def dies_where_a_ring_was() -> None:
    right = Ring.open
    was = set()

    def opened(ring: Ring, *rest: Any) -> Any:
        try:
            queue = right(ring, *rest)
        except QueueBroken:
            if ring in was:
                crash()
            raise
        was.add(ring)
        return queue

    Ring.open = opened  # type: ignore[method-assign]


@fault("memory.unmaps-data")
def dies_where_data_was() -> None:
    right = Lifecycle._ring_ended
    changed = set()

    async def change(connection: Connection, request: Any, handle: Any) -> Any:
        changed.update(ring for ring in connection.rings if ring.running)
        return await handle(connection, request)

    handling(F.SET_MEM_TABLE, change)

    def ended(life: Lifecycle, ring: Ring, broken: Any) -> None:
        if broken is not None and broken.code == lib.VU_E_RANGE and ring in changed:
            crash()
        right(life, ring, broken)

    Lifecycle._ring_ended = ended  # type: ignore[method-assign]


@fault("memory.file-shrinks-ring", "memory.file-shrinks-data")
def lets_the_kernel_end_it() -> None:
    """No guard against SIGBUS."""
    right = Ring.run

    def run(ring: Ring, *rest: Any) -> Any:
        ctypes.CDLL(None).signal(int(signal.SIGBUS), None)
        return right(ring, *rest)

    Ring.run = run  # type: ignore[method-assign]
