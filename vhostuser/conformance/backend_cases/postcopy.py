"""Postcopy, with pages that are really missing: bases, faults, waking, END, and loss. Sections VHOST_USER_POSTCOPY_*.

What belongs here: what one back-end must do, step by step. What does not: load and time (``vhostuser postcopy``).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from vhostuser.conformance.bench import Need
from vhostuser.conformance.migration import PAGE, PATTERN, advise, advised, migrate
from vhostuser.conformance.peer import MIB, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.drivers.blk import BlkRequest
from vhostuser.frontend import PostcopyClient
from vhostuser.protocol import (
    NEED_REPLY,
    VERSION,
    FrontendRequest,
    PostcopyAck,
    ProtocolFeature,
)
from vhostuser.uffd import Userfaultfd

F, P = FrontendRequest, ProtocolFeature
CASES: Theme[Peer] = Theme("postcopy", "Migration")
PAGEFAULT, SLOTS, UFFD, DISK = P.PAGEFAULT, P.CONFIGURE_MEM_SLOTS, Need.USERFAULTFD, Need.BLK
ADVISE, LISTEN, END = F.POSTCOPY_ADVISE.clause, F.POSTCOPY_LISTEN.clause, F.POSTCOPY_END.clause
TABLE, ADD = F.SET_MEM_TABLE.clause, F.ADD_MEM_REG.clause


async def _before_features(peer: Peer) -> None:
    """What a back-end was told when QEMU's destination advises it and listens: SET_FEATURES comes with the rings."""
    await peer.frontend.get_features()
    offered = await peer.frontend.get_protocol_features()
    await peer.frontend.set_protocol_features(offered & (PAGEFAULT.mask | P.REPLY_ACK.mask))
    await peer.frontend.set_owner()


# ---- ADVISE


@CASES.must("advise", "POSTCOPY_ADVISE is answered with no payload and one descriptor.", PAGEFAULT, section=ADVISE)
async def _(peer: Peer) -> None:
    await _before_features(peer)
    reaction = await peer.react(F.POSTCOPY_ADVISE, flags=VERSION)
    equal("bytes and descriptors of the reply", (len(reaction.body), reaction.fds), (0, 1))


@CASES.must("advise-userfaultfd", "The descriptor is a userfaultfd.", PAGEFAULT, section=ADVISE)
async def _(peer: Peer) -> None:
    await _before_features(peer)
    equal("the descriptor", _kind_of((await advise(peer)).uffd), "anon_inode:[userfaultfd]")


def _kind_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


@CASES.must("advise-again", "POSTCOPY_ADVISE may come again, as once for each queue pair.", PAGEFAULT, section=ADVISE)
async def _(peer: Peer) -> None:
    await advised(peer)
    for _ in range(2):
        again = await PostcopyClient.advise(peer.frontend)
        again.close()
    await peer.answers()


@CASES.must(
    "advise-only", "A migration that ends in precopy after ADVISE leaves everything as it was.", PAGEFAULT, DISK
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    client = await PostcopyClient.advise(peer.frontend)
    client.close()
    await lane.works()
    await peer.share(peer.memory)
    await lane.works()


@CASES.must("advise-leak", "The userfaultfd is closed with the connection.", PAGEFAULT, section=ADVISE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    before = peer.open_fds()
    for _ in range(10):
        (await PostcopyClient.advise(peer.frontend)).close()
        await peer.again()
        await peer.negotiate()
    check(peer.open_fds() <= before + 1, f"{before} descriptors", f"{peer.open_fds()} after ten connections")


# ---- LISTEN


@CASES.must("listen", "POSTCOPY_LISTEN is acknowledged.", PAGEFAULT, P.REPLY_ACK, section=LISTEN)
async def _(peer: Peer) -> None:
    await _before_features(peer)
    await advise(peer)
    await peer.accepts(F.POSTCOPY_LISTEN, flags=VERSION | NEED_REPLY)


@CASES.should(
    "listen-always", "POSTCOPY_LISTEN is acknowledged without REPLY_ACK too: QEMU waits.", PAGEFAULT, section=LISTEN
)
async def _(peer: Peer) -> None:
    await peer.negotiate(without={P.REPLY_ACK})
    client = await PostcopyClient.advise(peer.frontend)
    client.close()
    await peer.accepts(F.POSTCOPY_LISTEN, flags=VERSION | NEED_REPLY)


@CASES.must(
    "listen-again",
    "POSTCOPY_LISTEN may come again, as once for each queue pair.",
    PAGEFAULT,
    P.REPLY_ACK,
    section=LISTEN,
)
async def _(peer: Peer) -> None:
    await advised(peer)
    for _ in range(2):
        await peer.accepts(F.POSTCOPY_LISTEN, flags=VERSION | NEED_REPLY)


@CASES.should("listen-unadvised", "POSTCOPY_LISTEN without ADVISE is not done.", PAGEFAULT, P.REPLY_ACK, section=LISTEN)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(F.POSTCOPY_LISTEN, flags=VERSION | NEED_REPLY)


@CASES.should(
    "listen-mapped",
    "POSTCOPY_LISTEN is refused when there are regions: their pages were touched.",
    PAGEFAULT,
    section=LISTEN,
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    client = await PostcopyClient.advise(peer.frontend)
    client.close()
    await peer.refuses(F.POSTCOPY_LISTEN, flags=VERSION | NEED_REPLY)


# ---- bases


@CASES.must(
    "table",
    "SET_MEM_TABLE is answered with the same regions, and addresses in place of ours.",
    PAGEFAULT,
    UFFD,
    section=TABLE,
)
async def _(peer: Peer) -> None:
    await migrate(peer, by_slots=False)


@CASES.must(
    "slots",
    "ADD_MEM_REG is answered with its region, and an address in place of ours.",
    PAGEFAULT,
    SLOTS,
    UFFD,
    section=ADD,
)
async def _(peer: Peer) -> None:
    await migrate(peer, by_slots=True)


@CASES.must(
    "table-order", "The regions come back in their order, with size and offset as they were.", PAGEFAULT, section=TABLE
)
async def _(peer: Peer) -> None:
    client = await advised(peer)
    await client.listen()
    memory = peer.make_memory((0, 1 << 20), (1 << 32, 1 << 21))
    memory.add(8 << 20, 1 << 20, offset=1 << 20)
    back = [(region.guest, region.size, region.offset) for region in await peer.frontend.set_mem_table(memory)]
    sent = [(region.guest, region.size, region.offset) for region in memory.table().regions]
    equal("guest address, size and offset of each", back, sent)


def _acknowledged(name: str, rule: str, *, by_slots: bool, empty: bool) -> None:
    @CASES.must(name, rule, PAGEFAULT, UFFD, DISK, *((SLOTS,) if by_slots else ()), section=TABLE)
    async def _(peer: Peer) -> None:
        migration = await migrate(peer, by_slots=by_slots)
        lane = await migration.lane(acknowledge=(F.ADD_MEM_REG if by_slots else F.SET_MEM_TABLE, PostcopyAck(empty)))
        await lane.works()


_acknowledged("ack-empty", "The bases are acknowledged by an empty message.", by_slots=False, empty=True)
_acknowledged("ack-u64", "The bases are acknowledged by a u64 of 0, as QEMU does.", by_slots=False, empty=False)
_acknowledged("ack-slots", "One acknowledgement does for regions that came one by one.", by_slots=True, empty=False)


@CASES.must(
    "no-touch", "Before the acknowledgement nothing is touched, and no fault comes.", PAGEFAULT, UFFD, section=TABLE
)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    await asyncio.sleep(peer.quiet)  # nothing is asked: DPDK takes the next message for the acknowledgement
    faults = Userfaultfd(os.dup(migration.client.uffd))
    with faults:
        check(not faults.read(), "no fault", "a fault before the acknowledgement")
    check(not migration.present(0), "memory without a page", "a page was touched without a fault")


# ---- faults


@CASES.must("fault", "A missing page is waited for, and reported at the address that was told.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    await migration.blocked(lane)
    equal("faults at other addresses", migration.stats().stray, 0)
    migration.held.give()
    await lane.served()


@CASES.must("waits", "A request waits for its page: it is not returned before that has come.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    await migration.blocked(lane)
    await asyncio.sleep(peer.quiet)
    check(not lane.returned(), "the request under way", "it was returned while its page was missing")
    migration.held.give()
    await lane.served()


@CASES.must("no-hole-filled", "No page comes into being by a touch that was not reported.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    for _ in range(8):
        await lane.works()
    migration.server.prefetch()
    await asyncio.to_thread(migration.server.wait, peer.patience)
    equal("pages that were there before they were placed", migration.server.stats().present, 0)


@CASES.should("no-more-than-needed", "Pages that nobody needs are not asked for.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    await lane.works()
    await asyncio.sleep(peer.quiet)
    faults = migration.stats().faults
    check(faults < 100, "a fault for each page of the ring and of its requests", f"{faults} faults")


@CASES.must("control", "While a page is waited for the front-end is answered.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    await migration.blocked(lane)
    await peer.answers()
    migration.held.give()
    await lane.served()


@CASES.must("data", "What is in a page is what the device finds there.", PAGEFAULT, UFFD, DISK, Need.WRITABLE)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    # By hand, since whoever submits a write touches its data, which must be missing.
    write, read = lane.buffers(BlkRequest.write(0, PATTERN), slot=1), lane.buffers(BlkRequest.read(0, 8), slot=2)
    migration.held.pattern = write.data
    lane.describe((write.header, 16, False), (write.data, PAGE, False), (write.status, 1, True), first=8)
    lane.describe((read.header, 16, False), (read.data, PAGE, True), (read.status, 1, True), first=16)
    for number, head in enumerate((8, 16), 2):
        lane.push(head)
        lane.kick()
        await lane.used_to(number)
    check(peer.memory.read(read.data, PAGE) == PATTERN, "the bytes of the page that came", "others")


@CASES.must("two-regions", "Faults are told apart by region.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer, (0, 4 * MIB), (1 << 32, 4 * MIB))
    lane = await migration.lane(requests=1 << 32)
    await migration.blocked(lane)
    equal("faults at addresses of no region", migration.stats().stray, 0)
    migration.held.give()
    await lane.served()


@CASES.must(
    "two-regions-in-table", "Faults are told apart by region where they came in a table.", PAGEFAULT, UFFD, DISK
)
async def _(peer: Peer) -> None:
    migration = await migrate(peer, (0, 4 * MIB), (1 << 32, 4 * MIB), by_slots=False)
    lane = await migration.lane(requests=1 << 32)
    await migration.blocked(lane)
    migration.held.give()
    await lane.served()


@CASES.must("hugetlb", "Pages of hugetlbfs are waited for like any others.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer, memory=peer.make_huge_memory(8 * MIB))
    lane = await migration.lane(requests=4 * MIB)
    await lane.works()
    equal("pages that were there before they were placed", migration.server.stats().present, 0)


# ---- END


@CASES.must("end", "POSTCOPY_END is answered with 0, and the device goes on.", PAGEFAULT, UFFD, DISK, section=END)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    await lane.works()
    migration.server.prefetch()
    await asyncio.to_thread(migration.server.wait, peer.patience)
    await migration.client.end()
    await lane.works()


@CASES.must("end-again", "POSTCOPY_END may come again, as once for each queue pair.", PAGEFAULT, section=END)
async def _(peer: Peer) -> None:
    client = await advised(peer)
    await client.listen()
    for _ in range(2):
        await peer.accepts(F.POSTCOPY_END, flags=VERSION)


@CASES.must("second", "After END another migration can begin.", PAGEFAULT, section=ADVISE)
async def _(peer: Peer) -> None:
    client = await advised(peer)
    await client.listen()
    await client.end()
    await (await advise(peer)).listen()


# ---- loss


@CASES.must("loss", "When the front-end is lost no missing page is filled with zeros.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    guest = await migration.blocked(lane)
    peer.frontend.close()
    await asyncio.sleep(4 * peer.quiet)
    check(not migration.present(guest), "the hole left alone", "a page of zeros in the guest's memory")


@CASES.must("loss-then-next", "After a loss in postcopy the next front-end is served.", PAGEFAULT, UFFD, DISK)
async def _(peer: Peer) -> None:
    migration = await migrate(peer)
    lane = await migration.lane()
    await migration.blocked(lane)
    await peer.again()
    await peer.answers()
