"""What packed rings alone have: places, wrap counters, buffer ids, event suppression structures. Virtio 1.3, 2.8.

What belongs here: rules without a counterpart in split rings. What does not: those that both have (``twins``).
"""

from __future__ import annotations

import asyncio

from vhostuser.conformance.bench import Need
from vhostuser.conformance.bytewise import AVAIL, DISABLE, ENABLE, USED, PackedBytes
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import MIB, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.driverqueue import Descriptor
from vhostuser.drivers.blk import BlkStatus
from vhostuser.protocol import FrontendRequest, VirtioFeature

F, V = FrontendRequest, VirtioFeature
CASES: Theme[Peer] = Theme("packed", "Packed Virtqueues")
RINGS, DISK, PACKED, INDIRECT, EVENT_IDX = Need.RINGS, Need.BLK, V.RING_PACKED, V.RING_INDIRECT_DESC, V.RING_EVENT_IDX
NEXT, WRITE, TABLE = Descriptor.NEXT, Descriptor.WRITE, Descriptor.INDIRECT
AWAY = 5 * MIB
"""Guest address of an indirect table."""
BASE = F.SET_VRING_BASE.clause


async def _made(peer: Peer, *features: VirtioFeature, size: int = 64, indirect: bool = False) -> Lane:
    """A packed ring that the back-end does not know yet."""
    peer.packed = True
    await peer.negotiate(*features)
    await peer.share()
    return peer.make_lane(size=size, indirect=indirect)


async def _lane(peer: Peer, *features: VirtioFeature, size: int = 64, indirect: bool = False) -> Lane:
    """One that is started."""
    lane = await _made(peer, *features, size=size, indirect=indirect)
    await lane.start()
    return lane


def _ring(lane: Lane) -> PackedBytes:
    assert isinstance(lane.bytes, PackedBytes)
    return lane.bytes


async def _status_is_ok(lane: Lane, address: int) -> None:
    equal("the status", lane.memory.read(address, 1)[0], int(BlkStatus.OK))


# ---- sizes and rounds


def _goes_round(name: str, rule: str, *features: VirtioFeature, size: int, count: int, rounds: int) -> None:
    @CASES.must(name, rule, RINGS, PACKED, *features)
    async def _(peer: Peer) -> None:
        lane = await _lane(peer, *features, size=size, indirect=INDIRECT in features)
        for _ in range(rounds):
            lane.offer(count=count)
            lane.kick()
            await lane.served()


_goes_round("size-5", "A packed ring may have five entries: its size need not be a power of two.",
            size=5, count=1, rounds=20)  # fmt: skip
_goes_round("size-100", "A packed ring may have a hundred entries.", size=100, count=16, rounds=20)
_goes_round("size-1", "A packed ring may have one entry, whose wrap counter turns each time.",
            INDIRECT, size=1, count=1, rounds=8)  # fmt: skip
_goes_round("wrap", "Places go on from the last to the first with the other wrap counter, also inside of a chain.",
            size=7, count=2, rounds=30)  # fmt: skip


# ---- where it begins


def _begins(name: str, rule: str, place: int) -> None:
    @CASES.must(name, rule, RINGS, PACKED, section=BASE)
    async def _(peer: Peer) -> None:
        lane = await _made(peer, size=16)
        ring = _ring(lane)
        ring.go_to(place)
        lane.base = ring.base_at(place)
        lane.usual_chain()
        await lane.start()
        for number in range(1, 9):
            lane.push(0)
            lane.kick()
            await lane.used_to(number)


_begins("base-place", "A packed ring begins at the place of its base, not at the first.", 5)
_begins("base-wrap", "The wrap counters of a base count: a packed ring may begin in a round with counter 0.", 16 + 5)


@CASES.must("base-half", "A base has the used place and its wrap counter in its upper half.", RINGS, PACKED,
            section=F.GET_VRING_BASE.clause)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer, size=16)
    for _ in range(6):  # into the second round
        await lane.works()
    base = await lane.stop()
    equal("the upper half of the base", base >> 16, lane.queue.base >> 16)


@CASES.must("reset", "A ring that is set up anew has its wrap counters from the base, not from before.", RINGS, PACKED,
            section=BASE)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer, size=4)
    for _ in range(2):  # into the second round
        await lane.works()
    await lane.stop()
    fresh = peer.make_lane(size=4)  # which clears the ring, as a guest that boots again does
    await fresh.start()
    for _ in range(3):
        await fresh.works()


# ---- what is available


@CASES.must("first-last", "A chain is not there before its first descriptor is, whatever lies behind it.",
            RINGS, PACKED)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    ring = _ring(lane)
    lane.usual_chain()
    ring.push_but_first(0)
    lane.kick()
    await lane.stays_at(0)
    ring.push_first()
    lane.kick()
    await lane.used_to(1)


def _left_alone(name: str, rule: str, mark: int) -> None:
    @CASES.must(name, rule, RINGS, PACKED)
    async def _(peer: Peer) -> None:
        lane = await _lane(peer)
        ring = _ring(lane)
        await lane.works()
        lane.usual_chain()
        ring.push_but_first(0)
        ring.push_first(mark)
        seen = ring.first_row
        lane.kick()
        await lane.frontend.get_features()
        await asyncio.sleep(lane.quiet)
        equal("the descriptor", ring.first_row, seen)
        ring.push_first()
        lane.kick()
        await lane.used_to(1)


_left_alone("flags-equal", "A descriptor whose AVAIL and USED flags are equal is not available.", AVAIL | USED)
_left_alone("other-round", "A descriptor that is available in the other round is not available in this one.", USED)


# ---- what is returned


@CASES.must("id", "A chain is returned by its buffer id, which may be any number.", RINGS, PACKED)
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    lane.usual_chain()
    for number, identity in enumerate((0xFFFF, 7, 0xFFFF, 0x8000)):
        _ring(lane).push_as(identity, 0)
        lane.kick()
        await lane.used_to(number + 1)
        equal("the buffer id", lane.bytes.used_entry(number)[0], identity)


@CASES.must("id-of-last", "The buffer id of a chain is that of its last descriptor.", DISK, PACKED)
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    lane.plain_chain()
    _ring(lane).push_as(9, 0, others=3)
    lane.kick()
    await lane.used_to(1)
    equal("the buffer id", lane.bytes.used_entry(0)[0], 9)


@CASES.must("written", "A used descriptor has the flag WRITE where something was written.", DISK, PACKED)
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    lane.plain_chain()
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the used length", lane.bytes.used_entry(0)[1], 513)  # which is 0 without the flag


@CASES.must("skipped", "A chain is returned in the place of its first descriptor; the next, behind its last.",
            DISK, PACKED)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    lane.plain_chain(first=0)
    lane.plain_chain(first=8)
    lane.push(0, 8)
    lane.kick()
    ring = _ring(lane)
    for _ in range(int(lane.patience * 1000)):
        if ring.is_used(3):
            break
        await asyncio.sleep(0.001)
    equal("the places that are used", [place for place in range(6) if ring.is_used(place)], [0, 3])


# ---- indirect tables


@CASES.must("table-next", "In a packed ring's table descriptors follow each other: NEXT and ids mean nothing there.",
            DISK, PACKED, INDIRECT)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer, INDIRECT)
    buffers, ring = lane.buffers(), _ring(lane)
    ring.write_row(AWAY, (buffers.header, 16, 5, 0))
    ring.write_row(AWAY + 16, (buffers.data, 512, 6, WRITE))
    ring.write_row(AWAY + 32, (buffers.status, 1, 7, WRITE | NEXT))
    lane.bytes.describe(0, AWAY, 48, TABLE)
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    await _status_is_ok(lane, buffers.status)
    equal("the buffer id", lane.bytes.used_entry(0)[0], 0)


# ---- notifications


@CASES.must("event-round", "With EVENT_IDX a place counts with its wrap counter: in another round nobody is called.",
            RINGS, PACKED, EVENT_IDX)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer, EVENT_IDX)
    await lane.works()
    _ring(lane).want_call_at(lane.queue.size)
    await lane.calm()
    await lane.works()
    check(not await lane.called(within=peer.quiet), "no call", "a call")


@CASES.should("event-behind", "With EVENT_IDX the driver is called when a place inside of a chain is passed.",
            RINGS, PACKED, EVENT_IDX)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer, EVENT_IDX)
    await lane.works()
    _ring(lane).want_call_at(4)
    await lane.calm()
    for _ in range(6):  # at least one of which lies behind that place
        await lane.works()
    check(await lane.called(), "a call", "none")


@CASES.must("event-enable", "With EVENT_IDX a driver may ask for all calls as well.", RINGS, PACKED, EVENT_IDX)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, EVENT_IDX)
    await lane.works()
    _ring(lane).say(ENABLE)
    for _ in range(3):
        await lane.calm()
        await lane.works()
        check(await lane.called(), "a call", "none")


@CASES.should("event-disable", "With EVENT_IDX a driver may ask for no calls as well.", RINGS, PACKED, EVENT_IDX)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, EVENT_IDX)
    await lane.works()
    _ring(lane).say(DISABLE)
    await lane.calm()
    await lane.works()
    check(not await lane.called(within=peer.quiet), "no call", "a call")


@CASES.must("kick-wanted", "Without EVENT_IDX the device asks for kicks when it goes idle.", RINGS, PACKED)
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    await lane.works()
    await asyncio.sleep(peer.quiet)
    equal("the flags of the device area", _ring(lane).asked[1], ENABLE)


# ---- what no driver does


async def _break(peer: Peer) -> Lane:
    """A ring with a chain that has no end."""
    lane = await _lane(peer)
    await lane.works()
    lane.bytes.describe(0, lane.buffers().header, 16, NEXT, 0)
    lane.push(0)
    lane.kick()
    return lane


@CASES.must("overfull", "A driver that offers more than there are places does no harm.", RINGS, PACKED)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, size=4)
    lane.bytes.describe(0, lane.at, 16, 0)
    for _ in range(20):  # five rounds, without looking at what was returned
        _ring(lane).push_as(0, 0)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.serves_another()


@CASES.should("control-kept", "The front-end of a broken packed ring is still answered.", DISK, PACKED,
              section="Ring states")  # fmt: skip
async def _(peer: Peer) -> None:
    await _break(peer)
    await asyncio.sleep(peer.quiet)
    await peer.answers()


@CASES.should("recovers", "A broken packed ring that is stopped and set up anew works.", DISK, PACKED,
              section="Ring states")  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _break(peer)
    await asyncio.sleep(peer.quiet)
    await lane.stop()
    fresh = peer.make_lane()
    await fresh.start()
    await fresh.works()


@CASES.should("reported", "A broken packed ring is reported on its err descriptor.", DISK, PACKED,
              section=F.SET_VRING_ERR.clause)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _break(peer)
    check(await lane.reported(), "the err eventfd signalled", "silence")
