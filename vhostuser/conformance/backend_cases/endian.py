"""The byte order of legacy rings. Section VHOST_USER_SET_VRING_ENDIAN; virtio 1.3, section 2.4.3 (legacy interfaces).

What is put into rings here is the same in either order, but for the ring: a read of sector 0 has a header of zeros.
"""

from __future__ import annotations

import asyncio

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import MIB, Peer
from vhostuser.conformance.suite import Theme, Violation, equal
from vhostuser.driverqueue import Descriptor, RawRing
from vhostuser.protocol import FrontendRequest, ProtocolFeature, VirtioFeature, VringEndian, VringState

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature
CASES: Theme[Peer] = Theme("endian", F.SET_VRING_ENDIAN.clause)
BIG, LITTLE = VringEndian.BIG, VringEndian.LITTLE
CROSS, ACK, DISK = P.CROSS_ENDIAN, P.REPLY_ACK, Need.BLK
TABLE = 5 * MIB
_LOOK = 0.001


async def _lane(peer: Peer, *orders: VringEndian, indirect: bool = False) -> Lane:
    """A legacy driver's ring, of which these orders were said, the last of which counts."""
    await peer.negotiate(*(V.RING_INDIRECT_DESC,) * indirect, legacy=True, also=(CROSS,))
    await peer.share()
    lane = peer.make_lane()
    for order in orders:
        await peer.frontend.set_vring_endian(lane.index, order)
    await lane.start()
    return lane


def _big(lane: Lane) -> RawRing:
    queue = lane.queue
    return RawRing(queue.memory, queue.size, queue.desc, queue.avail, queue.used, "big")


async def _used(lane: Lane, ring: RawRing, index: int) -> None:
    """Waits until the used index is ``index``; of a ring that is read in the other order it never is."""
    deadline = asyncio.get_running_loop().time() + lane.patience
    while ring.used_index != index:
        if asyncio.get_running_loop().time() > deadline:
            raise Violation(f"a used index of {index}", f"{ring.used_index} after {lane.patience:g} s")
        await asyncio.sleep(_LOOK)


async def _read(lane: Lane, ring: RawRing, table: int | None = None) -> None:
    """Reads sector 0 by this ring, and sees what was used."""
    buffers = lane.buffers()
    parts = ((buffers.header, 16, False), (buffers.data, 512, True), (buffers.status, 1, True))
    for number, (guest, length, writable) in enumerate(parts):
        flags = Descriptor.NEXT * (number < 2) | Descriptor.WRITE * writable
        ring.describe_at(ring.desc if table is None else table, number, guest, length, flags, number + 1)
    if table is not None:
        ring.describe(0, table, 48, Descriptor.INDIRECT)
    index = ring.available_index
    ring.make_available(index, [0])
    ring.available_index = index + 1
    lane.kick()
    await _used(lane, ring, index + 1)
    equal("the used entry", ring.used_entry(index), (0, 513))
    equal("the status", lane.memory.read(buffers.status, 1)[0], 0)


@CASES.must("big", "A ring that was said to be big-endian is read and written so.", CROSS, DISK)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, BIG)
    ring = _big(lane)
    for _ in range(3):
        await _read(lane, ring)


@CASES.must("big-indirect", "So are indirect tables of such a ring.", CROSS, DISK, V.RING_INDIRECT_DESC)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, BIG, indirect=True)
    await _read(lane, _big(lane), TABLE)


@CASES.must("little", "A ring that was said to be little-endian works as one of which nothing was said.", CROSS, DISK)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, LITTLE)
    await lane.works()


@CASES.must("said-again", "What was said last of a ring that does not run counts.", CROSS, DISK)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, BIG, LITTLE)
    await lane.works()


@CASES.must("goes-on", "A big-endian ring goes on where it stopped, by a base that is a plain number.", CROSS, DISK)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, BIG)
    await _read(lane, _big(lane))
    equal("the base", await lane.stop(), 1)
    await lane.start()
    await _read(lane, _big(lane))


@CASES.should("modern", "A big-endian ring is refused where VERSION_1 was negotiated.", CROSS, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(CROSS,))
    await peer.refuses(F.SET_VRING_ENDIAN, VringState(peer.index, BIG))


@CASES.should("neither", "An order that is neither is refused.", CROSS, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate(legacy=True, also=(CROSS,))
    await peer.refuses(F.SET_VRING_ENDIAN, VringState(peer.index, 2))
