"""Memory tables and slots: whole, in part, hostile, and while rings run. Sections of the memory messages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import MEMORY, MIB, Peer
from vhostuser.conformance.suite import Skipped, Theme, check
from vhostuser.frontend import SharedMemory
from vhostuser.protocol import (
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    SingleRegion,
)

F, P = FrontendRequest, ProtocolFeature
TABLE: Theme[Peer] = Theme("memory", F.SET_MEM_TABLE.clause)
SLOTS: Theme[Peer] = Theme("slots", F.ADD_MEM_REG.clause)
RINGS, ACK, SLOT = Need.RINGS, P.REPLY_ACK, P.CONFIGURE_MEM_SLOTS
REMOVE = F.REM_MEM_REG.clause
USER = 0x7000_0000_0000
"""User addresses for regions that are only described."""


async def _lane_in(peer: Peer, memory: SharedMemory, *, by_slots: bool = False) -> Lane:
    """A ring that runs in this memory, of which the back-end is told in one of the two ways."""
    await peer.share(memory, by_slots=by_slots)
    lane = peer.make_lane()
    await lane.start()
    return lane


# ---- tables that must work


@TABLE.must("eight-regions", "A table has up to eight regions.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    pieces = [(number * 2 * MIB, 2 * MIB - 4096) for number in range(7)]
    lane = await _lane_in(peer, peer.make_memory(*pieces, (1 << 40, MIB)))
    await lane.works()


@TABLE.must("high", "Guest addresses have 64 bits: a region may begin above 4 GiB.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share(peer.make_memory((0, MIB), (5 << 32, 2 * MIB)))
    lane = peer.make_lane(at=5 << 32, requests=(5 << 32) + 65536)
    await lane.start()
    await lane.works()


async def _at_offset(peer: Peer, offset: int) -> None:
    await peer.negotiate()
    memory = peer.make_memory((16 * MIB, 65536))
    memory.add(0, MEMORY, offset=offset)
    lane = await _lane_in(peer, memory)
    await lane.works()


@TABLE.must("offset", "A region may begin at an offset of its file.", RINGS)
async def _(peer: Peer) -> None:
    await _at_offset(peer, 3 * 4096)


@TABLE.should("odd-offset", "The offset need not be a multiple of the page size.", RINGS)
async def _(peer: Peer) -> None:
    await _at_offset(peer, 4096 + 512)


@TABLE.must("one-file", "Several regions may lie in one file, as below and above the hole at 4 GiB.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = peer.make_memory((0, 4 * MIB))
    os.truncate(memory.fds[0], 8 * MIB)
    memory.add(1 << 32, 4 * MIB, offset=4 * MIB, file=memory.fds[0])
    await peer.share(memory)
    lane = peer.make_lane(requests=1 << 32)
    await lane.start()
    await lane.works()


@TABLE.must("hugetlb", "Memory may lie in huge pages.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    lane = await _lane_in(peer, peer.make_huge_memory(8 * MIB))
    await lane.works()


@TABLE.must("descriptors-closed", "The descriptors of a table are closed or used, not kept: tables leave none behind.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    before = peer.open_fds()
    for _ in range(20):
        await peer.share(memory)
    await peer.frontend.get_features()
    check(peer.open_fds() <= before + 1, f"{before} descriptors", f"{peer.open_fds()} after 20 tables")


@TABLE.must("set-twice", "A table takes the place of the one before: a ring that is set up anew works in it.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    again = await _lane_in(peer, peer.make_memory())
    await again.works()


@TABLE.must("after-rings", "A table may come after the ring's size and base.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.frontend.set_vring_num(peer.index, 64)
    await peer.frontend.set_vring_base(peer.index, 0)
    lane = await _lane_in(peer, peer.make_memory())
    await lane.works()


# ---- changes while rings run


async def _under_load(lane: Lane, change: Callable[[], Awaitable[object]]) -> None:
    """Changes something five times while requests come and go, of which none may be lost."""
    done = False

    async def load() -> None:
        while not done:
            await lane.works()

    loading = asyncio.ensure_future(load())
    try:
        for _ in range(5):
            await asyncio.sleep(0.005)
            await change()
    finally:
        done = True
        await loading


@TABLE.must(
    "under-load", "The same table may be sent again while rings run; no request is lost.", RINGS, section="Ring states"
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await _under_load(lane, lambda: peer.frontend.set_mem_table(peer.memory))
    await lane.stop()


@TABLE.must("grows-under-load", "A region may be added to the table while rings run.", RINGS, section="Ring states")
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    guest = iter(range(16 * MIB, 64 * MIB, MIB))

    async def grow() -> None:
        peer.memory.add(next(guest), MIB)
        await peer.frontend.set_mem_table(peer.memory)

    await _under_load(lane, grow)


@SLOTS.must(
    "under-load", "Regions may come and go while rings run; no request is lost.", RINGS, SLOT, section="Ring states"
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()

    async def come_and_go() -> None:
        added = peer.memory.add(16 * MIB, MIB)
        await peer.frontend.add_mem_reg(added)
        await peer.frontend.rem_mem_reg(added)
        peer.memory.remove(added)

    await _under_load(lane, come_and_go)


@TABLE.must("unmaps-ring", "A table without the memory of a ring that runs does no harm.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    elsewhere = peer.make_memory((32 * MIB, MIB))
    await peer.react(F.SET_MEM_TABLE, elsewhere.table(), elsewhere.fds)
    lane.kick()
    await peer.serves_another()


@TABLE.must("unmaps-data", "A table without the data of a request does no harm.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    both = peer.make_memory((0, MIB), (MIB, MIB))
    lane = await _lane_in(peer, both)
    await lane.works()
    lane.usual_chain()
    both.remove(both.regions[1])
    await peer.frontend.set_mem_table(both)
    lane.push(0)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.serves_another()


# ---- tables that no front-end may send


def _refused(name: str, rule: str, *regions: MemoryRegion, fds: int = -1) -> None:
    """Regions in one file of a megabyte, with as many descriptors as there are regions, or ``fds``."""

    @TABLE.should(f"refused.{name}", rule, ACK)
    async def _(peer: Peer) -> None:
        await peer.negotiate()
        (file,) = peer.make_memory((0, MIB)).fds
        count = len(regions) if fds < 0 else fds
        table = len(regions).to_bytes(8, "little") + b"".join(MemoryTable((region,)).pack()[8:] for region in regions)
        await peer.refuses(F.SET_MEM_TABLE, table, [file] * count)


def _region(guest: int, size: int = 65536, user: int = USER, offset: int = 0) -> MemoryRegion:
    return MemoryRegion(guest, size, user, offset)


_TWO = (_region(0), _region(MIB, user=USER + MIB))
_refused("empty-region", "A region of no bytes is refused.", _region(0, 0))
_refused("guest-wraps", "A region that goes on at guest address 0 is refused.", _region((1 << 64) - 4096))
_refused("user-wraps", "A region that goes on at user address 0 is refused.", _region(0, user=(1 << 64) - 4096))
_refused("offset-wraps", "A region whose offset and size wrap is refused.", _region(0, offset=(1 << 64) - 4096))
_refused("huge", "A region larger than any file is refused.", _region(0, 1 << 62))
_refused("beyond-file", "A region that goes on behind its file is refused.", _region(0, 2 * MIB))
_refused(
    "guest-overlap", "Regions that overlap in guest addresses are refused.", _region(0), _region(4096, user=USER + MIB)
)
_refused(
    "user-overlap", "Regions that overlap in user addresses are refused.", _region(0), _region(MIB, user=USER + 4096)
)
_refused("too-few-descriptors", "A table with fewer descriptors than regions is refused.", *_TWO, fds=1)
_refused("too-many-descriptors", "A table with more descriptors than regions is refused.", *_TWO, fds=3)
_refused(
    "nine", "A table of more than eight regions is refused.", *[_region(n * MIB, user=USER + n * MIB) for n in range(9)]
)


@TABLE.must("lying-count", "A count of regions that is not that of the payload is not believed.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = peer.make_memory()
    await peer.refuses(F.SET_MEM_TABLE, (200).to_bytes(8, "little") + memory.table().pack()[8:], memory.fds)
    await peer.serves_another()


@TABLE.should("refused.eventfd", "A descriptor that cannot be mapped is refused.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(F.SET_MEM_TABLE, MemoryTable((_region(0),)), (peer.eventfd(),))


@TABLE.should("refusal-keeps-table", "A table that is refused leaves the one before in force.", ACK, RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.refuses(F.SET_MEM_TABLE, MemoryTable((_region(0),)), (peer.eventfd(),))
    await lane.works()


@TABLE.must("empty", "A table without regions does no harm.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.react(F.SET_MEM_TABLE, bytes(8))
    await peer.serves_another()


# ---- files that shrink


@TABLE.must("file-shrinks-ring", "A file that is cut off under a ring does not end the process (SIGBUS).", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = peer.make_memory((0, MIB), (MIB, 4 * MIB))
    lane = await _lane_in(peer, memory)
    await lane.works()
    os.truncate(memory.fds[0], 0)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.serves_another()


@TABLE.must(
    "file-shrinks-data", "A file that is cut off under a request's data does not end the process (SIGBUS).", RINGS
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = peer.make_memory((0, MIB), (MIB, 4 * MIB))
    lane = await _lane_in(peer, memory)
    await lane.works()
    lane.usual_chain()
    os.truncate(memory.fds[1], 0)
    lane.push(0)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.serves_another()


# ---- slots


@SLOTS.must("added", "Memory may come region by region.", RINGS, SLOT)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    lane = await _lane_in(peer, peer.make_memory((0, MIB), (MIB, 4 * MIB)), by_slots=True)
    await lane.works()


@SLOTS.must("many", "As many regions as GET_MAX_MEM_SLOTS says can be added, up to 512 of them tried.", RINGS, SLOT)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    slots = min(await peer.frontend.get_max_mem_slots(), 512)
    pieces = [(64 * MIB + number * MIB, 4096) for number in range(slots - 1)]
    lane = await _lane_in(peer, peer.make_memory((0, 4 * MIB), *pieces), by_slots=True)
    await lane.works()


@SLOTS.must("removed", "A region that was removed can be added again.", SLOT, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    added = memory.add(16 * MIB, MIB)
    for _ in range(3):
        await peer.frontend.add_mem_reg(added)
        await peer.frontend.rem_mem_reg(added)


@SLOTS.must(
    "removed-offset",
    "What is removed is named by guest, user and size; the offset is ignored.",
    SLOT,
    ACK,
    section=REMOVE,
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    added = memory.add(16 * MIB, MIB)
    await peer.frontend.add_mem_reg(added)
    known = added.describe()
    described = SingleRegion(MemoryRegion(known.guest, known.size, known.user, 4096))
    await peer.accepts(F.REM_MEM_REG, described)
    await peer.refuses(F.REM_MEM_REG, described)


@SLOTS.must("removed-descriptor", "A descriptor that comes with a removal is closed.", SLOT, section=REMOVE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    added = memory.add(16 * MIB, MIB)
    await peer.frontend.add_mem_reg(added)
    read, write = peer.pipe()
    await peer.react(F.REM_MEM_REG, SingleRegion(added.describe()), (write,))
    check(await peer.let_go(read, write), "the descriptor closed", "it is still open in the back-end")


@SLOTS.must("removed-unknown", "A region that was never added is not removed.", SLOT, ACK, section=REMOVE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    await peer.refuses(F.REM_MEM_REG, SingleRegion(_region(32 * MIB)))


@SLOTS.must("removed-other-user", "A region at another user address is another region.", SLOT, ACK, section=REMOVE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    known = memory.regions[0].describe()
    await peer.refuses(F.REM_MEM_REG, SingleRegion(MemoryRegion(known.guest, known.size, known.user + 4096, 0)))


@SLOTS.must("removed-ring", "The region of a ring that runs may be removed without harm.", SLOT, RINGS, section=REMOVE)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.react(F.REM_MEM_REG, SingleRegion(peer.memory.regions[0].describe()))
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.serves_another()


@SLOTS.must("added-unused", "A region beside those of the ring changes nothing for it.", SLOT, RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.frontend.add_mem_reg(peer.memory.add(16 * MIB, MIB))
    await lane.works()


@SLOTS.must("added-used", "A region is of use from the answer on.", SLOT, RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.frontend.add_mem_reg(peer.memory.add(16 * MIB, 4 * MIB))
    await lane.stop()
    other = peer.make_lane(requests=16 * MIB)
    await other.start()
    await other.works()


@SLOTS.should("added-twice", "A region that is there already is refused.", SLOT, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    await peer.refuses(F.ADD_MEM_REG, SingleRegion(memory.regions[0].describe()), memory.fds)


@SLOTS.should("added-overlap", "A region that overlaps one that is there is refused.", SLOT, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    await peer.refuses(F.ADD_MEM_REG, SingleRegion(_region(4096)), memory.fds)


@SLOTS.should("added-empty", "A region of no bytes is refused.", SLOT, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    await peer.refuses(F.ADD_MEM_REG, SingleRegion(_region(32 * MIB, 0)), memory.fds)


@SLOTS.should("added-beyond-file", "A region that goes on behind its file is refused.", SLOT, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    await peer.refuses(F.ADD_MEM_REG, SingleRegion(_region(32 * MIB, 16 * MIB)), memory.fds)


@SLOTS.should("too-many", "More regions than GET_MAX_MEM_SLOTS says are refused.", SLOT, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    slots = await peer.frontend.get_max_mem_slots()
    if slots > 1024:
        raise Skipped(f"{slots} slots are too many to try")
    (file,) = peer.make_memory((0, 4096)).fds
    for number in range(slots):
        await peer.accepts(F.ADD_MEM_REG, _small(number), (file,))
    await peer.refuses(F.ADD_MEM_REG, _small(slots), (file,))


def _small(number: int) -> SingleRegion:
    return SingleRegion(MemoryRegion(number * 8192, 4096, USER + number * 8192, 0))


@SLOTS.must("leak", "Regions that come and go leave no descriptor behind.", SLOT)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    added = memory.add(16 * MIB, MIB)
    await peer.frontend.add_mem_reg(added)
    await peer.frontend.rem_mem_reg(added)
    before = peer.open_fds()
    for _ in range(20):
        await peer.frontend.add_mem_reg(added)
        await peer.frontend.rem_mem_reg(added)
    await peer.frontend.get_features()
    check(peer.open_fds() <= before, f"{before} descriptors", f"{peer.open_fds()} after 20 regions")


@SLOTS.must("table-replaces", "A table takes the place of regions that were added.", SLOT, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = peer.make_memory()
    await peer.share(memory, by_slots=True)
    await peer.share(peer.make_memory((64 * MIB, MIB)))
    await peer.accepts(F.ADD_MEM_REG, SingleRegion(memory.regions[0].describe()), memory.fds)
