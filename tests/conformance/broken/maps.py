"""Guest memory, and where it is."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import fault, handling
from tests.conformance.plain import override
from tests.conformance.plain.queue import Chain
from vhostuser.connection import Connection
from vhostuser.memory import GuestMemory, Region
from vhostuser.protocol import FrontendRequest, RequestRefused

F = FrontendRequest


@fault("memory.offset", "memory.odd-offset", "memory.one-file")
def maps_from_the_beginning() -> None:
    right = Region.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[Region], fd: int, described: Any, *rest: Any, **more: Any) -> Any:
        return right(kind, fd, replace(described, offset=0), *rest, **more)

    Region.map = classmethod(mapped)  # type: ignore[assignment,method-assign]


@fault("memory.eight-regions")
def has_room_for_four_regions() -> None:
    _refuses_tables(lambda connection, regions: len(regions) > 4)


@fault("memory.hugetlb")
def maps_no_huge_pages() -> None:
    right = Region.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[Region], fd: int, described: Any, *rest: Any, **more: Any) -> Any:
        region = right(kind, fd, described, *rest, **more)
        if region.hugetlb:
            raise RequestRefused("the length is no multiple of the page size")
        return region

    Region.map = classmethod(mapped)  # type: ignore[assignment,method-assign]


# ---- one table after the other


@fault("memory.refusal-keeps-table")
def forgets_its_table_when_it_refuses_another() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        try:
            return await right(connection, request)
        except RequestRefused:
            await connection._adopt(GuestMemory(), [])
            raise

    handling(F.SET_MEM_TABLE, change)


@fault("memory.under-load", "memory.grows-under-load", "slots.under-load")
def stops_rings_for_a_new_table() -> None:
    right = Connection._adopt

    async def adopt(connection: Connection, memory: GuestMemory, arrived: Any) -> None:
        for ring in connection._session.rings if any(ring.running for ring in connection.rings) else ():
            ring.started = False
        await right(connection, memory, arrived)

    Connection._adopt = adopt  # type: ignore[method-assign]


@fault("memory.grows-under-load")
def grows_only_while_nothing_runs() -> None:
    def refused(connection: Connection, regions: Any) -> bool:
        return len(regions) > len(connection.memory.regions) and any(ring.running for ring in connection.rings)

    _refuses_tables(refused)


def _refuses_tables(condition: Any) -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if condition(connection, request.payload.regions):
            raise RequestRefused("there are too many regions")
        return await right(connection, request)

    handling(F.SET_MEM_TABLE, change)


# ---- files that shrink


@fault("memory.file-shrinks-data")
def touches_data_without_care() -> None:
    def read(chain: Chain, offset: int = 0, length: int = 1 << 32) -> bytes:
        _touch(chain)
        return right(chain, offset, length)

    right = Chain.read
    override(Chain, read=read)


def _touch(chain: Chain) -> None:
    for guest, _ in chain.readable + chain.writable:
        ctypes.string_at(chain.memory.guest_to_host(guest), 1)
