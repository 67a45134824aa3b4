"""Rings whose addresses go through an IOMMU: misses, updates, invalidations, permissions. Section "IOMMU support".

Guest memory lies at one GiB, its halves the other way round behind the IOMMU, and drivers' addresses begin at 0: who
takes the one for the other finds nothing, or the wrong half.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import MEMORY, Kind, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.drivers.blk import SECTOR, BlkRequest
from vhostuser.frontend import Iommu
from vhostuser.protocol import FrontendRequest, Iotlb, IotlbType, ProtocolFeature, VirtioFeature

F, P, V, TYPE = FrontendRequest, ProtocolFeature, VirtioFeature, IotlbType
CASES: Theme[Peer] = Theme("iommu", "IOMMU support")
ON, CHANNEL, RINGS, BLK = V.ACCESS_PLATFORM, P.BACKEND_REQ, Need.RINGS, Need.BLK
BASE, HALF, PAGE, TOP = 1 << 30, MEMORY // 2, 4096, 1 << 64
FLOOD = 1500
"""Translations that are told without need: more than most tables of a device have room for."""


async def _behind(peer: Peer, *features: VirtioFeature, access: int = 3) -> Iommu:
    """Negotiated, memory shared and mapped, the channel served; ``access`` is that to what requests write into."""
    await peer.negotiate(ON, *features)
    memory = await peer.share(peer.make_memory((BASE, MEMORY)))
    iommu = Iommu(peer.frontend, memory)
    peer.own(iommu.close)
    iommu.map(0, BASE + HALF, HALF)
    iommu.map(HALF, BASE, HALF, access)
    await iommu.serve()
    peer.adopt(iommu.view)
    return iommu


async def _lane(peer: Peer, *features: VirtioFeature) -> tuple[Lane, Iommu]:
    """A ring that runs there and has served a request."""
    iommu = await _behind(peer, *features)
    lane = peer.make_lane()
    await lane.start()
    await lane.works()
    return lane, iommu


def _update(iommu: Iommu, iova: int = 2 * MEMORY, size: int = PAGE, *, behind: int = 0, access: int = 3) -> Iotlb:
    """An update to guest memory ``behind`` bytes from its beginning."""
    return Iotlb(iova, size, iommu.user(BASE) + behind, access, TYPE.UPDATE)


def _invalidate(iova: int, size: int) -> Iotlb:
    return Iotlb(iova, size, 0, 0, TYPE.INVALIDATE)


def _asked(iommu: Iommu, pages: Iterable[int]) -> bool:
    return bool(set(pages) & {miss.iova // PAGE for miss in iommu.misses})


# ---- misses and updates


@CASES.must("works", "A ring and its requests are found through the IOMMU.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, _ = await _lane(peer)
    for _ in range(20):
        await lane.works()


@CASES.must("data", "What is read comes where the IOMMU says.", ON, CHANNEL, BLK)
async def _(peer: Peer) -> None:
    lane, _ = await _lane(peer)
    for sector in range(8):
        data = bytes([sector + 1]) * SECTOR
        await lane.works(BlkRequest.write(sector, data))
        (answer,) = await lane.works(BlkRequest.read(sector, 1))
        equal(f"sector {sector}", answer.data, data)


@CASES.must("miss", "A miss names an address that is needed, and an access that exists.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    _, iommu = await _lane(peer)
    for miss in iommu.misses:
        check(miss.iova < MEMORY, f"an address below {MEMORY:#x}", f"{miss.iova:#x}")
        check(miss.permissions in (1, 2, 3), "permissions 1, 2 or 3", str(miss.permissions))


@CASES.should("told-early", "What was told before is not asked for.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    iommu = await _behind(peer)
    await iommu.tell(0, HALF)
    await iommu.tell(HALF, HALF)
    lane = peer.make_lane()
    await lane.start()
    await lane.works()
    equal("misses", len(iommu.misses), 0)


@CASES.must("update-reply", "An update is answered with 0, asked for or not.", ON)
async def _(peer: Peer) -> None:
    iommu = await _behind(peer)
    await peer.accepts(F.IOTLB_MSG, _update(iommu))


@CASES.must("update-again", "An update that says what is known is done.", ON)
async def _(peer: Peer) -> None:
    iommu = await _behind(peer)
    for _ in range(2):
        await peer.accepts(F.IOTLB_MSG, _update(iommu))


@CASES.must("waits", "A request whose translation is missing waits, and goes on when it has come.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, iommu = await _lane(peer)
    await peer.frontend.iotlb_msg(_invalidate(lane.at, MEMORY - lane.at))
    iommu.answering.clear()
    lane.offer()
    lane.kick()
    await lane.idle()
    iommu.answering.set()
    await lane.served()


@CASES.must("stops", "A ring that waits for a translation is stopped at once.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    iommu = await _behind(peer)
    iommu.answering.clear()
    lane = peer.make_lane()
    await lane.start()
    lane.offer()
    lane.kick()
    await asyncio.wait_for(iommu.asked(), peer.patience)
    await lane.stop()
    equal("the base", lane.base, lane.queue.first_base)


@CASES.should("flood", f"{FLOOD} translations that nobody needs do no harm.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, iommu = await _lane(peer)
    for page in range(FLOOD):
        await peer.frontend.iotlb_msg(_update(iommu, 2 * MEMORY + 2 * page * PAGE))
    await lane.works()


# ---- invalidations


@CASES.must("invalidate-reply", "An invalidation is answered with 0, whether anything was there or not.", ON)
async def _(peer: Peer) -> None:
    iommu = await _behind(peer)
    for _ in range(2):
        await peer.accepts(F.IOTLB_MSG, _invalidate(2 * MEMORY, PAGE))
        await peer.accepts(F.IOTLB_MSG, _update(iommu))


@CASES.must("invalidate-all", "An invalidation of all addresses is done.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, _ = await _lane(peer)
    await peer.frontend.iotlb_msg(_invalidate(0, TOP - 1))
    await lane.works()


@CASES.must("forgotten", "What was invalidated is asked for anew.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, iommu = await _lane(peer)
    iommu.misses.clear()
    await peer.frontend.iotlb_msg(_invalidate(lane.at, MEMORY - lane.at))
    await lane.works()
    check(_asked(iommu, range(lane.at // PAGE, MEMORY // PAGE)), "a miss for the request", "none")


@CASES.must("ring", "A ring whose own addresses were invalidated asks for them anew, and goes on.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, iommu = await _lane(peer)
    iommu.misses.clear()
    await peer.frontend.iotlb_msg(_invalidate(0, HALF))
    await lane.works()
    check(_asked(iommu, [lane.queue.desc // PAGE]), "a miss for the ring", "none")


@CASES.must("moved", "After an invalidation data goes where the addresses lead to then.", ON, CHANNEL, BLK)
async def _(peer: Peer) -> None:
    lane, iommu = await _lane(peer)
    buffers = lane.buffers(slot=0)
    page = buffers.data - buffers.data % PAGE
    await iommu.unmap(page, PAGE)
    iommu.remap(page, BASE + 3 * PAGE, PAGE)
    iommu.memory.write(BASE + 3 * PAGE, b"\xa5" * PAGE)
    lane.offer()
    lane.kick()
    await lane.answers()
    there = iommu.memory.read(BASE + 3 * PAGE + buffers.data % PAGE, SECTOR)
    check(there != b"\xa5" * SECTOR, "the data in the new place", "nothing there")


@CASES.must("in-use", "Invalidations while requests run lose none.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, _ = await _lane(peer)
    for _ in range(20):
        lane.offer(count=8)
        lane.kick()
        await peer.frontend.iotlb_msg(_invalidate(0, MEMORY))
        await lane.served()


@CASES.must("restart", "A ring that was stopped is found again.", ON, CHANNEL, RINGS)
async def _(peer: Peer) -> None:
    lane, _ = await _lane(peer)
    for _ in range(3):
        await lane.stop()
        await lane.start()
        await lane.works()


# ---- permissions


@CASES.must("read-only", "What may only be read is not written.", ON, CHANNEL, BLK)
async def _(peer: Peer) -> None:
    iommu = await _behind(peer, access=1)
    lane = peer.make_lane(requests=HALF)
    await lane.start()
    buffers = lane.plain_chain()
    before = iommu.view.read(HALF, HALF)
    lane.push(0)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.answers()
    written = iommu.view.read(buffers.data, SECTOR) != before[buffers.data - HALF :][:SECTOR]
    written |= iommu.view.read(buffers.status, 1) != before[buffers.status - HALF :][:1]
    check(not written, "memory untouched", "data or a status written")
    check(bool(iommu.misses), "the address asked for", "no question")


# ---- what is refused


_BAD: dict[str, tuple[str, Callable[[Iommu], Iotlb]]] = {
    "size": ("An update of nothing is refused.", lambda iommu: _update(iommu, size=0)),
    "wrap": ("An update beyond the last address is refused.", lambda iommu: _update(iommu, TOP - PAGE, 2 * PAGE)),
    "outside": ("An update to what is no guest memory is refused.", lambda iommu: _update(iommu, behind=MEMORY)),
    "across": (
        "An update that ends outside of guest memory is refused.",
        lambda iommu: _update(iommu, size=2 * MEMORY),
    ),
    "no-access": ("An update without a permission is refused.", lambda iommu: _update(iommu, access=0)),
    "bad-access": (
        "An update with no permission that exists is refused.",
        lambda iommu: _update(iommu, access=4),
    ),
    "miss": ("A miss from the front-end is refused.", lambda _: Iotlb(0, 0, 0, 1, TYPE.MISS)),
    "failure": ("An access failure from the front-end is refused.", lambda _: Iotlb(0, 0, 0, 1, TYPE.ACCESS_FAIL)),
}


def _refused(name: str) -> None:
    rule, message = _BAD[name]

    @CASES.should(f"refused-{name}", rule, ON, CHANNEL)
    async def _(peer: Peer) -> None:
        iommu = await _behind(peer)
        reaction = await peer.react(F.IOTLB_MSG, message(iommu))
        check(reaction.kind in (Kind.REFUSED, Kind.CLOSED), "a refusal, or the connection closed", str(reaction))


for _name in _BAD:
    _refused(_name)


@CASES.should("refused-other", "An update that contradicts what is known and valid is refused.", ON, CHANNEL)
async def _(peer: Peer) -> None:
    iommu = await _behind(peer)
    await peer.accepts(F.IOTLB_MSG, _update(iommu, size=2 * PAGE))
    await peer.refuses(F.IOTLB_MSG, _update(iommu, 2 * MEMORY + PAGE, behind=3 * PAGE))


# ---- the dirty log


@CASES.must(
    "log", "The log is marked at guest addresses.", ON, CHANNEL, BLK, P.LOG_SHMFD, V.LOG_ALL, section="Migration"
)
async def _(peer: Peer) -> None:
    lane, iommu = await _lane(peer)
    peer.adopt(iommu.memory)
    log = peer.make_log()
    await peer.frontend.start_log(log)
    data = lane.buffers(slot=0).data
    await lane.works()
    marked = {page for guest, length in log.take() for page in range(guest // PAGE, (guest + length) // PAGE)}
    wanted = (BASE + HALF + data) // PAGE
    check(wanted in marked, f"page {wanted * PAGE:#x} marked", " ".join(hex(page * PAGE) for page in sorted(marked)))
