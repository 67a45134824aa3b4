"""Faults of guest memory: tables and slots.

What belongs here: what is wrong with regions. What does not: rings in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from tests.conformance.broken_frontends.faults import (
    TOP,
    Say,
    eventfd,
    fault,
    file,
    moved,
    nothing,
    only,
    raw,
    saying,
    without,
)
from tests.conformance.frontends import MIB, Life
from vhostuser.protocol import (
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    SingleRegion,
    VirtioFeature,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


def tables(life: Life) -> bool:
    return not life.has(P.CONFIGURE_MEM_SLOTS)


def table(*regions: MemoryRegion, kind: Callable[[], int] = file) -> Say:
    """Says a table, where tables are said, before the right one."""

    async def say(life: Life) -> None:
        made = [kind() for _ in regions]
        await life.talk.raw(F.SET_MEM_TABLE, MemoryTable(regions), *made)
        for fd in made:
            os.close(fd)

    return only(tables, say)


def bad_table(name: str, *regions: MemoryRegion, kind: Callable[[], int] = file, fails: str) -> None:
    saying("share", table(*regions, kind=kind), fails, name=name, first=True)


_GOOD = MemoryRegion(0, MIB, 16 * MIB, 0)
bad_table("regions_overlap", _GOOD, replace(_GOOD, guest=4096, user=32 * MIB), fails="memory.guest-disjoint")
bad_table("addresses_overlap", _GOOD, replace(_GOOD, guest=4 * MIB), fails="memory.user-disjoint")
bad_table("region_of_nothing", replace(_GOOD, size=0), fails="memory.not-empty")
bad_table("region_wraps", replace(_GOOD, guest=(1 << 64) - 4096), fails="memory.no-wrap")
bad_table("region_crooked", replace(_GOOD, guest=512), fails="memory.aligned")
bad_table("memory_of_an_eventfd", _GOOD, kind=eventfd, fails="memory.files")
bad_table("memory_beyond_its_file", replace(_GOOD, offset=4096), fails="memory.inside-file")
bad_table("no_regions", fails="memory.table-not-empty")


@fault("memory.before-addresses", "memory.before-kick")
class MemoryAfterRings(Life):
    steps = tuple(step for step in moved("share", "set_up"))

    async def set_up(self) -> None:
        await self.make()
        await super().set_up()

    async def make(self) -> None:
        """The memory, of which the back-end is told later."""
        told, self.talk.set_memory = self.talk.set_memory, nothing  # type: ignore[method-assign]
        await super().share()
        self.talk.set_memory = told  # type: ignore[method-assign]

    async def share(self) -> None:
        await self.talk.set_memory(self.memory, by_slots=self.has(P.CONFIGURE_MEM_SLOTS))


async def _other_memory(life: Life) -> None:
    region = life.memory.regions[1]
    await life.talk.raw(F.SET_MEM_TABLE, MemoryTable((region.describe(),)), region.fd)


saying(TOP, only(tables, _other_memory), "memory.kept-for-rings", name="takes_the_rings_memory_away")


def slots(life: Life) -> bool:
    return life.has(P.CONFIGURE_MEM_SLOTS)


saying(TOP, only(slots, raw(F.REM_MEM_REG, SingleRegion(_GOOD))), "slots.known", name="removes_what_is_not_there")


@fault("slots.limit")
class TooManySlots(Life):
    async def slots(self) -> None:
        await super().slots()
        self.room = 32


@fault("slots.asked-first")
class SlotsUnasked(Life):
    steps = without("slots", "hotplug")


async def _both(life: Life) -> None:
    await life.talk.raw(F.SET_MEM_TABLE, life.memory.table(), *life.memory.fds)


saying(TOP, only(slots, _both), "slots.one-way", name="slots_and_tables")
